"""What an index of bergson knows of its examples (data.hf), as the examples of a dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import dataset_error, extra
from ..format.kept_fields import TAKEN, TAKEN_BEGINNINGS
from ..format.plan import FieldExample
from .bergson_store import WHO, Index

_OURS = ("input_ids", "source", "start", "length")  # columns that say what an example says under these names
_READ_ROWS = 1024  # at a time
_SOURCE = "data.hf"  # of an example that names no other


class Examples:
    """The examples of an index, by number.

    Attributes:
        kept: the types of the columns that are kept, by name.
        left_out: the columns that a row table can't hold: nested, with nulls, or named as what it says anyway.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._data, self.kept, self.left_out = None, {}, []
        self._ours: set[str] = set()
        if not (index.folder / "data.hf").is_dir():
            return
        datasets = extra("datasets", WHO, "hub")
        self._data = datasets.load_from_disk(str(index.folder / "data.hf")).with_format("arrow")
        if len(self._data) != index.n_items:
            rule, got = f"hold {index.n_items} examples, as info.json says", len(self._data)
            raise dataset_error(WHO, str(index.folder / "data.hf"), rule, got, "Build it anew.")
        for name, column in zip(self._data.column_names, self._data.data.columns, strict=True):
            kind = _kind(column)
            if name in _OURS and kind == {"input_ids": "list<int64>", "source": "string"}.get(name, "int64"):
                self._ours.add(name)
            elif kind is None or name in TAKEN or name.startswith(TAKEN_BEGINNINGS):
                self.left_out.append(name)
            else:
                self.kept[name] = kind

    def read(self, start: int, stop: int) -> list[FieldExample]:
        """Return examples ``start`` to ``stop``, whose length is that of their rows where these are per token."""
        offsets = self._index.offsets
        table: dict[str, list[Any]] = {}
        if self._data is not None:
            wanted = [*self._ours, *self.kept]
            table = {name: self._data[start:stop].column(name).to_pylist() for name in wanted}
        n = stop - start
        ids = table.get("input_ids", [()] * n)
        lengths = table.get("length", [len(tokens) for tokens in ids])
        if offsets is not None:
            counts = np.diff(offsets[start : stop + 1]).tolist()
            if not {"length", "input_ids"} & self._ours:  # an example of one token has no row, either
                lengths = [count + 1 if count else 0 for count in counts]
            self._check_counts(start, counts, lengths)
        sources, starts = table.get("source", [_SOURCE] * n), table.get("start", range(start, stop))
        return [
            FieldExample(
                start + k, ids[k], sources[k], starts[k], lengths[k], kept={name: table[name][k] for name in self.kept}
            )
            for k in range(n)
        ]

    def _check_counts(self, start: int, counts: list[int], lengths: list[int]) -> None:
        for k, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            if count != max(length - 1, 0):
                rule = f"have {max(length - 1, 0)} rows, one less than tokens"
                raise dataset_error(WHO, f"example {start + k}", rule, count, "Build the index anew.")

    def describe(self) -> dict[str, Any]:
        """What a header says of them: how many tokens, and a digest of what is known of each."""
        digest, n_tokens = hashlib.sha256(), 0
        for example in self._all():
            said = [example.source, example.start, example.length, list(example.input_ids), example.kept]
            digest.update(json.dumps(said, sort_keys=True).encode())
            n_tokens += example.length
        return {"tokens": n_tokens, "sha256": digest.hexdigest(), "skipped": []}

    def _all(self) -> Iterator[FieldExample]:
        for start in range(0, self._index.n_items, _READ_ROWS):
            yield from self.read(start, min(start + _READ_ROWS, self._index.n_items))


def _kind(column: Any) -> str | None:
    """The type that a row table keeps an Arrow column as; None where it can't."""
    pa = extra("pyarrow", WHO)
    kind, form = column.type, "{}"
    if column.null_count:
        return None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if any(chunk.flatten().null_count for chunk in column.chunks):
            return None
        kind, form = kind.value_type, "list<{}>"
    names: Mapping[str, Any] = {
        "bool": pa.types.is_boolean, "string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        "int64": lambda t: pa.types.is_integer(t) and t != pa.uint64(), "float64": pa.types.is_floating,
    }  # fmt: skip
    name = next((name for name, fits in names.items() if fits(kind)), None)
    return None if name is None or (name == "string" and form != "{}") else form.format(name)
