"""From the bytes of a fuzzer to the content of one file of a dataset, and of others that must agree with it.

The first byte of an input chooses how the others are used: as the bytes of the file, as bytes written over a part of
it, or as edits of what it says, with checksums that are right again so that they don't end the test too early.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from hostile_dataset import HostileDataset

from tlfast.dataset.format.strict_json import checksum_of
from tlfast.dataset.places.durable import crc32c

NASTY = [
    None, True, -1, 0, 1, 3, 4, 2**31, 2**53, 2**63, 10**30, 1.5, -0.0, 1e308, "", "x", "../../../etc/passwd",
    "/etc/passwd", "u000001", "data/u000000.safetensors", "rows/u000000-00000000.parquet", "F64", "BF16", "00000000",
    "\ud800", "\0", "a" * 5000, "e\u0301", [], {}, [[]], [1], [2**40, 2**40], {"a": 1}, {"__metadata__": {}},
]  # fmt: skip
DATASET, EXTENSION = "dataset.json", "plan/x000001.json"
UNIT_FILE, ROW_TABLE, COMMIT = "data/u000000.safetensors", "rows/u000000.parquet", "commits/u000000.json"
RAW, OVER, EDITS = range(3)

Files = dict[str, bytes]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys or indexes."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def edited(value: Any, edits: bytes) -> Any:
    """A JSON value after edits of two bytes each: where, and what is put there."""
    value = json.loads(json.dumps(value))
    for where, what in zip(edits[::2], edits[1::2], strict=False):
        found = list(places(value))
        if not found:
            break
        container, key = found[where % len(found)]
        if what < len(NASTY):
            container[key] = json.loads(json.dumps(NASTY[what]))
        elif what % 3 == 0 and isinstance(container, dict):
            container[f"new {what}"] = container.pop(key)
        elif what % 3 == 1:
            del container[key]
        else:  # what stands elsewhere
            other, its_key = found[what % len(found)]
            container[key] = json.loads(json.dumps(other[its_key])) if its_key in places_of(other) else None
    return value


def places_of(container: Any) -> Any:
    """The keys of a container, or its indexes."""
    return container if isinstance(container, dict) else range(len(container))


def laid_over(original: bytes, data: bytes) -> bytes:
    """``data`` but for its first four bytes, written over the original at an offset; the fourth may cut it there."""
    at = int.from_bytes(data[:3], "little") % (len(original) + 1)
    new = original[:at] + data[4:]
    return new if data[3:4] == b"\1" else new + original[len(new) :]


def signed(value: Any) -> bytes:
    """A JSON file with a checksum that is right, where it can have one."""
    if isinstance(value, dict):
        value.pop("checksum", None)
        value["checksum"] = checksum_of(value)
    return json.dumps(value, allow_nan=True).encode(errors="replace")


def commits_with(ds: HostileDataset, old: str, new: Any) -> Files:
    """The commits, naming another hash."""
    return {
        name: data.replace(f'"{old}"'.encode(), json.dumps(new).encode())
        for name, data in ds.original.items()
        if name.startswith("commits/")
    }


def dataset_json(ds: HostileDataset, how: int, data: bytes) -> Files:
    """dataset.json; edited, its hashes are right, and the commits name them."""
    if how != EDITS:
        return {DATASET: data if how == RAW else laid_over(ds.original[DATASET], data)}
    before = json.loads(ds.original[DATASET])
    value = edited(before, data)
    if isinstance(value, dict) and "config_hash" in value:
        value["config_hash"] = checksum_of(
            {key: value.get(key) for key in ("format", "version", "header", "columns", "plan")}
        )
        return {DATASET: signed(value)} | commits_with(ds, before["config_hash"], value["config_hash"])
    return {DATASET: signed(value)}


def extension(ds: HostileDataset, how: int, data: bytes) -> Files:
    """The extension of the plan; edited, its checksum is right, and the commits of its units name it."""
    if how != EDITS:
        return {EXTENSION: data if how == RAW else laid_over(ds.original[EXTENSION], data)}
    before = json.loads(ds.original[EXTENSION])
    after = signed(edited(before, data))
    value = json.loads(after)
    checksum = value.get("checksum") if isinstance(value, dict) else None
    return {EXTENSION: after} | commits_with(ds, before["checksum"], checksum)


def commit(ds: HostileDataset, how: int, data: bytes) -> Files:
    """The commit of a unit."""
    if how != EDITS:
        return {COMMIT: data if how == RAW else laid_over(ds.original[COMMIT], data)}
    return {COMMIT: json.dumps(edited(json.loads(ds.original[COMMIT]), data)).encode()}


def unit_file(ds: HostileDataset, how: int, data: bytes) -> Files:
    """A unit file, whose commit has its size and checksum."""
    original = ds.original[UNIT_FILE]
    if how == RAW:
        new = data
    elif how == OVER:
        new = laid_over(original, data)
    else:
        n_header = 8 + struct.unpack("<Q", original[:8])[0]
        header = json.dumps(edited(json.loads(original[8:n_header]), data), separators=(",", ":")).encode()
        new = struct.pack("<Q", n_header - 8) + header.ljust(n_header - 8) + original[n_header:]
    return agreeing(ds, UNIT_FILE, new)


def row_table(ds: HostileDataset, how: int, data: bytes) -> Files:
    """A row table, whose commit has its size and checksum."""
    original = ds.original[ROW_TABLE]
    new = data if how == RAW else laid_over(original, data) if how == OVER else edited_table(original, data)
    return agreeing(ds, ROW_TABLE, new)


def agreeing(ds: HostileDataset, name: str, data: bytes) -> Files:
    """A unit's file, and the commit that says the same of it."""
    said = json.loads(ds.original[COMMIT])
    for file in said["files"]:
        if file["path"] == name:
            file.update(bytes=len(data), crc32c=f"{crc32c(data):08x}")
    return {name: data, COMMIT: (json.dumps(said, indent=1) + "\n").encode()}


TABLE_EDITS: list[Callable[[pa.Table, int], pa.Table]] = [
    lambda table, k: table.drop_columns([table.column_names[k % table.num_columns]]),
    lambda table, k: table.slice(k % 5),
    lambda table, k: pa.concat_tables([table] * (k % 4)) if k % 4 else table.slice(0, 0),
    lambda table, k: table.rename_columns([*table.column_names[1:], table.column_names[0]]),
    lambda table, k: table.append_column("extra", pa.array([k] * table.num_rows)),
    lambda table, k: table.set_column(k % table.num_columns, table.column_names[k % table.num_columns],
                                      pa.nulls(table.num_rows)),
    lambda table, k: table.set_column(k % table.num_columns, table.column_names[k % table.num_columns],
                                      pa.array([[k] * k] * table.num_rows)),
    lambda table, k: table.set_column(1, "input_ids", pa.array([[0] * (k * 1_000)] * table.num_rows,
                                                               table.schema.field(1).type)),
    lambda table, k: table.set_column(2, "source", pa.array(["x" * (k * 1_000)] * table.num_rows)),
    lambda table, k: table.set_column(2, "source", pa.array(["\0\ufffd"] * table.num_rows).dictionary_encode()),
    lambda table, k: table.set_column(0, "id", pa.array(range(k, k + table.num_rows), pa.int64())),
    lambda table, k: table.replace_schema_metadata({"ARROW:schema": bytes([k] * k), "pandas": b"{" * k}),
]  # fmt: skip


def edited_table(original: bytes, edits: bytes) -> bytes:
    """A row table after edits of two bytes each, written with other settings by the last byte."""
    table = pa.parquet.read_table(io.BytesIO(original))
    for which, how in zip(edits[:8:2], edits[1:8:2], strict=False):
        with suppress(pa.ArrowException, IndexError, ZeroDivisionError, KeyError):  # what isn't there is left alone
            table = TABLE_EDITS[which % len(TABLE_EDITS)](table, how)
    last, sink = edits[-1] if edits else 0, io.BytesIO()
    codec = ("none", "zstd", "gzip", "snappy")[last % 4]
    pa.parquet.write_table(
        table, sink, compression=codec, use_dictionary=bool(last & 4), write_statistics=bool(last & 8),
        store_schema=bool(last & 16), row_group_size=1 + last % 7, version="2.6",
    )  # fmt: skip
    return sink.getvalue()


TARGETS: dict[str, Callable[[HostileDataset, int, bytes], Files]] = {
    "dataset_json": dataset_json,
    "extension": extension,
    "commit": commit,
    "unit_file": unit_file,
    "row_table": row_table,
}


def check(ds: HostileDataset, target: str, data: bytes) -> bool:
    """Read the dataset with what an input makes of it; AssertionError, or whatever it raised, if that wasn't safe."""
    files = TARGETS[target](ds, data[0] % 3 if data else RAW, data[1:])
    original = ds.original[UNIT_FILE]
    payload = 8 + struct.unpack("<Q", original[:8])[0]
    # A payload whose checksum is right as well is as good as the one that was written.
    return ds.readable(files, same=files.get(UNIT_FILE, original)[payload:] == original[payload:])


def seeds(ds: HostileDataset, target: str) -> list[bytes]:
    """Inputs to begin with: the file itself, the file cut, a byte changed, each single edit's kind."""
    name = {"dataset_json": DATASET, "extension": EXTENSION, "commit": COMMIT, "unit_file": UNIT_FILE}.get(
        target, ROW_TABLE
    )
    original = ds.original[name]
    raw = [original, original[: len(original) // 2], b"", b"\x80\x04.", b"{}", b"[" * 2000]
    over = [
        (at).to_bytes(3, "little") + b"\0" + new for at in (0, 8, 9, len(original) - 9) for new in (b"\xff" * 8, b"0")
    ]
    edits = [bytes([where, what]) for where in range(0, 40, 3) for what in range(0, 60, 5)]
    return (
        [bytes([RAW]) + data for data in raw]
        + [bytes([OVER]) + data for data in over]
        + [bytes([EDITS]) + data for data in edits]
    )
