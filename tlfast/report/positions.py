"""How large gradients are at each position, from a sample of rows, where rows keep their positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..dataset import GradientDataset
from ..dataset.read.row_dataset import per_example
from ..hooks.points import glob_to_regex, is_glob

_CHUNK_BYTES = 32 << 20  # of gradients in memory at a time


def points_with_positions(dataset: GradientDataset) -> list[str]:
    """Return the points whose rows begin with the position dimension, by what the header says of their specs."""
    width = _get(dataset.header, "batching", "width")
    specs = dataset.header.get("specs")
    if not isinstance(width, int) or not isinstance(specs, list):
        return []
    keep = [spec for spec in specs if isinstance(spec, dict) and _keeps_positions(spec)]
    columns = {p: dataset.column(p) for p in dataset.points}
    wide = [p for p, column in columns.items() if column.per == "example" and column.row_shape[:1] == (width,)]
    return [p for p in wide if any(_is_of(p, spec) for spec in keep)]


def _get(header: Any, *keys: str) -> Any:
    for key in keys:
        header = header.get(key) if isinstance(header, dict) else None
    return header


def _keeps_positions(spec: dict[str, Any]) -> bool:
    over = spec.get("over")
    if "at" in spec:  # a few of them, or a mask that chooses other ones in each example
        return False
    return spec.get("reduce") == "none" or (isinstance(over, list) and 1 not in over)


def _is_of(point: str, spec: dict[str, Any]) -> bool:
    names = spec.get("points")
    patterns = [names] if isinstance(names, str) else names if isinstance(names, list) else []
    return any(
        bool(glob_to_regex(name).fullmatch(point)) if is_glob(name) else name == point
        for name in patterns
        if isinstance(name, str)
    )


def norms_by_position(
    dataset: GradientDataset, points: Sequence[str], rows: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any]
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the mean norm at each position, float64 [positions], of the real tokens of some rows; NaN where none is.

    Args:
        dataset: where the rows are.
        points: some of points_with_positions.
        rows: row numbers.
        lengths: real tokens of each.
    """
    left = _get(dataset.header, "batching", "padding_side") == "left"
    means = {}
    for point in points:
        column = per_example("write_report", dataset, point)
        width = column.shape[1]
        row_bytes = column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=np.int64))
        step = max(1, _CHUNK_BYTES // max(1, row_bytes))
        total, count = np.zeros(width), np.zeros(width, np.int64)
        for start in range(0, len(rows), step):
            values = column[rows[start : start + step]].to(torch.float64).flatten(2 if column[:0].dim() > 2 else 1)
            norms = (values if values.dim() == 2 else values.norm(dim=2)).abs().numpy()
            length = lengths[start : start + step, None]
            positions = np.arange(width)[None]
            real = (positions >= width - length) if left else (positions < length)
            real = real & np.isfinite(norms)
            total += np.where(real, norms, 0.0).sum(0)
            count += real.sum(0)
        with np.errstate(invalid="ignore"):
            means[point] = total / count
    return means
