"""The bench of a GPU, run on the CPU: its checks refuse what is wrong, and its report says what was measured."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from backends import usable
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import __main__ as command
from bench import gpu, gpu_collect, gpu_host, gpu_kernel, gpu_step, gpu_storing, gpu_work
from bench.clock import CpuClock, NoGpu
from bench.measure import WrongResult
from bench.report import Findings, Result, save, show

CLOCK = CpuClock()


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A folder of the test for what the benches write."""
    for module in (gpu_step, gpu_collect):
        monkeypatch.setattr(module, "SCRATCH", tmp_path)
    return tmp_path


def tiny_work(n_units=1):
    return gpu_work.make_work(gpu_work.TINY, gpu_work.make_model(gpu_work.TINY, CLOCK), CLOCK, 2, 2, n_units)


@pytest.mark.long
def test_a_rehearsal_runs_every_part_and_is_kept_nowhere_else(native, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    before = sorted((ROOT / "bench" / "results").iterdir())
    written = []
    monkeypatch.setattr(
        command,
        "save",
        lambda results, out: (written.append(list(results[0].settings["parts"])), save(results, out))[1],
    )
    command.main(["gpu", "--quick", "--rehearse", "--out", str(tmp_path)])
    assert written == [list(gpu.PARTS)[:n] for n in (1, 2, 3, 4, 4)]  # after each part, and in the end
    assert sorted((ROOT / "bench" / "results").iterdir()) == before
    shown = capsys.readouterr().out
    (path,) = tmp_path.glob("gpu-*.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["failures"] == []
    assert result["machine"]["gpu"] is None
    assert result["machine"]["rehearsal"] is True
    assert "say nothing of a GPU" in result["settings"]["timed_by"]
    for part in gpu.PARTS:
        assert f"{part}:" in result["prediction"]
        assert any(table["title"].startswith(part) for table in result["tables"]), part
        assert part in shown
    for table in result["tables"]:
        names = [row["variant"] for row in table["rows"]]
        assert table["floor"] in names
        numbers = [v for row in table["rows"] for k, v in row.items() if k != "variant" and v is not None]
        assert all(math.isfinite(number) for number in numbers), table["title"]


@pytest.mark.long
def test_one_part_has_a_file_of_its_own(native, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    command.main(["gpu_kernel", "--quick", "--rehearse", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("gpu_kernel-")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert (result["bench"], result["settings"]["parts"]) == ("gpu_kernel", ["kernel"])
    assert result["prediction"] == gpu_kernel.PREDICTION


def test_without_a_gpu_one_line_and_status_2(monkeypatch, capsys):
    def no_gpu():
        raise NoGpu("no driver is installed")

    monkeypatch.setattr(command, "gpu_clock", no_gpu)
    with pytest.raises(SystemExit) as end:
        command.main(["gpu", "--quick"])
    assert end.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "bench: gpu must run on a CUDA device with the native code, got no driver is installed. See tlfast doctor.\n"
    )


def test_all_benches_leave_the_gpu_out_where_there_is_none_and_say_so(monkeypatch, capsys):
    def no_gpu():
        raise NoGpu("no driver is installed")

    class Bench:
        @staticmethod
        def run(quick):
            return Result("some", "guess", {}, machine={"cpu": "x"})

    monkeypatch.setattr(command, "gpu_clock", no_gpu)
    monkeypatch.setattr(command.importlib, "import_module", lambda name, package: Bench)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    command.main(["--quick"])
    shown = capsys.readouterr().out
    assert shown.count("== some ==") == len(command.BENCHES) - 1
    assert "left out: gpu (no driver is installed)" in shown


def test_a_rehearsal_is_quick(capsys):
    with pytest.raises(SystemExit):
        command.main(["gpu", "--rehearse"])
    assert "--rehearse must come with --quick" in capsys.readouterr().err


def test_a_part_that_fails_is_said_and_the_others_run(monkeypatch, capsys):
    def wrong(clock, quick):
        raise WrongResult("x: values must be right")

    class Part:
        PREDICTION = "guess"
        run = staticmethod(lambda clock, quick: Findings())

    class Wrong(Part):
        run = staticmethod(wrong)

    monkeypatch.setattr(gpu, "PARTS", {"a": Wrong, "b": Part})
    result = gpu.run(quick=True, clock=CLOCK)
    assert result.failures == ["a: WrongResult: x: values must be right"]
    assert "FAILED: a: WrongResult: x: values must be right" in show(result).splitlines()
    assert "WrongResult" in capsys.readouterr().err
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    with pytest.raises(SystemExit) as end:
        command.main(["gpu", "--quick", "--rehearse"])
    assert end.value.code == 1


def test_a_result_is_named_after_its_gpu(tmp_path):
    named = Result("gpu", "guess", {}, machine={"cpu": "x", "gpu": "NVIDIA H200"})
    assert save([named], tmp_path) == [tmp_path / "gpu-nvidia-h200.json"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out, grad: out.copy_(grad.sum(1)),
        lambda out, grad: out[:1].copy_(grad.float().mean(1)[:1]),
        lambda out, grad: out.copy_(grad.float().mean(1).roll(1, 0)),
        lambda out, grad: out.copy_(grad.float().mean(1) * 1.0001),
    ],
    ids=["sum", "a row unwritten", "rows off by one", "0.01 % off"],
)
def test_a_wrong_kernel_is_not_timed(wrong, monkeypatch):
    case = gpu_kernel.Case((4, 32, 64), torch.float32)
    monkeypatch.setattr(gpu_kernel, "interleave", lambda *args: pytest.fail("timed before the check"))
    with pytest.raises(WrongResult, match="wrong"):
        gpu_kernel.measure(case, CLOCK, 1, False, {"wrong": wrong})


@pytest.mark.parametrize("case", gpu_kernel.TINY, ids=str)
def test_a_kernel_off_by_a_little_is_refused(case, native):
    grad, mask = torch.randn(case.shape).to(case.dtype), gpu_kernel.make_mask(case, CLOCK.device)
    ways = gpu_kernel.variants(case, mask)
    gpu_kernel.check_variants(case, ways, grad, mask)
    right = ways[gpu_kernel.TLFAST]

    def off(out, grad):
        right(out, grad)
        out.mul_(1.001)

    with pytest.raises(WrongResult, match="off"):
        gpu_kernel.check_variants(case, {"off": off}, grad, mask)


def test_the_mask_hides_something_of_every_example_but_one():
    mask = gpu_kernel.make_mask(gpu_kernel.Case((4, 16, 2), torch.float32, masked=True), CLOCK.device)
    assert mask.sum(1).tolist() == [16, 14, 12, 10]


def test_each_way_to_the_disk_has_the_right_rows(native, scratch):
    gpu_step.check_variants(tiny_work(), gpu_storing.make_variants(CLOCK))
    gpu_step.check_variants(tiny_work(), gpu_collect.WAYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.roll(1, 0),
        lambda rows: rows * 1.02,
        lambda rows: rows[:-1],
        lambda rows: torch.cat([rows[:1] * math.nan, rows[1:]]),
    ],
    ids=["off by one", "2 % off", "one too few", "a row unwritten"],
)
def test_a_wrong_way_to_the_disk_is_not_timed(change, native, scratch, monkeypatch):
    right = gpu_storing.make_variants(CLOCK)
    eager = right[gpu_storing.EAGER]
    wrong = replace(eager, read=lambda *of: change(eager.read(*of)))
    monkeypatch.setattr(gpu_step, "interleave", lambda *args: pytest.fail("timed before the check"))
    with pytest.raises(WrongResult, match="wrong at transformer"):
        gpu_step.run(CLOCK, quick=True, variants={**right, "wrong": wrong})


def test_a_model_that_refuses_graphs_is_collected_without(native, scratch):
    def refuse(work, out):
        raise ValueError("collect: cuda_graph must be ...")

    ways = {**gpu_collect.WAYS, gpu_collect.COLLECT_GRAPH: gpu_storing.Way(refuse, None)}
    found = gpu_collect.run(CLOCK, quick=True, variants=ways)
    assert found.tables[0].note == "no graphs: collect: cuda_graph must be ..."
    assert len(found.claims) == 1

    def other(work, out):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        gpu_collect.run(CLOCK, quick=True, variants={**ways, gpu_collect.COLLECT_GRAPH: gpu_storing.Way(other, None)})


def test_a_way_without_a_backward_is_refused(scratch):
    idle = gpu_storing.Way(lambda work, out: None, lambda work, out, point: torch.zeros(0))
    with pytest.raises(WrongResult, match="must be seen at every point"):
        gpu_step.check_variants(tiny_work(), {"idle": idle})


def test_the_first_unit_is_not_timed(tmp_path):
    work = tiny_work(n_units=3)
    assert (len(work.batches), work.rows_per_unit, work.n_examples) == (8, 4, 16)
    for number, _ in enumerate(work.stepping()):
        assert len(work.span) == (number >= 2)
    work.end()
    work.span[:] = [10.0, 22.0]
    assert work.step_time_s == 2.0


def test_the_160m_shape_has_160m_parameters():
    shape = gpu_work.MIDDLE
    block = 12 * shape.width**2 + 13 * shape.width
    n = shape.n_layers * block + (2 * shape.vocabulary + shape.length + 2) * shape.width
    assert 155e6 < n < 165e6
    assert len(gpu_work.points_of(shape)) == 24


def test_the_clock_of_a_gpu_needs_one(monkeypatch):
    from bench.clock import gpu_clock

    usable("native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpu):
        gpu_clock()


def test_the_design_and_the_bench_predict_the_same():
    design = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    section = " ".join(design.partition("## What is left for a GPU")[2].partition("\n## ")[0].split())
    for said, prediction in [
        ("[8,1024,4096] bf16 should read at 82-92 % of the rate of a copy", gpu_kernel.PREDICTION),
        ("a tap should take 5.5-6.5 µs", gpu_host.PREDICTION),
    ]:
        assert said in section
        (amount,) = re.findall(r"[\d.]+-[\d.]+ (?:%|µs)", said)
        assert amount.replace("µs", "us") in prediction
    assert "1760 bytes of parameters" in gpu_host.PREDICTION
    assert "It takes 1760 bytes today" in section
