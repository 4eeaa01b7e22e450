"""Records with images or sounds become examples: their files are kept as bytes, and decoded when they are asked for."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..dataset.read.conditions import Condition
from ..errors import broken_rule
from .examples import AskedAgain
from .fields import BadField, Fields, as_value, is_unicode, packed, unpacked
from .media import Processor, media_bytes
from .records import Record
from .skipped import BadExamples
from .spool import Folder, Spool
from .tokenizing import Columns, Unusable, check_first, label_of

_WHO = "collect"
# What spools have of a file: where it lies, also of one that made no example; or all of it, or which record has it.
_PATH, _BYTES, _LEFT_OUT = b"\0", b"\1", b"\2"


@dataclass
class MediaExamples(AskedAgain):
    """The examples of records, each a mapping of what the processor makes, ``labels`` and what is kept.

    Args:
        columns: what they are made of.
        records: begins to read them.
        processor: makes the fields.
        bad: takes what can't be used.
        root: the folder that the sources of the records are relative to.
        label_ids: numbers of labels that are texts, by name.
        encode: (text) -> its tokens, of a response; None: there is none.
        longest: the most tokens of a response; None: any number.
        condition: a text that a record must fulfil to be taken.
        most: examples, at most; None: all.
        spool_in: where the bytes of files lie that aren't files of their own.
        place: where the records are from, for messages.
        origin: `tlfast.collecting.stored_examples.Origin` of all but the files that have a path; None: not known.
    """

    columns: Columns
    records: Callable[[], Iterator[Record]]
    processor: Processor
    bad: BadExamples
    root: Path
    label_ids: Mapping[str, int] = field(default_factory=dict)
    encode: Callable[[str], list[int]] | None = None
    longest: int | None = None
    condition: str = ""
    most: int | None = None
    spool_in: Folder = None
    place: str = ""
    origin: Any = None
    unused: list[str] = field(default_factory=list)  # columns that nobody asks for; known once the first is read

    def __post_init__(self) -> None:
        self._condition = Condition(self.condition, _WHO) if self.condition else None
        self._begin()

    def _begin(self) -> None:
        self._small, self._files, self._asked = Spool(self.spool_in), Spool(self.spool_in), Spool(self.spool_in)
        self._sha256 = hashlib.sha256()  # of the files with a path that were asked for, in that order

    @property
    def wanted(self) -> set[str]:
        """The columns that are asked for."""
        return {*self.columns.names, *(self._condition.names if self._condition is not None else ())}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.bad.forget()
        self._begin()
        n_records = 0
        for record in self.records():
            if not n_records:
                check_first(record, self.columns, self._condition, ())
                self.unused[:] = [name for name in record.values if name not in self.wanted]
            n_records += 1
            try:
                if not self._is_wanted(record):
                    continue
                small, file = self._small_of(record), self._file_of(record)
                small = {name: as_value(value, name) for name, value in small.items()}
                made = self._first_made(file, n_records - 1) | small
            except (Unusable, BadField) as reason:
                got, remedy = f"{reason}, in record {record.start} of {record.source}", "Correct it, or leave it out."
                error = broken_rule(_WHO, "a record", "be an example", got, remedy)
                self.bad.leave_out(record.source, record.start, str(reason), error)
                continue
            self._small.add(packed(small))
            self._files.add(file)
            yield made | {"source": record.source, "start": record.start}
            if len(self._small) == self.most:
                break
        if not len(self._small):
            got = f"{n_records} records without" if n_records else f"no records in {self.place!r}"
            got += f"; {self.bad}" if len(self.bad) else ""
            raise ValueError(broken_rule(_WHO, "dataset", "hold examples", got, "Look at the columns, and the filter."))

    def __getitem__(self, number: int) -> Fields:
        data = self._data_of(self._files[number])
        return self.processor.fields(data, self.columns.of_media) | unpacked(self._small[number])

    def _data_of(self, file: bytes) -> bytes:
        return file[1:] if file[:1] == _BYTES else media_bytes(file[1:].decode(), Path(), self.columns.of_media)

    def _first_made(self, file: bytes, n_record: int) -> Fields:
        """What a file becomes that is read the first time; what else than records this is made of is remembered."""
        if file[:1] == _BYTES:
            made = self.processor.fields(file[1:], self.columns.of_media)
            self._asked.add(_BYTES + n_record.to_bytes(8, "little"))
            return made
        data: bytes | None = None
        kind = _LEFT_OUT
        try:
            data = self._data_of(file)
            made = self.processor.fields(data, self.columns.of_media)
            kind = _PATH
        finally:
            self._sha256.update(_told(file[1:], data))
            self._asked.add(kind + file[1:])
        return made

    # What a run that continues knows without decoding.

    def to_parts(self) -> tuple[dict[str, Any], dict[str, Spool]]:
        """The files with a path by their bytes, others by the number of their record; and what is small."""
        return {"sha256": self._sha256.hexdigest()}, {"asked": self._asked, "small": self._small}

    def recall(self, said: Mapping[str, Any], spools: Mapping[str, Spool]) -> bool:
        """The files are read and none is decoded; False where one is another than then. Records must be the same."""
        asked, files, digest = spools["asked"], Spool(self.spool_in), hashlib.sha256()
        records = enumerate(self.records())  # they are read where they have files in them, and else not
        for k in range(len(asked)):
            entry = asked[k]
            kind, name = entry[:1], entry[1:]
            data: bytes | None = None
            try:
                if kind == _BYTES:
                    number = int.from_bytes(name, "little")
                    files.add(next(self._file_of(record) for n, record in records if n == number))
                    continue
                data = self._data_of(_PATH + name)
            except StopIteration:
                return False
            except BadField:  # it couldn't be read then, either
                pass
            digest.update(_told(name, data))
            if kind == _PATH:
                files.add(_PATH + name)
        if digest.hexdigest() != said["sha256"]:
            return False
        self._small, self._files, self._asked, self._sha256 = spools["small"], files, asked, digest
        return True

    # The parts of a record.

    def _small_of(self, record: Record) -> dict[str, Any]:
        """What is small of a record, as it stands there."""
        columns = self.columns
        small: dict[str, Any] = {name: record.values.get(name) for name in columns.keep}
        lacks = next((name for name in columns.keep if small[name] is None), None)
        if lacks is not None:
            raise Unusable(f"no {lacks}, which is to be kept")
        if columns.label:
            label = label_of(record.values.get(columns.label), self.label_ids, columns.label)
            small["labels"] = np.array(label, np.int64) if isinstance(label, array) else label
        elif self.encode is not None:
            small["labels"] = self._response(record.values.get(columns.response))
        return small

    def _file_of(self, record: Record) -> bytes:
        """The file of a record: by its path where it has one, else its bytes."""
        value, folder = record.values.get(self.columns.of_media), (self.root / record.source).parent
        if isinstance(value, Mapping) and value.get("bytes") is None:
            value = value.get("path")
        if isinstance(value, str) and value and is_unicode(value):
            return _PATH + str((folder / value).absolute()).encode()
        return _BYTES + media_bytes(value, folder, self.columns.of_media)

    def _response(self, text: Any) -> Any:
        if not isinstance(text, str):
            raise Unusable(f"{self.columns.response} is a {type(text).__name__}, no text")
        tokens = self.encode(text) if self.encode is not None else []
        if self.longest is not None and len(tokens) > self.longest:
            raise Unusable(f"{len(tokens)} tokens, more than {self.longest}")
        if not tokens:
            raise Unusable(f"no token in {self.columns.response}")
        return np.array(array("i", tokens), np.int64)

    def _is_wanted(self, record: Record) -> bool:
        if self._condition is None:
            return True
        try:
            return bool(self._condition(dict(record.values)))
        except (ValueError, KeyError) as error:
            raise Unusable(f"the filter fails: {' '.join(str(error).split())[:120]}") from None


def _told(path: bytes, data: bytes | None) -> bytes:
    """What is hashed of a file that was asked for; ``data`` is None where it couldn't be read."""
    seen = b"none" if data is None else hashlib.sha256(data).digest()
    return b"%d;%b%b;" % (len(path), path, seen)
