"""Views of small datasets, each beside the list of the rows that it must have, and a check of everything it offers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from dataset_cases import same_bits

from tlfast.dataset import RowDataset, ShuffledBatches, concat_datasets

N = 11  # rows of each dataset
VIEWS = {
    "all points": lambda a, b: (a.with_fields(*a.points), [(a, r) for r in range(N)]),
    "selected": lambda a, b: (a.select([9, 1, 1, 10, 0]), [(a, r) for r in (9, 1, 1, 10, 0)]),
    "a slice": lambda a, b: (a.select(slice(2, 9)), [(a, r) for r in range(2, 9)]),
    "every other": lambda a, b: (a.select(range(0, N, 2)), [(a, r) for r in range(0, N, 2)]),
    "a mask": lambda a, b: (a.select(torch.arange(N) % 3 == 0), [(a, r) for r in range(0, N, 3)]),
    "from the end": lambda a, b: (a.select(np.array([-1, -2])), [(a, 10), (a, 9)]),
    "filtered": lambda a, b: (a.filter("length > 3"), [(a, r) for r in range(N) if r % 5 + 2 > 3]),
    "nothing": lambda a, b: (a.filter("length > 100"), []),
    "both": lambda a, b: (concat_datasets([a, b]), [(d, r) for d in (a, b) for r in range(N)]),
    "some of both": lambda a, b: (
        concat_datasets([a, b]).select([21, 0, 11, 12, 13, 10]),
        [(b, 10), (a, 0), (b, 0), (b, 1), (b, 2), (a, 10)],
    ),
    "views of both": lambda a, b: (
        concat_datasets([b.select([3]), a.filter("id < 2"), b]).filter("id != 7"),
        [(b, 3), (a, 0), (a, 1), *((b, r) for r in range(N) if r != 7)],
    ),
    "nothing and one": lambda a, b: (concat_datasets([a.select([]), b]), [(b, r) for r in range(N)]),
    "a view of a view": lambda a, b: (a.select([5, 6, 7]).select([2, 0]), [(a, 7), (a, 5)]),
}


def expected(rows, point):
    """The rows of a point one by one, out of their datasets."""
    return [ds[point][row] for ds, row in rows]


def check_columns(view, rows):
    """Fail unless every point reads as the rows do, however it is indexed."""
    index = list(range(0, len(rows), 2)) + [-1] * bool(rows)
    for point in view.points:
        truth = expected(rows, point)
        for wanted in (slice(None), slice(1, None, 2), index, torch.tensor(index, dtype=torch.int64)):
            found = view[point][wanted]
            chosen = [truth[k] for k in np.arange(len(rows))[wanted]]
            assert len(found) == len(chosen), (point, wanted)
            assert all(same_bits(a, b) for a, b in zip(found, chosen, strict=True)), (point, wanted)
        assert all(same_bits(view[point][r], row) for r, row in enumerate(truth))
        assert torch.equal(view.norms(point), torch.tensor([d.norms(point)[r] for d, r in rows]))


def check_examples(view, rows):
    """Fail unless examples, ids, tokens and places are those of the rows."""
    assert len(view) == len(rows) == len(view.examples)
    examples = [d.examples[r] for d, r in rows]
    assert list(view.examples) == examples == view.examples[:]
    assert view.ids.tolist() == [example["id"] for example in examples]
    for start, stop in pairwise(sorted({0, len(rows) // 2, len(rows)})):
        tokens = [found.tolist() for found in view.examples.tokens(start, stop)]
        assert tokens == [example["input_ids"] for example in examples[start:stop]]
    which, local = view.where()
    assert [(view.sources[k], r) for k, r in zip(which.tolist(), local.tolist(), strict=True)] == rows


def check_loaders(view, rows, points):
    """Fail unless every row comes once from a loader, and in shuffled batches, with its fields."""
    fields = ["length", "source", "norms", "input_ids"]
    view = view.with_fields(*points, *fields)
    items = RowDataset(view)
    seen = [items[k] for k in range(len(items))]
    shuffled = ShuffledBatches(view, 3, seed=1, block_rows=2, mixed_blocks=2)
    for batch in shuffled:
        seen += [{name: values[k] for name, values in batch.items()} for k in range(len(batch["id"]))]
    straight = ShuffledBatches(view, 4, shuffle=False, rank=0, world_size=2)
    other = ShuffledBatches(view, 4, shuffle=False, rank=1, world_size=2)
    for batch in [*straight, *other]:
        seen += [{name: values[k] for name, values in batch.items()} for k in range(len(batch["id"]))]
    truth = [_item(ds, row, points) for ds, row in rows]
    assert sorted(map(_said, seen)) == sorted(3 * [_said(item) for item in truth])


def _item(ds, row, points):
    example = ds.examples[row]
    norms = {f"norm:{point}": torch.tensor(example["norms"][point]) for point in points}
    named = {key: example[key] for key in ("length", "source")}
    tokens = torch.tensor(example["input_ids"])
    return {"id": example["id"], **{p: ds[p][row] for p in points}, **named, **norms, "input_ids": tokens}


def _said(item):
    return str({key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in item.items()})
