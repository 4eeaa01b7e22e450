"""The benches run, keep what they promise to keep, and time nothing that is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from checkout import ROOT
from torch import nn

sys.path.append(str(ROOT))  # at the end: where tlfast is taken from another build, only the benches come from here

from bench import collect, gpu, hooks, kernel, step, storing, training
from bench.measure import Times, WrongResult, check_close, check_equal, interleave
from bench.report import Claim, Result, save, show
from bench.rivals import BARE, FULL_HOOKS, VARIANTS, Keep, Rows, python_full_hook, tlfast_capture


def finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


@pytest.mark.long
def test_quick_runs_all_benches_and_keeps_machine_floor_and_ratios(tmp_path):
    out = tmp_path / "all.json"
    # A process of its own: one thread, and the warning of a pure-Python install is none of this test's business.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "hooks", "kernel", "step", "collect", "dataset", "--quick", "--out", str(out)],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text(encoding="utf-8"))
    assert list(results) == ["hooks", "kernel", "step", "collect", "dataset"]
    for name, result in results.items():
        assert {"cpu", "cores", "torch", "commit", "backend", "load"} <= result["machine"].keys()
        assert result["machine"]["threads"] == 1
        assert result["prediction"]
        assert result["claims"], name
        for claim in result["claims"]:
            assert isinstance(claim["met"], bool)
            assert claim["what"] in done.stdout
        for table in result["tables"]:
            rows = {row["variant"]: row for row in table["rows"]}
            assert table["floor"] in rows
            assert any(
                column.endswith(("ratio", "ratio_to_floor")) or "percent" in column for column in table["columns"]
            )
            assert all(finite(v) or v is None for row in rows.values() for k, v in row.items() if k != "variant")
    assert not any((ROOT / "bench" / "results").glob("*quick*"))


@contextmanager
def doubled(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    with python_full_hook(model, keep) as rows:
        yield lambda: [2 * row for row in rows() or []]


@contextmanager
def next_point(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    with python_full_hook(model, keep) as rows:
        yield lambda: (rows() or [])[1:] + (rows() or [])[:1]


@contextmanager
def one_nan(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    with python_full_hook(model, keep) as rows:
        yield lambda: [torch.where(row == row.max(), torch.nan, row) for row in rows() or []]


@contextmanager
def too_few(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    with python_full_hook(model, keep) as rows:
        yield lambda: (rows() or [])[:-1]


@contextmanager
def changes_the_model(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    handle = model.get_submodule(keep.points[0]).register_full_backward_hook(lambda m, i, o: (i[0] * 2,))
    yield lambda: None
    handle.remove()


WRONG = [doubled, next_point, one_nan, too_few, changes_the_model]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
@pytest.mark.parametrize("make_job", [lambda: hooks.chain_job("fresh", hooks.SHAPE, 5, 1),
                                      lambda: step.gpt2_job(1, 2, 8, 1)], ids=["hooks", "step"])  # fmt: skip
def test_a_wrong_way_to_capture_is_not_timed(wrong, make_job):
    job = make_job()
    training.check_variants(
        job, {BARE: VARIANTS[BARE], "right": python_full_hook, "python": tlfast_capture("auto", "python")}
    )
    with pytest.raises(WrongResult, match="wrong"):
        training.check_variants(job, {"wrong": wrong})


@pytest.mark.parametrize("bench", [hooks, step], ids=["hooks", "step"])
def test_run_checks_before_it_times(bench, monkeypatch):
    def timed(*args: object) -> None:
        raise AssertionError("timed before the check")

    monkeypatch.setattr(bench, "interleave", timed)
    with pytest.raises(WrongResult, match="wrong at"):
        bench.run(quick=True, variants={**FULL_HOOKS, "wrong": doubled})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, grad: out.copy_(grad.sum(1)),
        lambda out, grad: out[:1].copy_(grad.mean(1)[:1]),
        lambda out, grad: out.copy_(grad.mean(1).roll(1, 0)),
        lambda out, grad: out.copy_(grad.mean(1) * 1.02),
    ],
    ids=["sum", "a row unwritten", "rows off by one", "2 % off"],
)
def test_a_wrong_kernel_is_not_timed(wrong):
    grad = kernel.gradients((4, 32, 64), torch.float32, 1)[0]
    with pytest.raises(WrongResult, match="wrong"):
        kernel.check_variants({"wrong": wrong}, grad)


def test_a_wrong_store_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "SCRATCH", tmp_path)
    work = collect.make_work("mean", n_layers=1, width=32, length=16, batch=4, n_examples=8, rows_per_unit=8)
    right = storing.VARIANTS[storing.MEMMAP]
    collect.check_variants(work, {"right": right})
    wrong = replace(right, read=lambda *of: right.read(*of).roll(1, 0))
    with pytest.raises(WrongResult, match="wrong"):
        collect.check_variants(work, {"wrong": wrong})


def test_checks_refuse_shapes_and_nan():
    one = torch.ones(2, dtype=torch.float64)
    check_close("x", one, one, one * 0)
    for got in (torch.ones(3), torch.full((2,), torch.nan), torch.tensor([1.0, 1.1])):
        with pytest.raises(WrongResult):
            check_close("x", got, one, one * 0.01)
    for got in (None, torch.zeros(2)):
        with pytest.raises(WrongResult):
            check_equal("x", got, one)


def test_interleave_takes_turns():
    order: list[str] = []
    measured = interleave({n: lambda n=n: (order.append(n), {"total": float(len(order))})[1] for n in "abc"}, 2)
    assert "".join(order) == "abcbca"
    assert measured["a"]["total"].samples == [1.0, 6.0]
    assert measured["b"]["total"].above(measured["a"]["total"]) == (1.0 - 2.0) / 2
    assert Times([2.0, 9.0, 4.0]).ratio(Times([1.0, 3.0, 1.0])) == 3.0


def test_a_missed_target_is_said_and_not_raised(tmp_path):
    claims = [Claim("speed", "at least", 2, 2.5), Claim("cost", "at most", 1, float("nan"), " %")]
    result = Result("some", "guess", {}, claims=claims, machine={"cpu": "x"})
    assert [claim.met for claim in claims] == [True, False]
    lines = show(result).splitlines()
    assert next(line for line in lines if "speed" in line).endswith("met")
    assert next(line for line in lines if "cost" in line).endswith("missed")
    save([result], tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert [claim["met"] for claim in kept["some"]["claims"]] == [True, False]


def test_every_committed_result_is_a_full_run():
    for path in (ROOT / "bench" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["settings"]["quick"] is False, path
        assert path.name.startswith(result["bench"] + "-")
        assert result["settings"]["rounds"] >= 7, path
        assert result.get("failures", []) == [], path
        assert result["settings"].get("parts", list(gpu.PARTS)) == list(gpu.PARTS), path
