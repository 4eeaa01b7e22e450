"""The normalizers of a command: of a file of `tlfast factors`, of what an optimizer has saved, or of bergson's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from torch import nn

from ..errors import broken_rule
from ..hooks.bergson_normalizers import is_bergsons, read_bergson_normalizers
from ..hooks.factors import Factors
from ..hooks.normalizers import Normalizer, read_optimizer
from ..hooks.second_moments import kinds_of

NormalizerKind = Literal["auto", "adam", "adafactor"]
Normalizers = dict[str, Normalizer]
Reader = Callable[[nn.Module, bool], Normalizers]  # of a model, with the biases of its layers or without

_WHO = "collect"


def reader_of(path: str, kind: NormalizerKind) -> Reader:
    """What gives the normalizers of a model's linear layers, with their biases or without, by the name of each.

    The file is looked at here, before there is a model: one of `tlfast factors` (.npz) is read.

    Args:
        path: a .npz file with the kind "adam"; the ``optimizer.pt`` of torch's Adam or AdamW, or transformers'
            Adafactor; bergson's ``normalizers.pth``; or the folder that one of these two lies in.
        kind: "adam" or "adafactor", of which a .npz file can give both, and another what it has; "auto": "adam", or
            what it has.

    Raises:
        ValueError: for another file; by what it returns also for one of another model, or another optimizer.
    """
    place = os.path.expanduser(path)
    if not place.endswith(".npz"):
        names = ("optimizer.pt", "normalizers.pth") if os.path.isdir(place) else ("",)
        found = next((one for name in names if os.path.isfile(one := os.path.join(place, name).rstrip("/"))), None)
        if found is None:
            raise _refused(path, "no such file")
        read: Callable[..., Normalizers] = read_bergson_normalizers if is_bergsons(found) else read_optimizer
        return lambda model, bias: _of_model(found, kind, lambda: read(found, model, bias=bias))
    try:
        factors = Factors.load(place)
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error
    if "adam" not in factors.kinds:
        raise _refused(path, f"factors of {', '.join(factors.kinds)}")
    made = factors.normalizers("adafactor" if kind == "adafactor" else "adam")
    return lambda model, bias: made


def _of_model(path: str, kind: NormalizerKind, read: Callable[[], Normalizers]) -> Normalizers:
    """What is read of a file; ValueError where it isn't of this model, or of another kind than the one wanted."""
    try:
        made = read()
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from error
    if kind != "auto" and kinds_of(made.values()) != kind:
        rule = f"be auto or {kinds_of(made.values())} for what {path!r} has"
        remedy = "Leave it out; a file of `tlfast factors --kinds adam` has both."
        raise ValueError(broken_rule(_WHO, "normalizer_kind", rule, repr(kind), remedy))
    return made


def _refused(path: str, why: str) -> ValueError:
    rule = (
        "be a .npz file of `tlfast factors --kinds adam`, or the optimizer.pt of a checkpoint of this model, or "
        "bergson's normalizers.pth"
    )
    remedy = "Check the path; in Python collect takes normalizer=, and read_optimizer names=."
    return ValueError(broken_rule(_WHO, "normalizer", rule, f"{path!r}: {why}", remedy))
