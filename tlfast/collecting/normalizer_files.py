"""The normalizers of a command: those of a file that `tlfast factors` wrote, or what an optimizer has saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from torch import nn

from ..errors import broken_rule
from ..hooks.factors import Factors
from ..hooks.normalizers import Normalizer, read_optimizer
from ..hooks.second_moments import kinds_of

NormalizerKind = Literal["auto", "adam", "adafactor"]
Normalizers = dict[str, Normalizer]

_WHO = "collect"


def reader_of(path: str, kind: NormalizerKind) -> Callable[[nn.Module, bool], Normalizers]:
    """What gives the normalizers of a model's linear layers, with their biases or without, by the name of each.

    The file is looked at here, before there is a model: one of `tlfast factors` (.npz) is read.

    Args:
        path: a .npz file with the kind "adam"; or the ``optimizer.pt`` of torch's Adam or AdamW, or transformers'
            Adafactor, or the folder that it lies in.
        kind: "adam" or "adafactor", of which a .npz file can give both, and an optimizer what it was; "auto": "adam",
            or what it was.

    Raises:
        ValueError: for another file; by what it returns also for one of another model, or another optimizer.
    """
    place = os.path.expanduser(path)
    if not place.endswith(".npz"):
        found = os.path.join(place, "optimizer.pt") if os.path.isdir(place) else place
        if not os.path.isfile(found):
            raise _refused(path, "no such file")
        return lambda model, bias: _of_optimizer(place, kind, model, bias)
    try:
        factors = Factors.load(place)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error
    if "adam" not in factors.kinds:
        raise _refused(path, f"factors of {', '.join(factors.kinds)}")
    made = factors.normalizers("adafactor" if kind == "adafactor" else "adam")
    return lambda model, bias: made


def _of_optimizer(path: str, kind: NormalizerKind, model: nn.Module, bias: bool) -> Normalizers:
    try:
        made = read_optimizer(path, model, bias=bias)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error
    if kind != "auto" and kinds_of(made.values()) != kind:
        rule = f"be auto or {kinds_of(made.values())} for what {path!r} has"
        remedy = "Leave it out; a file of `tlfast factors --kinds adam` has both."
        raise ValueError(broken_rule(_WHO, "normalizer_kind", rule, repr(kind), remedy))
    return made


def _refused(path: str, why: str) -> ValueError:
    rule = "be a .npz file of `tlfast factors --kinds adam`, or the optimizer.pt of a checkpoint of this model"
    remedy = "Check the path; in Python collect takes normalizer=, and read_optimizer names=."
    return ValueError(broken_rule(_WHO, "normalizer", rule, f"{path!r}: {why}", remedy))
