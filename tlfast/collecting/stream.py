"""Rows for a training loop, with no disk between: a buffer, filled unit by unit, and shuffled batches out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any, Literal

import torch
from torch import nn

from ..dataset.format.layout import Column
from ..dataset.format.plan import Plan, Unit
from ..dataset.read.shuffle import check_seed, permutation
from ..errors import SpeakingAs, broken_rule
from ..hooks.tokens import positions_within
from ..spec import Points, Spec, one_of
from .batches import unit_rows_of
from .fsdp import is_sharded
from .identity import describe_loss
from .loop import rings_of
from .options import CollectOptions, check_positive
from .pack import Pack
from .unit import Oddities, Runner
from .work import Work

Batch = dict[str, torch.Tensor]

_WHO = "stream"
_ID = "id"  # of the examples, beside the columns: as in the batches of a dataset
_POSITION = "position"  # among the real tokens of its example, where a row is a token's
_SAID = {_ID: "the examples' numbers", _POSITION: "the tokens' positions"}
_PART = 4  # of the buffer is a unit, where nobody says: the rest of it is mixed with each that comes in
# The settings of `collect` that say what a row is.
SETTINGS = (
    "reduce", "of", "side", "ref", "heads", "at", "per", "project", "bias", "normalizer", "summed", "over", "dtype",
    "output", "embedding", "loss", "fields", "collate", "batch_examples", "size", "batch_tokens", "seq_len",
    "rows_per_unit", "padding_side", "pad_id", "grad_scale", "attach", "backend", "calls", "missing", "lens",
    "bad_examples", "deterministic",
)  # fmt: skip


class GradientStream(Iterator[Batch]):
    """Shuffled batches of rows, once through all examples; made by `stream`, which says all of it.

    ``columns`` are dtype and row shape of each column, ``skipped`` the (source, start, reason) of bad examples,
    ``n_rows`` the number of all rows and ``len`` that of all batches.
    """

    def __init__(
        self,
        batches: Generator[Batch, None, None],
        n_rows: int,
        n_batches: int,
        columns: Mapping[str, Column],
        skipped: Sequence[Sequence[Any]],
        who: str = _WHO,
    ):
        self._batches, self.n_rows, self._n_batches, self._turn = batches, n_rows, n_batches, Lock()
        self._who = who
        self.columns, self.skipped = dict(columns), [tuple(entry) for entry in skipped]

    def __next__(self) -> Batch:
        if not self._turn.acquire(blocking=False):
            remedy = "Put a lock around next(), or give each thread a stream and a model."
            raise RuntimeError(
                broken_rule(self._who, "a stream", "be read by one thread at a time", "a second one", remedy)
            )
        try:
            with SpeakingAs(self._who, "collect"):
                return next(self._batches)
        finally:
            self._turn.release()

    def __len__(self) -> int:
        return self._n_batches

    def close(self) -> None:
        """Give no more batches, and let the memory of the rows go."""
        self._batches.close()

    def __enter__(self) -> GradientStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Buffer:
    """Rows in memory that is allocated once, on the device on which they were captured."""

    def __init__(self, n_rows: int, seed: int):
        self._rows: Batch = {}
        self._n_rows, self._seed, self._n_shuffled = n_rows, seed, 0
        self._free = torch.arange(n_rows)
        self._order = self._free[:0]  # where the rows lie, in the order in which they are given out

    def __len__(self) -> int:
        return len(self._order)

    def has_room(self, n_rows: int) -> bool:
        """Whether so many rows fit in."""
        return n_rows <= len(self._free)

    def put(self, rows: Batch) -> None:
        """Copy in the rows of a unit, and shuffle all that is here."""
        n = len(rows[_ID])
        slots, self._free = self._free[:n], self._free[n:]
        for name, block in rows.items():
            if name not in self._rows:
                self._rows[name] = block.new_empty(self._n_rows, *block.shape[1:])
            held = self._rows[name]
            held.index_copy_(0, slots.to(held.device), block.to(held.device))
        order = torch.cat([self._order, slots])
        self._order = order[torch.from_numpy(permutation(len(order), self._seed, self._n_shuffled))]
        self._n_shuffled += 1

    def take(self, n: int) -> Batch:
        """The next ``n`` rows, as copies; their room is free again."""
        slots, self._order = self._order[:n], self._order[n:]
        self._free = torch.cat([self._free, slots])
        return {name: held.index_select(0, slots.to(held.device)) for name, held in self._rows.items()}


def _batches(
    work: Units, plan: Plan, buffer: _Buffer, batch_size: int, seed: int, drop_last: bool
) -> Generator[Batch, None, None]:
    """Fill the buffer, and again as soon as there is room for a unit; a full batch fits beside one."""
    units = deque(plan.unit(k) for k in permutation(plan.n_units, seed).tolist())
    while units or len(buffer) >= batch_size:
        while units and buffer.has_room(work.n_rows(units[0])):
            buffer.put(work.rows(units[0]))
            units.popleft()
        while len(buffer) >= batch_size and not (units and buffer.has_room(work.n_rows(units[0]))):
            yield buffer.take(batch_size)
    if len(buffer) and not drop_last:
        yield buffer.take(len(buffer))


def stream(
    model: nn.Module,
    batches: Iterable[Any],
    points: Points | Spec | Sequence[Spec],
    *,
    buffer_rows: int,
    batch_size: int,
    seed: int = 0,
    drop_last: bool = False,
    non_finite: Literal["keep", "stop"] = "stop",
    **settings: Any,
) -> GradientStream:
    """Give the gradients of ``model`` at ``points`` to a training loop: shuffled batches of rows, with no disk between.

    They are the rows that `collect` stores with the same settings and ``rows_per_unit``, each once, to the bit (on a
    GPU with ``cuda_graph="off"``). Units of examples are computed in random order into a buffer of rows, from which
    batches are drawn at random; as soon as there is room for one, the next unit is computed. That happens between two
    batches, in the thread that asks for them: then, and only then, the model is in eval mode, frozen and hooked. One
    device computes either that or a step of training, and torch's modes belong to a whole process, so nothing runs
    behind the loop's back.

    Rows are of the weights at the moment when their unit is computed, so a batch has rows that are up to
    ``buffer_rows`` rows old. After the model was changed, start another stream. `torch.autocast` is as it was when the
    stream was made, whatever is in force where batches are asked for.

    Args:
        model, batches, points: as in `collect`. For another epoch, call again with another ``seed``.
        buffer_rows: how many rows are held and mixed, on the device of the gradients. It has room for a unit beside a
            batch; two units more are in memory while one is computed.
        batch_size: rows of a batch; the last one may be shorter.
        seed: makes the order, the same for the same examples and settings; 64 bits.
        drop_last: leave out the last batch, if it is shorter.
        non_finite: for a row with a NaN or an infinity: "stop" raises when its unit is computed, "keep" gives it out.
        settings: reduce, of, side, ref, heads, at, per, project, bias, normalizer, summed, over, dtype, output,
            embedding, loss, fields, collate, batch_examples, size, batch_tokens, seq_len, rows_per_unit, padding_side,
            pad_id, grad_scale, attach, backend, calls, missing, lens, bad_examples and deterministic, as in `collect`.
            rows_per_unit None: a quarter of the buffer, at most those that fill 256 MiB, and 2048. With per="token"
            ``buffer_rows`` and ``batch_size`` count tokens, and ``rows_per_unit`` the examples that are computed
            together.

    Returns:
        An iterator of dicts: "id", int64 [b], the numbers of the examples, on the host; and for each column
        [b, *row shape], on the device of its gradients; with per="token" also "position", int64 [b], that of the
        token among the real ones of its example. ``len`` of it is the number of batches, ``n_rows`` that of all rows,
        ``skipped`` the bad examples. It ends with the data; ``close()``, or the end of a ``with`` block, lets its
        memory go before.

    Raises:
        ValueError, TypeError: for bad arguments, and all that `collect` refuses, before the first batch.
        RuntimeError: inside a capture of the model, or `torch.inference_mode`; where another thread is at work on the
            model or reads this stream.
        FloatingPointError: for ``non_finite="stop"``. After this or any other error there are no more batches, and
            the model is as before.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> texts = [[1, 2, 3], [4, 5], [6, 7, 8], [1, 5]]
        >>> for batch in tlfast.stream(model, texts, "0", buffer_rows=4, batch_size=2):
        ...     print(batch["id"].shape, batch["0"].shape)
        torch.Size([2]) torch.Size([2, 4])
        torch.Size([2]) torch.Size([2, 4])
    """
    with SpeakingAs(_WHO, "collect"):
        options = row_options(_WHO, SETTINGS, points, settings)
        one_of(_WHO, "non_finite", non_finite, ("keep", "stop"))
        check_positive(_WHO, buffer_rows=buffer_rows, batch_size=batch_size)
        check_seed(_WHO, seed)
        most = options.rows_per_unit or max(1, min(buffer_rows // _PART, buffer_rows - batch_size))
        _check_room(buffer_rows, batch_size, most)
        work = Units(model, batches, options, most, non_finite)
        return work.shuffled(buffer_rows, batch_size, seed, drop_last)


def row_options(
    who: str, allowed: Sequence[str], points: Points | Spec | Sequence[Spec], settings: Mapping[str, Any], **ours: Any
) -> CollectOptions:
    """The options of rows that go into no dataset, ``ours`` beside those of the user.

    Raises:
        TypeError: for a setting of the user that isn't ``allowed`` there.
        ValueError: for one that `collect` refuses.
    """
    unknown = next((name for name in settings if name not in allowed), None)
    if unknown is not None:
        raise TypeError(broken_rule(who, "settings", f"be among {', '.join(allowed)}", unknown, "Leave it out."))
    options = CollectOptions(points=points, cuda_graph="off", **settings, **ours)
    given: Any = options.loss
    if not callable(given):
        describe_loss(given, "", None)  # raises what `collect` does
    return options


def _check_room(buffer_rows: int, batch_size: int, largest: int) -> None:
    """ValueError where a buffer has no room for the largest unit beside a batch."""
    if buffer_rows < batch_size + largest:
        rule = f"have room for a batch of {batch_size} beside a unit of {largest}"
        remedy = "Give more, or a smaller batch_size or rows_per_unit."
        raise ValueError(broken_rule(_WHO, "buffer_rows", rule, buffer_rows, remedy))


class Units(Work):
    """What goes into the buffer: tried when it is made, as `collect` does, and then computed unit by unit.

    ``most`` are the examples of a unit; ``who`` speaks of what is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: CollectOptions,
        most: int,
        non_finite: str,
        who: str = _WHO,
    ) -> None:
        super().__init__(model, options)
        self._who = who
        if is_sharded(model):
            remedy = "Collect a dataset, and read it with ShuffledBatches."
            raise ValueError(broken_rule(who, "model", "be whole in this process", "a sharded one", remedy))
        encoded = next((spec.encoding for spec in self.specs if spec.encoding), None)
        if encoded is not None:
            remedy = "Leave it out; a dataset stores rows so."
            raise ValueError(broken_rule(who, "encoding", "be None: its rows lie in memory", repr(encoded), remedy))
        if len({spec.per for spec in self.specs}) > 1:
            rule, remedy = "be the same at all points of a stream", "Make a stream of each, or a dataset of both."
            raise ValueError(broken_rule(who, "per", rule, "'example' and 'token'", remedy))
        self.per_token = self.specs[0].per == "token"
        self._stops = non_finite == "stop"
        self._autocast = _Autocast(self.devices)
        self.read(batches, with_graphs=False)
        if self.per_token and options.rows_per_unit is None:
            most = max(1, most // max(example.length for example in self.examples))
        self.most = most  # examples of a unit
        with self.at_work():
            self._probed = self.look(most)
        self.columns = self._probed.columns
        for name, what in _SAID.items():
            if name in self.columns and (name == _ID or self.per_token):
                rule, remedy = f"not have the name of {what}", "Give its module another name."
                raise ValueError(broken_rule(who, "points", rule, name, remedy))

    def shuffled(self, buffer_rows: int, batch_size: int, seed: int, drop_last: bool) -> GradientStream:
        """All rows once, in the order that belongs to the seed."""
        n_rows = self.options.rows_per_unit or min(self.most, unit_rows_of(self.columns.values(), self.examples))
        plan = Plan(len(self.examples), n_rows)
        sizes = [self.n_rows(unit) for unit in plan.units]
        _check_room(buffer_rows, batch_size, max(sizes))
        n = sum(sizes)
        made = _batches(self, plan, _Buffer(min(buffer_rows, n), seed), batch_size, seed, drop_last)
        n_batches = n // batch_size if drop_last else -(-n // batch_size)
        return GradientStream(made, n, n_batches, self.columns, self.bad.skipped, self._who)

    def n_rows(self, unit: Unit) -> int:
        """How many rows a unit has: one for each example, or for each token of them."""
        return sum(example.length for example in self.examples[unit.start : unit.stop]) if self.per_token else len(unit)

    def rows(self, unit: Unit) -> Batch:
        """The rows of a unit, by rising example, on the devices of their gradients; and whose they are.

        The capture is made anew for each: between two units the model is its owner's.
        """
        part, options = list(self.examples[unit.start : unit.stop]), self.options
        cap = self.enter(len(part), self.specs).unmasked(self._probed.unmasked)
        with self.at_work(), self._autocast.as_begun(), cap:
            runner = Runner(
                self.model, cap, self.batching, self.loss, options.grad_scale, decoding=self._probed.decoding
            )
            places, tokens = runner.fill_ring(part, _nothing)
        absent = cap.missing if options.missing == "nan" else {}
        rings, pack = rings_of(cap, self.columns, tokens), Pack(self.columns)
        rows = pack.take(rings, pack.choose(rings, places, tokens))
        missing = torch.stack(list(absent.values())).any(0)[places] if absent else None
        counters = torch.stack([counted.cpu() for counted in cap.counters])
        odd = missing is not None or bool(counters[:, 0].any())
        looked_at = {name: block.cpu() for name, block in rows.items()} if odd else rows
        lengths = dict.fromkeys(pack.per_token, [] if tokens is None else tokens.lengths)
        Oddities(self._stops, self._who).flags(looked_at, counters, missing, cap.n_writes, unit, lengths)
        ids = torch.arange(unit.start, unit.stop)
        if tokens is None or not self.per_token:
            return {_ID: ids, **rows}
        counts = torch.tensor(tokens.lengths)
        return {
            _ID: ids.repeat_interleave(counts),
            _POSITION: torch.from_numpy(positions_within(counts.numpy())),
            **rows,
        }


class _Autocast:
    """The modes of `torch.autocast` of here and now, for rows that are computed where others are in force."""

    def __init__(self, devices: Iterable[torch.device]):
        kinds = {"cpu"} | {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
        self._modes = {kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds}
        self._caches = torch.is_autocast_cache_enabled()

    @contextmanager
    def as_begun(self) -> Iterator[None]:
        with ExitStack() as stack:
            for kind, (dtype, enabled) in self._modes.items():
                mode = torch.autocast(kind, dtype if enabled else None, enabled, self._caches)
                stack.enter_context(mode)
            yield


def _nothing(n_examples: int, n_tokens: int) -> None:
    """Nobody hears of the batches of a unit."""
