"""Ranges of objects: whatever they are, each goes to its own memory, and near ones share a request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shared_filesystem import SharedFileSystem

from tlfast.dataset import DatasetError
from tlfast.dataset.places import remote_store
from tlfast.dataset.places.remote_store import RemoteStore

SIZE = 300
OBJECTS = {name: bytes((k * step + len(name)) % 251 for k in range(SIZE)) for name, step in (("a", 1), ("b", 3))}
RANGES = st.lists(
    st.tuples(st.sampled_from(sorted(OBJECTS)), st.integers(0, SIZE), st.integers(0, 60)).filter(
        lambda asked: asked[1] + asked[2] <= SIZE
    ),
    max_size=12,
)


def stored(folder):
    """A store with the two objects."""
    store = RemoteStore(f"shared:/{folder}/store")
    for name, data in OBJECTS.items():
        store.folder.create(name, data)
    return store


@given(asked=RANGES)
def test_every_range_gets_its_bytes(tmp_path_factory, asked):
    folder = tmp_path_factory.getbasetemp() / "ranges"
    store, reads = stored(folder), []
    files = {name: store.open(name, "test") for name in OBJECTS}
    targets = [bytearray(b"\xff" * n_bytes) for _, _, n_bytes in asked]
    gap, longest, before = remote_store._GAP_BYTES, remote_store._REQUEST_BYTES, SharedFileSystem.before
    remote_store._GAP_BYTES, remote_store._REQUEST_BYTES = 16, 64
    SharedFileSystem.before = staticmethod(lambda call, path: reads.append(call))
    try:
        store.fill([(files[name], at, memoryview(t)) for (name, at, _), t in zip(asked, targets, strict=True)], "test")
    finally:
        remote_store._GAP_BYTES, remote_store._REQUEST_BYTES = gap, longest
        SharedFileSystem.before = staticmethod(before)
    for (name, at, n_bytes), target in zip(asked, targets, strict=True):
        assert bytes(target) == OBJECTS[name][at : at + n_bytes]
    assert reads.count("cat") <= len(asked)


def test_near_ranges_share_a_request_and_a_cut_object_is_an_error(url, tmp_path, monkeypatch):
    store, reads = stored(tmp_path), []
    file, target = store.open("a", "test"), bytearray(40)
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(lambda call, path: reads.append(call)))
    store.fill([(file, at, memoryview(target)[at : at + 10]) for at in (30, 0, 10, 20)], "test")
    assert bytes(target) == OBJECTS["a"][:40]
    assert reads == ["cat"]
    (tmp_path / "store" / "a").write_bytes(b"short")
    with pytest.raises(DatasetError, match=r"must have 40 bytes, got 5\. It was cut while it was being read"):
        store.fill([(file, 0, memoryview(target))], "test")
