"""`collect` on a GPU, natively: the rows of the CPU, graphs or not, and the same bytes after it was killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from processes import wait_for_units
from tiny_models import collect, sequences, tiny_model, unit_bytes

import tlfast

EXAMPLES = sequences(60, longest=24)
SETTINGS = {"rows_per_unit": 12, "batch_tokens": 72, "dtype": torch.float32}

# A process of its own, to be killed: a device, whether with graphs, and a folder.
PROGRAM = """
import sys, torch
from tiny_models import collect, sequences, tiny_model
torch.set_num_threads(1)
device, graphs, out, n = sys.argv[1:]
collect(tiny_model().to(device), out, sequences(int(n), longest=24), rows_per_unit=4, batch_tokens=72,
        backend="native", cuda_graph=graphs)
"""


def graphs_of(gpu):
    """The ways to run steps there."""
    return ("off", "on") if gpu.real else ("off",)


@pytest.mark.parametrize("attach", ["tensor", "full"])
def test_rows_are_those_of_the_cpu(gpu, tmp_path, attach):
    collect(tiny_model(dtype=torch.float64), tmp_path / "right", EXAMPLES, backend="python", **SETTINGS)
    right = tlfast.open_dataset(tmp_path / "right")
    for graphs in graphs_of(gpu):
        model = tiny_model(dtype=torch.float64).to(gpu.device)
        report = collect(
            model, tmp_path / graphs, EXAMPLES, backend="native", attach=attach, cuda_graph=graphs, **SETTINGS
        )
        found = tlfast.open_dataset(tmp_path / graphs)
        assert report.n_rows == len(found) == len(EXAMPLES)
        assert found.verify().ok
        for point in right.points:
            torch.testing.assert_close(found[point][:], right[point][:])


@pytest.mark.parametrize("reduce", ["none", "norm", "last"])
def test_other_reductions(gpu, tmp_path, reduce):
    for name, device, backend in (("right", torch.device("cpu"), "python"), ("found", gpu.device, "native")):
        model = tiny_model(dtype=torch.float64).to(device)
        collect(model, tmp_path / name, EXAMPLES, reduce=reduce, backend=backend, cuda_graph="off", **SETTINGS)
    right, found = (tlfast.open_dataset(tmp_path / name) for name in ("right", "found"))
    for point in right.points:
        torch.testing.assert_close(found[point][:], right[point][:])


def test_a_second_run_has_the_same_bytes(gpu, tmp_path):
    for graphs in graphs_of(gpu):
        for turn in ("a", "b"):
            collect(tiny_model().to(gpu.device), tmp_path / f"{graphs}{turn}", EXAMPLES, cuda_graph=graphs, **SETTINGS)
        assert unit_bytes(tmp_path / f"{graphs}a") == unit_bytes(tmp_path / f"{graphs}b")


@pytest.mark.long
def test_what_was_killed_goes_on_to_the_same_bytes(gpu, tmp_path):
    n, n_units = 400, 100
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for graphs in graphs_of(gpu):
        whole, out = tmp_path / f"{graphs}-whole", tmp_path / f"{graphs}-killed"
        settings = {"rows_per_unit": 4, "batch_tokens": 72, "backend": "native", "cuda_graph": graphs}
        collect(tiny_model().to(gpu.device), whole, sequences(n, longest=24), **settings)
        words = [sys.executable, "-c", PROGRAM, str(gpu.device), graphs, str(out), str(n)]
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            wait_for_units(process, out, 3)
            process.kill()
        finally:
            process.kill()
            process.communicate()
        kept = len(tlfast.open_dataset(out, partial=True).units)
        assert 3 <= kept < n_units, "the signal came too late to prove anything"
        report = collect(tiny_model().to(gpu.device), out, sequences(n, longest=24), **settings)
        assert 0 < report.n_rows < n
        assert unit_bytes(out) == unit_bytes(whole)
