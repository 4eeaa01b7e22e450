"""The index of bergson 2: gradients.bin and the files that its readers open beside it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error, extra
from ..format.layout import WEIGHT
from ..read.arrow_rows import PART_BYTES, Rows
from ..read.decoding import text_of
from .bergson_projection import check_shapes, module_names, processor_of
from .hf_folder import save_to_disk, say

_WHO = "export_dataset"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_TEXT = "text"  # the column of data.hf that its `query` prints


def write_index(rows: Rows, folder: Path, target: Path) -> None:
    """Write the index: gradients.bin is [rows, all points side by side] of one dtype.

    Rows of weights are what bergson's own are: its queries go on from there, with the settings of the projection in
    processor_config.yaml and the model in config.yaml. Of other rows it knows no more than that they are rows.
    """
    said = {point: rows.dataset.column(point) for point in rows.columns}
    processor, names = None, {point: point for point in said}
    if any(column.of == WEIGHT for column in said.values()):
        headers = [source.header for source in rows.dataset.sources]
        processor = processor_of(headers)
        check_shapes(said, processor["projection_dim"])
        names = module_names(said, [header.get("model") for header in headers])
    n_rows = _write_gradients(rows, folder)
    _write_info(rows, folder, names, n_rows)
    for name in ("normalizers", "hessians", "hessians_eigen"):  # what its Attributor opens: there are none
        torch.save({}, folder / f"{name}.pth")
    tokenizer = None
    if processor is None:
        (folder / "processor_config.yaml").write_text("projection_dim: null\n", encoding="utf-8")
    else:
        tokenizer = rows.dataset.tokenizer()
        yaml = extra("yaml", _WHO)
        for name, settings in (
            ("processor_config", processor),
            ("config", _run_config(rows, processor, tokenizer, target)),
        ):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (folder / "data.hf").mkdir()
    _write_examples(rows, folder / "data.hf", tokenizer)


def _write_gradients(rows: Rows, folder: Path) -> int:
    """Write gradients.bin, and offsets.npy for rows per token; return how many rows there are."""
    base, n_rows = _base_dtype(rows), 0
    ends = [np.zeros(1, np.int64)]
    with (folder / "gradients.bin").open("xb") as file:
        for arrays, counts in _token_parts(rows) if rows.per_token else ((part.arrays, None) for part in rows.parts()):
            flat = [array.reshape(len(array), -1) for array in arrays.values()]
            file.write(np.ascontiguousarray(np.concatenate(flat, axis=1, dtype=base)).data)
            n_rows += len(flat[0])
            if counts is not None:
                ends.append(ends[-1][-1] + np.cumsum(counts, dtype=np.int64))
    if rows.per_token:
        np.save(folder / "offsets.npy", np.concatenate(ends))
    return n_rows


def _base_dtype(rows: Rows) -> np.dtype[Any]:
    """The one dtype of the file, which holds the values of each point exactly."""
    return np.result_type(*(torch.empty(0, dtype=column.dtype).numpy().dtype for column in rows.columns.values()))


def _token_parts(rows: Rows) -> Iterator[tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]]:
    """Yield the rows of some examples, without that of each one's last token, and how many each has.

    The last token predicts nothing, and bergson has no row for it: what stands there must be zeros.
    """
    dataset = rows.dataset
    for first, end in zip(*(bounds.tolist() for bounds in dataset.unit_bounds), strict=True):
        dataset.verify_rows(first, end)
        counts = dataset.examples.arrow(np.arange(first, end)).column("length").to_numpy().astype(np.int64)
        most = max(1, PART_BYTES // max(1, rows.row_bytes * int(counts.max(initial=1))))
        for start in range(first, end, most):
            here = np.arange(start, min(start + most, end))
            lengths = counts[here - first]
            last = np.cumsum(lengths)[lengths > 0] - 1
            kept = np.ones(int(lengths.sum()), bool)
            kept[last] = False
            arrays = {}
            for point, column in rows.columns.items():
                values = dataset[point].joined(here)[0].to(column.dtype).numpy()
                if values[last].any():
                    rule = "be zero at the last token of each example, which predicts nothing"
                    got = f"another row in examples {start} to {here[-1]}"
                    raise dataset_error(_WHO, f"point {point!r}", rule, got, "Export it to npy.")
                arrays[point] = values[kept]
            yield arrays, np.maximum(lengths - 1, 0)
            rows.written(len(here))


def _write_info(rows: Rows, folder: Path, names: dict[str, str], n_rows: int) -> None:
    """Write info.json; ``dtype`` in it, a structured one, is what bergson's versions before 2 read."""
    base, sizes = _base_dtype(rows), {names[point]: prod(column.row_shape) for point, column in rows.columns.items()}
    formats = [f"({size},){base.str}" for size in sizes.values()]
    info = {
        "attribute_tokens": rows.per_token,
        "num_items": len(rows),
        "num_grads": n_rows,
        "grad_sizes": sizes,
        "base_dtype": base.name,
        "dtype": {"names": list(sizes), "formats": formats, "itemsize": base.itemsize * sum(sizes.values())},
        "tlfast": rows.provenance(),
    }
    say(folder / "info.json", info)


def _run_config(rows: Rows, processor: dict[str, Any], tokenizer: Any, target: Path) -> dict[str, Any]:
    """Return config.yaml: from it `query` learns which model it loads, and where the texts are.

    A model that the dataset doesn't name is named "", which no library loads: `query` then needs its --model.
    """
    model = rows.dataset.sources[0].header.get("model")
    model = model if isinstance(model, dict) else {}
    dtypes = model.get("dtypes") or [""]
    index = {
        "run_path": str(target),
        "model": str(getattr(tokenizer, "name_or_path", "") or model.get("name", "")),
        "precision": _PRECISIONS.get(dtypes[0], "auto") if len(dtypes) == 1 else "auto",
        "data": {"dataset": str(target / "data.hf"), "split": "train", "prompt_column": _TEXT},
        "attribute_tokens": rows.per_token,
    }
    index |= {key: value for key, value in processor.items() if key != "projection_version"}
    index["projection_dim"] = processor["projection_dim"] or 0
    return {"steps": [{"build": {"index_cfg": index, "preprocess_cfg": {"unit_normalize": False}}}]}


def _write_examples(rows: Rows, folder: Path, tokenizer: Any) -> None:
    """Write data.hf: what is known of the examples, and their texts where the tokenizer is here."""
    examples_only = Rows(rows.dataset, [], who=_WHO, verify=False)  # which was done for the rows
    schema = examples_only.schema()
    if tokenizer is None or _TEXT in schema.names:
        save_to_disk(examples_only, folder, schema)
        return
    pa = extra("pyarrow", _WHO)
    with_text = schema.append(pa.field(_TEXT, pa.string(), nullable=False))

    def batches() -> Iterator[Any]:
        for batch in examples_only.batches(schema):
            texts = [text_of(tokenizer, tokens) for tokens in batch.column("input_ids").to_pylist()]
            yield pa.record_batch([*batch.columns, pa.array(texts, pa.string())], schema=with_text)

    save_to_disk(examples_only, folder, with_text, batches())
