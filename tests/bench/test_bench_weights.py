"""The bench of weight gradients: it runs, and nothing wrong is timed."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import weight_factors, weight_norms, weight_queries, weights
from bench.measure import WrongResult
from bench.turns import take_turns
from bench.weight_ways import CAPTURE, FLOOR, INTO, PRODUCTS, PYTHON, WAYS, bergson_collector, read_index

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


@pytest.mark.parametrize("kind", ["hadamard", "count-sketch"])
def test_sketches_are_checked_like_signs(kind):
    (work,) = weights.works(weights.QUICK)
    ways = {name: WAYS[name] for name in (CAPTURE, INTO)}
    weights.check_ways(replace(work, kind=kind), ways)
    wrong = replace(WAYS[CAPTURE], matrices=lambda _, point: WAYS[CAPTURE].matrices(work, point))
    with pytest.raises(WrongResult, match="wrong at"):
        weights.check_ways(replace(work, kind=kind), {"wrong": wrong})


def test_a_wrong_way_is_not_timed(monkeypatch):
    def timed(*args):
        raise AssertionError("timed before the check")

    monkeypatch.setattr(weights, "take_turns", timed)
    right = WAYS[PYTHON]
    transposed = replace(right, read=lambda *given: right.read(*given).mT)
    with pytest.raises(
        WrongResult, match=r"wrong at transformer\.h\.0\.attn\.c_attn: values must be within the computed"
    ):
        weights.run(quick=True, ways={FLOOR: WAYS[FLOOR], "wrong": transposed})


@pytest.mark.peers("bergson")
def test_bergsons_collection_is_checked_like_ours():
    (work,) = weights.works(weights.QUICK)
    way = next(way for way in WAYS.values() if way.run is bergson_collector)
    weights.check_ways(work, {"bergson": way})
    wrong = replace(way, read=lambda *given: read_index(*given) * 1.001)
    with pytest.raises(WrongResult, match="bergson at"):
        weights.check_ways(work, {"bergson": wrong})


def test_norms_are_checked_and_timed():
    ways = {name: way for name, way in weight_norms.WAYS.items() if name not in weight_norms.OPACUS}
    found = weight_norms.findings(quick=True, ways=ways)
    assert [row["variant"] for row in found.tables[0].rows] == list(ways)
    assert len(found.claims) == 2
    wrong = {weight_norms.FLOOR: ways[weight_norms.FLOOR], "wrong": lambda work: ways[weight_norms.GRAM](work) * 1.01}
    with pytest.raises(WrongResult, match="wrong: values must be within the computed bound"):
        weight_norms.findings(quick=True, ways=wrong)


@pytest.mark.peers("opacus")
def test_norms_of_opacus_are_checked_like_ours():
    work = weight_norms.make_work(**weight_norms.QUICK)
    weight_norms.check_ways(work, {name: weight_norms.WAYS[name] for name in weight_norms.OPACUS})


def test_factors_are_checked_and_timed():
    ways = weight_factors.WAYS
    found = weight_factors.findings(quick=True, ways=ways)
    assert [row["variant"] for row in found.tables[0].rows] == list(ways)
    assert len(found.claims) == 1

    def wrong(work):
        return {name: (a, s * 1.01) for name, (a, s) in weight_factors.python_hooks(work).items()}

    with pytest.raises(WrongResult, match=r"wrong, S at .*: values must be within the computed bound"):
        weight_factors.findings(quick=True, ways={"wrong": wrong})


@pytest.mark.peers("kronfluence")
@pytest.mark.filterwarnings("default")  # theirs
def test_kronfluences_factors_are_checked_like_ours():
    work = weight_factors.make_work(**weight_factors.QUICK)
    weight_factors.check_ways(
        work, {weight_factors.KRONFLUENCE: weight_factors.ways_here()[weight_factors.KRONFLUENCE]}
    )


def test_scores_of_queries_are_checked_and_timed():
    (work,) = weights.works(weights.QUICK)
    found = weight_queries.findings(True, work, weights.factors)
    assert [row["variant"] for table in found.tables for row in table.rows] == 2 * list(weight_queries.WAYS)
    assert len(found.claims) == 4
    assert [weight_queries.products(of)[0] for of in weight_queries.make_works(work).values()] == [
        12 * 32**2 * (1 + 8 / 8), 12 * 32**2 * (1 + 8 / 8)
    ]  # fmt: skip
    wrong = {"wrong": lambda work: weight_queries.python_hooks(work) * 1.01}
    with pytest.raises(WrongResult, match="wrong: values must be within the computed bound"):
        weight_queries.findings(True, work, weights.factors, wrong)


def test_ways_take_a_step_each_in_turn():
    model, seen = torch.nn.Linear(2, 2), []

    def by_model(model, begin):
        seen.append("a begins")
        for step in range(4):
            model(torch.zeros(1, 2))
            seen.append(f"a{step}")

    def by_itself(model, begin):
        for step in range(4):
            begin()
            seen.append(f"b{step}")

    measured = take_turns(model, {"a": by_model, "b": by_itself}, 4)
    assert seen == ["a begins", "b0", "a0", "a1", "b1", "b2", "a2", "a3", "b3"]
    for times in measured.values():
        assert [len(times[name].samples) for name in ("cpu", "total", "set_up", "close")] == [2, 2, 1, 1]
    assert not model._forward_pre_hooks

    def broken(model, begin):
        begin()
        raise WrongResult("broken")

    with pytest.raises(WrongResult, match="broken"):
        take_turns(model, {"broken": broken}, 4)
    with pytest.raises(RuntimeError, match="a must take 5 steps, got 4"):
        take_turns(model, {"a": by_model}, 5)
