"""The bench of scores: it runs, and nothing wrong is timed."""

import sys

import pytest
import torch
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import scores
from bench.measure import WrongResult


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    for name, size in (("UNIT", 32), ("MODULES", 3), ("SIDE", 4)):
        monkeypatch.setattr(scores, name, size)


def test_it_runs_at_the_size_that_it_is_given(monkeypatch):
    monkeypatch.setattr(scores, "measure", lambda *given: 123_000_000)  # a process of its own: see the long tests
    monkeypatch.setattr(scores.gc, "collect", lambda: 0)  # of all that other tests hold: most of the time of this one
    result = scores.run(quick=True, rows=100)
    assert result.settings["rows"] == 100
    (table,) = result.tables
    names = [scores.FLOOR, scores.DIRECT, scores.OURS, scores.COSINE, scores.LOOP]
    assert [row["variant"] for row in table.rows] == names
    assert all(row["GB/s"] > 0 for row in table.rows)
    assert [claim.figure for claim in result.claims][-1] == 123_000_000 / 2**30
    assert len(result.claims) == 4
    assert result.prediction


@pytest.mark.long
def test_the_peak_of_a_process(tmp_path):
    scores.store(tmp_path / "ds", 70)
    peak = scores.measure({"MODULES": 3, "SIDE": 4}, scores.OURS, tmp_path / "ds", "bench.scores")
    assert 50e6 < peak < 2e9


def test_wrong_scores_are_not_timed(tmp_path):
    dots, cosines = scores.store(tmp_path / "ds", 70)
    for found, best in (
        (scores.ours(tmp_path / "ds"), dots),
        (scores.ours(tmp_path / "ds", "cosine"), cosines),
        (scores.loop(tmp_path / "ds"), dots),
    ):
        scores.check("right", found, best)
        rows, values = found
        with pytest.raises(WrongResult, match="wrong: the scores must be the highest"):
            scores.check("wrong", (rows, values + 0.1), best)
        with pytest.raises(WrongResult, match="wrong: the scores must be the highest"):
            scores.check("wrong", (rows[:, 1:], values[:, 1:]), best)
        with pytest.raises(WrongResult, match="wrong: the rows of a query must be different ones"):
            scores.check("wrong", (torch.zeros_like(rows), values), best)
