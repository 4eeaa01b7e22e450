"""Plain processes with ranges of units, as the jobs of a SLURM array: they overlap, and make one dataset."""

from __future__ import annotations

import pytest
from processes import N_UNITS, WAIT_S, arguments, check_equal, end, start

import tlfast
from tlfast.cli import main
from tlfast.collecting.settings import load_settings


@pytest.mark.long
def test_jobs_that_overlap_make_one_dataset(undisturbed, tmp_path, capsys):
    out = tmp_path / "out"
    ranges = (":25", "15:-20")
    jobs = [start("-m", "tlfast", *arguments(undisturbed, out, "--units", units)) for units in ranges]
    try:
        for job in jobs:
            _, errors = job.communicate(timeout=WAIT_S)
            assert (job.returncode, errors) == (0, f"{tlfast.backend()}\n")
    finally:
        for job in jobs:
            end(job)
    there = tlfast.open_dataset(out, partial=True)
    assert [unit.name for unit in there.units] == [f"u{k:06d}" for k in range(N_UNITS - 20)], "no other unit is touched"
    assert load_settings(out / "config.yaml").units == "", "config.yaml completes the dataset"
    assert main(arguments(undisturbed, out, "--units", "-20:")) == 0
    assert " rows in 20 units" in capsys.readouterr().out
    check_equal(undisturbed, out)


@pytest.mark.parametrize("units", ["7", "5:2"])
def test_a_wrong_range_is_refused_before_anything_is_read(undisturbed, tmp_path, capsys, units):
    assert main(arguments(undisturbed, tmp_path / "out", "--units", units)) == 2
    assert capsys.readouterr().err.splitlines()[1].startswith("collect: units must ")
    assert not (tmp_path / "out").exists()


def test_a_range_beyond_the_end_has_nothing_to_do(undisturbed, tmp_path, capsys):
    assert main(arguments(undisturbed, tmp_path / "out", "--units", f"{N_UNITS}:{2 * N_UNITS}")) == 0
    assert "0 rows in 0 units" in capsys.readouterr().out
    assert len(tlfast.open_dataset(tmp_path / "out", partial=True)) == 0
