"""An index that bergson built, as a dataset."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error
from ..format.layout import WEIGHT, Column
from ..format.plan import Plan, Unit
from ..write.writer import DatasetWriter
from .bergson_examples import Examples
from .bergson_projection import ENDING, as_said
from .bergson_store import WHO, Index, read_index

_UNIT_BYTES = 64 << 20  # of rows: what is held in memory twice
_UNIT_ROWS = 2048


def import_bergson(
    index: str | PathLike[str],
    out: str | PathLike[str],
    *,
    base: str = "",
    rows_per_unit: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path | str:
    """Make a dataset of an index of bergson: a column ``<module>:weight`` for each module, of the index's own dtype.

    Rows are [p, p] where they were projected on both sides, else as flat as bergson has them. In an index per token
    each example gets a row of zeros for its last token, which predicts nothing and for which bergson has none. What
    data.hf says of the examples is kept: ``input_ids``, ``source``, ``start`` and ``length`` as such, other columns as
    fields.

    What was written survives a kill: the same call goes on where it ended.

    Args:
        index: the folder of one build, with its info.json.
        out: the dataset, a path or a URL: new, empty, or begun by the same call.
        base: the name of the base model in the model, "transformer" in GPT-2, "model" in Llama: bergson's names begin
            inside of it. With it columns are called as those of `tlfast.collect` are, and scored against these.
        rows_per_unit: examples of a unit; None: those that fill 64 MiB, and 2048 at most.
        progress: called with the number of examples just written.

    Returns:
        Where the dataset is.

    Raises:
        DatasetError: where the index isn't whole, or ``out`` is another dataset.
        ImportError: naming the extra that data.hf needs.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import Column, DatasetWriter, Example, Plan
        >>> from tlfast.dataset import export_dataset, import_bergson, open_dataset
        >>> folder, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> specs = [{"points": ["h"], "of": "weight", "project": {"dim": 2, "scheme": "bergson-2"}}]
        >>> columns = {"h:weight": Column(torch.float32, (2, 2), of="weight")}
        >>> writer = DatasetWriter(folder + "/ds", header={"specs": specs}, columns=columns, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h:weight": torch.ones(1, 2, 2)}, [Example(0, [1], "a", 0, 1)])
        True
        >>> made = import_bergson(export_dataset(folder + "/ds", to="bergson"), folder + "/again")
        >>> open_dataset(made)["h:weight"][0]
        tensor([[1., 1.],
                [1., 1.]])
    """
    if base and not all(base.split(".")):
        raise dataset_error(WHO, "base", "be the name of a module", repr(base), 'Say "transformer", without a dot.')
    found = read_index(index)
    examples = Examples(found)
    per_item = found.row_bytes * -(-(found.n_rows + found.n_items) // found.n_items)
    most = max(1, min(_UNIT_ROWS, _UNIT_BYTES // per_item))
    plan = Plan(found.n_items, most if rows_per_unit is None else rows_per_unit)
    inside = f"{base}." if base else ""
    columns = {
        inside + module + ENDING: Column(found.dtype, found.row_shape(module), WEIGHT, _per(found))
        for module in found.sizes
    }
    fields = examples.kept or None
    with DatasetWriter(out, header=_header(found, examples, base), columns=columns, plan=plan, fields=fields) as writer:
        for unit in plan.units:
            if unit.name not in writer.done:
                known = examples.read(unit.start, unit.stop)
                rows = _rows(found, unit, [example.length for example in known])
                writer.write_unit(unit, {inside + name: values for name, values in rows.items()}, known)
            if progress is not None:
                progress(len(unit))
        return writer.out


def _per(index: Index) -> Any:
    return "example" if index.offsets is None else "token"


def _header(index: Index, examples: Examples, base: str) -> dict[str, Any]:
    """What the dataset says of itself, in the words that a collection has, and what the index was."""
    inside, dtype = f"{base}." if base else "", str(index.dtype).removeprefix("torch.")
    spec: dict[str, Any] = {"points": [inside + name for name in index.sizes], "reduce": "none", "over": []}
    spec |= {"dtype": dtype, "output": None, "name": None, "of": WEIGHT}
    spec |= as_said(index.processor) | ({} if index.offsets is None else {"per": "token"})
    spec |= {"normalized": list(index.normalized)} if index.normalized else {}
    spec |= {"preprocessed": index.made_by["preprocess"]} if "preprocess" in index.made_by else {}
    left_out = {"left_out": examples.left_out} if examples.left_out else {}
    name = index.made_by.get("model")
    return {
        **({"model": {"name": name}} if name else {}),
        "specs": [spec],
        "examples": examples.describe(),
        "imported": {
            "from": "bergson", "sha256": index.sha256(), "processor": index.processor, "made_by": index.made_by,
        } | left_out | ({"base": base} if base else {}),
    }  # fmt: skip


def _rows(index: Index, unit: Unit, lengths: list[int]) -> dict[str, torch.Tensor]:
    """The rows of a unit by column; per token with a row of zeros behind those of each example that has tokens."""
    if index.offsets is None:
        rows = index.rows(unit.start, unit.stop)
    else:
        first, last = int(index.offsets[unit.start]), int(index.offsets[unit.stop])
        stored = index.rows(first, last)
        is_last = np.zeros(sum(lengths), bool)
        is_last[np.cumsum([n for n in lengths if n]) - 1] = True
        filled = torch.from_numpy(~is_last)
        rows = {}
        for module, values in stored.items():
            rows[module] = values.new_zeros(len(filled), values.shape[1])
            rows[module][filled] = values
    return {module + ENDING: values.reshape(-1, *index.row_shape(module)) for module, values in rows.items()}
