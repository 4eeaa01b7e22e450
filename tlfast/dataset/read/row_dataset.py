"""A dataset as a map-style torch dataset: rows by number, many at once where a DataLoader asks for many."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ...errors import broken_rule
from .columns import integers, row_numbers
from .row_fields import columns_of, entries
from .views import Readable

Batch = dict[str, Any]


def checked_entries(
    who: str, ds: Readable, points: Iterable[str] | None, input_ids: bool
) -> tuple[list[str], list[str]]:
    """Return the points that were asked for, and the columns of the row tables, as entries of a batch.

    KeyError or ValueError for one that there isn't, or that has no place.
    """
    chosen = ds.points if points is None else [points] if isinstance(points, str) else list(points)
    for point in chosen:
        ds[point]
    wanted = [*(["input_ids"] if input_ids else []), *ds.loaded]
    beside = [name for name in columns_of(wanted, chosen) if name != "id"]
    for point in chosen:
        if point in ("id", *beside):
            remedy = "Leave it out, and read it by ds[point]."
            raise ValueError(broken_rule(who, "points", "not include the name of another entry", repr(point), remedy))
    return chosen, beside


def per_example(who: str, ds: Readable, point: str) -> Any:
    """Return the rows of a point; ValueError where an example of it has as many as tokens."""
    column = ds[point]
    if ds.column(point).per == "token":
        remedy = "Leave it out of points, and read it by ds[point]."
        raise ValueError(broken_rule(who, f"point {point!r}", "have a row for each example", "one per token", remedy))
    return column


class RowDataset(Dataset[Batch]):
    """A map-style torch dataset: item r is ``{"id": int, point: row r, ...}``.

    Of a point per token the row is [length, *row shape], and a list of rows holds a list of them.
    A list of row numbers is read at once: ``DataLoader(rows, sampler=BatchSampler(...), batch_size=None)`` gives
    batches without a copy more; ``DataLoader(rows, batch_size=...)`` works as well. Where a point is per token, or with
    ``input_ids``, examples differ in length: ``collate_fn=list`` makes a batch a list of items.

    Args:
        ds: an open dataset, or a view of some. Items hold the fields that ``ds.with_fields`` named as well: of a list
            of rows numbers as a tensor, whatever else as a list.
        points: names of points; all by default.
        input_ids: whether items hold the example's tokens as well, an int64 tensor of its length; lists of rows hold
            a list of them.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, RowDataset, open_dataset
        >>> out, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([[3.0, 4.0]])}, [Example(0, [1], "a", 0, 1)])
        True
        >>> RowDataset(open_dataset(out))[0]
        {'id': 0, 'h': tensor([3., 4.])}
    """

    def __init__(self, ds: Readable, points: Iterable[str] | None = None, *, input_ids: bool = False) -> None:
        self.ds = ds
        self.points, self.fields = checked_entries("RowDataset", ds, points, input_ids)
        self.input_ids = "input_ids" in self.fields

    def __len__(self) -> int:
        return len(self.ds)

    def __getitem__(self, index: Any) -> Batch:
        rows = row_numbers(index, len(self)) if not isinstance(index, slice) else np.arange(len(self))[index]
        item: Batch = {"id": self.ds.ids_of(rows)} | self.ds.rows(rows, self.points)
        beside = entries(self.ds.examples, rows.reshape(-1), self.fields)
        if rows.ndim == 0:
            item["id"] = int(item["id"])
            beside = {name: values[0] for name, values in beside.items()}
        return item | beside

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Read many rows at once; what a DataLoader calls."""
        batch = self[integers("RowDataset", "indices", indices)]
        batch["id"] = batch["id"].tolist()
        return [{name: values[k] for name, values in batch.items()} for k in range(len(indices))]
