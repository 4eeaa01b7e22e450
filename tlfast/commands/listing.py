"""`tlfast points`: the modules of a model, with their classes and shapes."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from typing import Any

import torch

from ..collecting.huggingface import (
    TASKS,
    Loading,
    base_and_adapter,
    check_model_name,
    empty_model,
    load_model,
)
from ..collecting.point_list import list_points
from ..errors import SpeakingAs
from .arguments import FAILED, OK, Arguments, complain


def points(args: list[str]) -> int:
    """List the points of a model, without its weights where no adapter is put into it."""
    parser = Arguments("points", "List the points of a model, with classes and shapes.", "one model, and globs")
    parser.add_argument("model", help="folder with a Hugging Face model, or a name on the hub")
    parser.add_argument("globs", nargs="*", metavar="GLOB", help="names or globs: * within one part, ** crosses dots")
    parser.add_argument("--task", choices=["auto", *TASKS], default="auto", help="what the model is for")
    parser.add_argument("--adapter", default="", help="a PEFT adapter to put into it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside the model")
    parser.add_argument("--json", action="store_true", help="as JSON")
    given = parser.read(args)
    with SpeakingAs("tlfast points", "collect"):
        return _listed(given)


def _listed(given: Any) -> int:
    name, adapter = base_and_adapter(given.model, given.adapter)
    check_model_name(name)
    loading = Loading(given.task, adapter, given.trust_remote_code)
    with redirect_stdout(sys.stderr):
        model = load_model(name, None, torch.device("cpu"), "", loading) if adapter else empty_model(name, loading)
        try:
            found = list_points(model, given.globs or "**")
        except RuntimeError as error:
            return complain(str(error), FAILED)
    if given.json:
        print(json.dumps([{"name": p.name, "class": p.kind, "shape": p.shape} for p in found], indent=1))
        return OK
    widths = [max(len(text) for text in column) for column in zip(*((p.name, p.kind) for p in found), strict=True)]
    for point in found:
        print(f"{point.name:<{widths[0]}}  {point.kind:<{widths[1]}}  {point.shown}")
    return OK
