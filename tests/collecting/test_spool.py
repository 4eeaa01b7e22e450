"""Examples on disk: they come back as they were, in parts and one by one, and memory holds a few numbers of each."""

from __future__ import annotations

import tracemalloc
from array import array

import pytest

from tlfast.collecting import spool
from tlfast.collecting.spool import Examples, Spool
from tlfast.dataset.format.plan import Example, FieldExample


def tokens(k):
    return array("i", range(k, k + k % 7))


@pytest.mark.parametrize("in_memory", [1, 50, 1 << 20])
@pytest.mark.parametrize("with_fields", [False, True])
def test_examples_come_back_as_they_were(tmp_path, monkeypatch, in_memory, with_fields):
    monkeypatch.setattr(spool, "_IN_MEMORY", in_memory)
    monkeypatch.setattr(spool, "_AT_ONCE", 8)
    found, wanted = Examples(tmp_path), []
    for k in range(30):
        known = (tokens(k), f"{k % 3}.txt", k)
        if with_fields:
            kept, digest = {"n": k} if k % 2 else {}, bytes([k]) * 16
            found.add(*known, kept, digest)
            wanted.append(FieldExample(k, *known, k % 7, kept, digest))
        else:
            found.add(*known)
            wanted.append(Example(k, *known, k % 7))
        assert found[k // 2] == wanted[k // 2]  # read between two that are added
    assert list(found) == wanted
    assert (len(found), found[-1], found[3]) == (30, wanted[-1], wanted[3])
    for part in (slice(5, 21), slice(-4, None), slice(7, 3), slice(0, 30, 4)):
        assert list(found[part]) == wanted[part]
    assert list(found[5:21][2:4]) == wanted[7:9]
    assert found[5:21][-1] == wanted[20]
    assert list(found[4:9].lengths()) == [k % 7 for k in range(4, 9)]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(IndexError):
        found[30]


def test_memory_holds_a_few_numbers_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(spool, "_IN_MEMORY", 1)
    found, one = Examples(tmp_path), array("i", range(200))
    found.add(one, "a", 0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for k in range(5000):
            found.add(one, "a", k)
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert held < 64 * 5000, "of each an end, a start, a source and an end of what is kept, 8 bytes each, which grow"
    assert sum(found.lengths()) == 5001 * 200


def test_pieces_of_bytes():
    pieces = Spool()
    for data in (b"ab", b"", b"cde"):
        pieces.add(data)
    assert (len(pieces), pieces[0], pieces[1], pieces[2], pieces.read(0, 3)) == (3, b"ab", b"", b"cde", b"abcde")
