"""Two datasets of the same examples, row beside row: other points, another model, another loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error
from .reader import GradientDataset
from .views import Readable

_WHO = "join_datasets"
_COMPARED_ROWS = 4096  # whose tokens are held at once


class JoinedSide:
    """One of the joined datasets, restricted to the examples that both have: ``side[point][rows]``."""

    def __init__(self, ds: Readable, rows: torch.Tensor) -> None:
        self.ds = ds
        self.rows = rows  # of the dataset, int64 per row of the join
        self.view = ds.select(rows)  # row r of it is row r of the join

    def __getitem__(self, point: str) -> Any:
        """Return the rows of ``point``: index them by rows of the join."""
        return self.view[point]

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point``."""
        return self.view.norms(point)


class Join:
    """Made by join_datasets: ``left`` and ``right``, row r of both being example ``ids[r]``."""

    def __init__(self, left: Readable, right: Readable, ids: np.ndarray[Any, Any]) -> None:
        self.ids = torch.from_numpy(ids)
        self.left, self.right = (JoinedSide(ds, ds.rows_of(ids)) for ds in (left, right))

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        places = (", ".join(str(source.path) for source in side.ds.sources) for side in (self.left, self.right))
        return "\n  ".join([f"Join: {len(self)} examples of", *places])


def join_datasets(left: Readable, right: Readable) -> Join:
    """Join two datasets, or views of some, of the same data by example id; the examples that both have stay.

    The examples are the same where dataset.json says so of both, by its fingerprint of all examples; otherwise the
    tokens of every shared example are compared, and where both have rows per token how many these are.

    Returns:
        A Join: ``join.ids``, ``join.left[point][rows]``, ``join.right[point][rows]``.

    Raises:
        DatasetError: where an id stands for other tokens in the other dataset, or for another number of rows of them.
        KeyError: where several rows of a view have an id.

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
    joined = Join(left, right, np.intersect1d(left.ids.numpy(), right.ids.numpy()))
    said = [ds.examples_fingerprint if isinstance(ds, GradientDataset) else None for ds in (left, right)]
    if said[0] is None or said[0] != said[1]:
        _compare(joined)
    return joined


def _compare(joined: Join) -> None:
    left, right = joined.left.rows.numpy(), joined.right.rows.numpy()
    sides = (joined.left.view, joined.right.view)
    if all(any(view.column(point).per == "token" for point in view.points) for view in sides):
        lengths = [view.examples.arrow(np.arange(len(view)), ["length"]).column("length").to_numpy() for view in sides]
        odd = np.flatnonzero(lengths[0] != lengths[1])
        if len(odd):  # masks were others: row k of one isn't the token of row k of the other
            got, remedy = " and ".join(str(length[odd[0]]) for length in lengths), "Collect them with the same tokens."
            argument, rule = f"example {joined.ids[odd[0]]}", "have as many tokens in both datasets"
            raise dataset_error(_WHO, argument, rule, got, remedy)
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
