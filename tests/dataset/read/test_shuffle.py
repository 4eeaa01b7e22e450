"""The shuffled order by itself: blocks, shares, and a permutation that stays the same for ever."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast.dataset.read.shuffle import Blocks, permutation, share


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5),
    st.integers(1, 4), st.one_of(st.none(), st.tuples(st.integers(-5, 5), st.integers(0, 2**40))),
)  # fmt: skip
@settings(max_examples=200)
def test_every_row_once_over_all_ranks_and_workers(lengths, rows, mixed, ranks, workers, key):
    stops = np.cumsum(lengths)
    n, blocks = int(stops[-1]), Blocks.cut(stops - lengths, stops, rows)
    seen, sizes = [], []
    for rank in range(ranks):
        low, high = share(n, rank, ranks)
        for worker in range(workers):
            first, last = share(high - low, worker, workers)
            own = []
            for group in blocks.groups(low + first, low + last, mixed, key):
                there = np.concatenate([np.arange(a, b) for a, b in zip(group.starts, group.stops, strict=True)])
                assert (
                    np.searchsorted(stops, group.starts, side="right")
                    == np.searchsorted(stops, group.stops - 1, side="right")
                ).all()
                assert sorted(group.order) == list(range(len(there)))
                assert len(group.starts) <= mixed
                assert max(group.stops - group.starts) <= rows
                own += there[group.order].tolist()
            assert len(own) == last - first
            seen += own
            sizes.append(len(own))
    assert sorted(seen) == list(range(n))
    assert max(sizes) - min(sizes) <= 2
    if key is None:
        assert seen == list(range(n))


def test_the_hash_permutes_and_stays_as_it_is():
    assert sorted(permutation(1000, 1, 2)) == list(range(1000))
    # Another order here would let a resumed run see rows twice.
    assert permutation(8, 0, 0).tolist() == HERE_FOR_EVER
    assert (permutation(100, 0, 1) != permutation(100, 1, 0)).any()
    halves = np.array([np.mean(permutation(1000, seed)[:500]) for seed in range(200)])
    assert abs(halves.mean() - 499.5) < 4 * 1000 / np.sqrt(12 * 500) / np.sqrt(200)


HERE_FOR_EVER = [7, 3, 2, 4, 6, 0, 5, 1]
