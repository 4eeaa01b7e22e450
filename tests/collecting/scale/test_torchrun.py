"""`tlfast collect` under torchrun: ranks share the units, one is killed, and the bytes are those of one process."""

from __future__ import annotations

import os
import re
import signal

import pytest
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
