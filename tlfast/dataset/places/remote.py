"""A dataset's folder at a URL, through fsspec: its objects are created once, by conditional put, and never replaced."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EEXIST, EIO, ENOENT, ENOSYS
from pathlib import Path
from typing import Any

from ..errors import DatasetError, dataset_error, extra
from .durable import crc32c

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_BLOCK_BYTES = 16 << 20  # per request where an object is read in pieces: long enough to hide a round trip
# S3 takes at most 10,000 parts, so 640 GiB of a unit; four parts at once are 256 MiB of memory.
_PART_BYTES, _PARTS_AT_ONCE = 64 << 20, 4
# Asking again doesn't help: the bucket isn't there, or isn't ours.
DEFINITE = (FileExistsError, FileNotFoundError, PermissionError, NotImplementedError)
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError"}  # of botocore
_PRECONDITION_FAILED = {"PreconditionFailed", "412"}  # of S3 and its like, RFC 9110
_BEHIND_THE_END = {"InvalidRange", "416"}  # so S3 answers for the first byte of an empty object
_NUMBERS = (
    (FileNotFoundError, ENOENT),
    (PermissionError, EACCES),
    (FileExistsError, EEXIST),
    (NotImplementedError, ENOSYS),
)
_BUCKETS = {"s3", "gs", "az"}  # have no folders to make; asked for one, their libraries would make a bucket
# Handed over together, and so held in memory; fsspec sends at most its own `batch_size` (128) of them at a time.
_BATCH, _BATCH_BYTES = 256, 128 << 20


def url_of(out: str | os.PathLike[str]) -> str | None:
    """Return ``out`` without a slash at its end if it is a URL, else None."""
    text = os.fspath(out)
    return text.rstrip("/") if _URL.match(text) else None


def local_path(out: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the path that a ``file://`` URL means, and anything else as it is."""
    url = url_of(out)
    match = _URL.match(url) if url else None
    return match[2] if match and match[1].lower() in ("file", "local") else out


class RemoteFolder:
    """The folder at ``url``; credentials and endpoints come from the environment alone.

    Raises:
        DatasetError: for a URL that fsspec doesn't know, or that holds credentials.
        ImportError: naming the extra, where the library for this kind of URL is missing.
        OSError: from every method, where the store fails or can't be reached.
    """

    def __init__(self, url: str, who: str) -> None:
        match = _URL.match(url)
        if match is None or not match[2].strip("/") or "::" in url:
            raise dataset_error(who, "url", "be like s3://bucket/folder", repr(url), "Name a bucket and a folder.")
        if "@" in match[2].partition("/")[0]:
            rule = "hold no credentials"
            raise dataset_error(who, "url", rule, f"{match[1]}://...@...", "Give them by the environment.")
        self.url = url.rstrip("/")
        self._who = who
        self._opened: tuple[int, Any, str] | None = None
        _ = self._fs  # a missing library is found before any work

    @property
    def _fs(self) -> Any:
        return self._filesystem()[0]

    def _filesystem(self) -> tuple[Any, str]:
        # The connections and the thread of a filesystem don't survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            fsspec = extra("fsspec", self._who, "s3")
            extra("fsspec.core", self._who, "s3")
            try:
                # No listing is kept: other processes write here too.
                found = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
            except ImportError as error:
                remedy = "Run: pip install 'tlfast[s3]', or what this kind of URL needs"
                rule = "have its library installed"
                raise ImportError(str(dataset_error(self._who, self.url, rule, str(error), remedy))) from error
            except ValueError as error:
                raise dataset_error(
                    self._who, "url", "be one that fsspec knows", str(error), "See docs/remote.md."
                ) from error
            self._opened = (os.getpid(), *found)
        return self._opened[1], self._opened[2]

    def _path(self, name: str) -> str:
        return f"{self._filesystem()[1].rstrip('/')}/{name}" if name else self._filesystem()[1]

    def sizes(self, folder: str = "") -> dict[str, int | None]:
        """Return the bytes of each object directly in ``folder``, None for a folder in it; {} where nothing is."""
        with self._asked(folder):
            try:
                entries = self._fs.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return {}
        own = self._path(folder).strip("/")
        return {
            entry["name"].rstrip("/").rpartition("/")[2]: int(entry["size"]) if entry["type"] == "file" else None
            for entry in entries
            if entry["name"].strip("/") != own
        }

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._asked(name):
            return bool(self._fs.exists(self._path(name)))

    def size(self, name: str) -> int:
        """Return the bytes of an object; FileNotFoundError where there is none."""
        with self._asked(name):
            info = self._fs.info(self._path(name))
            if info["type"] != "file":
                raise FileNotFoundError(ENOENT, "no object")
            return int(info["size"])

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes ``start`` up to ``stop`` of an object, fewer where it ends before."""
        return next(self.read_many([(name, start, stop)]))

    def read_many(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
        """Yield what `read` returns of each (name, start, stop), many of them on their way at once."""
        for part in _batches(ranges):
            with self._asked(part[0][0]):
                paths, starts = [self._path(name) for name, _, _ in part], [start for _, start, _ in part]
                found = self._fs.cat_ranges(paths, starts, [stop for _, _, stop in part], on_error="return")
            for (name, _, _), data in zip(part, found, strict=True):
                with self._asked(name):
                    if isinstance(data, Exception):
                        if _code(data) in _BEHIND_THE_END:
                            data = b""
                        else:
                            raise data
                yield bytes(data)

    def holds(self, name: str, n_bytes: int, crc: int) -> bool:
        """Whether the object has this many bytes and this CRC32C: it is read for that."""
        if self.size(name) != n_bytes:
            return False
        found = 0
        for start in range(0, n_bytes, _BLOCK_BYTES):
            found = crc32c(self.read(name, start, min(n_bytes, start + _BLOCK_BYTES)), found)
        return found == crc

    def create(self, name: str, data: bytes) -> bool:
        """Make an object, whole or not at all; False where there is one of this name."""
        return self._create(name, lambda path: self._fs.pipe_file(path, data, mode="create"))

    def create_from(self, name: str, file: Path) -> bool:
        """The same with the content of a local file."""
        parts: dict[str, int] = {}
        if "s3" in _protocols(self._fs):  # s3fs would hold ten parts of 50 MB at once
            parts = {"chunksize": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
        return self._create(name, lambda path: self._fs.put_file(str(file), path, mode="create", **parts))

    def _create(self, name: str, put: Callable[[str], Any]) -> bool:
        with self._asked(name):
            try:
                if not _BUCKETS & _protocols(self._fs):
                    self._fs.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)
                put(self._path(name))
            except FileExistsError:
                return False
            except OSError as error:
                if _code(error) in _PRECONDITION_FAILED:
                    return False
                raise
            return True

    def replace(self, name: str, data: bytes) -> None:
        """Make an object, or replace it: for what only people read."""
        with self._asked(name):
            self._fs.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with self._asked(name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def refuses_to_replace(self) -> bool:
        """Whether `create` leaves an object alone that is there: asked by trying it on one of our own."""
        name = f".tlfast-{secrets.token_hex(8)}.tmp"
        try:
            return self.create(name, b"first") and not self.create(name, b"other") and self.read(name, 0, 9) == b"first"
        finally:
            self.remove(name)

    @contextmanager
    def _asked(self, name: str) -> Iterator[None]:
        """Every failure of the store as an OSError that names the object."""
        try:
            yield
        except (ImportError, DatasetError):
            raise
        except Exception as error:  # botocore, aiohttp and others have no OSError for a connection that failed
            if isinstance(error, OSError) and self.url in str(error):
                raise
            number = getattr(error, "errno", None) or next((n for kind, n in _NUMBERS if isinstance(error, kind)), EIO)
            if type(error).__name__ in _NO_CREDENTIALS:
                number = EACCES
            text = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
            raise OSError(
                number, text, f"{self.url}/{name}".rstrip("/")
            ) from error  # of the kind that belongs to the number


def _batches(ranges: Sequence[tuple[str, int, int]]) -> Iterator[list[tuple[str, int, int]]]:
    batch: list[tuple[str, int, int]] = []
    n_bytes = 0
    for name, start, stop in ranges:
        if batch and (len(batch) == _BATCH or n_bytes + stop - start > _BATCH_BYTES):
            yield batch
            batch, n_bytes = [], 0
        batch.append((name, start, stop))
        n_bytes += stop - start
    if batch:
        yield batch


def _protocols(filesystem: Any) -> set[str]:
    protocol: Any = filesystem.protocol
    return {protocol} if isinstance(protocol, str) else set(protocol)


def _code(error: BaseException) -> Any:
    """The code in the answer of an S3 server, which s3fs keeps beside its own exception."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return response.get("Error", {}).get("Code")
