"""The bench of records: it runs, and nothing wrong is timed."""

import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

sys.path.append(str(ROOT))

import tlfast
from bench import data
from bench.measure import WrongResult


@pytest.mark.long
def test_it_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "SCRATCH", tmp_path)
    result = data.run(quick=True)
    memory = result.tables[2:]
    assert [table.title.split(", ")[-1] for table in result.tables] == [data.TEXTS, data.ANSWERS, data.TEXTS][
        : 2 + len(memory)
    ]
    for table, kind in zip(result.tables, data.KINDS, strict=False):
        assert [row["variant"] for row in table.rows] == [data.FLOOR, kind]
        assert all(row["examples/s"] > 0 for row in table.rows)
    assert len(memory) == sys.platform.startswith("linux")
    assert all(row["rise_MB"] > 1 for table in memory for row in table.rows)
    assert len(result.claims) == 3 * 2 + len(memory)
    assert result.prediction


@pytest.mark.parametrize("kind", data.KINDS)
def test_wrong_rows_are_not_timed(tmp_path, kind):
    source = data.make_source(tmp_path, 40, n_layers=1, width=16)
    settings = source.settings(kind, tmp_path / "out")
    timed = data.Timed(settings)
    run = timed.run(settings, "test", progress=False)
    run.collect()
    data.check(kind, timed.model, run, tmp_path / "out")
    with torch.no_grad():
        timed.model.lm_head.weight *= 2
    with pytest.raises(WrongResult, match="values must be within the computed bound"):
        data.check(kind, timed.model, run, tmp_path / "out")
    (only,) = Path(tmp_path / "out" / "commits").iterdir()
    only.unlink()
    with pytest.raises((WrongResult, tlfast.dataset.DatasetError)):
        data.check(kind, timed.model, run, tmp_path / "out")
