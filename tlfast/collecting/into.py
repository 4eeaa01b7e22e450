"""The rows of one's own loop as a dataset: they find their units by the ids given to `Capture.batch`."""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from operator import index
from types import TracebackType
from typing import Any

import torch

from ..dataset.format.description import read_description
from ..dataset.format.encodings import ENCODED_DTYPES
from ..dataset.format.layout import Column, notes_of
from ..dataset.format.plan import Example, Plan, Unit
from ..dataset.places.remote import RemoteFolder, local_path, url_of
from ..dataset.write.background import BackgroundWriter
from ..dataset.write.folder import refuse_stranger
from ..dataset.write.writer import DatasetWriter
from ..errors import broken_rule
from ..hooks.captured import Capture
from ..hooks.tokens import Tokens
from .drain import Drain, streams_for
from .identity import describe_spec
from .loop import rings_of, submit_unit
from .options import check_positive
from .pack import column_of
from .resume import has_units
from .unit import Filled, Oddities

_WHO = "into"


class IntoDataset:
    """Takes whole units out of a capture; made by `Capture.into`, which says all of it.

    What is written is made when it is known what a row is: at the first step, or where the dataset says so already.
    """

    def __init__(
        self,
        cap: Capture,
        out: Any,
        *,
        plan: Plan | None,
        header: Mapping[str, Any] | None,
        config: str | Mapping[str, Any],
        staging: str | os.PathLike[str] | None,
        disk_wait_s: float,
    ):
        if not 0 <= disk_wait_s < math.inf:
            raise ValueError(broken_rule(_WHO, "disk_wait_s", "be 0 or more", disk_wait_s, "Give seconds."))
        self._cap, self._disk_wait_s = cap, disk_wait_s
        self._writer: Any = out if hasattr(out, "write_unit") else None
        self._out = out
        self._settings: dict[str, Any] = {"config": config, "staging": staging}
        if self._writer is not None:
            _check_nothing_more(plan=plan, header=header, **self._settings)
            self.plan: Plan = out.plan
        else:
            self.plan = _checked_place(out, plan, header, staging)
            self._settings |= {"plan": plan, "header": _header_of(cap, header or {})}
            self._settings |= {"about": cap.about_weights} if cap.about_weights else {}
        n_rows = min(self.plan.n_examples, self.plan.rows_per_unit)
        if cap.capacity < n_rows:
            remedy = f"Give capture rows={n_rows}."
            raise ValueError(broken_rule(_WHO, "rows of the capture", f"hold a unit of {n_rows}", cap.capacity, remedy))
        self._stack = ExitStack()  # the writer, where it is ours, and the thread
        self._background: BackgroundWriter | None = None
        self._oddities = Oddities(who=_WHO)
        self._entered = False
        self._before: set[str] = set()  # units that were there
        self._written: set[str] = set()  # units of this run
        self._expected: tuple[Unit, list[Example]] | None = None
        self._unit: Unit | None = None  # the one that is being filled
        self._places: dict[int, int] = {}  # of its examples, where the row lies in the capture
        self._examples: dict[int, Example] = {}
        self._firsts: dict[int, int] = {}  # of these, the position of the first token, where columns are per token
        self._told = False  # this batch has ids
        self._n_rows = 0  # in the capture
        self._n_cleared = 0  # by us
        self._let_go = self._dropped = False  # these rows are on their way or not wanted: the next batch has the room

    # What a user asks.

    @property
    def units(self) -> list[Unit]:
        """The units that are not written yet, by rising number."""
        if not self._entered:
            remedy = "Write: with cap.into(...) as out."
            raise RuntimeError(
                broken_rule(_WHO, "what is left", "be asked inside its with block", "a question before it", remedy)
            )
        done = self._before | self._written
        return [unit for unit in self.plan.units if unit.name not in done]

    @property
    def left(self) -> list[int]:
        """The numbers of their examples."""
        return [number for unit in self.units for number in range(unit.start, unit.stop)]

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """Yield the numbers that are left, rising, at most ``batch_size`` at a time and never those of two units.

        A batch depends on its unit and ``batch_size`` alone, so that a run that continues another has the same ones.
        """
        check_positive(_WHO, batch_size=batch_size)
        units = self.units

        def cut() -> Iterator[list[int]]:
            for unit in units:
                for start in range(unit.start, unit.stop, batch_size):
                    yield list(range(start, min(start + batch_size, unit.stop)))

        return cut()

    def __repr__(self) -> str:
        place = getattr(self._writer, "out", self._out)
        if not self._entered:
            return f"<tlfast rows into {place}: not entered>"
        return f"<tlfast rows into {place}: {len(self.units)} of {self.plan.n_units} units left>"

    # The context.

    def __enter__(self) -> IntoDataset:
        if self._entered:
            raise RuntimeError(
                broken_rule(_WHO, "a dataset", "be entered once", "a second time", "Call cap.into again.")
            )
        if getattr(self._writer, "closed", False):
            raise RuntimeError(broken_rule(_WHO, "the writer", "be open", "a closed one", "Open the dataset again."))
        if self._cap.receiver is not None:
            got = f"{self._cap.receiver!r} already"
            raise RuntimeError(broken_rule(_WHO, "a capture", "go into one dataset", got, "Leave that block first."))
        if self._cap.rows:
            remedy = "Read them, and call cap.clear()."
            raise RuntimeError(broken_rule(_WHO, "the capture", "be empty", f"{self._cap.rows} rows", remedy))
        with ExitStack() as stack:  # which closes what was opened, where something is wrong
            if self._writer is None and has_units(self._out):
                self._open(stack, read_description(self._out, _WHO).columns)
            if self._writer is not None:
                self._check_columns()
                self.plan, self._before = self._writer.plan, set(self._writer.done)
            self._stack = stack.pop_all()
        self._starts = [unit.start for unit in self.plan.units]
        self._cap.receiver, self._n_cleared, self._entered = self, self._cap.n_cleared, True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cap.receiver = None
        self._stack.__exit__(kind, error, trace)
        if isinstance(error, RuntimeError) and "call clear()" in str(error):  # a remedy for other loops
            remedy = "Run what is not for the dataset outside the capture, and one backward for each batch."
            raise RuntimeError(
                broken_rule(_WHO, "the loop", "make the rows of its ids alone", error, remedy)
            ) from error
        if error is not None:
            return
        self._check_rows()
        if self._unit is not None:
            got = f"{len(self._places)} of {len(self._unit)} rows of {self._unit.name}, which are dropped"
            remedy = "Run the loop again: left and batches(n) are what isn't written."
            raise RuntimeError(broken_rule(_WHO, "a unit", "be whole at the end", got, remedy))

    def _open(self, stack: ExitStack, columns: Mapping[str, Column]) -> None:
        # As `collect` does, replace what a run left that failed before its first unit.
        writer = DatasetWriter(self._out, columns=columns, replace_unused=True, **self._settings)
        self._writer = stack.enter_context(writer)

    def _check_columns(self) -> None:
        """ValueError where the dataset can't hold what a capture has."""
        for name, (_, spec) in self._cap.wanted.items():
            column = self._writer.columns.get(name)
            if column is not None and (column.of, column.per, column.encoding) != (spec.of, spec.per, spec.encoding):
                wanted = notes_of(spec.of, spec.per, spec.encoding)
                rule = f"be as the capture has it ({wanted[2:] or 'grad, per example'})"
                remedy = "Say of=, per= and encoding= in the capture's Spec as in the dataset's Column."
                got = column.notes[2:] or "grad, per example"
                raise ValueError(broken_rule(_WHO, f"the column {name}", rule, got, remedy))
        odd = sorted(set(self._writer.columns) ^ set(self._cap.names))
        if odd:
            got = f"a difference in {', '.join(odd[:3])}"
            remedy = f"This capture has {', '.join(self._cap.names[:5])}."
            raise ValueError(broken_rule(_WHO, "columns of the dataset", "be those of the capture", got, remedy))

    # The loop, step by step.

    def expect(self, ids: Sequence[Any] | None, tokens: Tokens | None = None) -> None:
        """Check a batch before it runs, and make room for it."""
        if self._background is not None:
            self._background.check()
        self._check_rows()
        self._expected, self._told = None, ids is not None
        if ids is None:  # of a recording, which makes no rows; those that it does make are found by the next batch
            return
        examples = [_example(given) for given in ids]
        if tokens is not None:
            examples = list(map(_with_length, examples, tokens.lengths))
        if not examples:
            return
        self._expected = unit, _ = self._checked(examples)
        if self._let_go:
            self._make_room()
        n_lost = self._n_rows - len(self._places)
        if n_lost and self._n_rows + len(examples) > self._cap.capacity:
            rule = f"hold the {n_lost} that a failed batch left in this unit beside its own"
            remedy = f"Give capture rows={len(unit) + n_lost} or more, or run the loop again."
            raise RuntimeError(broken_rule(_WHO, "rows of the capture", rule, self._cap.capacity, remedy))

    def took(self) -> None:
        """Note where the rows of the batch lie, and let them be written where they make their unit whole."""
        if not self._told:  # which is found by the next batch
            return
        try:
            self._take()
        except BaseException:
            self.failed()
            raise

    def failed(self) -> None:
        """Leave the rows of the batch out, whose ids may come again."""
        if self._cap.n_cleared != self._n_cleared:  # which is found by the next batch
            return
        for example in self._expected[1] if self._expected else ():
            self._places.pop(example.id, None)
            self._examples.pop(example.id, None)
        if not self._places:
            self._unit = None
        if self._cap.rows > self._n_rows and not self._places:
            self._let_go = self._dropped = True
        self._n_rows = self._cap.rows

    def _take(self) -> None:
        unit, examples = self._expected or (None, [])
        n_new = self._cap.rows - self._n_rows
        if n_new != len(examples) or self._cap.n_cleared != self._n_cleared:
            rule = f"make a row for each of its {len(examples)} ids"
            remedy = "Run one backward in it, whose reduction keeps the batch; leave clear() to into."
            raise RuntimeError(broken_rule(_WHO, "a batch", rule, n_new, remedy))
        if unit is None:
            return
        first, self._n_rows = self._n_rows, self._cap.rows
        if unit.name in self._before:
            self._let_go = self._dropped = True
            return
        self._unit = unit
        examples = self._with_tokens(first, examples)
        self._places |= {example.id: first + k for k, example in enumerate(examples)}
        self._examples |= {example.id: example for example in examples}
        if self._background is None:
            self._start(whole=len(self._places) == len(unit))
        if len(self._places) == len(unit):
            self._submit(unit)

    def _with_tokens(self, first: int, examples: list[Example]) -> list[Example]:
        """The examples, with the lengths that their rows from ``first`` on have; ValueError where they say others."""
        if not self._cap.squeezes:
            return examples
        tokens = self._cap.tokens(first, self._width())
        if min(tokens.lengths, default=0) < 0:
            rule, remedy = "have a mask where no point per token has fired yet", "Give cap.batch(mask=...)."
            raise ValueError(broken_rule(_WHO, "a batch", rule, "none", remedy))
        self._firsts |= {example.id: n for example, n in zip(examples, tokens.firsts or (), strict=True)}
        return list(map(_with_length, examples, tokens.lengths))

    def _width(self) -> int:
        """The positions of the padded rows of columns per token; -1 before one has fired."""
        rings = {
            name: self._cap.ring(name)
            for name, (_, spec) in self._cap.wanted.items()
            if spec.per == "token" and self._cap.is_known(name)
        }
        for name, ring in rings.items():
            column_of(f"{_WHO} at {name}", self._cap.wanted[name][1], ring)
        widths = {ring.shape[1]: name for name, ring in rings.items()}
        if len(widths) > 1:
            rule, got = "be of the same positions in all columns per token", " and ".join(map(str, sorted(widths)))
            remedy = "Take points with the positions of the tokens."
            raise ValueError(broken_rule(_WHO, "rows", rule, got, remedy))
        return next(iter(widths), -1)

    def _checked(self, examples: Sequence[Example]) -> tuple[Unit, list[Example]]:
        """The unit of a batch; ValueError where it is none, or can't be filled now."""
        outside = [example.id for example in examples if not 0 <= example.id < self.plan.n_examples]
        if outside:
            rule, remedy = f"be in 0..{self.plan.n_examples - 1}, numbers of the plan", "Number the examples from 0 on."
            raise ValueError(broken_rule(_WHO, "ids", rule, outside[0], remedy))
        units: dict[int, int] = {}  # number -> an example of it
        for example in examples:
            units.setdefault(bisect_right(self._starts, example.id) - 1, example.id)
        if len(units) > 1:
            got = " and ".join(f"{number} of {self.plan.unit(k).name}" for k, number in list(units.items())[:2])
            remedy = "Take batches(n), or a batch size that divides rows_per_unit."
            raise ValueError(broken_rule(_WHO, "a batch", "have examples of one unit", got, remedy))
        unit = self.plan.unit(next(iter(units)))
        if self._unit is not None and unit != self._unit:
            got = f"one of {unit.name} after {len(self._places)} of the {len(self._unit)} rows of {self._unit.name}"
            remedy = "Sort the batches by unit, as batches(n) does."
            raise ValueError(broken_rule(_WHO, "a unit", "be whole before the next begins", got, remedy))
        here: set[int] = set()
        for example in examples:
            if example.id in here or example.id in self._places or unit.name in self._written:
                got, remedy = f"{example.id} a second time", "Leave the block after one pass over the examples."
                raise ValueError(broken_rule(_WHO, "ids", "come once", got, remedy))
            here.add(example.id)
        return unit, list(examples)

    def _check_rows(self) -> None:
        n_rows, cleared = self._cap.rows, self._cap.n_cleared != self._n_cleared
        if n_rows != self._n_rows or cleared:
            rule, got = f"be the {self._n_rows} that came with ids", f"{n_rows}{' after a clear()' * cleared}"
            remedy = "Run each backward inside cap.batch(ids=...) or outside the capture, and leave clear() to into."
            raise RuntimeError(broken_rule(_WHO, "rows in the capture", rule, got, remedy))

    def _make_room(self) -> None:
        if self._dropped:
            if self._background is not None:
                self._background.flush()  # the thread looks at the counts, too
            self._oddities.leave_out(self._cap.counters)
        self._cap.clear()
        self._n_cleared = self._cap.n_cleared
        self._n_rows, self._let_go, self._dropped = 0, False, False

    def _start(self, whole: bool) -> None:
        """Begin to write, as soon as it is known what a row is: when all points have fired, in the first unit."""
        silent = [name for name in self._cap.names if not self._cap.is_known(name)]
        if silent and self._writer is None:
            if whole:
                rule, remedy = (
                    "be there in the first unit",
                    "Begin with examples that reach the point, or leave it out.",
                )
                raise RuntimeError(broken_rule(_WHO, f"rows at {silent[0]}", rule, "none", remedy))
            return
        if self._writer is None:
            wanted = {name: spec for name, (_, spec) in self._cap.wanted.items()}
            rings = {name: self._cap.ring(name) for name in wanted}
            self._open(self._stack, {name: column_of(f"{_WHO} at {name}", wanted[name], rings[name]) for name in rings})
        rings = rings_of(self._cap, self._writer.columns, Tokens([1]))
        self._check_kind(rings)
        self._devices = {ring.device for ring in rings.values()}
        self._drain = self._new_drain(0)
        self._background = self._stack.enter_context(BackgroundWriter(self._writer, 2, self._disk_wait_s))

    def _new_drain(self, n_tokens: int) -> Drain:
        largest = max(map(len, self.plan.units))
        self._n_tokens = n_tokens
        return Drain(streams_for(self._devices), self._writer.columns, largest, n_tokens, self._writer.native)

    def _check_kind(self, rings: Mapping[str, torch.Tensor]) -> None:
        """ValueError where rows are not as in the dataset: after each unit the capture takes those of any kind."""
        for name, ring in rings.items():
            there = self._writer.columns[name]
            shape = tuple(ring.shape[2 if there.per == "token" else 1 :])
            dtypes = (there.dtype,) if there.encoding is None else ENCODED_DTYPES
            if ring.dtype not in dtypes or shape != tuple(there.row_shape):
                rule = f"be {there.dtype} {list(there.row_shape)}, as in the dataset"
                got = f"{ring.dtype} {list(shape)}"
                remedy = (
                    "Pad to one length, give capture another dtype or reduction, and keep autocast as it was; "
                    "or write another dataset."
                )
                raise ValueError(broken_rule(_WHO, f"rows at {name}", rule, got, remedy))

    def _submit(self, unit: Unit) -> None:
        assert self._background is not None
        numbers = range(unit.start, unit.stop)
        examples, tokens = [self._examples[number] for number in numbers], None
        if self._cap.squeezes:
            tokens = Tokens([example.length for example in examples], [self._firsts[number] for number in numbers])
            if tokens.total > self._n_tokens:  # nobody knows the largest unit: room for half as many more
                self._drain = self._new_drain(tokens.total * 3 // 2)
        rings = rings_of(self._cap, self._writer.columns, tokens)
        self._check_kind(rings)
        filled = Filled(torch.tensor([self._places[number] for number in numbers]), tokens)
        submit_unit(
            self._cap, rings, self._drain, self._background, self._oddities, unit, examples, filled, True,
            self._background.wait_for_room,
        )  # fmt: skip
        self._written.add(unit.name)
        self._unit, self._places, self._examples, self._firsts = None, {}, {}, {}
        self._let_go = True


def _check_nothing_more(**told: Any) -> None:
    """ValueError for what a writer knows already."""
    given = ", ".join(name for name, value in told.items() if value not in (None, ""))
    if given:
        remedy = "The writer has its own."
        raise ValueError(broken_rule(_WHO, given, "be left out where out is a writer", "both", remedy))


def _checked_place(out: Any, plan: Any, header: Any, staging: Any) -> Plan:
    """The plan; TypeError or ValueError where no dataset can be begun or continued with these."""
    if not isinstance(out, (str, os.PathLike)):
        got, remedy = type(out).__name__, "Give a path, a URL or a DatasetWriter."
        raise TypeError(broken_rule(_WHO, "out", "be a place or a writer", got, remedy))
    if not isinstance(plan, Plan):
        remedy = "Give tlfast.dataset.Plan(n_examples, rows_per_unit)."
        raise TypeError(broken_rule(_WHO, "plan", "be a Plan", type(plan).__name__, remedy))
    if not isinstance(header, (Mapping, type(None))):
        raise TypeError(broken_rule(_WHO, "header", "be a mapping", type(header).__name__, "Give a dict."))
    if staging is not None and not url_of(out):
        rule, remedy = "be left out unless out is a URL", "A folder needs none."
        raise ValueError(broken_rule(_WHO, "staging", rule, repr(str(staging)), remedy))
    url = url_of(local_path(out))
    if url:
        RemoteFolder(url, _WHO)  # speaks in our name of a URL that nobody knows
    refuse_stranger(out, _WHO)
    return plan


def _example(given: Any) -> Example:
    """The example that an id means; one that is a number alone has no tokens."""
    number = given.id if isinstance(given, Example) else given
    try:
        if isinstance(number, bool) or getattr(number, "dtype", None) == torch.bool:
            raise TypeError
        if isinstance(given, Example):
            if isinstance(number, torch.Tensor):
                raise TypeError
            return given if type(number) is int else replace(given, id=index(number))
        return Example(index(number), (), "", 0, 0)
    except TypeError as error:
        rule, remedy = "be numbers of examples, or Examples", "Number the examples from 0 on."
        raise TypeError(broken_rule(_WHO, "ids", rule, repr(given), remedy)) from error


def _with_length(example: Example, length: int) -> Example:
    """The example with as many tokens as its rows have; ValueError where it has others."""
    if example.length not in (0, length):
        rule, remedy = f"have the {example.length} tokens of example {example.id}", "See the mask of this batch."
        raise ValueError(broken_rule(_WHO, "the mask", rule, length, remedy))
    return replace(example, length=length)


def _header_of(cap: Capture, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataset says of its rows; ValueError where ``given`` says other things of the capture."""
    own: dict[str, Any] = {"specs": _specs_of(cap)}
    own |= {name: value for name, value in cap.kept_as.items() if value != "raise" or name in given}
    for key in own.keys() & given.keys():
        if _said(given[key]) != _said(own[key]):
            rule = f"be left to the capture, or say what it has, {own[key]}"
            raise ValueError(broken_rule(_WHO, f"header[{key!r}]", rule, repr(given[key]), "Take another key."))
    return own | dict(given)


def _said(value: Any) -> Any:
    """What a header says of a capture; of its specs all but the points, which may be globs: the columns name them."""
    if not isinstance(value, list) or not all(isinstance(spec, dict) for spec in value):
        return value
    return sorted(repr(sorted((spec | {"points": None}).items())) for spec in value)


def _specs_of(cap: Capture) -> list[dict[str, Any]]:
    """What a dataset says of the specs of a capture."""
    points: dict[int, list[str]] = {}
    specs = {id(spec): spec for _, spec in cap.wanted.values()}
    for column, (point, spec) in cap.wanted.items():
        points.setdefault(id(spec), []).extend(cap.summed_points.get(column, [point]))
    return [describe_spec(cap._model, replace(spec, points=points[key])) for key, spec in specs.items()]
