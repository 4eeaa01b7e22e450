"""The formats that a dataset can be exported to: each a function that writes all rows into a new folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from ..errors import extra
from ..read.arrow_rows import Rows

_WHO = "export_dataset"
_ONE_ARROW_FILE = "data-00000-of-00001.arrow"
_MAX_NAME = 200  # bytes of a file's name that leave room for an ending below the 255 of common filesystems


@dataclass(frozen=True)
class Format:
    """How to write a format, what it needs, and whether it is one file (named ``data`` in the folder) or a folder."""

    write: Callable[[Rows, Path], None]
    ending: str  # of the default name
    needs: tuple[tuple[str, str], ...]  # library, extra
    is_file: bool = False


def _parquet(rows: Rows, folder: Path) -> None:
    parquet, schema = extra("pyarrow.parquet", _WHO), rows.schema()
    # Gradients hardly repeat: a dictionary of them costs time and saves nothing.
    options = {"compression": "zstd", "use_dictionary": ["source"], "write_page_checksum": True}
    with parquet.ParquetWriter(folder / "data", schema, **options) as file:
        for batch in rows.batches(schema):
            file.write_batch(batch)


def _arrow(rows: Rows, folder: Path) -> None:
    pa, schema = extra("pyarrow", _WHO), rows.schema()
    with pa.OSFile(str(folder / "data"), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for batch in rows.batches(schema):
            file.write_batch(batch)


def _npy(rows: Rows, folder: Path) -> None:
    names = _file_names(list(rows.columns))
    np.save(folder / "ids.npy", rows.dataset.ids.numpy())
    for point, column in rows.columns.items():
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=column.dtype).numpy().dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (len(rows), *column.row_shape)}
        with (folder / names[point]).open("xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
    for part in rows.parts():
        for point, array in part.arrays.items():  # opened anew: there may be more points than file descriptors
            with (folder / names[point]).open("ab") as file:
                file.write(np.ascontiguousarray(array).data)
    _say(folder / "points.json", {"files": {names[point]: point for point in rows.columns}} | rows.provenance())


def _file_names(points: list[str]) -> dict[str, str]:
    """Return a file name for each point: its own where that is a safe name, otherwise its number."""
    names: dict[str, str] = {}
    taken = {"ids"}
    for k, point in enumerate(points):
        name = quote(point, safe="")
        if not name or name.startswith(".") or len(name) > _MAX_NAME or name.casefold() in taken:
            name = f"point-{k}"
        taken.add(name.casefold())  # some filesystems don't tell A from a
        names[point] = f"{name}.npy"
    return names


def _hf(rows: Rows, folder: Path) -> None:
    _save_to_disk(rows, folder, rows.schema())


def _save_to_disk(rows: Rows, folder: Path, schema: Any) -> None:
    """Write what `datasets.load_from_disk` reads; its own save_to_disk wants the data in its cache first."""
    pa, datasets = extra("pyarrow", _WHO), extra("datasets", _WHO, "hub")
    features = datasets.Features.from_arrow_schema(schema)
    stored = features.arrow_schema
    with pa.OSFile(str(folder / _ONE_ARROW_FILE), "wb") as sink, pa.ipc.new_stream(sink, stored) as file:
        for batch in rows.batches(schema):
            file.write_table(pa.Table.from_batches([batch]).cast(stored))
    said = rows.provenance()
    datasets.DatasetInfo(description=json.dumps(said), features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": _ONE_ARROW_FILE}],
        "_fingerprint": said["config_hash"][:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    _say(folder / "state.json", state)


def _lance(rows: Rows, folder: Path) -> None:
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


def _bergson(rows: Rows, folder: Path) -> None:
    """Write the index of bergson 2: gradients.bin is [rows, all points side by side] of one dtype.

    ``dtype`` in info.json, a structured one, is what its versions before 2 read.
    """
    dtypes = [torch.empty(0, dtype=column.dtype).numpy().dtype for column in rows.columns.values()]
    base = np.result_type(*dtypes)
    sizes = {point: prod(column.row_shape) for point, column in rows.columns.items()}
    with (folder / "gradients.bin").open("xb") as file:
        for part in rows.parts():
            flat = [array.reshape(len(array), -1) for array in part.arrays.values()]
            file.write(np.ascontiguousarray(np.concatenate(flat, axis=1, dtype=base)).data)
    formats = [f"({size},){base.str}" for size in sizes.values()]
    info = {
        "attribute_tokens": False,
        "num_items": len(rows),
        "num_grads": len(rows),
        "grad_sizes": sizes,
        "base_dtype": base.name,
        "dtype": {"names": list(sizes), "formats": formats, "itemsize": base.itemsize * sum(sizes.values())},
        "tlfast": rows.provenance(),
    }
    _say(folder / "info.json", info)
    # What its Attributor opens beside them: no projection, no normalizers, no Hessians.
    (folder / "processor_config.yaml").write_text("projection_dim: null\n", encoding="utf-8")
    for name in ("normalizers", "hessians", "hessians_eigen"):
        torch.save({}, folder / f"{name}.pth")
    (folder / "data.hf").mkdir()
    examples_only = Rows(rows.dataset, [], who=_WHO, verify=False)  # which was done for the rows
    _save_to_disk(examples_only, folder / "data.hf", examples_only.schema())


def _say(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


FORMATS = {
    "parquet": Format(_parquet, ".parquet", (("pyarrow.parquet", "collect"),), is_file=True),
    "arrow": Format(_arrow, ".arrow", (("pyarrow", "collect"),), is_file=True),
    "npy": Format(_npy, "-npy", (("pyarrow", "collect"),)),
    "hf": Format(_hf, "-hf", (("pyarrow", "collect"), ("datasets", "hub"))),
    "lance": Format(_lance, ".lance", (("pyarrow", "collect"), ("lance", "lance"))),
    "bergson": Format(_bergson, "-bergson", (("pyarrow", "collect"), ("datasets", "hub"))),
}
