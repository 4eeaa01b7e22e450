"""Units split over processes that hear nothing of each other: all are done, few twice, whoever dies or is slow."""

from __future__ import annotations

import heapq
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tlfast
from tlfast.cli import main
from tlfast.collecting import huggingface
from tlfast.collecting.loss import next_token_loss
from tlfast.collecting.losses import LOSSES
from tlfast.collecting.unit_queue import Share, Todo, share_of, units_in
from tlfast.dataset import Plan


def simulate(n_units, processes, before=(), todo=Todo):
    """Processes of (start, time for a unit, death) do units until none is left: (units done by each, names committed).

    A process that dies loses the unit that it was at.
    """
    plan = Plan(n_units, 1)
    names = {plan.unit(k).name for k in before}
    left = [unit for unit in plan.units if unit.name not in names]
    walks = [iter(todo(left, Share(i, len(processes)), lambda: set(names))) for i in range(len(processes))]
    n_done = [0] * len(processes)
    # All commits of an instant come before the looks of that instant.
    events = [(start, 1, i, None) for i, (start, _, _) in enumerate(processes)]
    heapq.heapify(events)
    while events:
        time, _, i, unit = heapq.heappop(events)
        _, unit_time, death = processes[i]
        if time >= death:
            continue
        if unit is not None:
            names.add(unit.name)
            n_done[i] += 1
            heapq.heappush(events, (time, 1, i, None))
        elif (taken := next(walks[i], None)) is not None:
            heapq.heappush(events, (time + unit_time, 0, i, taken))
    return n_done, names


def wasted(n_done, names, before=()):
    return sum(n_done) - (len(names) - len(before))


PROCESSES = st.lists(
    st.tuples(st.floats(0, 5), st.floats(0.5, 2), st.one_of(st.just(math.inf), st.floats(0, 40))), max_size=7
)


@given(st.integers(1, 60), PROCESSES, st.floats(0.5, 5), st.sets(st.integers(0, 59)))
def test_one_that_lives_suffices(n_units, others, unit_time, before):
    before = {k for k in before if k < n_units}
    processes = [*others, (0.0, unit_time, math.inf)]
    n_done, names = simulate(n_units, processes, before)
    assert len(names) == n_units
    assert max(n_done) <= n_units - len(before), "a process does no unit twice"


@pytest.mark.parametrize("count", [2, 3, 8, 32])
@pytest.mark.parametrize(
    "case", ["all alike", "starts apart", "one dies", "half of them die", "one is slow", "one died before"]
)
def test_few_units_are_done_twice(count, case):
    n_units, before = 40 * count, ()
    processes = [(0.01 * i, 1 + 0.001 * i, math.inf) for i in range(count)]
    if case == "starts apart":
        processes = [(7.0 * i / count, unit_time, death) for i, (_, unit_time, death) in enumerate(processes)]
    elif case == "one dies":
        processes[-1] = (0.0, 1.0, 10.0)
    elif case == "half of them die":
        processes = [(start, t, 3.0 + i if 2 * i < count else death) for i, (start, t, death) in enumerate(processes)]
    elif case == "one is slow":
        processes[0] = (0.0, 7.3, math.inf)
    elif case == "one died before":
        before = [k for k in range(n_units) if k % count]
    n_done, names = simulate(n_units, processes, before)
    assert len(names) == n_units
    # At its end each may be at a unit that another is at, twice if that one is slow. Where a share is spread, a process
    # meets another by chance, with a likelihood of count / (units left): the sum over what is left is a logarithm.
    assert wasted(n_done, names, before) <= count * (2 + math.log(n_units / count))


def test_without_a_death_each_does_its_own():
    n_done, names = simulate(60, [(0.0, 1.0, math.inf)] * 3)
    assert (n_done, len(names)) == ([20] * 3, 60)


def test_an_order_that_all_share_wastes_much():
    """The bound on waste can be broken: by processes that all begin at the front."""

    def alike(units, share, committed):
        return Todo(units, Share(), committed)

    n_done, names = simulate(80, [(0.0, 1.0, math.inf), (0.1, 1.0, math.inf)], todo=alike)
    assert len(names) == 80
    assert wasted(n_done, names) > 2 * (2 + math.log(40))


def test_what_others_commit_is_counted():
    plan, names = Plan(10, 2), set()
    todo = Todo(plan.units, Share(0, 2), lambda: names)
    walk = iter(todo)
    assert next(walk).name == "u000000"
    names |= {"u000000", "u000001", "u000003"}
    assert next(walk).name == "u000002"
    assert todo.n_rows_elsewhere == 4
    names |= {"u000002", "u000004"}
    assert [*walk] == []
    assert ([unit.name for unit in todo.taken], todo.n_rows_elsewhere) == (["u000000", "u000002"], 6)


def test_a_unit_that_another_commits_first_is_dropped():
    now, names = [0.0], set()
    todo = Todo(Plan(8, 2).units, Share(), lambda: set(names), clock=lambda: now[0])
    walk = iter(todo)
    assert next(walk).name == "u000000"
    names |= {"u000000", "u000002"}
    now[0] = 9.0
    assert not todo.overtaken(), "a look costs time"
    now[0] = 11.0
    assert todo.overtaken()
    assert (todo.taken, todo.n_rows_elsewhere) == ([], 4)
    assert next(walk).name == "u000001"
    now[0] = 30.0
    assert not todo.overtaken()
    names |= {"u000001"}
    assert [unit.name for unit in walk] == ["u000003"]
    assert ([unit.name for unit in todo.taken], todo.n_rows_elsewhere) == (["u000001", "u000003"], 4)


@pytest.mark.parametrize(
    "environment, share",
    [
        ({}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, (1, 3)),
        ({"RANK": "1"}, (0, 1)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
    ],
)
def test_torchrun_says_which_share(environment, share):
    assert share_of(environment) == Share(*share)


@pytest.mark.parametrize("rank, size", [("3", "3"), ("-1", "2"), ("one", "2"), ("0", "0"), ("0", "2.0")])
def test_other_ranks_are_refused(rank, size):
    text = f"RANK and WORLD_SIZE must be numbers with 0 <= RANK < WORLD_SIZE, got '{rank}' and '{size}'. Start with"
    with pytest.raises(ValueError, match=text):
        share_of({"RANK": rank, "WORLD_SIZE": size})


@pytest.mark.parametrize(
    "text, numbers",
    [("", range(7)), (":", range(7)), ("2:5", range(2, 5)), ("5:", range(5, 7)), (":-1", range(6)),
     ("-2:", range(5, 7)), ("3:99", range(3, 7)), ("99:200", range(7, 7)), ("4:4", range(4, 4)), ("-3:6", range(4, 6))],
)  # fmt: skip
def test_a_range_of_units_is_a_slice(text, numbers):
    assert units_in(text, 7) == numbers == range(7)[numbers.start : numbers.stop]


@pytest.mark.parametrize("text", ["3", "a:b", "1:2:3", "1-2", " 1:2", "1 :2", "+1:2", "0x1:2", 3, None])
def test_other_ranges_are_refused(text):
    with pytest.raises(ValueError, match=r"collect: units must be A:B, numbers of units as in a Python slice, got "):
        units_in(text or "none", 7)
    with pytest.raises(ValueError, match=r"units must end after it begins, got '5:3'. B itself is left out."):
        units_in("5:3", 7)


MODEL = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
EXAMPLES = [[k % 9, 1, 2] for k in range(10)]


def collect(out, **settings):
    return tlfast.collect(MODEL, EXAMPLES, out, points="0", rows_per_unit=2, progress=False, **settings)


def test_units_and_share_of_the_function(tmp_path):
    report = collect(tmp_path, units="1:3")
    assert (report.n_rows, report.n_units, report.n_rows_before) == (4, 2, 0)
    assert collect(tmp_path, units="2:4").n_rows_before == 2
    assert tlfast.open_dataset(tmp_path, partial=True).info()["units"] == 3
    assert collect(tmp_path, share=(1, 2)).n_rows == 4, "the rest is done by whoever is there"
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_what_another_process_commits_meanwhile_is_not_done_again(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.collecting.unit_queue.LOOK_EVERY_S", 0.0)
    collect(tmp_path / "there", batch_tokens=3)
    steps = []

    def loss(model, batch):
        steps.append(len(steps))
        if len(steps) == 1 + 2 + 1:  # a probe, two batches of the first unit, one of the second
            for kind in ("data", "rows", "commits"):
                (there,) = (tmp_path / "there" / kind).glob("u000001.*")
                shutil.copy(there, tmp_path / "out" / kind)
        return next_token_loss(model, batch)

    loss.__module__, loss.__qualname__ = "tests", "loss"
    monkeypatch.setitem(LOSSES, "next_token", loss)  # the same data
    report = collect(tmp_path / "out", batch_tokens=3, loss=loss)
    assert (report.n_rows, report.n_units, report.n_rows_elsewhere) == (8, 4, 2)
    assert len(steps) == 1 + 9, "the second batch of that unit isn't computed"
    assert tlfast.open_dataset(tmp_path / "out").verify().ok


@pytest.mark.parametrize("share", [(2, 2), (-1, 2), (0, 0), (0.0, 1), ("0", 1)])
def test_a_wrong_share_is_refused(tmp_path, share):
    with pytest.raises(ValueError, match=r"collect: share must be \(index, count\), ints with 0 <= index < count, got"):
        collect(tmp_path / "out", share=share)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("several", [{"units": "0:2"}, {"share": (0, 2)}])
def test_nobody_removes_what_others_write(tmp_path, several):
    collect(tmp_path)
    with pytest.raises(ValueError, match=r"overwrite must be off where several processes collect, got on\. Remove"):
        collect(tmp_path, overwrite=True, **several)
    with pytest.raises(ValueError, match='resume must be "auto" or "must" where several processes'):
        collect(tmp_path / "new", resume="never", **several)
    assert len(tlfast.open_dataset(tmp_path)) == len(EXAMPLES)


def test_each_rank_has_its_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, set_device=chosen.append,
    ))  # fmt: skip
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert huggingface.pick_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert huggingface.pick_device("auto") == torch.device("cuda:1")
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"LOCAL_RANK must be below 2, the GPUs here, got 2\. Start as many"):
        huggingface.pick_device("auto")


def test_every_line_says_its_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["collect", "--model", "none", "--text", "none", "--points", "a", "--out", "none"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"rank 1 of 2: {tlfast.backend()}\nrank 1 of 2: collect: text must be ")
    monkeypatch.setenv("RANK", "2")
    assert main(["collect", "--model", "none", "--text", "none", "--points", "a", "--out", "none"]) == 2
    assert capsys.readouterr().err.startswith(f"{tlfast.backend()}\ncollect: ")
