"""`cap.into`: the rows of one's own loop as a dataset, the same as `collect` writes; resumed, and never half."""

from __future__ import annotations

import errno
import os
import re
import threading
from contextlib import nullcontext, suppress

import pytest
import torch
from poisoned_rows import files_of, poisoned, poisoned_loss
from shared_filesystem import SharedFileSystem
from tiny_models import POINTS, collect, sequences, tiny_model
from torch import nn

import tlfast
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.unit import Oddities
from tlfast.dataset import (
    FLAG_MISSING,
    FLAG_NON_FINITE,
    BackgroundWriter,
    Column,
    DatasetError,
    DatasetWriter,
    Example,
    Plan,
    open_dataset,
)

PLAN = Plan(n_examples=10, rows_per_unit=4)
COLUMNS = {"first": (torch.float32, (5,)), "second": (torch.float32, (5,))}
DATA = torch.randn(10, 5, generator=torch.Generator().manual_seed(1))


class Alone(nn.Module):
    """A point whose rows depend on their examples alone, to the bit: no sum goes over more than one of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x * 2)))


MODEL = Alone()


def run(cap, ids):
    with cap.batch(ids=ids):
        numbers = [i.id if isinstance(i, Example) else int(i) for i in ids]
        MODEL(DATA[numbers].requires_grad_()).square().sum().backward()


def rows_at():
    """The rows of all examples, by one backward."""
    with tlfast.capture(MODEL, ["first", "second"], rows=10) as cap:
        run(cap, range(10))
    return {name: cap[name].clone() for name in cap.names}


def entered(backend="auto", rows=4, **settings):
    return tlfast.capture(MODEL, ["first", "second"], rows=rows, backend=backend, **settings)


def write(place, *batches, then=None, backend="auto", size=4, **settings):
    """A loop over these batches, or over all that is left; ``then`` is raised at its end."""
    with entered(backend) as cap, cap.into(place, **{"plan": PLAN} | settings) as out:
        for ids in batches or out.batches(size):
            run(cap, ids)
        if then is not None:
            raise then


def assert_whole(folder):
    """A dataset has all rows; returns it."""
    dataset = open_dataset(folder)
    for name, rows in rows_at().items():
        assert torch.equal(dataset[name][:], rows), name
    assert dataset.verify().ok
    return dataset


# The rows.


@pytest.mark.parametrize("opened", ["writer", "place"])
def test_the_bytes_are_those_of_collect(tmp_path, backend, opened):
    examples = poisoned(sequences(20), (3, 4, 17))
    settings = {"dtype": torch.float16, "loss": poisoned_loss, "backend": backend, "missing": "nan"}
    collect(tiny_model(), tmp_path / "collected", examples, rows_per_unit=6, batch_tokens=48, **settings)
    there = open_dataset(tmp_path / "collected")
    plan, batching, known = Plan(20, 6), Batching(48), as_examples(examples)
    model = tiny_model().eval()
    out, given = tmp_path / "own", {"plan": plan, "header": there.header}
    if opened == "writer":
        columns = {name: (torch.float16, there[name].shape[1:]) for name in there.points}
        out, given = DatasetWriter(out, columns=columns, **given), {}
    with (
        tlfast.freeze(model),
        tlfast.capture(
            model, POINTS["gpt2"], reduce="mean", dtype=torch.float16, rows=6, backend=backend, missing="nan"
        ) as cap,
        cap.into(out, **given) as written,
    ):
        for unit in written.units:
            part = known[unit.start : unit.stop]
            for rows, batch in batching.batches(part, batching.order(part)):
                with cap.batch(batch.mask, ids=[part[k] for k in rows]):
                    poisoned_loss(model, batch).backward()
    assert files_of(tmp_path / "own") == files_of(tmp_path / "collected")
    assert len(files_of(tmp_path / "own")) == 3 * 4
    assert [example["id"] for example in open_dataset(tmp_path / "own").examples if example["flags"]] == [3, 4, 17]


def test_examples_and_units_in_any_order(tmp_path, backend):
    with entered(backend) as cap, cap.into(tmp_path, plan=PLAN, header={"model": "alone"}) as out:
        assert (out.left, [unit.name for unit in out.units]) == (list(range(10)), ["u000000", "u000001", "u000002"])
        for ids in ([9], [8], [2, 0], [3], [1], [7, 6, 5, 4]):
            run(cap, ids)
        assert (out.left, out.units) == ([], [])
    dataset = assert_whole(tmp_path)
    assert dataset.header["model"] == "alone"
    assert dataset.header["specs"] == [
        {"points": ["first", "second"], "reduce": "none", "over": [], "dtype": None, "output": None, "name": None}
    ]
    assert dataset.examples[3] | {"norms": None} == {
        "id": 3, "input_ids": [], "source": "", "start": 0, "length": 0, "flags": 0, "norms": None
    }  # fmt: skip


def test_what_is_said_of_an_example_is_in_the_row_table(tmp_path):
    with entered() as cap, cap.into(tmp_path, plan=Plan(2, 2)) as out:
        run(cap, [Example(1, [5, 6], "b.txt", 7, 2), Example(0, [1, 2, 3], "a.txt", 0, 3)])
        assert out.left == []
    examples = open_dataset(tmp_path).examples
    assert [(e["input_ids"], e["source"], e["start"], e["length"]) for e in examples] == [
        ([1, 2, 3], "a.txt", 0, 3), ([5, 6], "b.txt", 7, 2)
    ]  # fmt: skip


def test_ids_may_be_a_tensor(tmp_path):
    with entered() as cap, cap.into(tmp_path, plan=Plan(2, 2)):
        run(cap, torch.tensor([1, 0]))
    assert torch.equal(open_dataset(tmp_path)["first"][:], rows_at()["first"][:2])


def test_rows_stay_readable_until_the_next_batch(tmp_path):
    truth = rows_at()["first"]
    with entered() as cap, cap.into(tmp_path, plan=Plan(4, 2)):
        run(cap, [0, 1])
        assert torch.equal(cap["first"], truth[:2])
        run(cap, [2, 3])
        assert cap.ids == [2, 3]


class Skipping(Alone):
    """A module whose first point is left out for single examples."""

    def forward(self, x):
        return super().forward(x) if len(x) > 1 else self.second(x * 2)


def skip_in(folder, *batches):
    model = Skipping()
    with (
        tlfast.capture(model, ["first", "second"], rows=3, missing="nan") as cap,
        cap.into(folder, plan=Plan(3, 3)),
    ):
        for ids in batches:
            with cap.batch(ids=ids):
                model(DATA[ids].requires_grad_()).sum().backward()


def test_a_point_that_did_not_fire_is_flagged(tmp_path):
    skip_in(tmp_path, [0], [1, 2])
    examples = open_dataset(tmp_path).examples
    assert [e["flags"] for e in examples] == [FLAG_MISSING | FLAG_NON_FINITE, 0, 0]


def test_a_run_that_begins_where_a_point_is_silent_continues(tmp_path, backend):
    def go(folder, stop=3):
        model = Skipping()
        with (
            tlfast.capture(model, ["first", "second"], rows=2, missing="nan", backend=backend) as cap,
            cap.into(folder, plan=Plan(3, 2)) as out,
        ):
            for unit in out.units[:stop]:
                with cap.batch(ids=range(unit.start, unit.stop)):  # one example: its first point is silent
                    model(DATA[unit.start : unit.stop].requires_grad_()).sum().backward()

    go(tmp_path / "whole")
    go(tmp_path / "again", stop=1)
    go(tmp_path / "again")
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "again")
    dataset = open_dataset(tmp_path / "again")
    assert dataset["first"][:].isnan().all(1).tolist() == [False, False, True]
    assert [e["flags"] for e in dataset.examples] == [0, 0, FLAG_MISSING | FLAG_NON_FINITE]


def test_a_point_that_never_fired_has_rows_of_no_known_kind(tmp_path):
    text = "rows at first must be there in the first unit, got none. Begin with examples that reach the point, or"
    with refuses(text, RuntimeError):
        skip_in(tmp_path, [0], [1], [2])
    assert list(tmp_path.iterdir()) == []


def test_the_next_unit_is_computed_while_two_are_written(tmp_path, monkeypatch):
    waiting, wait_for_room, n_waits = threading.Event(), BackgroundWriter.wait_for_room, []

    def watched(self, *given):
        n_waits.append(self._unfinished)
        if len(n_waits) == 3:
            waiting.set()
        return wait_for_room(self, *given)

    def slow_write(self, *unit):
        assert waiting.wait(60)
        return write_unit(self, *unit)

    write_unit = DatasetWriter.write_unit
    monkeypatch.setattr(BackgroundWriter, "wait_for_room", watched)
    monkeypatch.setattr(DatasetWriter, "write_unit", slow_write)
    with entered(rows=2) as cap, cap.into(tmp_path, plan=Plan(10, 2)) as out:
        for ids in out.batches(2):
            run(cap, ids)
    assert n_waits[2] == 2  # the rows of the third unit are there, and those of two others still on their way
    assert_whole(tmp_path)


# Resuming, and what goes wrong.


def test_an_error_keeps_whole_units_and_the_next_run_the_rest(tmp_path, backend):
    write(tmp_path / "whole", backend=backend, size=3)
    with pytest.raises(LookupError, match="mine"):
        write(tmp_path / "again", [0, 1, 2], [3], [4, 5, 6], then=LookupError("mine"), backend=backend)
    assert [path.stem for path in (tmp_path / "again/commits").iterdir()] == ["u000000"]
    assert {path.stem for path in (tmp_path / "again").rglob("u*")} == {"u000000"}  # nothing half-written
    with entered(backend) as cap, cap.into(tmp_path / "again", plan=PLAN) as out:
        assert repr(out) == f"<tlfast rows into {tmp_path / 'again'}: 2 of 3 units left>"
        assert out.left == [4, 5, 6, 7, 8, 9]
        assert list(out.batches(3)) == [[4, 5, 6], [7], [8, 9]]
        for ids in out.batches(3):
            run(cap, ids)
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_a_loop_that_begins_anew_drops_what_is_there(tmp_path, monkeypatch):
    with pytest.raises(LookupError):
        write(tmp_path, [0, 1, 2, 3], then=LookupError())
    said = []
    leave_out = Oddities.leave_out
    monkeypatch.setattr(Oddities, "leave_out", lambda self, counters: said.append(1) or leave_out(self, counters))
    with entered() as cap, cap.into(tmp_path, plan=PLAN) as out:
        run(cap, [4, 5, 6, 7])
        for ids in ([0, 1], [2, 3], [2, 3], [8, 9]):
            run(cap, ids)
        assert out.left == []
    assert len(said) == 3  # the counts of dropped rows are nobody's
    assert_whole(tmp_path)


def fail_after_backward(cap, ids, factor=9.0):
    with suppress(LookupError), cap.batch(ids=ids):
        (MODEL(DATA[ids].requires_grad_()) * factor).sum().backward()
        raise LookupError


def test_a_batch_that_fails_may_be_tried_again(tmp_path):
    with entered() as cap, cap.into(tmp_path, plan=Plan(2, 2)):
        with pytest.raises(LookupError), cap.batch(ids=[0, 1]):
            raise LookupError
        run(cap, [0, 1])
    assert len(open_dataset(tmp_path)) == 2


def test_a_batch_that_fails_after_its_backward_may_be_tried_again(tmp_path, backend):
    with entered(backend, rows=6) as cap, cap.into(tmp_path, plan=PLAN) as out:
        for k, ids in enumerate(out.batches(2)):
            if k != 3:  # also as the first batch of all, and where all rows of the unit are those of failed ones
                fail_after_backward(cap, ids, float("nan"))
            if k == 2:
                fail_after_backward(cap, ids)
            run(cap, ids)
    assert_whole(tmp_path)
    assert not any(example["flags"] for example in open_dataset(tmp_path).examples)


def test_a_whole_unit_that_fails_after_its_backward(tmp_path):
    with entered() as cap, cap.into(tmp_path, plan=PLAN) as out:
        for ids in out.batches(4):
            fail_after_backward(cap, ids)
            fail_after_backward(cap, ids)
            run(cap, ids)
    assert_whole(tmp_path)


def test_no_room_for_what_a_failed_batch_left(tmp_path):
    text = (
        "rows of the capture must hold the 2 that a failed batch left in this unit beside its own, got 4. "
        "Give capture rows=6 or more, or run the loop again."
    )
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN):
        run(cap, [0, 1])
        fail_after_backward(cap, [2, 3])
        run(cap, [2, 3])


def test_a_batch_with_two_backwards_may_be_tried_again(tmp_path):
    with entered(rows=8) as cap, cap.into(tmp_path, plan=Plan(2, 2)):
        with refuses("a batch must make a row for each of its 2 ids, got 4.", RuntimeError), cap.batch(ids=[0, 1]):
            run_loss()
            run_loss()
        run(cap, [1, 0])
    assert torch.equal(open_dataset(tmp_path)["first"][:], rows_at()["first"][:2])


def test_a_clear_in_a_batch_that_fails(tmp_path):
    text = "rows in the capture must be the 2 that came with ids, got 2 after a clear()."
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN):
        run(cap, [0, 1])
        with suppress(LookupError), cap.batch(ids=[2, 3]):
            cap.clear()
            run_loss()
            raise LookupError
        run(cap, [2, 3])


def test_nothing_is_done_where_all_is_there(tmp_path):
    for n_batches in (3, 0):
        with entered() as cap, cap.into(tmp_path, plan=PLAN) as out:
            batches = list(out.batches(4))
            assert len(batches) == n_batches
            for ids in batches:
                run(cap, ids)
            if not batches:
                run(cap, [0])  # `capture` wants a backward
    assert_whole(tmp_path)


def test_what_a_run_left_that_failed_before_its_first_unit_is_replaced(tmp_path):
    for header in ({"run": 1}, {"run": 2}):
        with pytest.raises(LookupError):
            write(tmp_path, [0], then=LookupError(), header=header)
    assert open_dataset(tmp_path, partial=True).header["run"] == 2


def test_a_disk_that_fails_ends_the_loop_at_the_next_batch(tmp_path, monkeypatch):
    failed, write_unit = threading.Event(), DatasetWriter.write_unit

    def failing(self, unit, *rest):
        if unit.name == "u000001":
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return write_unit(self, unit, *rest)

    monkeypatch.setattr(DatasetWriter, "write_unit", failing)
    cap, n_run = entered(), []

    def loop(out):
        for ids in out.batches(4):
            run(cap, ids)
            n_run.append(ids)
            if len(n_run) == 2:
                assert failed.wait(60)
                out._background._thread.join(60)

    with pytest.raises(OSError, match="Input/output error"), cap, cap.into(tmp_path, plan=PLAN) as out:
        loop(out)
    assert len(n_run) == 2
    assert open_dataset(tmp_path, partial=True).ids.tolist() == [0, 1, 2, 3]


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tlfast.dataset.places.full_disk._RETRY_S", 0.001)
    n_full, write_unit = [3], DatasetWriter.write_unit

    def full(self, *unit):
        n_full[0] -= 1
        if n_full[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_unit(self, *unit)

    monkeypatch.setattr(DatasetWriter, "write_unit", full)
    write(tmp_path)
    assert "u000000 waits for room on the disk" in capsys.readouterr().err
    assert_whole(tmp_path)


def test_a_full_disk_that_is_not_waited_for(tmp_path, monkeypatch):
    def full(self, *unit):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(DatasetWriter, "write_unit", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, disk_wait_s=0)


def test_a_url(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(lambda call, path: None))
    url = f"shared:/{tmp_path}/store"
    write(url, staging=tmp_path / "staging")
    assert_whole(url)
    with (
        DatasetWriter(f"{url}2", header={}, columns=COLUMNS, plan=PLAN) as writer,
        entered() as cap,
        cap.into(writer) as out,
    ):
        for ids in out.batches(4):
            run(cap, ids)
    assert_whole(f"{url}2")


# What is refused.


def refuses(text, error=ValueError):
    return pytest.raises(error, match=re.escape(f"into: {text}"))


TWICE = "ids must come once, got 1 a second time. Leave the block after one pass over the examples."
CROSSING = (
    "a batch must have examples of one unit, got 3 of u000000 and 4 of u000001. "
    "Take batches(n), or a batch size that divides rows_per_unit."
)
TOO_EARLY = (
    "a unit must be whole before the next begins, got one of u000001 after 2 of the 4 rows of u000000. "
    "Sort the batches by unit, as batches(n) does."
)


@pytest.mark.parametrize(
    "before, ids, error, text",
    [
        ([], [3, 4], ValueError, CROSSING),
        ([0, 1], [4], ValueError, TOO_EARLY),
        ([0, 1], [1], ValueError, TWICE),
        ([], [1, 1], ValueError, TWICE),
        ([0, 1, 2, 3], [1], ValueError, TWICE),
        ([], [10], ValueError, "ids must be in 0..9, numbers of the plan, got 10. Number the examples from 0 on."),
        ([], [-1], ValueError, "ids must be in 0..9, numbers of the plan, got -1. Number the examples from 0 on."),
        ([], ["a"], TypeError, "ids must be numbers of examples, or Examples, got 'a'. Number the examples from 0 on."),
        ([], [True], TypeError, "ids must be numbers of examples, or Examples, got True."),
        ([], torch.tensor([True]), TypeError, "ids must be numbers of examples, or Examples, got tensor(True)."),
        ([], [1.0], TypeError, "ids must be numbers of examples, or Examples, got 1.0."),
        (
            [],
            [Example("0", (), "", 0, 0)],
            TypeError,
            "ids must be numbers of examples, or Examples, got Example(id='0'",
        ),
        (
            [],
            [Example(torch.tensor(0), (), "", 0, 0)],
            TypeError,
            "ids must be numbers of examples, or Examples, got Exa",
        ),
        (
            [],
            [Example(True, (), "", 0, 0)],
            TypeError,
            "ids must be numbers of examples, or Examples, got Example(id=Tr",
        ),
    ],
)
def test_ids_that_can_not_be_placed(tmp_path, before, ids, error, text):
    ran = []
    with refuses(text, error), entered() as cap, cap.into(tmp_path, plan=PLAN):
        if before:
            run(cap, before)
        with cap.batch(ids=ids):
            ran.append(ids)
    assert ran == []  # nothing is computed for nothing


@pytest.mark.parametrize(
    "ids, kind",
    [((i for i in (0, 1)), "generator"), (3, "int"), ({0, 1}, "set"), (torch.tensor(3), "Tensor"), ({}, "dict")],
)
def test_ids_that_are_no_sequence(tmp_path, ids, kind):
    text = f"batch: ids must be a sequence, got {kind}. Give a list with one id for each example."
    with (
        pytest.raises(TypeError, match=re.escape(text)),
        entered() as cap,
        cap.into(tmp_path, plan=PLAN),
        cap.batch(ids=ids),
    ):
        run_loss()


@pytest.mark.parametrize("inside", [True, False])
def test_rows_that_are_not_for_the_dataset_and_have_no_room(tmp_path, inside):
    text = "the loop must make the rows of its ids alone, got capture at second: rows must hold the 4 rows written"
    with refuses(text, RuntimeError) as caught, entered() as cap, cap.into(tmp_path, plan=PLAN):
        run(cap, range(4))
        with cap.batch() if inside else nullcontext():
            run_loss()
    assert str(caught.value).endswith(
        ". Run what is not for the dataset outside the capture, and one backward for each batch."
    )
    assert open_dataset(tmp_path, partial=True).ids.tolist() == [0, 1, 2, 3]


def run_loss():
    MODEL(DATA[:2].requires_grad_()).sum().backward()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("then", [True, False])
def test_rows_without_ids(tmp_path, inside, then):
    text = (
        "rows in the capture must be the 0 that came with ids, got 2. "
        "Run each backward inside cap.batch(ids=...) or outside the capture, and leave clear() to into."
    )
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN):
        with cap.batch() if inside else nullcontext():
            run_loss()
        if then:
            run(cap, [0])


def test_rows_that_were_cleared(tmp_path):
    text = "rows in the capture must be the 2 that came with ids, got 0 after a clear()."
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN):
        run(cap, [0, 1])
        cap.clear()
        run(cap, [2, 3])


def test_two_backwards_in_one_batch(tmp_path):
    text = (
        "a batch must make a row for each of its 2 ids, got 4. "
        "Run one backward in it, whose reduction keeps the batch; leave clear() to into."
    )
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN), cap.batch(ids=[0, 1]):
        run_loss()
        run_loss()


def test_a_unit_that_is_not_whole_at_the_end(tmp_path):
    text = (
        "a unit must be whole at the end, got 1 of 4 rows of u000001, which are dropped. "
        "Run the loop again: left and batches(n) are what isn't written."
    )
    with refuses(text, RuntimeError), entered() as cap, cap.into(tmp_path, plan=PLAN):
        run(cap, [0, 1, 2, 3])
        run(cap, [4])
    assert open_dataset(tmp_path, partial=True).ids.tolist() == [0, 1, 2, 3]


def test_another_dataset(tmp_path):
    write(tmp_path, plan=Plan(2, 2), header={"run": 1})
    other, summed = entered(), entered(reduce="sum")
    with pytest.raises(DatasetError, match=r"header\.run: 1 there, 2 here"):
        other.into(tmp_path, plan=Plan(2, 2), header={"run": 2}).__enter__()
    with pytest.raises(DatasetError, match=r"header\.specs.*'none' there, 'sum' here"):
        summed.into(tmp_path, plan=Plan(2, 2), header={"run": 1}).__enter__()
    assert other.receiver is summed.receiver is None


def test_calls_and_missing_say_what_a_dataset_is(tmp_path):
    write(tmp_path / "plain", plan=Plan(2, 2))
    assert set(open_dataset(tmp_path / "plain").header) == {"specs"}
    for setting, value in (("calls", "sum"), ("missing", "nan")):
        with entered(**{setting: value}) as cap, cap.into(tmp_path / setting, plan=Plan(2, 2)):
            run(cap, [0, 1])
        assert open_dataset(tmp_path / setting).header[setting] == value
        with pytest.raises(DatasetError, match=rf"header\.{setting}"):
            entered(**{setting: value}).into(tmp_path / "plain", plan=Plan(2, 2)).__enter__()


@pytest.mark.parametrize(
    "key, value", [("specs", "mine"), ("calls", "sum"), ("missing", "nan"), ("specs", [{"reduce": "sum"}])]
)
def test_a_header_that_says_something_else_of_the_capture(tmp_path, key, value):
    with refuses(f"header['{key}'] must be left to the capture, or say what it has, "):
        entered().into(tmp_path, plan=PLAN, header={key: value})


@pytest.mark.parametrize(
    "column, said", [({"of": "act"}, "act"), ({"encoding": "int8"}, "int8"), ({"per": "token"}, "token")]
)
def test_columns_that_a_capture_can_not_fill(tmp_path, column, said):
    columns = COLUMNS | {"first": Column(torch.float32, (5,), **column)}
    writer = DatasetWriter(tmp_path, header={}, columns=columns, plan=PLAN)
    text = "the column first must be as the capture has it (grad, per example), got "
    out = entered().into(writer)
    with refuses(text) as caught:
        out.__enter__()
    assert said in str(caught.value)
    remedy = "Say of=, per= and encoding= in the capture's Spec as in the dataset's Column."
    assert str(caught.value).endswith(remedy)


def test_rows_of_another_kind(tmp_path):
    columns = COLUMNS | {"first": (torch.float16, (5,))}
    writer = DatasetWriter(tmp_path, header={}, columns=columns, plan=PLAN)
    text = (
        "rows at first must be torch.float16 [5], as in the dataset, got torch.float32 [5]. Pad to one length, "
        "give capture another dtype or reduction, and keep autocast as it was; or write another dataset."
    )
    with refuses(text), entered() as cap, cap.into(writer):
        run(cap, [0])
    cap = tlfast.capture(MODEL, "first", rows=4)
    text = "columns of the dataset must be those of the capture, got a difference in second. This capture has first."
    with refuses(text):
        cap.into(writer).__enter__()
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("dtype, n", [(torch.float32, 7), (torch.float32, 3), (torch.float64, 5)])
@pytest.mark.parametrize("size", [4, 2])
def test_a_later_unit_with_rows_of_another_kind(tmp_path, backend, dtype, n, size):
    text = f"rows at first must be torch.float32 [5], as in the dataset, got {dtype} [{n}]."
    with refuses(text), entered(backend) as cap, cap.into(tmp_path, plan=PLAN) as out:
        for ids in out.batches(size):
            x = torch.ones(len(ids), 5) if ids[0] < 4 else torch.ones(len(ids), n, dtype=dtype)
            with cap.batch(ids=ids):
                MODEL(x.requires_grad_()).sum().backward()
    dataset = open_dataset(tmp_path, partial=True)
    assert dataset.ids.tolist() == [0, 1, 2, 3]
    assert torch.equal(dataset["second"][:], torch.ones(4, 5))
    assert not any("u000000" in str(problem) for problem in dataset.verify().problems)


def test_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with refuses("out must be a new or empty folder", DatasetError):
        entered().into(tmp_path, plan=PLAN)


NO_PLAN = "plan must be a Plan, got NoneType. Give tlfast.dataset.Plan(n_examples, rows_per_unit)."
NO_PLACE = "out must be a place or a writer, got int. Give a path, a URL or a DatasetWriter."
TOO_SMALL = "rows of the capture must hold a unit of 5, got 4. Give capture rows=5."
NO_STAGING = "staging must be left out unless out is a URL, got 's'. A folder needs none."
BOTH = "plan, config must be left out where out is a writer, got both. The writer has its own."


@pytest.mark.parametrize(
    "out, settings, error, text",
    [
        ("new", {}, TypeError, NO_PLAN),
        ("new", {"plan": PLAN, "header": 3}, TypeError, "header must be a mapping, got int. Give a dict."),
        ("new", {"plan": PLAN, "disk_wait_s": -1}, ValueError, "disk_wait_s must be 0 or more, got -1. Give seconds."),
        ("new", {"plan": Plan(10, 5)}, ValueError, TOO_SMALL),
        ("new", {"plan": PLAN, "staging": "s"}, ValueError, NO_STAGING),
        (3, {"plan": PLAN}, TypeError, NO_PLACE),
        ("writer", {"plan": PLAN, "config": "a"}, ValueError, BOTH),
    ],
)
def test_bad_arguments(tmp_path, out, settings, error, text):
    if out == "writer":
        out = DatasetWriter(tmp_path / "there", header={}, columns=COLUMNS, plan=PLAN)
    out = tmp_path / out if out == "new" else out
    with refuses(text, error):
        entered().into(out, **settings)
    assert not (tmp_path / "new").exists()


def test_a_bad_batch_size(tmp_path):
    out = entered().into(tmp_path, plan=PLAN)
    with refuses("batch_size must be a positive number, got 0. Give a whole number."):
        out.batches(0)


def test_it_is_entered_once_and_knows_nothing_before(tmp_path):
    with entered() as cap:
        out = cap.into(tmp_path, plan=PLAN)
        assert repr(out) == f"<tlfast rows into {tmp_path}: not entered>"
        text = (
            "what is left must be asked inside its with block, got a question before it. Write: with cap.into(...) as"
        )
        for ask in (lambda: out.units, lambda: out.left, lambda: out.batches(2)):
            with refuses(text, RuntimeError):
                ask()
        with out:
            run(cap, range(4))
        assert out.left == [4, 5, 6, 7, 8, 9]
        with refuses("a dataset must be entered once, got a second time. Call cap.into again.", RuntimeError):
            out.__enter__()


def test_a_writer_that_is_closed(tmp_path, monkeypatch):
    writer = DatasetWriter(tmp_path, header={}, columns=COLUMNS, plan=PLAN)
    out = entered().into(writer)
    writer.close()
    monkeypatch.setattr(DatasetWriter, "closed", True, raising=False)
    with refuses("the writer must be open, got a closed one. Open the dataset again.", RuntimeError):
        out.__enter__()


def test_a_url_that_nobody_knows():
    with refuses("url must be one that fsspec knows", DatasetError):
        entered().into("s3x://b/c", plan=PLAN)


def test_one_dataset_at_a_time_and_an_empty_capture(tmp_path):
    with entered() as cap:
        there = f"<tlfast rows into {tmp_path / 'a'}: 3 of 3 units left>"
        text = f"a capture must go into one dataset, got {there} already. Leave that block first."
        with cap.into(tmp_path / "a", plan=PLAN), refuses(text, RuntimeError):
            cap.into(tmp_path / "b", plan=PLAN).__enter__()
        run_loss()
        with refuses("the capture must be empty, got 2 rows. Read them, and call cap.clear().", RuntimeError):
            cap.into(tmp_path / "a", plan=PLAN).__enter__()
