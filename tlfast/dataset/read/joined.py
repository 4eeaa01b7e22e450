"""Two datasets of the same examples, row beside row: other points, another model, another loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import dataset_error
from .columns import row_numbers
from .reader import GradientDataset

_WHO = "join_datasets"
_COMPARED_ROWS = 4096  # whose tokens are held at once


class JoinedColumn:
    """One point of one of the joined datasets: index it by the rows of the join, and get a tensor."""

    def __init__(self, ds: GradientDataset, point: str, rows: np.ndarray[Any, Any]) -> None:
        self._column = ds[point]
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def flat(self) -> NoReturn:
        """AttributeError: the examples of the join don't lie behind each other."""
        got = f"the joined {self._column.name!r}"
        remedy = "Index it by rows of the join, or take side.ds[point].flat, which has the tokens of all its examples."
        raise AttributeError(broken_rule(_WHO, "flat", "be asked of a dataset's own column", got, remedy))

    @property
    def shape(self) -> tuple[int, ...]:
        """``(rows of the join, *shape of a row)``; AttributeError for a point per token, as of a dataset's column."""
        return (len(self), *self._column.shape[1:])

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the indexed rows as the dataset's column does."""
        chosen = index if isinstance(index, slice) else row_numbers(index, len(self))
        return self._column[self._rows[chosen]]


class JoinedSide:
    """One of the joined datasets, restricted to the examples that both have: ``side[point][rows]``."""

    def __init__(self, ds: GradientDataset, rows: np.ndarray[Any, Any]) -> None:
        self.ds = ds
        self.rows = torch.from_numpy(rows)  # of the dataset, int64 per row of the join

    def __getitem__(self, point: str) -> JoinedColumn:
        return JoinedColumn(self.ds, point, self.rows.numpy())

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point``."""
        return self.ds.norms(point)[self.rows]


class Join:
    """Made by join_datasets: ``left`` and ``right``, row r of both being example ``ids[r]``."""

    def __init__(self, left: GradientDataset, right: GradientDataset, ids: np.ndarray[Any, Any]) -> None:
        self.ids = torch.from_numpy(ids)
        self.left, self.right = (JoinedSide(ds, ds.rows_of(ids).numpy()) for ds in (left, right))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"Join: {len(self)} examples of\n  {self.left.ds.path}\n  {self.right.ds.path}"


def join_datasets(left: GradientDataset, right: GradientDataset) -> Join:
    """Join two datasets of the same data by example id; the examples that both have stay.

    The examples are the same where dataset.json says so of both, by its fingerprint of all examples; otherwise the
    tokens of every shared example are compared.

    Returns:
        A Join: ``join.ids``, ``join.left[point][rows]``, ``join.right[point][rows]``.

    Raises:
        DatasetError: where an id stands for other tokens in the other dataset.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, join_datasets, open_dataset
        >>> plan, both = Plan(1, 1), []
        >>> for point in ("early", "late"):
        ...     out = tempfile.mkdtemp()
        ...     writer = DatasetWriter(out, header={}, columns={point: (torch.float32, (2,))}, plan=plan)
        ...     assert writer.write_unit(plan.unit(0), {point: torch.ones(1, 2)}, [Example(0, [1], "a", 0, 1)])
        ...     both.append(open_dataset(out))
        >>> pair = join_datasets(*both)
        >>> (pair.left["early"][:] * pair.right["late"][:]).sum(1)
        tensor([2.])
    """
    ids = np.intersect1d(left.ids.numpy(), right.ids.numpy(), assume_unique=True)
    joined = Join(left, right, ids)
    if left.examples_fingerprint is None or left.examples_fingerprint != right.examples_fingerprint:
        _compare(joined)
    return joined


def _compare(joined: Join) -> None:
    left, right = joined.left.rows.numpy(), joined.right.rows.numpy()
    breaks = np.flatnonzero((np.diff(left) != 1) | (np.diff(right) != 1)) + 1
    bounds = np.unique(np.concatenate([np.arange(0, len(left), _COMPARED_ROWS), breaks, [len(left)]])).tolist()
    for start, stop in pairwise(bounds):
        ours = joined.left.ds.examples.tokens(left[start], left[start] + stop - start)
        theirs = joined.right.ds.examples.tokens(right[start], right[start] + stop - start)
        for example, a, b in zip(joined.ids[start:stop].tolist(), ours, theirs, strict=True):
            if not torch.equal(a, b):
                rule = "have the same tokens in both datasets"
                texts = [f"{len(tokens)} tokens {tokens[:8].tolist()}" for tokens in (a, b)]
                remedy = "Only datasets of the same text, tokenizer and length can be joined."
                raise dataset_error(_WHO, f"example {example}", rule, " and ".join(texts), remedy)
