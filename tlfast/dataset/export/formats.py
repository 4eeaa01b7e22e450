"""The formats that a dataset can be exported to: each a function that writes all rows into a new folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from ..errors import extra
from ..read.arrow_rows import Rows, Tokens
from .bergson_index import write_index
from .hf_folder import save_to_disk, say

_WHO = "export_dataset"
_MAX_NAME = 200  # bytes of a file's name that leave room for an ending below the 255 of common filesystems


@dataclass(frozen=True)
class Format:
    """How to write a format, what it needs, and whether it is one file (named ``data`` in the folder) or a folder.

    ``write`` is given the rows, the folder to write in, and the path that what is in it will have.
    """

    write: Callable[[Rows, Path, Path], None]
    ending: str  # of the default name
    needs: tuple[tuple[str, str], ...]  # library, extra
    is_file: bool = False
    tokens: Tokens = "all"  # which points may have rows per token


def _parquet(rows: Rows, folder: Path, target: Path) -> None:
    parquet, schema = extra("pyarrow.parquet", _WHO), rows.schema()
    # Gradients hardly repeat: a dictionary of them costs time and saves nothing.
    options = {"compression": "zstd", "use_dictionary": ["source"], "write_page_checksum": True}
    with parquet.ParquetWriter(folder / "data", schema, **options) as file:
        for batch in rows.batches(schema):
            file.write_batch(batch)


def _arrow(rows: Rows, folder: Path, target: Path) -> None:
    pa, schema = extra("pyarrow", _WHO), rows.schema()
    with pa.OSFile(str(folder / "data"), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for batch in rows.batches(schema):
            file.write_batch(batch)


def _npy(rows: Rows, folder: Path, target: Path) -> None:
    names, n_rows = _file_names(list(rows.columns), rows.per_token), rows.n_rows
    if rows.per_token:
        lengths = rows.dataset[next(iter(rows.columns))].lengths()
        np.save(folder / "ids.npy", rows.dataset.ids.repeat_interleave(lengths).numpy())
        firsts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        np.save(folder / "positions.npy", (torch.arange(n_rows) - firsts).numpy())
    else:
        np.save(folder / "ids.npy", rows.dataset.ids.numpy())
    for point, column in rows.columns.items():
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=column.dtype).numpy().dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (n_rows, *column.row_shape)}
        with (folder / names[point]).open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    for part in rows.parts():
        for point, array in part.arrays.items():  # opened anew: there may be more points than file descriptors
            with (folder / names[point]).open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
    say(folder / "points.json", {"files": {names[point]: point for point in rows.columns}} | rows.provenance())


def _file_names(points: list[str], per_token: bool) -> dict[str, str]:
    """Return a file name for each point: its own where that is a safe name, otherwise its number."""
    names: dict[str, str] = {}
    taken = {"ids", *(["positions"] if per_token else [])}
    for k, point in enumerate(points):
        name = quote(point, safe="")
        if not name or name.startswith(".") or len(name) > _MAX_NAME or name.casefold() in taken:
            name = f"point-{k}"
        taken.add(name.casefold())  # some filesystems don't tell A from a
        names[point] = f"{name}.npy"
    return names


def _hf(rows: Rows, folder: Path, target: Path) -> None:
    save_to_disk(rows, folder, rows.schema())


def _lance(rows: Rows, folder: Path, target: Path) -> None:
    pa, lance, schema = extra("pyarrow", _WHO), extra("lance", _WHO, "lance"), rows.schema()
    # Lance takes a dot in a name for a field within a struct.
    names: list[str] = []
    for name in schema.names:
        plain = name.replace(".", "_")
        names.append(f"{plain}_{len(names)}" if plain in names else plain)
    renamed = pa.schema([field.with_name(name) for field, name in zip(schema, names, strict=True)], schema.metadata)
    failures: list[BaseException] = []

    def batches() -> Iterator[Any]:
        try:
            for batch in rows.batches(schema):
                yield batch.rename_columns(names).replace_schema_metadata(schema.metadata)
        except BaseException as error:
            failures.append(error)
            raise

    try:
        lance.write_dataset(pa.RecordBatchReader.from_batches(renamed, batches()), str(folder))
    except OSError:
        if failures:  # Lance makes an OSError of whatever its input raises, of Ctrl-C too
            raise failures[0] from None
        raise


FORMATS = {
    "parquet": Format(_parquet, ".parquet", (("pyarrow.parquet", "collect"),), is_file=True),
    "arrow": Format(_arrow, ".arrow", (("pyarrow", "collect"),), is_file=True),
    "npy": Format(_npy, "-npy", (("pyarrow", "collect"),)),
    "hf": Format(_hf, "-hf", (("pyarrow", "collect"), ("datasets", "hub"))),
    "lance": Format(_lance, ".lance", (("pyarrow", "collect"), ("lance", "lance"))),
    "bergson": Format(write_index, "-bergson", (("pyarrow", "collect"), ("datasets", "hub")), tokens="weights"),
}
