"""Examples on disk: in memory are a few numbers of each, and what is asked for is read again."""

from __future__ import annotations

import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, overload

from ..dataset.format.plan import Example, FieldExample

Folder = str | os.PathLike[str] | None

_IN_MEMORY = 4 << 20  # bytes of a spool that need no file
_NOTHING = pickle.dumps({})
_AT_ONCE = 1024  # examples read together
DIGEST_BYTES = 16


class Spool:
    """Bytes that are appended, and read again in any order: in memory while few, then in a file without a name.

    Args:
        folder: where the file lies, which goes with this process; None: where temporary files lie.
    """

    def __init__(self, folder: Folder = None) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=None if folder is None else os.fspath(folder))  # noqa: SIM115 (as long as what it is for)
        weakref.finalize(self, self._file.close)
        self._at_end = True
        self.ends = array("q", [0])  # of each piece; the first begins at 0

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, data: bytes | memoryview) -> None:
        """Append a piece."""
        if not self._at_end:
            self._file.seek(self.ends[-1])
            self._at_end = True
        self._file.write(data)
        self.ends.append(self.ends[-1] + len(data))

    def read(self, start: int, stop: int) -> bytes:
        """The pieces ``start`` to ``stop``, behind each other."""
        first, last = self.ends[start], self.ends[stop]
        if first == last:
            return b""
        self._at_end = False
        self._file.seek(first)
        return self._file.read(last - first)

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
        number = columns.numbers.setdefault(source, len(columns.names))
        if number == len(columns.names):
            columns.names.append(source)
        columns.sources.append(number)
        if digest:
            columns.digests += digest
            columns.kept.add(pickle.dumps(kept, protocol=5) if kept else b"")
        self._stop += 1

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
                kept = pickle.loads(columns.kept[k] or _NOTHING)
                made.append(FieldExample(k, tokens, source, begins, len(tokens), kept, digest))
            else:
                made.append(Example(k, tokens, source, begins, len(tokens)))
        return made
