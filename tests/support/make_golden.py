"""The dataset that each version of the format keeps for good: its values, and how ``v<version>`` was written, once.

``python tests/support/make_golden.py VERSION FOLDER`` writes one: only for a new version, beside those that are there,
which no change of tlfast may touch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from tlfast.dataset import FLAG_MISSING, FLAG_NON_FINITE, Column, DatasetWriter, Example, FieldExample, Plan

COLUMNS = {
    "v1": {
        "blocks.0.hook_resid_post": (torch.bfloat16, (4,)),
        "blocks.1.attn": (torch.float32, (2, 3)),
        "loss": (torch.float16, ()),
        "double é": (torch.float64, (2,)),
    },
    "v2": {
        "h.3": (torch.bfloat16, (4,)),
        "h.3:act": Column(torch.float16, (4,), of="act"),
        "tokens": Column(torch.float32, (2, 3), per="token"),
        "low é": Column(torch.float32, (70,), of="grad*act", encoding="int8:64"),
        "low tokens": Column(torch.float32, (3,), of="act", per="token", encoding="int8"),
    },
    "v3": {"h.3": (torch.bfloat16, (4,)), "tokens": Column(torch.float32, (2, 3), per="token")},
}
KEPT = {
    "v3": {
        "label": "int64", "reward": "float64", "good": "bool", "topic é": "string", "spans": "list<int64>",
        "weights": "list<float64>", "marks": "list<bool>",
    }
}  # fmt: skip
SKIPPED = [["b.py", 7, "less than 2 tokens"]]
HEADER = {"model": {"name": "golden"}, "examples": {"tokens": 14, "sha256": "0" * 64, "skipped": SKIPPED}}
PLAN = Plan(n_examples=5, rows_per_unit=3)
BACKEND = "auto"
MORE = 2  # examples of an extension
NON_FINITE, MISSING = 1, 4  # the examples with an infinity at one point, and with NaN at another
WHERE = {
    "v1": ("blocks.1.attn", "blocks.0.hook_resid_post"),
    "v2": ("tokens", "low é"),
    "v3": ("tokens", "h.3"),
}  # fmt: skip


def kept(i: int) -> dict[str, Any]:
    """The fields that example number ``i`` keeps in version 3."""
    values = [7 - i, i / 8, i % 2 == 0, "é" * i, list(range(-i, 0)), [0.5] * i, [True, False][: i % 3]]
    return dict(zip(KEPT["v3"], values, strict=True))


def example(i: int, version: str = "v1") -> Example:
    """Example number ``i``."""
    known = (i, [2**31 - 1, *range(i)], f"{'ab'[i % 2]}.py", 10 * i, i + 1)
    return FieldExample(*known, kept(i)) if version in KEPT else Example(*known)


def column(version: str, name: str) -> Column:
    """What a column is."""
    return Column(*COLUMNS[version][name])


def row(version: str, name: str, i: int) -> torch.Tensor:
    """What example ``i`` has at a point, [*row shape] or [tokens, *row shape]: eighths, which every dtype holds."""
    number, (dtype, shape, _, per, encoding) = list(COLUMNS[version]).index(name), column(version, name)
    shape = (example(i).length, *shape) if per == "token" else shape
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    if encoding is not None:  # codes times an eighth, 127 among those of each scale
        values = 7 * values % 255 - 127
        values[..., 0] = values[..., -1] = 127
        values /= 2 ** (i + number)
    else:
        values += (i - number) / 8
    if (i, name) == (NON_FINITE, WHERE[version][0]):
        values[:] = -torch.inf
    if (i, name) == (MISSING, WHERE[version][1]):
        values[:] = torch.nan
    return values.to(dtype)


def rows(version: str, start: int, stop: int) -> dict[str, torch.Tensor]:
    """The rows of these examples, as they are given to a writer."""
    found = {}
    for name in COLUMNS[version]:
        each = [row(version, name, i) for i in range(start, stop)]
        found[name] = torch.cat(each) if column(version, name).per == "token" else torch.stack(each)
    return found


def write(version: str, out: Path) -> None:
    """Write two units, extend the plan, and write the unit of the extension."""
    columns, config = COLUMNS[version], {"model": "golden"}
    writer = DatasetWriter(
        out, header=HEADER, columns=columns, plan=PLAN, config=config, backend=BACKEND, fields=KEPT.get(version)
    )
    if writer.plan == PLAN:
        writer.extend(MORE, {"tokens": 13, "sha256": "1" * 64, "skipped": []})
    for unit in writer.plan.units:
        flags = [FLAG_MISSING | FLAG_NON_FINITE if i == MISSING else 0 for i in range(unit.start, unit.stop)]
        examples = [example(i, version) for i in range(unit.start, unit.stop)]
        writer.write_unit(unit, rows(version, unit.start, unit.stop), examples, flags)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]))
