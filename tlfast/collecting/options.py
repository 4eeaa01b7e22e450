"""The settings of a collection, once: the function, the command line and the identity of a dataset read these."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..dataset.format.kept_fields import TAKEN, TAKEN_BEGINNINGS
from ..errors import broken_rule
from ..hooks.freeze import Embedding
from ..hooks.options import TapOptions, check_words
from ..spec import At, Encoding, Heads, Normalizing, Over, Per, Points, Project, Reduction, Ref, Side, Spec
from .batches import Collate, PaddingSide
from .determinism import Deterministic
from .graph_cache import CudaGraph
from .loss import Loss, next_token_loss
from .losses import loss_called
from .skipped import BadPolicy
from .unit_queue import Share, units_in

Resume = Literal["auto", "must", "never"]
NonFinitePolicy = Literal["keep", "flag", "stop"]


@dataclass(frozen=True, kw_only=True)
class SharedOptions(TapOptions):
    """What the function and the command take alike, with the same defaults; the texts are those of ``--help``."""

    reduce: Reduction = "mean"
    """none, sum, mean, last, norm or absmax"""
    side: Side = "output"
    """at the output of the points, or at their input"""
    per: Per = "example"
    """a row for each example, or for each real token: padding is left out"""
    batch_tokens: int = 2048
    """tokens per batch, padding included"""
    padding_side: PaddingSide = "right"
    """right or left"""
    grad_scale: float = 1.0
    """the loss is multiplied by it and the rows divided by it: keeps small fp16 gradients alive"""
    cuda_graph: CudaGraph = "auto"
    """run the steps as CUDA graphs, with batches padded to a few lengths: auto (if the model is on a GPU), on or off"""
    lens: bool = False
    """points are hook points of TransformerLens, by its names; --calls raise means sum then"""
    units: str = ""
    """A:B: only these units of the plan, as a Python slice counts them, for jobs that know nothing of each other"""
    overwrite: bool = False
    """remove the dataset in OUT first"""
    extend: bool = False
    """append the examples that the dataset in OUT lacks; those that it has must come first, the same as then"""
    resume: Resume = "auto"
    """auto (continue the dataset in OUT, or begin one), must (continue) or never (begin)"""
    bad_examples: BadPolicy = "skip"
    """for text that gives no example (no UTF-8, less than 2 tokens): skip and record it, or stop"""
    non_finite: NonFinitePolicy = "flag"
    """for rows with NaN or infinity: keep, flag (keep, and name the first of them at the end) or stop"""
    disk_wait_s: float = 600.0
    """wait so many seconds for room on a full disk; 0: end at once"""
    deterministic: Deterministic = "strict"
    """for an operation without a deterministic form: strict (an error) or warn: a resumed run may differ then"""


@dataclass(frozen=True, kw_only=True)
class CollectOptions(SharedOptions):
    """All that `tlfast.collect` is given beside model, batches and folder; it says what each of them means.

    A new setting is a line here (or above, for the command too) and one in the signature of `tlfast.collect`. What it
    has to do with the identity says `tlfast.collecting.identity`.

    Raises:
        ValueError: for a value that can be seen to be wrong without looking at anything else.
    """

    points: Points | Spec | Sequence[Spec]
    of: str | Sequence[str] = "grad"
    ref: Ref | None = None
    heads: Heads | None = None
    at: At | None = None
    over: Over = "pos"
    dtype: torch.dtype | str | None = None
    output: int | str | None = None
    encoding: Encoding | None = None
    project: Project | None = None
    bias: bool = False
    normalizer: Normalizing | None = None
    summed: bool = False
    embedding: Embedding | None = None
    loss: Loss | str = next_token_loss
    identity: str = ""
    fields: Sequence[str] | Mapping[str, Any] | None = None
    keep_fields: Sequence[str] = ()
    collate: Collate | None = None
    batch_examples: int | None = None
    size: Callable[[Mapping[str, Any]], int] | None = None
    fingerprint: str = ""
    seq_len: int | None = None
    rows_per_unit: int | None = None
    pad_id: int = 0
    share: tuple[int, int] | None = None
    staging: str | os.PathLike[str] | None = None
    skipped: Iterable[tuple[str, int, str]] = ()
    progress: bool = True
    header: Mapping[str, Any] | None = None
    config: str | Mapping[str, Any] = ""

    def __post_init__(self) -> None:
        who = "collect"
        check_words(who, self)
        check_positive(
            who, batch_tokens=self.batch_tokens, seq_len=self.seq_len, rows_per_unit=self.rows_per_unit,
            batch_examples=self.batch_examples,
        )  # fmt: skip
        if not 0 < self.grad_scale < math.inf:
            raise ValueError(broken_rule(who, "grad_scale", "be positive", self.grad_scale, "1.0 changes nothing."))
        if not 0 <= self.disk_wait_s < math.inf:
            raise ValueError(broken_rule(who, "disk_wait_s", "be 0 or more", self.disk_wait_s, "Give seconds."))
        loss_called(self.loss)
        _check_data_options(self)
        units_in(self.units, 0)
        if self.share is not None:
            Share(*self.share)


def _check_data_options(options: CollectOptions) -> None:
    who = "collect"
    names = list(options.fields) if isinstance(options.fields, (list, tuple, Mapping)) else options.fields
    for argument, given in (("fields", names), ("keep_fields", options.keep_fields)):
        texts = isinstance(given, (list, tuple)) and all(isinstance(name, str) and name for name in given)
        if given is not None and not (texts and len(set(given)) == len(given)):
            remedy = f'Say {argument}=("labels",).'
            raise ValueError(broken_rule(who, argument, "be a list of names, each once", repr(given), remedy))
    taken = next((name for name in options.keep_fields if name in TAKEN or name.startswith(TAKEN_BEGINNINGS)), None)
    if taken is not None:
        rule = f"have other names than {', '.join(TAKEN)}, which a row table has anyway"
        remedy = f'fields={{"its_{taken}": "{taken}", ...}} gives it another one.'
        raise ValueError(broken_rule(who, "keep_fields", rule, repr(taken), remedy))
    functions: dict[str, Any] = {"collate": options.collate, "size": options.size}
    for argument, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(broken_rule(who, argument, "be a function", type(function).__name__, "Or leave it out."))
    fingerprint: Any = options.fingerprint
    if not isinstance(fingerprint, str):
        got = type(fingerprint).__name__
        raise TypeError(broken_rule(who, "fingerprint", "be a text", got, "Name the data and their version."))
    if options.fingerprint and options.extend:
        rule, remedy = "be left out with extend=True", "Without it the examples are compared by what they are."
        raise ValueError(broken_rule(who, "fingerprint", rule, repr(options.fingerprint), remedy))


def check_positive(who: str, **numbers: Any) -> None:
    """ValueError for the first that is no whole number of at least 1; None is nothing that was given."""
    for name, value in numbers.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(broken_rule(who, name, "be a positive number", repr(value), "Give a whole number."))
