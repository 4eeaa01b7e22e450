"""The bench of search: it runs, and nothing wrong is timed."""

import sys

import pytest
import torch
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import search
from bench.__main__ import main
from bench.measure import WrongResult


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(search, "UNIT", 32)
    monkeypatch.setattr(search, "WIDTH", 16)


@pytest.mark.long
def test_it_runs_at_the_size_that_it_is_given():
    result = search.run(quick=True, rows=100)
    assert result.settings["rows"] == 100
    (table,) = result.tables
    assert [row["variant"] for row in table.rows] == [search.FLOOR, search.DIRECT, search.OURS, search.LOOP]
    assert all(row["GB/s"] > 0 for row in table.rows)
    assert len(result.claims) == 2
    assert result.prediction


def test_wrong_scores_are_not_timed(tmp_path):
    queries = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    best = search.store(tmp_path / "ds", 70, queries)
    for found in (search.ours(tmp_path / "ds", queries), search.loop(tmp_path / "ds", queries)):
        search.check("right", found, best, queries)
        rows, scores = found
        for wrong in ((rows.roll(1, 1), scores), (rows, scores + 0.01), (rows[:, 1:], scores[:, 1:])):
            with pytest.raises(WrongResult, match="wrong: the scores must be the highest"):
                search.check("wrong", wrong, best, queries)


@pytest.mark.parametrize("words", [["hooks", "--rows", "5"], ["search", "--rows", "0"], ["--rows", "5"]])
def test_a_size_of_nothing(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "bench: --rows must be a number of rows, with search or scores alone, got" in capsys.readouterr().err
