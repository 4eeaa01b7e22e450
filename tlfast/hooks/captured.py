"""Register the taps on a model: the capture and its rows."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn

from ..backends.choice import pick_backend
from ..backends.interface import Column, Tap
from ..backends.recipe import Given
from ..errors import broken_rule
from ..spec import Points, Spec, stored_dtype
from .attachment import anything_compiled, check_not_compiled, hook_input, hook_module
from .captured_rows import CapturedRows
from .diagnosis import changed_in_place, in_place_error, n_backwards, tell_no_rows, why_no_rows
from .experts import ExpertLayer, RoutedCalls
from .into import Into, check_ids, openers
from .layers import engine_weight, factor_size, find_layer, weight_arguments, weighted_modules
from .options import CaptureOptions
from .points import find_points
from .running import RunningSums
from .step_inputs import OpenBatch, StepInputs, as_mask, constant_ref, has_functions
from .tokens import tokens_of

Change = Callable[[torch.Tensor], torch.Tensor]
See = Callable[[str, torch.Tensor, torch.Tensor | None, list[torch.Tensor]], None]


_entered: weakref.WeakSet[Capture] = weakref.WeakSet()


def captures_of(model: Any) -> list[Capture]:
    """The captures that are entered and have a point in a model."""
    modules = set(model.modules()) if isinstance(model, nn.Module) else set()
    at = {cap: [m.experts if isinstance(m, ExpertLayer) else m for m, _ in cap._taps] for cap in list(_entered)}
    return [cap for cap, here in at.items() if any(module in modules for module in here)]


class Capture(CapturedRows):
    """The gradients of some points, one row an example; made by `tlfast.capture`, used as a context manager.

    ``cap[name]`` is Tensor[rows, ...]; ``cap.names``, ``cap.rows``, ``cap.ids``, ``cap.missing`` and ``cap.counts``
    tell what is there; ``cap.batch(...)`` says what the next step is about and ``cap.clear()`` makes room.

    Raises:
        RuntimeError, ValueError: in the forward or backward that breaks a rule, naming the point. No row of that step
            is kept, and every earlier one is.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU())
        >>> with tlfast.capture(model, ["0", "1"], rows=8) as cap:
        ...     with cap.batch(ids=["a", "b"]):
        ...         model(torch.ones(2, 4)).sum().backward()
        >>> cap.names, cap.rows, cap.ids
        (['0', '1'], 2, ['a', 'b'])
    """

    def __init__(self, model: nn.Module, options: CaptureOptions):
        who, specs, rows = "capture", options.specs, options.rows
        devices = {p.device.type for p in model.parameters() if not p.is_meta}  # meta: kept elsewhere till it is used
        self._engine = engine = pick_backend(who, options.backend, devices)
        super().__init__(engine.Ledger(rows), rows, engine.NAME)
        self._model, self._attach = model, options.attach
        self._backwards = engine.Backwards(self._ledger, options.missing)
        self._taps: list[tuple[nn.Module, Tap]] = []
        self._places: list[str] = []  # of each tap
        self._made_at: list[list[Column]] = []  # the same, themselves, or what adds to them
        self.weights: dict[str, tuple[Any, ...]] = {}  # column -> what its Weight is made of
        self._members: dict[str, list[Column]] = {}  # column that adds up the rows of several points -> these
        self.summed_points: dict[str, list[str]] = {}  # such a column -> its points
        found = [self._find_for(spec) for spec in specs]
        modules = {name: module for points in found for name, module in points.items()}
        for name in dict.fromkeys(name for points in found for name in points):
            here = [spec for spec, points in zip(specs, found, strict=True) if name in points]
            alone = sum(spec.is_plain for spec in here) == 1
            for place in (name, f"{name}:weight", f"{name}:input"):  # the columns in this order, too
                at_place = [spec for spec in here if spec.place(name) == place]
                if at_place:
                    self._add_tap(name, modules[name], at_place, alone, options)
        self._routed = self._routed_calls()
        self.unmasked(self.routed)
        self.names = list(self._columns)
        self._handles: list[Any] = []
        self._batch: OpenBatch | None = None  # while a block of `batch` is open
        self._opening = threading.Lock()
        self._per_token = {name for name, (_, spec) in self.wanted.items() if spec.per == "token"}
        self._see: See | None = None
        self.receiver: Into | None = None  # what takes the rows out, inside `into`
        self.kept_as = {"calls": options.calls, "missing": options.missing}  # beside the specs, what rows are made of
        self._entered = self._compiled_before = False

    def _routed_calls(self) -> list[RoutedCalls]:
        """What calls the matrices of experts that are captured."""
        names = {id(module): name for name, module in self._model.named_modules()}
        layers: dict[str, list[ExpertLayer]] = {}
        for module, _ in self._taps:
            if isinstance(module, ExpertLayer):
                layers.setdefault(names[id(module.experts)], []).append(module)
        return [RoutedCalls("capture", name, self._model, several, self._open_mask) for name, several in layers.items()]

    @property
    def about_weights(self) -> dict[str, dict[str, Any]]:
        """What a dataset notes of columns of weight gradients, beside its identity: nothing of most.

        "factors": of those that have the factors (g, a) of each token side by side, how many numbers g has. "layers":
        the kind of those that aren't of linear layers alone.
        """
        sizes, kinds = dict[str, int](), dict[str, str]()
        for (module, tap), columns in zip(self._taps, self._columns_of, strict=True):
            for column in columns:
                spec = self.wanted[column][1]
                size = factor_size(module, spec)
                if size is not None:
                    sizes[column] = size
                if spec.of == "weight":
                    kind = find_layer("capture", tap.name, module).kind
                    kinds |= {} if kind == "linear" else {column: kind}
        return {key: found for key, found in (("factors", sizes), ("layers", kinds)) if found}

    @property
    def routed(self) -> list[str]:
        """The columns at experts, which get some of the positions of each example, and need no mask."""
        return [
            held.name
            for (module, _), columns in zip(self._taps, self._made_at, strict=True)
            for held in columns
            if isinstance(module, ExpertLayer)
        ]

    def _add_tap(
        self, name: str, module: nn.Module, specs: Sequence[Spec], alone: bool, options: CaptureOptions
    ) -> None:
        """A tap at one place of a module, and its columns. ``alone``: one column has the name of the point itself."""
        who, engine, side = "capture", self._engine, specs[0].side
        if len({spec.output for spec in specs}) > 1:
            raise ValueError(
                broken_rule(who, "output", f"be the same in all specs of {name}", [s.output for s in specs],
                            "Use one capture for each output.")
            )  # fmt: skip
        columns = []
        for spec in specs:
            column = name if spec.is_plain and alone else f"{name}:{spec.label}"
            if spec.summed:
                columns.append(self._add_member(name, module, spec, options.calls))
                continue
            if column in self._columns:
                raise ValueError(
                    broken_rule(who, "specs", "have columns of different names", column, "Give Spec a name=.")
                )
            dtype, rows = stored_dtype(who, spec.dtype), self.capacity
            self._columns[column] = made = (
                self._of_weight(column, name, module, spec, options.calls)
                if spec.of == "weight"
                else engine.Column(
                    column, spec.reduce, spec.dims, dtype, rows, options.calls, spec.of, spec.heads,
                    () if isinstance(spec.at, str) else cast("int | tuple[int, ...] | None", spec.at), None,
                )
            )  # fmt: skip
            made.ref = constant_ref(column, spec)
            columns.append(column)
            self.wanted[column] = name, spec
        made_here = [self._members[c][-1] if c in self._members else self._columns[c] for c in columns]
        self._made_at.append(made_here)
        keeper = engine.ColumnsKeeper(made_here)
        tap = engine.Tap(self._backwards, name, keeper, specs[0].output)
        tap.set_side(side)
        self._taps.append((module, tap))
        self._places.append(specs[0].place(name))
        self._columns_of.append(columns)

    def _add_member(self, name: str, module: nn.Module, spec: Spec, calls: str) -> str:
        """A column whose rows are added to those of the other points of a spec; returns the name of the sum's."""
        total, same = f"gradients:{spec.label}", next((t for t, (_, s) in self.wanted.items() if s is spec), None)
        if same is None:
            if total in self._columns:
                raise ValueError(
                    broken_rule("capture", "specs", "have columns of different names", total, "Give Spec a name=.")
                )
            dtype = stored_dtype("capture", spec.dtype)
            self._columns[total] = self._engine.Column(
                total, "none", (), dtype, self.capacity, calls, "grad", None, None, None
            )
            self.wanted[total], self._members[total], self.summed_points[total] = ("gradients", spec), [], []
        if name in self.summed_points[total]:
            raise ValueError(broken_rule("capture", "specs", "name a point once", f"{name} twice", "Leave one out."))
        of = spec.of_one
        member = self._of_weight(f"{name}:{of.label}", name, module, of, calls)
        member.total = self._columns[total]
        self._members[total].append(member)
        self.summed_points[total].append(name)
        return total

    def _of_weight(self, column: str, name: str, module: nn.Module, spec: Spec, calls: str) -> Column:
        """The column of a module's weight gradients."""
        made_of = weight_arguments("capture", self._model, name, module, spec, self.backend)
        self.weights[column] = made_of
        dtype, weight = stored_dtype("capture", spec.dtype), engine_weight(self._engine, made_of)
        return self._engine.Column(column, "none", (), dtype, self.capacity, calls, "weight", None, None, weight)

    # The context.

    def __enter__(self) -> Capture:
        if self._entered:
            raise RuntimeError(
                broken_rule("capture", "a Capture", "be entered once", "a second time", "Call capture again.")
            )
        check_not_compiled("capture", self._model)
        self._compiled_before = anything_compiled()
        self._entered = True
        self._backwards_before = n_backwards()
        try:
            for (module, tap), place in zip(self._taps, self._places, strict=True):
                self._handles += hook_input(module, tap) if place == f"{tap.name}:input" else self._hook(module, tap)
                if self._see is not None:
                    tap.set_convert(self._conversion(module), partial(self._see, place))
            for calls in self._routed:
                self._handles += calls.hook()
        except BaseException:
            self._detach()
            raise
        _entered.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._detach()
        if isinstance(error, RuntimeError) and changed_in_place(error):
            called = max((tap for _, tap in self._taps), key=lambda tap: tap.last_call, default=None)
            raise in_place_error(called.name if called is not None else "?") from error
        if error is None and not self._ledger.n_ended:
            tell_no_rows(self._compiled_before, any(tap.last_call for _, tap in self._taps), self._why_no_rows(0))

    def _why_no_rows(self, calls_before: int) -> str:
        before, now = self._backwards_before, n_backwards()
        ran = None if self._ledger.n_ended or before is None or now is None else now > before + 1
        return why_no_rows([tap for _, tap in self._taps], calls_before, ran)

    def watched(self, see: See) -> Capture:
        """Show the name of each point that fires, its gradient, and its output where a spec reads that (else None) to
        ``see``, and what was kept of its input for each column of weight gradients, before anything is checked; say so
        before entering."""
        self._see = see
        return self

    def unmasked(self, columns: Iterable[str]) -> Capture:
        """Leave the masks of `batch` out at these columns, whose gradients have no positions."""
        for column in columns:
            for held in self._held(column):
                held.masked = False
        return self

    def as_written(self) -> Capture:
        """Leave it to the caller which positions are tokens: he reads rows by `ring`, and knows their lengths."""
        self._per_token = set()
        return self

    def _conversion(self, module: nn.Module) -> Change | None:
        """What `_hook` lets be made of each gradient at a module."""
        return None

    def _find_for(self, spec: Spec) -> dict[str, Any]:
        found = self._find(spec.points)
        if spec.of == "weight":
            return weighted_modules("capture", self._model, spec, found)
        expert = next((name for name, module in found.items() if isinstance(module, ExpertLayer)), None)
        if expert is not None:
            rule, remedy = 'be of="weight" at a matrix of an expert', "Nothing is called there in the forward."
            raise ValueError(broken_rule("capture", f"the point {expert}", rule, f"of={spec.of!r}", remedy))
        return found

    def _find(self, points: Points) -> dict[str, Any]:
        return find_points("capture", self._model, points)

    def _hook(self, module: nn.Module, tap: Any) -> list[Any]:
        return hook_module(module, tap, self._attach, self._engine)

    def _detach(self) -> None:
        _entered.discard(self)
        self._backwards.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # The steps.

    @property
    def asks_for_batch(self) -> bool:
        """Whether `batch` must be given the batch itself, for the functions of some specs."""
        return has_functions(spec for _, spec in self.wanted.values())

    @property
    def positions_asked(self) -> list[str]:
        """The names by which each step gives positions to `batch`."""
        return list(dict.fromkeys(spec.at for _, spec in self.wanted.values() if isinstance(spec.at, str)))

    @contextmanager
    def batch(
        self,
        mask: torch.Tensor | None = None,
        ids: Sequence[Any] | None = None,
        grad_scale: float = 1.0,
        masks: Mapping[str, torch.Tensor] | None = None,
        refs: Mapping[str, torch.Tensor] | None = None,
        at: Mapping[str, Any] | None = None,
        batch: Any = None,
    ) -> Iterator[None]:
        """Say what the next forward and backward are about.

        Args:
            mask: bool [B, P], True at real tokens: reductions leave the others out, ``none`` stores zeros there, and
                columns per token have no row there. For these it is read at once, which waits for its device.
            ids: a sequence with one id for each example, kept in `ids`; inside `into` its number in the plan, or an
                `Example`.
            grad_scale: the factor in the loss (of a GradScaler, say) to divide out of the rows.
            masks: by column, in place of ``mask`` there: in an encoder-decoder the decoder has positions of its own.
            refs: by column, or by point, what the gradients are multiplied with where ``of="grad*ref"`` and the Spec
                has no ``ref``: a tensor that broadcasts to the gradient, on its device.
            at: by the names that are the ``at`` of some specs: the positions of each example, whole numbers [B] or
                [B, k], which count real tokens where there is a mask; or bool [B, P], which chooses some of these, and
                is the mask of the columns then.
            batch: what a function is called with that is the ``ref`` of a Spec: once, here, without gradients.

        Raises:
            ValueError: if mask and ids don't fit each other, or later the gradients; for a ref or positions that are
                missing, or that no column reads; for positions at padding.
            TypeError: for ids that are no sequence.
            RuntimeError: if no backward was committed inside; inside another block of this capture, or beside one that
                another thread has open: what it says holds for the backwards of all threads.
        """
        who = "batch"
        mask = None if mask is None else as_mask(who, mask)
        wrong = next((column for column in masks or () if column in self._per_token), None)
        if wrong is not None:
            rule, remedy = "leave columns per token to mask", "Keep its rows per example, or in a capture of its own."
            raise ValueError(broken_rule(who, "masks", rule, repr(wrong), remedy))
        check_ids(who, ids)
        tokens = tokens_of(who, mask) if mask is not None and self._per_token else None
        if ids is not None and mask is not None and len(ids) != mask.shape[0]:
            raise ValueError(
                broken_rule(who, "ids", f"have one id for each of {mask.shape[0]} examples", len(ids), "Check both.")
            )
        if not grad_scale > 0:
            raise ValueError(broken_rule(who, "grad_scale", "be positive", grad_scale, "Use scaler.get_scale()."))
        unmasked = {column for column in self._columns if not any(held.masked for held in self._held(column))}
        inputs = StepInputs(mask, masks or {}, refs or {}, at or {}, batch)
        own = inputs.of_columns(self.wanted, unmasked, self._ledger.recording)
        with self._opened(OpenBatch(mask, -1 if ids is None else len(ids), 1.0 / grad_scale, own)):
            if self.receiver is not None:
                self.receiver.expect(ids, tokens)
            ended, calls_before = self._ledger.n_ended, self._backwards.n_calls
            self._say_nothing_of_earlier()
            try:
                yield
            except BaseException:
                if self.receiver is not None:
                    self.receiver.failed()
                raise
            finally:
                self._say(ids, tokens)
        if self._ledger.n_ended == ended:
            raise RuntimeError(
                broken_rule(
                    who, "the block", "hold a forward and a backward", "no committed row",
                    self._why_no_rows(calls_before),
                )
            )  # fmt: skip
        if self.receiver is not None:
            self.receiver.took()

    @contextmanager
    def _opened(self, batch: OpenBatch) -> Iterator[None]:
        """It holds inside; RuntimeError where another one does, of this thread or another."""
        with self._opening:
            if self._batch is not None:
                raise self._batch.beside(batch)
            self._batch = batch
        try:
            batch.tell(self._backwards, self._held)
            yield
        finally:
            OpenBatch(None, -1, 1.0, {}).tell(self._backwards, self._held)
            self._batch = None

    def given(self, column: str) -> Given:
        """What a step gives a column now."""
        own = {} if self._batch is None else self._batch.own[column]
        mask, ref = own.get("own_mask"), own.get("ref", self._held(column)[0].ref)
        return Given(mask, ref, own.get("at"), mask is not None)

    def padded(self) -> set[str]:
        """The columns of examples that the open batch tells of padding, by masks: zeros where rows keep positions."""
        batch, found = self._batch, set()
        any_padding = batch is not None and batch.mask is not None and not bool(batch.mask.all())
        for column, own in {} if batch is None else batch.own.items():
            spec = self.wanted[column][1]
            chosen, masked = own.get("own_mask"), any(held.masked for held in self._held(column))
            pads = (any_padding and masked and spec.at is None) if chosen is None else not bool(chosen.all())
            if pads and spec.per == "example" and spec.of != "weight":
                found.add(column)
        return found

    def _open_mask(self) -> torch.Tensor | None:
        return None if self._batch is None else self._batch.mask

    def _held(self, column: str) -> list[Column]:
        """What is asked for a column's rows: itself, or those whose rows it adds up, by its name or theirs."""
        members = [held for several in self._members.values() for held in several if held.name == column]
        return members or self._members.get(column) or [self._columns[column]]

    def into(
        self,
        out: Any,
        *,
        plan: Any = None,
        header: Mapping[str, Any] | None = None,
        config: str | Mapping[str, Any] = "",
        staging: str | os.PathLike[str] | None = None,
        disk_wait_s: float = 600.0,
    ) -> Into:
        """Write the rows of one's own loop as a dataset: a context manager inside that of the capture.

        The ids given to `batch` say which examples the rows are of. As soon as the capture holds all rows of a unit, a
        thread writes them, and the next batch has the room; it waits where two units are not on disk yet. So read rows
        before the next batch, and leave `clear` alone. Units may come in any order, and so may the examples of a unit,
        but all of these before those of another one: a batch has examples of one unit, so that a run that continues
        this one makes the same batches, and the same bits. A batch that raised may be run again: the rows that it has
        made are dropped, and need room in the capture until their unit is written.

        Of the ``with`` block's value, ``left`` are the numbers of the examples that are not written yet, ``units``
        their units, and ``batches(n)`` these numbers in batches; before the block is entered they are not known. A unit
        that was there before may be computed again; its rows are dropped. After an error all whole units are kept, and
        nothing of another one.

        Args:
            out: a folder or URL, new or with a part of this dataset; or a `DatasetWriter`, which stays open; or
                `RunningSums`, to which the rows of each batch are added in place of all this: then it needs no ids, the
                capture room for one batch, and batches may have any length.
            plan: the `tlfast.dataset.Plan`: how many examples there are, and how many of them are a unit.
            header: what the data are (model, loss, ...), JSON; a part of the dataset's identity, as specs, calls and
                missing of this capture are.
            config: text or mapping for config.yaml.
            staging: where units lie until they are uploaded, if ``out`` is a URL; None: in the user's cache folder.
            disk_wait_s: how many seconds a full disk is waited for.

        Raises:
            ValueError, TypeError: for bad arguments; for another dataset in ``out``, at the first step; in `batch` for
                ids that are not of one unit, come twice or are not in the plan.
            ValueError: in the last `batch` of a unit whose rows have another shape or dtype than those before.
            RuntimeError: at the end of the block, where a unit has some of its rows and not all; all others are kept.
            OSError: where the disk fails or stays full, in the next `batch`.

        Example:
            >>> import tempfile, torch, tlfast
            >>> model, data = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()), torch.randn(6, 4)
            >>> out, plan = tempfile.mkdtemp(), tlfast.dataset.Plan(n_examples=6, rows_per_unit=4)
            >>> with tlfast.capture(model, "0", rows=4) as cap, cap.into(out, plan=plan) as written:
            ...     for ids in written.batches(2):
            ...         with cap.batch(ids=ids):
            ...             model(data[ids]).sum().backward()
            >>> tlfast.open_dataset(out)["0"].shape
            (6, 3)
        """
        if isinstance(out, RunningSums):
            if plan is not None or header is not None or config or staging is not None or disk_wait_s != 600.0:
                remedy = "Sums are kept in memory, and saved by RunningSums.save."
                rule, what = "be left out where out is RunningSums", "plan, header, config, staging, disk_wait_s"
                raise ValueError(broken_rule("into", what, rule, "some", remedy))
            return openers["sums"](self, out)
        return openers["dataset"](
            self, out, plan=plan, header=header, config=config, staging=staging, disk_wait_s=disk_wait_s
        )
