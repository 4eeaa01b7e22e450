"""Examples kept beside the units of a dataset that isn't complete: a run that continues it needn't make them again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import struct
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from ..dataset.errors import DatasetError
from ..dataset.format.description import EXAMPLES
from ..dataset.places.durable import PendingFile, open_regular
from .data_files import DataFiles, version_of
from .examples import AskedAgain, ExampleReader, Refetched, Spooled, is_map_style
from .items import singles
from .skipped import BadExamples
from .spool import Examples, Spool

_FORM = 1  # of the file, and of how examples are made where no version of a library says it
_MADE_BY = ("tlfast", "transformers", "tokenizers", "jinja2", "datasets", "pyarrow", "torch", "numpy")
_N, _END = struct.Struct("<Q"), struct.Struct("<Q32s")  # behind all else: the bytes of JSON, SHA-256 of what is before
_BLOCK = 4 << 20
_VOUCHED = "fingerprint"  # of data that the caller vouches for


class MadeAnew:
    """Examples that are made anew each time that they are gone through, and never all held.

    Args:
        make: begins to make them, also many at once as `Texts`.
        origin: what they are made of, and how; None: that can't be known.
        may_be_unused: fields that they have beside what the user gave, of which a loss may make nothing.
        earlier: gives the same as earlier versions made them; None: as they are made now.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        origin: Origin | None = None,
        may_be_unused: Sequence[str] = (),
        earlier: Callable[[], MadeAnew] | None = None,
    ) -> None:
        self._make, self.origin, self.may_be_unused, self.earlier = make, origin, may_be_unused, earlier

    def __iter__(self) -> Iterator[Any]:
        return singles(self._make())

    def together(self) -> Iterator[Any]:
        """Yield the same, those that are made many at once as `Texts`."""
        return self._make()


@dataclass(frozen=True)
class Origin:
    """What examples are made of.

    Args:
        files: all that is read.
        how: whatever else decides what they become, as JSON.
        bad: has what was left out while they were made.
        notes: what else is known of the data once they were read: a list that whoever makes the examples fills.
    """

    files: DataFiles
    how: Mapping[str, Any]
    bad: BadExamples
    notes: list[str]


class StoredExamples:
    """A file in the folder of a dataset with all that was read of its data.

    It is taken only where the same bytes would be read in the same way, by the same versions of all that reads them,
    and where it is whole. The examples in it are compared with those of the dataset as others are.

    Args:
        folder: of the dataset.
        data: the examples.
        origin: of them.
        reader: reads them.
        bad: what is left out.
    """

    def __init__(self, folder: Path, data: Any, origin: Origin, reader: ExampleReader, bad: BadExamples) -> None:
        self._path, self._data, self._origin, self._reader, self._bad = folder / EXAMPLES, data, origin, reader, bad
        self._restored = False

    def restore(self) -> bool:
        """Whether the file is there and right: then the reader has its examples."""
        with suppress(OSError, DatasetError), os.fdopen(open_regular(self._path, "collect")[0], "rb") as file:
            said = _checked(file, self._key())
            self._restored = said is not None and self._take(file, said)
        return self._restored

    def write(self) -> None:
        """Make the file, unless it is there; nothing where the data were changed while they were read."""
        if self._restored or (_VOUCHED in self._origin.how and not self._gives_fields()):
            return
        with suppress(OSError):  # it is a courtesy, for which a disk may be too full
            key = self._key()
            if not self._origin.files.unchanged():  # now that they are hashed: those bytes were read
                return
            said, numbers, spools = self._parts()
            said["key"] = key
            said["numbers"] = {name: [getattr(v, "typecode", "B"), len(v)] for name, v in numbers.items()}
            said["spools"] = {name: [spool.ends[-1], len(spool.ends)] for name, spool in spools.items()}
            text = json.dumps(said).encode()
            sizes = [len(values) * getattr(values, "itemsize", 1) for values in numbers.values()]
            sizes += [spool.ends[-1] + len(spool.ends) * spool.ends.itemsize for spool in spools.values()]
            with PendingFile(self._path, sum(sizes) + len(text) + _END.size) as file:
                digest = hashlib.sha256()
                for data in chain(_pieces(numbers, spools), (text, _N.pack(len(text)))):
                    digest.update(data)
                    file.append(data)
                file.append(digest.digest())
                file.rename()

    def _gives_fields(self) -> bool:
        """Whether examples are fields alone, which the data give again: tokens are read as soon as a file of them."""
        source = self._reader.source
        return isinstance(source, Refetched) and not source.rules.has_tokens

    def remove(self) -> None:
        """The dataset is complete."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _key(self) -> str:
        reader = self._reader
        read = (reader.least, reader.longest, list(reader.keep), reader.pad_id, sorted(reader.apart), reader.padded)
        libraries = {name: version_of(name) for name in _MADE_BY}
        made = [_FORM, sys.byteorder, libraries, self._origin.how, read, self._origin.files.sha256()]
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Spool]]:
        reader = self._reader
        said, numbers, spools = reader.examples.to_parts()
        said |= {"skipped": self._bad.skipped, "notes": self._origin.notes, "rules": reader.rules.to_json()}
        if isinstance(reader.source, Spooled):
            spools["fields"] = reader.source.spool
        elif isinstance(reader.source, Refetched):
            numbers |= reader.source.to_parts()
            more, given = self._data.to_parts() if isinstance(self._data, AskedAgain) else ({}, {})
            said["again"] = {"said": more, "spools": list(given)}
            spools |= given
        return said, numbers, spools

    def _take(self, file: BinaryIO, said: Mapping[str, Any]) -> bool:
        """Whether what is in the file could be taken; else the reader knows nothing of it."""
        reader, numbers, spools = self._reader, dict[str, Any](), dict[str, Spool]()
        file.seek(0)
        for name, (code, n) in said["numbers"].items():
            numbers[name] = bytearray(file.read(n)) if code == "B" else _array(file, code, n)
        for name, (n_bytes, n) in said["spools"].items():
            ends = _array(file, "q", n)
            spools[name] = Spool.lying_in(file.fileno(), file.tell(), ends)
            file.seek(n_bytes, os.SEEK_CUR)
        if "again" in said and not self._recall(said["again"], numbers, spools):
            return False
        reader.rules.recall(said["rules"])
        if "fields" in spools:
            reader.source = Spooled(reader.rules, spools.pop("fields"))
        reader.examples = Examples.of_parts(said, numbers, spools)
        if reader.padded:
            reader.rules.check(reader.keep)
        self._origin.bad.forget()
        self._bad.recall(said["skipped"])
        self._origin.notes[:] = said["notes"]
        return True

    def _recall(self, said: Mapping[str, Any], numbers: dict[str, Any], spools: dict[str, Spool]) -> bool:
        """Whether the data give their examples again without making all; what is theirs of the numbers is taken out."""
        reader, given = self._reader, {name: spools.pop(name) for name in said["spools"]}
        if isinstance(self._data, AskedAgain) and not self._data.recall(said["said"], given):
            return False
        source = Refetched(reader.rules, self._data, reader.reading(self._data))
        source.recall({name: numbers.pop(name) for name in Refetched.NUMBERS})
        if not isinstance(self._data, AskedAgain) and not source.gives_again(len(numbers["starts"])):
            return False
        reader.source = source
        return True


def _pieces(numbers: Mapping[str, Any], spools: Mapping[str, Spool]) -> Iterator[Any]:
    """The bytes of all numbers, and of all spools with the ends of their pieces; none of them empty."""
    for values in (values for values in numbers.values() if len(values)):
        yield memoryview(values).cast("B")
    for spool in spools.values():
        yield memoryview(spool.ends).cast("B")
        yield from spool.blocks()


def _array(file: BinaryIO, code: str, n: int) -> array[Any]:
    values = array(code)
    values.frombytes(file.read(n * values.itemsize))
    return values


def _checked(file: BinaryIO, key: str) -> dict[str, Any] | None:
    """What a file says of itself; None where it was made of something else, or isn't whole."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        return None
    file.seek(size - _END.size)
    n, wanted = _END.unpack(file.read(_END.size))
    left = size - _END.size
    if n > left:
        return None
    file.seek(left - n)
    text, digest, left = file.read(n), hashlib.sha256(), left + _N.size
    if key.encode() not in text:  # all of it is hashed only then
        return None
    file.seek(0)
    while left > 0 and (block := file.read(min(_BLOCK, left))):
        digest.update(block)
        left -= len(block)
    if left or digest.digest() != wanted:
        return None
    said: dict[str, Any] = json.loads(text)
    return said if said["key"] == key else None


def stored_in(
    folder: str | os.PathLike[str], data: Any, reader: ExampleReader, bad: BadExamples, fingerprint: str = ""
) -> StoredExamples | None:
    """Where the examples of data may lie; None where nobody knows of what they are made.

    ``fingerprint`` is what the caller vouches for; "": nothing.
    """
    origin = getattr(data, "origin", None)
    if isinstance(origin, Origin):
        origin = origin if reader.fields is None else None
    else:
        origin = _vouched(data, reader, bad, fingerprint) if fingerprint and is_map_style(data) else None
    return (
        None if origin is None or reader.size is not None else StoredExamples(Path(folder), data, origin, reader, bad)
    )


def _vouched(data: Any, reader: ExampleReader, bad: BadExamples, fingerprint: str) -> Origin:
    """The origin of data that give any item again, and are the same wherever this text is given."""
    how = {
        _VOUCHED: fingerprint, "n": len(data), "type": type(data).__qualname__, "machine": platform.machine(),
        "fields": None if reader.fields is None else sorted((name, repr(key)) for name, key in reader.fields.items()),
        "bad_examples": bad.policy, "skipped": list(bad.skipped),
        "decoders": {name: version_of(name) for name in ("pillow", "torchvision", "soundfile")},
    }  # fmt: skip
    return Origin(DataFiles([]), how, bad, [])
