"""Where a dataset's files lie, as whoever reads it sees them: names, sizes, small files, ranges of large ones."""

from __future__ import annotations

import mmap
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

from ..errors import dataset_error
from .durable import open_regular, read_small
from .local_file import IN_FLIGHT, LocalFile, threads
from .mounts import on_network
from .remote import local_path, url_of
from .remote_store import RemoteStore

_ASKED_BYTES = 64 << 20  # more would push out of memory what was got for others


class OpenFile(Protocol):
    """A file of a dataset, open for reading; closed when nothing refers to it."""

    name: str  # within the dataset: "data/u000000.safetensors"
    size: int  # bytes, when it was opened

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset`` on; fewer only at the end of the file."""
        ...

    def past_cache(self) -> None:
        """Read from the disk itself from now on, where that can be; ranges are then best whole pages."""
        ...

    def map(self) -> mmap.mmap:
        """Map the whole file for reading; only where the store ``maps``, as the next two."""
        ...

    def cached(self, offset: int) -> bool:
        """Whether the byte at ``offset`` is in memory; True where the system doesn't say."""
        ...

    def will_need(self, offset: int, n_bytes: int) -> None:
        """Let the system begin to read a range into memory."""
        ...


Range = tuple[OpenFile, int, memoryview]
"""A file, the offset of a range in it, and the memory that it goes to: as many bytes as that has."""


class Store(Protocol):
    """A place that holds a dataset. All names are relative to it, with ``/``; ``who`` is who speaks in an error.

    A store can be pickled, and is equal to another one of the same place.
    """

    maps: bool  # whether its files can be mapped into memory

    def where(self, name: str) -> str:
        """Return the whole path or URL of a file, for people to read."""
        ...

    def network(self) -> bool:
        """Whether a read waits for a network: many at once are then worth their threads, and mapping is not safe."""
        ...

    def names(self, folder: str, who: str) -> list[str]:
        """Return the names in a folder: one listing."""
        ...

    def sizes(self, folder: str, who: str, optional: bool = False) -> dict[str, int | None]:
        """Return the size of each file in a folder, None for what is no regular file: one listing.

        DatasetError where there is no such folder, unless it is ``optional``: it holds nothing then.
        """
        ...

    def read(self, name: str, who: str, limit: int) -> bytes:
        """Return a file's bytes; DatasetError where it is absent, no regular file, or above ``limit`` bytes."""
        ...

    def read_all(self, names: Sequence[str], who: str, limit: int) -> Iterator[bytes]:
        """Yield what `read` returns of each name, in this order; many may be on their way at once."""
        ...

    def open(self, name: str, who: str) -> OpenFile:
        """Open a file for ranged reads; DatasetError where it is absent or no regular file."""
        ...

    def fill(self, ranges: Sequence[Range], who: str) -> None:
        """Read all ranges, many at once, each into its memory; DatasetError where a file ends before its range."""
        ...


def as_store(place: str | PathLike[str] | Store) -> Store:
    """Return the store of a folder's path; a store is returned as it is."""
    if not isinstance(place, (str, PathLike)):
        return place
    url = url_of(place)
    return RemoteStore(url) if url else LocalStore(Path(local_path(place)))


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine. Links, devices and folders in the place of files are refused."""

    folder: Path
    maps = True

    def where(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)

    def network(self) -> bool:
        """Whether the folder lies on a network filesystem."""
        return on_network(self.folder)

    def names(self, folder: str, who: str) -> list[str]:
        """Return the names in a folder."""
        fd = open_folder(self.folder / folder, who)
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)

    def sizes(self, folder: str, who: str, optional: bool = False) -> dict[str, int | None]:
        """Return the size of each file in a folder, None for links, folders and devices."""
        if optional and not os.path.lexists(self.folder / folder):
            return {}
        fd = open_folder(self.folder / folder, who)
        try:
            return {name: _size(name, fd) for name in os.listdir(fd)}
        finally:
            os.close(fd)

    def read(self, name: str, who: str, limit: int) -> bytes:
        """Return a file's bytes."""
        return read_small(self.folder / name, who, limit)

    def read_all(self, names: Sequence[str], who: str, limit: int) -> Iterator[bytes]:
        """Yield each file's bytes."""
        root = str(self.folder)  # a Path for each of 10,000 names would take as long as reading them
        return (read_small(f"{root}/{name}", who, limit) for name in names)

    def open(self, name: str, who: str) -> LocalFile:
        """Open a file."""
        return LocalFile(name, *open_regular(self.folder / name, who))

    def fill(self, ranges: Sequence[Range], who: str) -> None:
        """Read the ranges by pread: over a network ``IN_FLIGHT`` at once, else as the system gets them into memory."""
        if not self.network():
            self._fill(_with_readahead(ranges), who)
            return
        waiting = list(_not_at_once(ranges))
        parts = [waiting[k::IN_FLIGHT] for k in range(min(IN_FLIGHT, len(waiting)))]
        if len(parts) <= 1:
            self._fill(waiting, who)
            return
        for _ in threads().map(lambda part: self._fill(part, who), parts):
            pass

    def _fill(self, ranges: Iterable[Range], who: str) -> None:
        for file, offset, target in ranges:
            assert isinstance(file, LocalFile)
            if file.read_into(offset, target) < len(target):
                rule = f"have {offset + len(target)} bytes"
                remedy = "It was cut while it was being read; run `tlfast verify`."
                raise dataset_error(who, self.where(file.name), rule, os.fstat(file.fileno()).st_size, remedy)


def _not_at_once(ranges: Sequence[Range]) -> Iterator[Range]:
    """Read what is in memory, and yield the ranges that aren't: for what needs no waiting, threads are a burden."""
    misses = 0
    for tried, (file, offset, target) in enumerate(ranges):
        if misses > 16 + tried // 4:  # most would be asked for twice
            yield from ranges[tried:]
            return
        assert isinstance(file, LocalFile)
        if not file.read_at_once(offset, target):
            misses += 1
            yield file, offset, target


def _with_readahead(ranges: Sequence[Range]) -> Iterator[Range]:
    """Yield ranges; the system has been asked for those that follow, so that the disk has many at once to do.

    Not if a few of them, at even distances, are all in memory: asking takes as long as a small read.
    """
    if len(ranges) < 2 or all(file.cached(offset) for file, offset, _ in ranges[:: max(1, len(ranges) // 16)]):
        yield from ranges
        return
    coming, n_bytes = deque[Range](), 0
    for file, offset, target in ranges:
        file.will_need(offset, len(target))
        coming.append((file, offset, target))
        n_bytes += len(target)
        while n_bytes > _ASKED_BYTES:
            n_bytes -= len(coming[0][2])
            yield coming.popleft()
    yield from coming


def _size(name: str, folder: int) -> int | None:
    try:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:  # a temporary file of a writer, gone since the listing
        return None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def open_folder(path: Path, who: str) -> int:
    """Open a folder of a dataset, for listing: its descriptor; DatasetError for a link to elsewhere, or no folder."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        got = "a link" if path.is_symlink() else "no folder" if not path.is_dir() else os.strerror(error.errno or 0)
        remedy = "Restore the dataset, or start a new one."
        raise dataset_error(who, str(path), "be a folder", got, remedy) from error
