"""Small datasets whose every value is known, and bit-exact comparisons for the dataset tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from checkout import ROOT, SUPPORT

from tlfast.dataset import DatasetWriter, Example, GradientDataset, Plan, open_dataset

COLUMNS = {
    "blocks.0.hook_resid_post": (torch.bfloat16, (6,)),
    "blocks.1.attn": (torch.float32, (2, 3)),
    "loss": (torch.float16, ()),
    "double": (torch.float64, (2,)),
}
PLAN = Plan(n_examples=11, rows_per_unit=4)
HEADER = {"model": {"name": "tiny", "sha": "abc"}, "reduce": "mean"}


def truth(columns=COLUMNS, plan=PLAN, seed=0):
    """Every row of every point."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(plan.n_examples, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, (dtype, shape, *_) in columns.items()
    }


def examples(unit):
    """The examples of a unit: lengths and tokens differ from row to row."""
    return [
        Example(i, [i, *range(i % 5), 2**31 - 1], f"file_{i % 3}.py", 10 * i, i % 5 + 2)
        for i in range(unit.start, unit.stop)
    ]


def rows_of(unit, tensors):
    """The part of every tensor that belongs to a unit."""
    return {name: tensor[unit.start : unit.stop] for name, tensor in tensors.items()}


def make_writer(out, **changes):
    """A writer with the arguments above, some of them changed."""
    return DatasetWriter(
        out, **({"header": HEADER, "columns": COLUMNS, "plan": PLAN, "config": "reduce: mean\n"} | changes)
    )


def write_units(writer, tensors=None):
    """Write every unit that is not committed."""
    tensors = truth(writer.columns, writer.plan) if tensors is None else tensors
    for unit in writer.plan.units:
        if unit.name not in writer.done:
            assert writer.write_unit(unit, rows_of(unit, tensors), examples(unit))


def make_base(out: Path, tensors=None) -> Path:
    """The folder of a complete dataset, unopened."""
    write_units(make_writer(out), tensors)
    return out


def make_dataset(out: Path, **changes) -> GradientDataset:
    """A complete dataset in ``out``."""
    write_units(make_writer(out, **changes))
    return open_dataset(out)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one dtype, one shape and the same bits, NaN included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return _integers(a).tobytes() == _integers(b).tobytes()


def _integers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]).numpy()


def check_rows(ds: GradientDataset, tensors: dict[str, torch.Tensor]) -> None:
    """Fail unless the dataset holds exactly the rows of its committed units, at every point, with their examples."""
    ids = [i for unit in ds.units for i in range(unit.start, unit.stop)]
    assert len(ds) == len(ids)
    assert ds.points == list(tensors)
    for name, tensor in tensors.items():
        assert same_bits(ds[name][:], tensor[ids]), name
    expected = [example for unit in ds.units for example in examples(unit)]
    for row, example in zip(ds.examples, expected, strict=True):
        assert {key: row[key] for key in vars(example)} == vars(example)


def content(out: Path) -> dict[str, bytes]:
    """Every file of a dataset but dataset.json, which says when it was made."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "dataset.json"
    }


def run_python(*arguments, preload=None, **options):
    """Start python on a program of this folder, with tlfast and this folder importable."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(SUPPORT)]),
        "OMP_NUM_THREADS": "1",
    }
    if preload is not None:
        environment["LD_PRELOAD"] = str(preload)
    return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True, **options)


def flip(path, position, bit):
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
