"""A dataset at a URL, as whoever reads it sees it: names, sizes, small files, ranges of large ones."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import dataset_error
from .remote import RemoteFolder

# Ranges are fetched together where fetching what lies between takes less than another request: some 10 ms of latency
# at 100 MB/s or more of each connection. A request stays short enough to have many of them on their way.
_GAP_BYTES = 1 << 20
_REQUEST_BYTES = 8 << 20
_WHO = "open_dataset"


class RemoteFile:
    """An object of a dataset."""

    def __init__(self, name: str, size: int, folder: RemoteFolder) -> None:
        self.name = name
        self.size = size
        self._folder = folder

    def read(self, offset: int, n_bytes: int) -> bytes:
        """Return up to ``n_bytes`` bytes from ``offset`` on."""
        return self._folder.read(self.name, offset, min(self.size, offset + n_bytes)) if offset < self.size else b""

    def past_cache(self) -> None:
        """There is no cache."""

    def map(self) -> mmap.mmap:
        """Objects can't be mapped: RemoteStore.maps is False."""
        raise NotImplementedError(f"{self._folder.url}/{self.name} can't be mapped")

    def cached(self, offset: int) -> bool:
        """Nothing is."""
        return False

    def will_need(self, offset: int, n_bytes: int) -> None:
        """Nothing is fetched ahead."""


@dataclass(frozen=True)
class RemoteStore:
    """The folder at an fsspec URL."""

    url: str
    maps = False

    @cached_property
    def folder(self) -> RemoteFolder:
        """The objects themselves."""
        return RemoteFolder(self.url, _WHO)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self.url,)  # connections are not pickled

    def where(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.url}/{name}" if name else self.url

    def network(self) -> bool:
        """It always is."""
        return True

    def names(self, folder: str, who: str) -> list[str]:
        """Return the names in a folder."""
        return list(self.folder.sizes(folder))

    def sizes(self, folder: str, who: str, optional: bool = False) -> dict[str, int | None]:
        """Return the size of each object in a folder, None for a folder; no objects are an empty folder."""
        return self.folder.sizes(folder)

    def read(self, name: str, who: str, limit: int) -> bytes:
        """Return an object's bytes."""
        return next(self.read_all([name], who, limit))

    def read_all(self, names: Sequence[str], who: str, limit: int) -> Iterator[bytes]:
        """Yield each object's bytes, many on their way at once."""
        found = self.folder.read_many([(name, 0, limit + 1) for name in names])
        for name in names:
            try:
                data = next(found)
            except FileNotFoundError as error:
                rule = "be a readable file, not a link"
                raise dataset_error(who, self.where(name), rule, "no such object", "Run `tlfast verify`.") from error
            if len(data) > limit:
                raise dataset_error(
                    who, self.where(name), f"have at most {limit} bytes", "more", "Run `tlfast verify`."
                )
            yield data

    def open(self, name: str, who: str) -> RemoteFile:
        """Open an object: asks for its size."""
        try:
            return RemoteFile(name, self.folder.size(name), self.folder)
        except FileNotFoundError as error:
            rule = "be a readable file, not a link"
            raise dataset_error(who, self.where(name), rule, "no such object", "Run `tlfast verify`.") from error

    def fill(self, ranges: Sequence[tuple[Any, int, memoryview]], who: str) -> None:
        """Read the ranges, those that lie near one another by one request, many requests at once."""
        requests = list(_merged(ranges))
        found = self.folder.read_many([(group[0][0].name, start, stop) for start, stop, group in requests])
        for (start, stop, group), data in zip(requests, found, strict=True):
            if len(data) < stop - start:
                rule, remedy = f"have {stop} bytes", "It was cut while it was being read; run `tlfast verify`."
                raise dataset_error(who, self.where(group[0][0].name), rule, start + len(data), remedy)
            for _, offset, target in group:
                target[:] = data[offset - start : offset - start + len(target)]


def _merged(
    ranges: Sequence[tuple[Any, int, memoryview]],
) -> Iterator[tuple[int, int, list[tuple[Any, int, memoryview]]]]:
    """Yield (start, stop, ranges) for each request."""
    group: list[tuple[Any, int, memoryview]] = []
    start = stop = 0
    for item in sorted(ranges, key=lambda item: (item[0].name, item[1])):
        file, offset, target = item
        end = offset + len(target)
        if group and (file.name != group[0][0].name or offset - stop > _GAP_BYTES or end - start > _REQUEST_BYTES):
            yield start, stop, group
            group = []
        if not group:
            start = stop = offset
        group.append(item)
        stop = max(stop, end)
    if group:
        yield start, stop, group
