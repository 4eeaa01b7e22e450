"""A dataset as an iterable torch dataset: batches in a shuffled order that reads whole blocks, and can be resumed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from ...errors import broken_rule
from .ahead import read_ahead
from .columns import read_stretches
from .row_dataset import Batch, checked_entries, per_example
from .row_fields import entries
from .shuffle import Blocks, Group, check_seed, share
from .views import Readable

BLOCK_BYTES = 768 << 10  # of one point: measured, from there on a disk reads blocks here and there as fast as a file
POSITION = "position"  # in a batch of tokens
_GROUP_BYTES = 64 << 20  # of all points in the blocks that are mixed


class ShuffledBatches(IterableDataset[Batch]):
    """An iterable torch dataset: batches ``{"id": int64 [b], point: [b, *row shape], ...}`` in a shuffled order.

    Rows are read in whole blocks; the blocks' order is random, and the rows of ``mixed_blocks`` of them are mixed. The
    next group of blocks is read in the background. The order belongs to (seed, epoch) and to the numbers of ranks and
    workers, each of which gets a part: together every row exactly once in an epoch. Use it as
    ``DataLoader(batches, batch_size=None, num_workers=...)``, or iterate over it directly.

    ``state_dict()`` says where the iteration is, in the process that iterates (torchdata's StatefulDataLoader asks each
    worker); after ``load_state_dict`` the next iteration gives exactly the rest of that epoch.

    Where all points are per token, a row is a token's: tokens of different examples are mixed, ``batch_size`` and the
    others count them, and a batch has "position", int64 [b], too, which of the real tokens of example "id" each is.
    Fields are those of its example.

    Args:
        ds: an open dataset, or a view of some, with the fields that ``ds.with_fields`` named; of a partial one the
            units that were there when it was opened.
        batch_size: rows of a batch; the last one of each worker may be shorter.
        points: names of points; all by default.
        seed: of 64 bits, signed; together with ``set_epoch`` makes the order.
        shuffle: False for the order in which the rows lie.
        drop_last: leave out short batches, and so many others that every worker of every rank gives equally many.
        input_ids: whether batches hold the tokens as well: a list of int64 tensors.
        rank: which of ``world_size`` processes this is; by default as torch.distributed, or RANK and WORLD_SIZE, say.
        world_size: how many processes share the rows.
        block_rows: rows of a block; by default 768 KiB of a point, less where many points make it too much memory.
        mixed_blocks: how many blocks are mixed.

    Raises:
        ValueError: for numbers out of range, a state of another order of rows, or a point with a row for each token
            beside one with a row for each example.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, ShuffledBatches, open_dataset
        >>> out, plan = tempfile.mkdtemp(), Plan(3, 3)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> examples = [Example(i, [1], "a", 0, 1) for i in range(3)]
        >>> writer.write_unit(plan.unit(0), {"h": torch.zeros(3, 2)}, examples)
        True
        >>> [len(batch["h"]) for batch in ShuffledBatches(open_dataset(out), batch_size=2)]
        [2, 1]
    """

    def __init__(
        self,
        ds: Readable,
        batch_size: int,
        *,
        points: Iterable[str] | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        input_ids: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        block_rows: int | None = None,
        mixed_blocks: int = 16,
    ) -> None:
        self.ds = ds
        self.points, self.fields = checked_entries("ShuffledBatches", ds, points, input_ids)
        self.batch_size = _positive("batch_size", batch_size)
        self.mixed_blocks = _positive("mixed_blocks", mixed_blocks)
        self._per_token = bool(self.points) and all(ds.column(point).per == "token" for point in self.points)
        if self._per_token and POSITION in (*self.points, *self.fields):
            remedy = "Leave it out, and read it by ds[point] or ds.examples."
            rule = "not include the name of a token's position"
            named = "points" if POSITION in self.points else "fields"
            raise ValueError(broken_rule("ShuffledBatches", named, rule, repr(POSITION), remedy))
        columns = self._columns()  # a point that can't be given is found here
        self._n_rows = len(columns[0]) if self._per_token else len(ds)
        self.block_rows = self._block_rows() if block_rows is None else _positive("block_rows", block_rows)
        self.seed = check_seed("ShuffledBatches", seed)
        self.shuffle, self.drop_last, self.input_ids = shuffle, drop_last, "input_ids" in self.fields
        self.rank, self.world_size = _place(rank, world_size)
        bounds: tuple[Any, Any] = columns[0].unit_bounds if self._per_token else ds.unit_bounds
        self._blocks = Blocks.cut(*bounds, self.block_rows)
        # In shared memory, so that workers that outlive an epoch see the next one.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._done = 0  # rows given in this epoch, by this process
        self._resumed: dict[str, Any] | None = None

    def _columns(self) -> list[Any]:
        """What is read: rows of examples, or of tokens, all behind each other."""
        if self._per_token:
            return [self.ds[point].flat for point in self.points]
        return [per_example("ShuffledBatches", self.ds, point) for point in self.points]

    def _block_rows(self) -> int:
        sizes: list[int] = [column.row_bytes for column in self._columns()]
        most = max(1, _GROUP_BYTES // (self.mixed_blocks * max(1, sum(sizes))))
        return max(1, min(most, BLOCK_BYTES // max(1, *sizes)))

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; without it every epoch has the same."""
        if epoch != int(self._epoch[0]):  # else a state that was loaded stays: a loop sets its epoch then, too
            self._epoch[0] = epoch
            self._done, self._resumed = 0, None

    def _order(self) -> dict[str, Any]:
        """What the order of this process's rows depends on."""
        info = get_worker_info()
        return {
            "rows": self._n_rows, "seed": self.seed, "shuffle": self.shuffle, "drop_last": self.drop_last,
            "batch_size": self.batch_size, "block_rows": self.block_rows, "mixed_blocks": self.mixed_blocks,
            "rank": self.rank, "world_size": self.world_size,
            "worker": info.id if info else 0, "workers": info.num_workers if info else 1,
        }  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration of this process is, as plain values."""
        return {"epoch": int(self._epoch[0]), "done": self._done, "order": self._order()}

    def load_state_dict(self, state: Any) -> None:
        """Let the next iteration go on where ``state`` was taken."""
        if not isinstance(state, dict) or set(state) != {"epoch", "done", "order"}:
            rule, remedy = "be what state_dict returned", "Save and load it whole."
            raise ValueError(broken_rule("ShuffledBatches", "state", rule, repr(state)[:80], remedy))
        self._epoch[0] = state["epoch"]
        self._done, self._resumed = state["done"], state["order"]

    def _share(self, order: dict[str, Any]) -> tuple[int, int]:
        """The positions that this process gives, of all rows in their order."""
        start, stop = share(self._n_rows, self.rank, self.world_size)
        first, last = share(stop - start, order["worker"], order["workers"])
        if self.drop_last:
            smallest = self._n_rows // self.world_size // order["workers"]
            last = first + smallest // self.batch_size * self.batch_size
        return start + first, start + last

    def __iter__(self) -> Iterator[Batch]:
        order, resumed, done = self._order(), self._resumed, self._done
        if resumed is not None and resumed != order:
            odd = next(key for key in order if resumed.get(key) != order[key])
            remedy = "Resume with the arguments, ranks and workers that the state was taken with."
            got = f"{resumed.get(odd)!r} there, {order[odd]!r} here"
            raise ValueError(broken_rule("ShuffledBatches", f"{odd} of the state", "be the same", got, remedy))
        self._resumed = None
        self._done = done if resumed is not None else 0
        start, stop = self._share(order)
        key = (self.seed, int(self._epoch[0])) if self.shuffle else None
        groups = self._blocks.groups(start, stop, self.mixed_blocks, key)
        return self._batches(groups, self._done)

    def _batches(self, groups: Iterator[Group], skipped: int) -> Iterator[Batch]:
        parts: list[Batch] = []
        n, free = 0, SimpleQueue[Batch]()

        def read(part: tuple[Group, int]) -> tuple[Batch, torch.Tensor]:
            return self._read(*part, free)

        for data, order in read_ahead(_behind(groups, skipped), read):
            for at in _cuts(len(order), self.batch_size, n):
                parts.append({name: _pick(values, order[at]) for name, values in data.items()})
                n += at.stop - at.start
                if n == self.batch_size:
                    self._done += n
                    yield _joined(parts)
                    parts, n = [], 0
            free.put(data)  # batches are copies: the memory is read into again
        if n:
            self._done += n
            yield _joined(parts)

    def _read(self, group: Group, skipped: int, free: SimpleQueue[Batch]) -> tuple[Batch, torch.Tensor]:
        bounds = list(zip(group.starts.tolist(), group.stops.tolist(), strict=True))
        rows = np.concatenate([np.arange(start, stop) for start, stop in bounds])
        memory = None
        with suppress(Empty):  # new memory costs as much as copying into it
            memory = free.get_nowait()
        positions: Batch = {}
        if self._per_token:
            owners, positions[POSITION] = self.ds[self.points[0]].where(rows)
            rows = owners.numpy()
        data: Batch = {"id": self.ds.ids_of(rows)} | positions | read_stretches(self._columns(), bounds, memory)
        data |= entries(self.ds.examples, rows, self.fields)
        return data, torch.from_numpy(group.order[skipped:])


def _cuts(n: int, size: int, begun: int) -> Iterator[slice]:
    """Cut 0..n-1 into batches; the first cut completes one of which ``begun`` rows are there."""
    at = 0
    while at < n:
        yield slice(at, min(n, at + size - begun))
        at, begun = at + size - begun, 0


def _pick(values: Any, which: torch.Tensor) -> Any:
    return [values[k] for k in which.tolist()] if isinstance(values, list) else values.index_select(0, which)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    return {
        name: list(chain(*(part[name] for part in parts)))
        if isinstance(first, list)
        else torch.cat([p[name] for p in parts])
        for name, first in parts[0].items()
    }


def _behind(groups: Iterator[Group], skipped: int) -> Iterator[tuple[Group, int]]:
    """Leave out the groups that lie before position ``skipped``; say how much of the first is to be left out."""
    for group in groups:
        n = len(group.order)
        if skipped >= n:
            skipped -= n
            continue
        yield group, skipped
        skipped = 0


def _positive(argument: str, value: int) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(broken_rule("ShuffledBatches", argument, "be an int of at least 1", repr(value), "Check it."))
    return value


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Which of how many processes this is: as given, as torch.distributed says, or as torchrun's environment says."""
    if (rank is None) != (world_size is None):
        got = f"rank {rank} and world_size {world_size}"
        raise ValueError(broken_rule("ShuffledBatches", "rank", "be given with world_size", got, "Give both, or none."))
    if rank is None or world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not 0 <= rank < world_size:
        rule = f"be in 0..{world_size - 1}"
        raise ValueError(broken_rule("ShuffledBatches", "rank", rule, rank, "Ranks count from 0 to world_size - 1."))
    return rank, world_size
