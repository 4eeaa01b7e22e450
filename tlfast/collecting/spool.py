"""Examples on disk: in memory are a few numbers of each, and what is asked for is read again."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from typing import Any, overload

from ..dataset.format.plan import Example, FieldExample

Folder = str | os.PathLike[str] | None

_IN_MEMORY = 4 << 20  # bytes of a spool that need no file
_AT_ONCE = 1024  # examples read together
_BUFFER = 1 << 16  # bytes that are written together
_BLOCK = 4 << 20  # bytes of a spool read together
DIGEST_BYTES = 16


class _Region:
    """A file that others may read, too, each from where it wants."""

    def __init__(self, fd: int) -> None:
        self._fd, self._at = os.dup(fd), 0
        weakref.finalize(self, os.close, self._fd)

    def seek(self, at: int) -> None:
        self._at = at

    def read(self, n: int) -> bytes:
        return os.pread(self._fd, n, self._at)


class Spool:
    """Bytes that are appended, and read again in any order: in memory while few, then in a file without a name.

    Args:
        folder: where the file lies, which goes with this process; None: where temporary files lie.
    """

    def __init__(self, folder: Folder = None) -> None:
        self._file: Any = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=None if folder is None else os.fspath(folder))  # noqa: SIM115 (as long as what it is for)
        weakref.finalize(self, self._file.close)
        self._new = bytearray()  # what isn't in the file yet
        self._begin = 0  # where its first byte lies in the file
        self.ends = array("q", [0])  # of each piece; the first begins at 0

    @classmethod
    def lying_in(cls, fd: int, begin: int, ends: array[int]) -> Spool:
        """Pieces that lie in an open file from ``begin`` on; nothing can be added."""
        spool = cls.__new__(cls)
        spool._file, spool._begin, spool._new, spool.ends = _Region(fd), begin, bytearray(), ends
        return spool

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, data: bytes | memoryview) -> None:
        """Append a piece."""
        self._new += data
        self.ends.append(self.ends[-1] + len(data))
        if len(self._new) > _BUFFER:
            self._flush()

    def add_all(self, pieces: Sequence[bytes]) -> None:
        """Append each of these."""
        self._new += b"".join(pieces)
        self.ends.extend(islice(accumulate(map(len, pieces), initial=self.ends[-1]), 1, None))
        if len(self._new) > _BUFFER:
            self._flush()

    def _flush(self) -> None:
        if self._new:
            self._file.seek(self.ends[-1] - len(self._new))
            self._file.write(self._new)
            self._new.clear()

    def read(self, start: int, stop: int) -> bytes:
        """The pieces ``start`` to ``stop``, behind each other."""
        first, last = self.ends[start], self.ends[stop]
        if first == last:
            return b""
        self._flush()
        self._file.seek(self._begin + first)
        data: bytes = self._file.read(last - first)
        return data

    def blocks(self) -> Iterator[bytes]:
        """All of its bytes, in order."""
        self._flush()
        for start in range(0, self.ends[-1], _BLOCK):
            self._file.seek(self._begin + start)
            yield self._file.read(min(_BLOCK, self.ends[-1] - start))

    def __getitem__(self, k: int) -> bytes:
        return self.read(k, k + 1)


def lengths_of(examples: Sequence[Example]) -> Iterator[int]:
    """The tokens of each example."""
    return examples.lengths() if isinstance(examples, Examples) else (example.length for example in examples)


class _Columns:
    """What is known of each example, by its number."""

    def __init__(self, folder: Folder) -> None:
        self.tokens, self.kept = Spool(folder), Spool(folder)
        self.starts, self.sources = array("q"), array("q")
        self.names: list[str] = []  # of the sources
        self.numbers: dict[str, int] = {}  # of the names
        self.digests = bytearray()
        self.hashes: dict[tuple[int, int], str] = {}  # of the examples from one number up to another

    def number_of(self, source: str) -> int:
        """Of a source, which is known from now on."""
        number = self.numbers.setdefault(source, len(self.names))
        if number == len(self.names):
            self.names.append(source)
        return number


class Examples(Sequence[Example]):
    """The examples ``start`` to ``stop`` of all that were added, numbered from 0: a slice of them is such a part, too.

    Examples of tokens alone are `Example`s, others `FieldExample`s; all of one list are the one or the other.

    Args:
        folder: as of `Spool`.

    Example:
        >>> from tlfast.collecting.spool import Examples
        >>> examples = Examples()
        >>> for tokens in ([5, 6, 7], [8, 9]):
        ...     examples.add(array("i", tokens), "a.txt", 0)
        >>> examples[1].id, list(examples[1].input_ids), [e.length for e in examples[:2]]
        (1, [8, 9], [3, 2])
    """

    def __init__(self, folder: Folder = None) -> None:
        self._columns, self._start, self._stop = _Columns(folder), 0, 0

    def add(self, tokens: array[int], source: str, start: int, kept: Any = None, digest: bytes = b"") -> None:
        """Append an example: its tokens, int32, and where they are from; of one with fields what is kept, and a digest.

        Only to what is no slice.
        """
        columns = self._columns
        columns.tokens.add(tokens.tobytes())
        columns.starts.append(start)
        columns.sources.append(columns.number_of(source))
        if digest:
            columns.digests += digest
            columns.kept.add(json.dumps(kept).encode() if kept else b"")
        columns.hashes.clear()
        self._stop += 1

    def add_all(self, tokens: Sequence[bytes], source: str, starts: Sequence[int], digests: Sequence[bytes]) -> None:
        """Append examples of one source, of which nothing is kept: the bytes of each one's tokens, and its digest.

        Without fields there are no ``digests``. Only to what is no slice.
        """
        columns = self._columns
        columns.tokens.add_all(tokens)
        columns.starts.extend(starts)
        columns.sources.extend([columns.number_of(source)] * len(tokens))
        if digests:
            columns.digests += b"".join(digests)
            columns.kept.add_all([b""] * len(digests))
        columns.hashes.clear()
        self._stop += len(tokens)

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, k: int) -> Example: ...

    @overload
    def __getitem__(self, k: slice) -> Sequence[Example]: ...

    def __getitem__(self, k: int | slice) -> Example | Sequence[Example]:
        found = range(self._start, self._stop)[k]
        if isinstance(found, int):
            return self._between(found, found + 1)[0]
        if found.step != 1:
            return [self._between(number, number + 1)[0] for number in found]
        part = Examples.__new__(Examples)
        part._columns, part._start, part._stop = self._columns, found.start, max(found.start, found.stop)
        return part

    def __iter__(self) -> Iterator[Example]:
        starts = range(self._start, self._stop, _AT_ONCE)
        return chain.from_iterable(self._between(k, min(k + _AT_ONCE, self._stop)) for k in starts)

    def lengths(self) -> Iterator[int]:
        """The tokens of each, without reading them."""
        ends = self._columns.tokens.ends
        return ((ends[k + 1] - ends[k]) // 4 for k in range(self._start, self._stop))

    def sha256(self) -> str:
        """SHA-256 of all tokens, sources and starts, and of the digests where there are any; found once."""
        columns, part = self._columns, (self._start, self._stop)
        if part not in columns.hashes:
            digest = hashlib.sha256()
            for start in range(*part, _AT_ONCE):
                digest.update(b"".join(self._told(start, min(start + _AT_ONCE, self._stop))))
            columns.hashes[part] = digest.hexdigest()
        return columns.hashes[part]

    def _told(self, start: int, stop: int) -> Iterator[bytes]:
        """What is hashed of examples, for each behind the other: where it is from, its tokens and its digest."""
        columns = self._columns
        ends, data = columns.tokens.ends, columns.tokens.read(start, stop)
        first = ends[start]
        for k in range(start, stop):
            begin, end = ends[k] - first, ends[k + 1] - first
            yield f"{columns.names[columns.sources[k]]}\0{columns.starts[k]} {(end - begin) // 4};".encode()
            yield data[begin:end]
            if columns.digests:
                yield bytes(columns.digests[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES])

    def to_parts(self) -> tuple[dict[str, Any], dict[str, array[int] | bytearray], dict[str, Spool]]:
        """All that was added, to be kept: what JSON says of it, numbers of each example, and bytes of each."""
        columns = self._columns
        numbers: dict[str, array[int] | bytearray] = {
            "starts": columns.starts,
            "sources": columns.sources,
            "digests": columns.digests,
        }
        return {"names": columns.names}, numbers, {"tokens": columns.tokens, "kept": columns.kept}

    @classmethod
    def of_parts(
        cls, said: Mapping[str, Any], numbers: Mapping[str, array[int] | bytearray], spools: Mapping[str, Spool]
    ) -> Examples:
        """The examples of which `to_parts` was told."""
        made = cls.__new__(cls)
        made._columns = columns = _Columns.__new__(_Columns)
        columns.names, columns.numbers, columns.hashes = list(said["names"]), {}, {}
        vars(columns).update(numbers)
        vars(columns).update(spools)
        made._start, made._stop = 0, len(columns.tokens)
        return made

    def _between(self, start: int, stop: int) -> list[Example]:
        columns = self._columns
        ends, data = columns.tokens.ends, memoryview(columns.tokens.read(start, stop))
        made: list[Example] = []
        for k in range(start, stop):
            tokens = array("i")
            tokens.frombytes(data[ends[k] - ends[start] : ends[k + 1] - ends[start]])
            source, begins = columns.names[columns.sources[k]], columns.starts[k]
            if columns.digests:
                digest = bytes(columns.digests[k * DIGEST_BYTES : (k + 1) * DIGEST_BYTES])
                kept = json.loads(columns.kept[k] or b"{}")
                made.append(FieldExample(k, tokens, source, begins, len(tokens), kept, digest))
            else:
                made.append(Example(k, tokens, source, begins, len(tokens)))
        return made
