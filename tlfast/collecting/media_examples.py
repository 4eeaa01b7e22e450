"""Records with images or sounds become examples: their files are kept as bytes, and decoded when they are asked for."""

from __future__ import annotations

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
_PATH, _BYTES = b"\0", b"\1"  # what the spool has of a file: where it lies, or all of it


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
    unused: list[str] = field(default_factory=list)  # columns that nobody asks for; known once the first is read

    def __post_init__(self) -> None:
        self._condition = Condition(self.condition, _WHO) if self.condition else None
        self._small, self._files = Spool(self.spool_in), Spool(self.spool_in)

    @property
    def wanted(self) -> set[str]:
        """The columns that are asked for."""
        return {*self.columns.names, *(self._condition.names if self._condition is not None else ())}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.bad.forget()
        self._small, self._files = Spool(self.spool_in), Spool(self.spool_in)
        n_records = 0
        for record in self.records():
            if not n_records:
                check_first(record, self.columns, self._condition, ())
                self.unused[:] = [name for name in record.values if name not in self.wanted]
            n_records += 1
            try:
                if not self._is_wanted(record):
                    continue
                small, file = self._parts(record)
                made = self._made(small, file)
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
        return self._made(unpacked(self._small[number]), self._files[number])

    def _made(self, small: Fields, file: bytes) -> Fields:
        name = self.columns.of_media
        data = media_bytes(file[1:].decode(), Path(), name) if file[:1] == _PATH else file[1:]
        return self.processor.fields(data, name) | small

    def _parts(self, record: Record) -> tuple[Fields, bytes]:
        """What is small of a record, and its file: by its path where it has one, else its bytes."""
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
        value, folder = record.values.get(columns.of_media), (self.root / record.source).parent
        if isinstance(value, Mapping) and value.get("bytes") is None:
            value = value.get("path")
        if isinstance(value, str) and value and is_unicode(value):
            file = _PATH + str((folder / value).absolute()).encode()
        else:
            file = _BYTES + media_bytes(value, folder, columns.of_media)
        return {name: as_value(value, name) for name, value in small.items()}, file

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
