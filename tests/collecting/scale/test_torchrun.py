"""`tlfast collect` under torchrun: ranks share the units, one is killed, and the bytes are those of one process."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch
from processes import (
    N_UNITS,
    ROWS_PER_UNIT,
    WAIT_S,
    arguments,
    check_equal,
    n_commits,
    pids_with,
    started,
    wait_for_units,
)
from tiny_models import unit_bytes

import tlfast
from tlfast.cli import main


def torchrun(n_ranks, *settings):
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks), *settings, "-m", "tlfast"]


@pytest.mark.long
@pytest.mark.parametrize("n_ranks", [3, 2])
def test_a_rank_is_killed_and_all_go_on_after_the_restart(undisturbed, tmp_path, n_ranks):
    out = tmp_path / "out"
    command = [*torchrun(n_ranks, "--max-restarts", "2"), *arguments(undisturbed, out)]
    with started(*command, TLFAST_TEST=str(tmp_path)) as process:
        wait_for_units(process, out, 5)
        (victim,) = pids_with(TLFAST_TEST=tmp_path, RANK="1")
        os.kill(victim, signal.SIGKILL)
        assert n_commits(out) < N_UNITS, "the signal came too late to prove anything"
        shown, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    starts = re.findall(rf"^rank (\d) of {n_ranks}: {re.escape(tlfast.backend())}$", errors, flags=re.MULTILINE)
    assert sorted(starts) == sorted(list(map(str, range(n_ranks))) * 2), errors
    reports = re.findall(r"^rank (\d) of \d: .* beside (\d+) that were there", shown, flags=re.MULTILINE)
    assert sorted(rank for rank, _ in reports) == list(map(str, range(n_ranks))), shown
    assert all(int(n_rows) >= 5 * ROWS_PER_UNIT for _, n_rows in reports), "what was there is not done again"
    check_equal(undisturbed, out)


@pytest.mark.long
def test_the_agent_is_stopped_and_another_engine_goes_on(undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    with started(*torchrun(2), *arguments(undisturbed, out), TLFAST_TEST=str(tmp_path)) as process:
        wait_for_units(process, out, 5)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode != 0
        assert pids_with(TLFAST_TEST=tmp_path) == [], errors
    kept = tlfast.open_dataset(out, partial=True)
    assert 5 <= len(kept.units) < N_UNITS, "the signal came too late to prove anything"
    assert kept.verify().ok
    assert main(["collect", str(out / "config.yaml")]) == 0
    assert unit_bytes(out) == unit_bytes(undisturbed / "out")


SUMS_OF_RANKS = """
import sys
import torch
import torch.distributed as dist
import tlfast

def made():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(50, 4), torch.nn.Linear(4, 50))
    return model, [torch.randint(0, 50, (2 + k % 7,)).tolist() for k in range(40)]

def part(rank, n):
    model, texts = made()
    return tlfast.running(model, texts[rank::n], "0", per="token", stats=("mean", "moment2_full", "max"))

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, n = dist.get_rank(), dist.get_world_size()
    part(rank, n).save(f"{sys.argv[1]}/{rank}.npz")
    dist.barrier()
    if rank == 0:
        merged = tlfast.RunningSums.load(f"{sys.argv[1]}/0.npz")
        for other in range(1, n):
            merged.merge(tlfast.RunningSums.load(f"{sys.argv[1]}/{other}.npz"))
        merged.save(f"{sys.argv[1]}/merged.npz")
    dist.destroy_process_group()
"""


@pytest.mark.long
def test_sums_of_two_ranks_are_those_of_one_process(tmp_path):
    script, names = tmp_path / "ranks.py", {"__name__": "ranks"}
    script.write_text(SUMS_OF_RANKS)
    exec(SUMS_OF_RANKS, names)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    with started(*command) as process:
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    merged, whole = tlfast.RunningSums.load(tmp_path / "merged.npz")["0"], names["part"](0, 1)["0"]
    here = names["part"](0, 2).merge(names["part"](1, 2))["0"]
    assert merged.n == here.n == whole.n
    for stat in ("mean", "moment2_full", "max"):
        torch.testing.assert_close(getattr(merged, stat), getattr(here, stat), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(getattr(merged, stat), getattr(whole, stat), rtol=1e-5, atol=1e-7)
