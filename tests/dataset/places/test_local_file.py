"""A file of this machine: what of it is in memory, reading past that, asking ahead."""

import mmap
import os

import pytest

from tlfast.dataset.places import local_file
from tlfast.dataset.places.local_file import LocalFile
from tlfast.dataset.places.store import LocalStore


def test_a_file_says_what_is_in_memory(tmp_path):
    (tmp_path / "f").write_bytes(bytes(8192))
    file = LocalStore(tmp_path).open("f", "test")
    file.read(0, 8192)
    assert file.cached(0)
    assert file.cached(8000)
    file.will_need(0, 4096)


def test_a_filesystem_that_cannot_say(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x")
    file = LocalStore(tmp_path).open("f", "test")
    for error, cached in ((OSError(95, "no"), True), (BlockingIOError(11, "no"), False)):

        def refuse(*args, error=error):
            raise error

        monkeypatch.setattr(os, "preadv", refuse)
        assert file.cached(0) is cached


def test_a_local_disk_is_asked_before_it_is_waited_for(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(content := os.urandom(700))
    store, done = LocalStore(tmp_path), []
    file = store.open("f", "test")
    monkeypatch.setattr("tlfast.dataset.places.store._ASKED_BYTES", 250)
    monkeypatch.setattr(LocalFile, "will_need", lambda self, offset, n: done.append(("asked", offset // 100)))
    monkeypatch.setattr(LocalFile, "cached", lambda self, offset: in_memory)
    in_memory = False
    real = LocalFile.read_into
    monkeypatch.setattr(
        LocalFile, "read_into", lambda self, at, part: done.append(("read", at // 100)) or real(self, at, part)
    )
    memory = bytearray(700)
    parts = [(file, at, memoryview(memory)[at : at + 100]) for at in range(0, 700, 100)]
    store.fill(parts[:4], "test")
    assert done == [("asked", 0), ("asked", 1), ("asked", 2), ("read", 0), ("asked", 3), ("read", 1),
                    ("read", 2), ("read", 3)]  # fmt: skip
    done.clear()
    store.fill(parts[4:5], "test")
    assert done == [("read", 4)], "a single range is waited for at once"
    done.clear()
    in_memory = True
    store.fill(parts[5:], "test")
    assert done == [("read", 5), ("read", 6)], "nobody asks for what is there"
    assert memory == content


@pytest.mark.parametrize("taken", [True, False])
def test_reading_past_the_cache(tmp_path, monkeypatch, taken):
    if not taken:
        monkeypatch.setattr(local_file, "set_direct", lambda fd, wanted: not wanted)
    content = os.urandom(3 * 4096 + 5)
    (tmp_path / "f").write_bytes(content)
    file = LocalFile("f", os.open(tmp_path / "f", os.O_RDONLY), len(content))
    file.past_cache()
    assert file._direct is (taken and local_file.set_direct(file.fileno(), True))
    memory = mmap.mmap(-1, 4 * 4096)
    assert file.read_into(4096, memoryview(memory)[:4096]) == 4096
    assert file.read_into(2 * 4096, memoryview(memory)[4096 : 4096 + 4101]) == 4101, "the end is no whole page"
    assert file.read_into(0, memoryview(memory)[9000:9010]) == 10
    assert memory[: 4096 + 4101] == content[4096:]
    assert memory[9000:9010] == content[:10]


def test_other_errors_of_the_disk_are_raised(tmp_path):
    file = LocalFile("f", os.open(tmp_path, os.O_RDONLY), 0)
    file.past_cache()
    with pytest.raises(IsADirectoryError):
        file.read_into(0, memoryview(bytearray(4096)))
