"""The bench of weight gradients: it runs, and nothing wrong is timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import weights
from bench.measure import WrongResult
from bench.weight_ways import FLOOR, PRODUCTS, PYTHON, WAYS, bergson_collector, read_index

OURS = [name for name in WAYS if name.startswith("tlfast")]
THERE = [FLOOR, PRODUCTS, PYTHON, *OURS]


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SCRATCH", tmp_path)


def test_a_quick_run():
    result = weights.run(quick=True, ways={name: WAYS[name] for name in THERE})
    (table,) = result.tables
    assert [row["variant"] for row in table.rows] == THERE
    assert all(row["times_the_products"] is None for row in table.rows[:2])
    assert len(result.claims) == 2
    assert result.prediction


def test_a_wrong_way_is_not_timed(monkeypatch):
    def timed(*args):
        raise AssertionError("timed before the check")

    monkeypatch.setattr(weights, "interleave", timed)
    right = WAYS[PYTHON]
    transposed = replace(right, read=lambda *given: right.read(*given).mT)
    with pytest.raises(
        WrongResult, match=r"wrong at transformer\.h\.0\.attn\.c_attn: values must be within the computed"
    ):
        weights.run(quick=True, ways={FLOOR: WAYS[FLOOR], "wrong": transposed})


def test_bergsons_collection_is_checked_like_ours():
    pytest.importorskip("bergson", reason="bergson is not installed")
    (work,) = weights.works(weights.QUICK)
    way = next(way for way in WAYS.values() if way.run is bergson_collector)
    weights.check_ways(work, {"bergson": way})
    wrong = replace(way, read=lambda *given: read_index(*given) * 1.001)
    with pytest.raises(WrongResult, match="bergson at"):
        weights.check_ways(work, {"bergson": wrong})
