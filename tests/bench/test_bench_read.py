"""The bench of reading: what it compares is what was written, and nothing wrong is timed."""

import sys

import numpy as np
import pytest
import torch
from checkout import ROOT

sys.path.append(str(ROOT))

pytest.importorskip("lance", reason="lance is not installed")

from bench import dataset_read, reading
from bench.measure import WrongResult

UNIT = 64


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(dataset_read, "UNIT", UNIT)
    monkeypatch.setattr(dataset_read, "N_RANDOM", 50)


@pytest.mark.long
def test_it_runs_and_keeps_its_promises():
    result = dataset_read.run(quick=True)
    assert [len(table.rows) for table in result.tables] == [3, 3, 5]
    assert all(row["rows/s"] > 0 for table in result.tables for row in table.rows)
    assert len(result.claims) == 6
    assert result.prediction


def test_rows_say_which_they_are():
    rows = torch.from_numpy(reading.rows_from(1 << 20, (1 << 20) + 9))
    assert reading.ids_in(rows).tolist() == list(range(1 << 20, (1 << 20) + 9))
    for dtype in (torch.bfloat16, torch.float16):
        assert rows.view(dtype).isfinite().all()


def test_wrong_rows_are_not_timed():
    ids = torch.arange(3, 9)
    rows = torch.from_numpy(reading.rows_from(0, UNIT))[3:9]
    dataset_read._checked("right", rows, ids)
    for wrong in (rows.flip(0), rows.roll(1, 1), rows + (torch.arange(reading.WIDTH) == 700).short()):
        with pytest.raises(WrongResult, match="wrong: rows must be those that were written"):
            dataset_read._checked("wrong", wrong, ids)


def test_what_is_forgotten_is_counted(tmp_path):
    (tmp_path / "f").write_bytes(np.zeros(1 << 20, np.uint8))
    with open(tmp_path / "f", "rb") as file:
        assert 0 <= reading.forget(tmp_path) <= 1
        file.read()
    (tmp_path / "f").unlink()
    assert reading.forget(tmp_path) == 0
