"""The same bits again: deterministic algorithms alone, and as many threads as the dataset was begun with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import collect, sequences, tiny_model, unit_bytes
from torch import nn

import tlfast
import tlfast.collecting.run
from tlfast.collecting import determinism
from tlfast.collecting.determinism import as_begun, describe_machine, deterministic
from tlfast.collecting.loss import next_token_loss

EXAMPLES = sequences(12)


class Summed(nn.Module):
    """Logits times a sum of so many values that torch splits it over its threads, and so rounds it in their way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.point = nn.Embedding(256, 1 << 12), nn.Identity()

    def forward(self, input_ids):
        wide = self.wide(input_ids)
        return self.point(wide[..., :256]) * wide.sum()


def run(out, stop_at=0):
    """Collect, and stop at a step."""
    steps = iter(range(10**6))

    def loss(model, batch):
        if next(steps) == stop_at - 1:
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    loss.__module__, loss.__qualname__ = "tests", "loss"
    more = {"loss": loss, "identity": "next tokens"}
    # One example in a batch: this model sums over all of them.
    return collect(Summed(), out, EXAMPLES, points="point", rows_per_unit=2, batch_tokens=1, **more)


@pytest.mark.long
def test_a_run_is_continued_with_the_threads_that_it_was_begun_with(tmp_path):
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        run(tmp_path / f"threads_{n_threads}")
    one, two = (unit_bytes(tmp_path / f"threads_{n_threads}") for n_threads in (1, 2))
    assert one != two, "on this machine threads change no bit, and this test proves nothing"
    torch.set_num_threads(2)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop_at=5)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    script = (
        "import sys, pathlib, torch, test_determinism as t; assert torch.get_num_threads() == 1;"
        "print(t.run(pathlib.Path(sys.argv[1])).n_rows, torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "killed")],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    n_rows, n_threads = map(int, done.stdout.split())
    assert 0 < n_rows < len(EXAMPLES), done.stderr
    assert n_threads == 1  # as before the run
    assert unit_bytes(tmp_path / "killed") == two


def test_a_dataset_says_what_it_was_begun_with(tmp_path):
    torch.set_num_threads(2)
    collect(tiny_model(), tmp_path, EXAMPLES)
    about = tlfast.open_dataset(tmp_path).info()["about"]
    assert about["threads"] == 2
    assert about["device"] == f"cpu ({torch.backends.cpu.get_cpu_capability().lower()})"
    torch.set_num_threads(1)
    assert collect(tiny_model(), tmp_path, EXAMPLES).n_rows == 0  # no part of what the data are


def test_another_kind_of_device_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules["tlfast.collecting.run"], "describe_machine", lambda model: {"device": "NVIDIA H100", "threads": 1}
    )
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=6)
    monkeypatch.undo()
    (tmp_path / "commits" / "u000001.json").unlink()
    text = "collect: device must be of the kind that began this dataset, NVIDIA H100, for the same last bits, got cpu"
    with pytest.warns(RuntimeWarning, match=text):
        assert collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=6).n_rows == 6


@pytest.mark.parametrize(
    "about, expected",
    [({"threads": 3}, 3), ({}, 1), ({"threads": "3"}, 1), ({"threads": 0}, 1), ({"threads": True}, 1),
     ({"threads": 10**9}, 1)],
)  # fmt: skip
def test_a_number_of_threads_that_nobody_wrote_is_left_alone(about, expected):
    with as_begun(about, describe_machine(tiny_model())):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == 1
    with as_begun({"threads": 3}, {"device": "NVIDIA H100"}):  # the CPU computes nothing then
        assert torch.get_num_threads() == 1


class WithoutOrder(nn.Module):
    """A model that asks for what has no deterministic form: torch knows of none on the CPU, so it says so itself."""

    def __init__(self):
        super().__init__()
        self.embed, self.point = nn.Embedding(256, 4), nn.Linear(4, 256)
        self.modes = []

    def forward(self, input_ids):
        self.modes.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError("scan_kernel does not have a deterministic implementation")
        return self.point(self.embed(input_ids))


def test_an_operation_without_a_deterministic_form(tmp_path):
    model = WithoutOrder()
    text = (
        'model must give a gradient at every point, .*scan_kernel does not have a deterministic.*deterministic="warn"'
    )
    with pytest.raises(ValueError, match=text):
        collect(model, tmp_path / "out", EXAMPLES, points="point")
    assert not (tmp_path / "out").exists()
    assert collect(model, tmp_path / "out", EXAMPLES, points="point", deterministic="warn").n_rows == len(EXAMPLES)
    assert set(model.modes) == {(True, False)}


@pytest.mark.parametrize("before", [(False, False, True), (True, True, False)])
def test_what_torch_was_told_before_comes_back(before):
    def told():
        return (
            torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory,
        )  # fmt: skip

    usual = told()
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        expected = told()
        for mode in ("strict", "warn"):
            with deterministic(mode, {torch.device("cpu")}):
                assert told() == (True, mode == "warn", False, False)
            assert told() == expected
    finally:
        torch.use_deterministic_algorithms(usual[0], warn_only=usual[1])
        torch.backends.cudnn.benchmark = usual[2]


def test_a_cublas_that_was_started_before_is_warned_of(monkeypatch):
    """It was asked too late for one order of sums: the run goes on, and says what that means."""
    monkeypatch.setattr(determinism, "_multiplies", lambda device: False)
    text = r"CUBLAS_WORKSPACE_CONFIG must be set before CUDA multiplies .* cuda:0"
    with pytest.warns(RuntimeWarning, match=text), deterministic("strict", {torch.device("cuda:0")}):
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_cublas_is_asked_unless_somebody_has(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    assert determinism._multiplies(torch.device("cpu"))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    determinism.prepare_cuda()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"

    def refused(*sizes, device):
        raise RuntimeError("set CUBLAS_WORKSPACE_CONFIG=:4096:8")

    monkeypatch.setattr(torch, "ones", refused)
    assert not determinism._multiplies(torch.device("cpu"))
