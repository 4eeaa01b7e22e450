"""Files that examples are made of, known by their bytes: hashed before they are read, looked at again afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_BLOCK = 1 << 20


class DataFiles:
    """Some files, as they are now.

    Args:
        files: each with the name by which its examples remember it.

    Example:
        >>> import pathlib, tempfile
        >>> from tlfast.collecting.data_files import DataFiles
        >>> path = pathlib.Path(tempfile.mkdtemp(), "a.jsonl")
        >>> _ = path.write_text("{}")
        >>> files = DataFiles([("a.jsonl", path)])
        >>> len(files.sha256()), files.unchanged()
        (64, True)
        >>> _ = path.write_text("[]")
        >>> files.unchanged()
        False
    """

    def __init__(self, files: Sequence[tuple[str, str | os.PathLike[str]]]) -> None:
        self._files = [(name, Path(path)) for name, path in files]
        self._then = self._seen()
        self._hash = ""

    @property
    def n_bytes(self) -> int:
        """Of all of them."""
        return sum(size for _, _, size, *_ in self._then)

    def sha256(self) -> str:
        """SHA-256 of their names and bytes, in their order; it is found once."""
        if not self._hash:
            digest = hashlib.sha256()
            for (name, path), (_, _, size, *_) in zip(self._files, self._then, strict=True):
                digest.update(f"{name!r} {size};".encode())
                with open(path, "rb", buffering=0) as file:
                    block = bytearray(_BLOCK)
                    while n := file.readinto(block):
                        digest.update(memoryview(block)[:n])
            self._hash = digest.hexdigest()
        return self._hash

    def unchanged(self) -> bool:
        """Whether nobody has written to them since they were first looked at, before they were hashed."""
        try:
            return self._seen() == self._then
        except OSError:
            return False

    def _seen(self) -> list[tuple[int, ...]]:
        found = [path.stat() for _, path in self._files]
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in found]


def version_of(name: str) -> str:
    """The version of a library that reads them, "" where it isn't installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
