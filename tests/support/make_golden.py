"""The dataset that each version of the format keeps for good: its values, and how ``v<version>`` was written, once.

``python tests/support/make_golden.py FOLDER`` writes one in the version of today: only for a new version, beside
those that are there, which no change of tlfast may touch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tlfast.dataset import FLAG_MISSING, FLAG_NON_FINITE, DatasetWriter, Example, Plan

COLUMNS = {
    "blocks.0.hook_resid_post": (torch.bfloat16, (4,)),
    "blocks.1.attn": (torch.float32, (2, 3)),
    "loss": (torch.float16, ()),
    "double é": (torch.float64, (2,)),
}
SKIPPED = [["b.py", 7, "less than 2 tokens"]]
HEADER = {"model": {"name": "golden"}, "examples": {"tokens": 14, "sha256": "0" * 64, "skipped": SKIPPED}}
PLAN = Plan(n_examples=5, rows_per_unit=3)
BACKEND = "auto"
MORE = 2  # examples of an extension
NON_FINITE, MISSING = 1, 4  # the rows with an infinity, and with NaN at the first point


def example(i: int) -> Example:
    """Example number ``i``."""
    return Example(i, [2**31 - 1, *range(i)], f"{'ab'[i % 2]}.py", 10 * i, i + 1)


def rows(start: int, stop: int) -> dict[str, torch.Tensor]:
    """The rows of these examples: eighths, which every dtype holds exactly."""
    tensors = {}
    for number, (name, (dtype, shape)) in enumerate(COLUMNS.items()):
        values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        examples = torch.arange(start, stop, dtype=torch.float64).reshape(-1, *[1] * len(shape))
        tensors[name] = ((examples - number) / 8 + values).to(dtype)
        if start <= NON_FINITE < stop and name == "blocks.1.attn":
            tensors[name][NON_FINITE - start] = -torch.inf
        if start <= MISSING < stop and name == "blocks.0.hook_resid_post":
            tensors[name][MISSING - start] = torch.nan
    return tensors


def write(out: Path) -> None:
    """Write two units, extend the plan, and write the unit of the extension."""
    writer = DatasetWriter(out, header=HEADER, columns=COLUMNS, plan=PLAN, config={"model": "golden"}, backend=BACKEND)
    if writer.plan == PLAN:
        writer.extend(MORE, {"tokens": 13, "sha256": "1" * 64, "skipped": []})
    for unit in writer.plan.units:
        flags = [FLAG_MISSING | FLAG_NON_FINITE if i == MISSING else 0 for i in range(unit.start, unit.stop)]
        writer.write_unit(unit, rows(unit.start, unit.stop), [example(i) for i in range(unit.start, unit.stop)], flags)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
