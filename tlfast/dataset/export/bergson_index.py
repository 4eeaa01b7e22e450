"""The index of bergson 2: gradients.bin and the files that its readers open beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error, extra
from ..format.layout import WEIGHT
from ..format.meaning import factor_of
from ..read.arrow_rows import Rows
from ..read.decoding import text_of
from .bergson_projection import ENDING, check_linear, heads_of, inside_base, modules_of, processor_of
from .hf_folder import save_to_disk, say

_WHO = "export_dataset"
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
_TEXT = "text"  # the column of data.hf that its `query` prints


@dataclass(frozen=True)
class _Rows:
    """The rows, and what bergson calls them: of each point its modules, each with its values in a row of the file."""

    rows: Rows
    modules: dict[str, dict[str, int]]
    processor: dict[str, Any] | None  # its settings of the projection; None: the rows aren't of weights
    heads: set[tuple[int, int]] = field(default_factory=set)
    factors: dict[str, int] = field(default_factory=dict)  # of points with two factors of a row: numbers of the first

    @property
    def sizes(self) -> dict[str, int]:
        """The values of each module, in the order of the file."""
        return {module: size for modules in self.modules.values() for module, size in modules.items()}

    @property
    def base(self) -> np.dtype[Any]:
        """The one dtype of the file, which holds the values of each point exactly."""
        return np.result_type(*(torch.empty(0, dtype=c.dtype).numpy().dtype for c in self.rows.columns.values()))


def write_index(rows: Rows, folder: Path, target: Path) -> None:
    """Write the index: gradients.bin is [rows, all points side by side] of one dtype.

    Rows of weights are what bergson's own are: its queries go on from there, with the settings of the projection in
    processor_config.yaml and the model in config.yaml. Of other rows it knows no more than that they are rows.
    """
    found = _named(rows)
    n_rows = _write_gradients(found, folder)
    _write_info(found, folder, n_rows)
    for name in ("normalizers", "hessians", "hessians_eigen"):  # what its Attributor opens: there are none
        torch.save({}, folder / f"{name}.pth")
    tokenizer = None
    if found.processor is None:
        (folder / "processor_config.yaml").write_text("projection_dim: null\n", encoding="utf-8")
    else:
        tokenizer = rows.dataset.tokenizer()
        yaml = extra("yaml", _WHO)
        said = {"processor_config": found.processor, "config": _run_config(found, tokenizer, target)}
        for name, settings in said.items():
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    (folder / "data.hf").mkdir()
    _write_examples(rows, folder / "data.hf", tokenizer)


def _named(rows: Rows) -> _Rows:
    """The rows by bergson's names; DatasetError where it would misread them."""
    said = {point: rows.dataset.column(point) for point in rows.columns}
    if all(column.of != WEIGHT for column in said.values()):
        return _Rows(rows, {point: {point: prod(column.row_shape)} for point, column in said.items()}, None)
    headers = [source.header for source in rows.dataset.sources]
    processor, heads = processor_of(headers), heads_of(headers)
    counts = {n for n, _ in heads}
    names = inside_base(said, headers)
    about = rows.dataset.sources[0].info()["about"]
    for source in rows.dataset.sources:
        check_linear(said, source.info()["about"])
    for point in said:
        rows.dataset.factor_sizes(point)  # DatasetError where they differ
    factors = {point: factor_of(point, column, processor["projection_dim"], about) for point, column in said.items()}
    shapes = {point: modules_of(point, column, processor, counts, factors[point]) for point, column in said.items()}
    modules = {
        point: {names[point] + module.removeprefix(point.removesuffix(ENDING)): size for module, size in found.items()}
        for point, found in shapes.items()
    }
    return _Rows(rows, modules, processor, heads, {point: n for point, n in factors.items() if n is not None})


def _write_gradients(found: _Rows, folder: Path) -> int:
    """Write gradients.bin, and offsets.npy for rows per token; return how many rows there are."""
    n_rows, per_token = 0, found.rows.per_token
    ends = [np.zeros(1, np.int64)]
    with (folder / "gradients.bin").open("xb") as file:
        for arrays, counts in _token_parts(found) if per_token else ((p.arrays, None) for p in found.rows.parts()):
            flat = [array.reshape(len(array), prod(array.shape[1:])) for array in arrays.values()]
            file.write(np.ascontiguousarray(np.concatenate(flat, axis=1, dtype=found.base)).data)
            n_rows += len(flat[0])
            if counts is not None:
                ends.append(ends[-1][-1] + np.cumsum(counts, dtype=np.int64))
    if per_token:
        np.save(folder / "offsets.npy", np.concatenate(ends))
    return n_rows


def _token_parts(found: _Rows) -> Iterator[tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]]:
    """Yield the rows of some examples, without that of each one's last token, and how many each has.

    The last token predicts nothing, and bergson has no row for it: what stands there must be zeros.
    """
    rows = found.rows
    for examples, lengths in rows.stretches(found.base.itemsize * sum(found.sizes.values())):
        arrays = {point: _without_last(found, point, examples, lengths) for point in rows.columns}
        yield arrays, np.maximum(lengths - 1, 0)
        rows.written(len(examples))


def _without_last(
    found: _Rows, point: str, examples: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """The rows of some examples but those of their last tokens; DatasetError where one of these isn't zero."""
    values = found.rows.values(point, examples)
    is_last = np.zeros(len(values), bool)
    is_last[np.cumsum(lengths)[lengths > 0] - 1] = True
    half = found.factors.get(point, 0)
    last = values[is_last].reshape(int(is_last.sum()), prod(values.shape[1:]))
    if ((last[:, :half].any(1) & last[:, half:].any(1)) if half else last).any():  # a product with zero is zero
        rule = "be zero at the last token of each example, which predicts nothing"
        got = f"another row in examples {examples[0]} to {examples[-1]}"
        raise dataset_error(_WHO, f"point {point!r}", rule, got, "Export it to npy.")
    kept = values[~is_last]
    product: np.ndarray[Any, Any] = kept[:, :half, None] * kept[:, None, half:] if half else kept
    return product


def _write_info(found: _Rows, folder: Path, n_rows: int) -> None:
    """Write info.json; ``dtype`` in it, a structured one, is what bergson's versions before 2 read."""
    base, sizes = found.base, found.sizes
    formats = [f"({size},){base.str}" for size in sizes.values()]
    info = {
        "attribute_tokens": found.rows.per_token,
        "num_items": len(found.rows),
        "num_grads": n_rows,
        "grad_sizes": sizes,
        "base_dtype": base.name,
        "dtype": {"names": list(sizes), "formats": formats, "itemsize": base.itemsize * sum(sizes.values())},
        "tlfast": found.rows.provenance(),
    }
    say(folder / "info.json", info)


def _run_config(found: _Rows, tokenizer: Any, target: Path) -> dict[str, Any]:
    """Return config.yaml: from it `query` learns which model it loads, and where the texts are.

    A model that the dataset doesn't name is named "", which no library loads: `query` then needs its --model.
    """
    model, processor = found.rows.dataset.sources[0].header.get("model"), found.processor or {}
    model = model if isinstance(model, dict) else {}
    dtypes = model.get("dtypes") or [""]
    index = {
        "run_path": str(target),
        "model": str(getattr(tokenizer, "name_or_path", "") or model.get("name", "")),
        "precision": _PRECISIONS.get(dtypes[0], "auto") if len(dtypes) == 1 else "auto",
        "data": {"dataset": str(target / "data.hf"), "split": "train", "prompt_column": _TEXT},
        "attribute_tokens": found.rows.per_token,
    }
    index |= {key: value for key, value in processor.items() if key != "projection_version"}
    index["projection_dim"] = processor["projection_dim"] or 0
    if len(found.heads) == 1:  # it has one setting for all
        ((n, width),) = found.heads
        split = sorted({module.rpartition(".head_")[0] for module in found.sizes if ".head_" in module})
        index |= {"split_attention_modules": split, "attention": {"num_heads": n, "head_size": width, "head_dim": 2}}
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
