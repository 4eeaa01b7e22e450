"""Write very many small rows, and look whether memory and open files stay as they are after the first unit.

``python tools/soak.py [--rows 1000000] [--rows-per-unit 5000] [--through writer|collect]``; it ends with 1 where the
memory (resident set) has grown by more than 5 %, or a file has stayed open.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tlfast
import tlfast.collecting.batches
from tlfast.dataset import (
    BackgroundWriter,
    DatasetWriter,
    Example,
    Plan,
    Unit,
    open_dataset,
)

COLUMNS = {"small": (torch.bfloat16, (8,)), "scalar": (torch.float32, ())}
MOST_GROWTH = 0.05  # the promise: flat within 5 % after the first unit
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Usage:
    """What the process had after each unit: bytes of resident memory, and open files."""

    rss_bytes: list[int] = field(default_factory=list)
    n_files: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """Note it once more."""
        self.rss_bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES)
        self.n_files.append(len(os.listdir("/proc/self/fd")))

    @property
    def growth(self) -> float:
        """The most memory after the first sample, over that of the first, less one."""
        return max(self.rss_bytes) / self.rss_bytes[0] - 1

    @property
    def flat(self) -> bool:
        """Whether memory and open files have stayed."""
        return self.growth <= MOST_GROWTH and max(self.n_files) <= self.n_files[0]

    def __str__(self) -> str:
        first, most, last = (size / 1e6 for size in (self.rss_bytes[0], max(self.rss_bytes), self.rss_bytes[-1]))
        return (
            f"memory {first:.1f} MB after the first unit, {most:.1f} at most ({self.growth:+.1%}), {last:.1f} at the "
            f"end; open files {self.n_files[0]}, {max(self.n_files)} at most; {len(self.n_files)} units"
        )


@contextmanager
def sampled() -> Iterator[Usage]:
    """Note it whenever a unit has been written, in the thread that writes, where no file is open for it."""
    usage, write_unit = Usage(), DatasetWriter.write_unit

    def sampling(self: DatasetWriter, *args: Any) -> bool:
        won = write_unit(self, *args)
        usage.sample()
        return won

    DatasetWriter.write_unit = sampling  # type: ignore[method-assign]
    try:
        yield usage
    finally:
        DatasetWriter.write_unit = write_unit  # type: ignore[method-assign]


def made_examples(unit: Unit) -> list[Example]:
    """Examples of a unit, in which nothing repeats but lengths."""
    return [
        Example(i, [i % 50_257, i % 97, i % 89], f"file_{i // 100}.txt", i % 100, 3)
        for i in range(unit.start, unit.stop)
    ]


def soak_writer(out: Path, n_rows: int, rows_per_unit: int) -> Usage:
    """Write the rows through a BackgroundWriter, two units on their way."""
    plan = Plan(n_rows, rows_per_unit)
    writer = DatasetWriter(out, header={}, columns=COLUMNS, plan=plan)
    with sampled() as usage, BackgroundWriter(writer, 2) as background:
        for unit in plan.units:
            rows = torch.arange(unit.start, unit.stop, dtype=torch.float32)
            tensors = {"small": rows[:, None].expand(-1, 8).bfloat16(), "scalar": rows}
            background.submit(unit, tensors, made_examples(unit))
    check(out, n_rows)
    return usage


def soak_collect(out: Path, n_rows: int, rows_per_unit: int) -> Usage:
    """Collect the rows from a model of a few numbers, as `tlfast collect` does."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(97, 8), torch.nn.Linear(8, 97))

    def loss(model: torch.nn.Module, batch: tlfast.collecting.batches.Batch) -> torch.Tensor:
        return model(batch.input_ids).square().sum()

    examples = torch.arange(n_rows)[:, None] % torch.tensor([97, 89, 83])  # one tensor, not a million lists
    with sampled() as usage:
        tlfast.collect(
            model,
            [examples],
            out,
            points="0",
            loss=loss,
            rows_per_unit=rows_per_unit,
            batch_tokens=3072,
            progress=False,
        )
    assert len(open_dataset(out)) == n_rows
    return usage


def check(out: Path, n_rows: int) -> None:
    """The rows that `soak_writer` writes are there, looked at here and there."""
    ds = open_dataset(out)
    assert len(ds) == n_rows
    rows = torch.linspace(0, n_rows - 1, 1000, dtype=torch.float64).long()
    assert ds["scalar"][rows].equal(rows.float())


def folders(base: str | None) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(dir=base) as folder:
        yield Path(folder) / "dataset"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-unit", type=int, default=5000)
    parser.add_argument("--through", choices=["writer", "collect"], default="writer")
    parser.add_argument("--dir", default=None, help="where the dataset lies meanwhile")
    args = parser.parse_args()
    soak = {"writer": soak_writer, "collect": soak_collect}[args.through]
    for out in folders(args.dir):
        start = time.monotonic()
        usage = soak(out, args.rows, args.rows_per_unit)
        print(f"soak through {args.through}: {args.rows} rows in {time.monotonic() - start:.0f} s; {usage}")
    return 0 if usage.flat else 1


if __name__ == "__main__":
    sys.exit(main())
