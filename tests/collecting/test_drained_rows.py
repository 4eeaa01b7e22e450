"""A collection drained by way of streams writes what a plain loop writes; a slow disk is waited for, and shown."""

from __future__ import annotations

import sys
import threading
from random import Random

import pytest
import torch
from fake_streams import FakeStreams
from poisoned_rows import files_of, poisoned, poisoned_loss
from tiny_models import POINTS, collect, sequences, tiny_model

import tlfast
import tlfast.collecting.run
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.progress import Progress
from tlfast.collecting.unit import Oddities
from tlfast.dataset import FLAG_NON_FINITE, FLAG_SATURATED, DatasetWriter, Plan

EXAMPLES = sequences(40)
ROWS_PER_UNIT = 6
BATCH_TOKENS = 48


@pytest.fixture(params=["direct", "staged"])
def drained(request, monkeypatch):
    """Rows straight to the host, or by way of the device, where copies lag behind until somebody waits for them."""
    if request.param == "staged":
        made = []
        module = sys.modules["tlfast.collecting.run"]
        monkeypatch.setattr(
            module, "streams_for", lambda devices: made.append(FakeStreams(Random(1), lagging=("side",))) or made[-1]
        )
        yield request.param
        assert made, "the streams were not used"
    else:
        yield request.param


def plain_loop(model, folder, backend, examples, loss):
    """The same dataset without slots, threads or counters, written as `collect` would have to, from its header on."""
    examples = as_examples(examples)
    there = tlfast.open_dataset(folder.parent / "collected")
    columns = {name: (torch.float16, there[name].shape[1:]) for name in there.points}
    plan = Plan(len(examples), ROWS_PER_UNIT)
    writer = DatasetWriter(folder, header=there.header, columns=columns, plan=plan)
    batching = Batching(BATCH_TOKENS)
    model.eval()
    for unit in plan.units:
        part = examples[unit.start : unit.stop]
        order = batching.order(part)
        flags = torch.zeros(len(part), dtype=torch.int64)
        tensors = {}
        for dtype in (torch.float32, torch.float16):
            with (
                tlfast.freeze(model),
                tlfast.capture(
                    model, POINTS["gpt2"], rows=len(part), reduce="mean", dtype=dtype, backend=backend
                ) as cap,
            ):
                for _, batch in batching.batches(part, order):
                    with cap.batch(batch.mask):
                        loss(model, batch).backward()
            for name in cap.names:
                rows = cap[name][torch.tensor(order).argsort()]
                if dtype == torch.float16:
                    flags |= (~rows.isfinite()).any(1) * FLAG_NON_FINITE
                    flags |= (rows.isinf() & tensors[name].isfinite()).any(1) * FLAG_SATURATED
                tensors[name] = rows
        writer.write_unit(unit, tensors, part, flags.tolist())


def test_the_bytes_are_those_of_a_plain_loop(tmp_path, backend, drained):
    examples = poisoned(EXAMPLES, (3, 4, 17, 39))
    report = collect(
        tiny_model(), tmp_path / "collected", examples, dtype=torch.float16, loss=poisoned_loss, backend=backend,
        rows_per_unit=ROWS_PER_UNIT, batch_tokens=BATCH_TOKENS,
    )  # fmt: skip
    plain_loop(tiny_model(), tmp_path / "plain", backend, examples, poisoned_loss)
    assert files_of(tmp_path / "collected") == files_of(tmp_path / "plain")
    assert len(files_of(tmp_path / "plain")) == 3 * 7
    dataset = tlfast.open_dataset(tmp_path / "collected")
    flagged = [example["id"] for example in dataset.examples if example["flags"]]
    assert flagged == [3, 4, 17, 39]
    assert report.n_nonfinite_rows == 4
    assert report.n_saturated == sum(int(dataset[name][:].isinf().sum()) for name in dataset.points)


def test_a_slow_disk_is_waited_for_and_shown(tmp_path, monkeypatch, drained):
    waiting, lines = threading.Event(), []
    step, write_unit = Progress.step, DatasetWriter.write_unit

    def watched_step(self, n_examples, n_tokens):
        if not n_examples:
            waiting.set()
        step(self, n_examples, n_tokens)
        lines.append(self._figures())

    def slow_write(self, *unit):
        assert waiting.wait(60)  # far above the second after which `collect` looks again
        return write_unit(self, *unit)

    monkeypatch.setattr(Progress, "step", watched_step)
    monkeypatch.setattr(DatasetWriter, "write_unit", slow_write)
    report = collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=ROWS_PER_UNIT)
    assert "waiting for the disk" not in lines[0]
    assert "waiting for the disk" in lines[-1]
    assert report.waited_s > 0
    assert "s of them waiting for the disk" in str(report)
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_without_waiting_nothing_is_said_of_it(tmp_path):
    report = collect(tiny_model(), tmp_path, EXAMPLES)  # one unit: there is nothing to wait for
    assert report.waited_s == 0
    assert "waiting" not in str(report)


def test_what_goes_wrong_while_a_unit_is_finished_ends_the_run(tmp_path, monkeypatch, drained):
    def failing(self, *unit):
        raise LookupError("no flags")

    monkeypatch.setattr(Oddities, "flags", failing)
    with pytest.raises(LookupError, match="no flags"):
        collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=ROWS_PER_UNIT)
    monkeypatch.undo()
    assert len(tlfast.open_dataset(tmp_path, partial=True)) == 0


def test_nothing_of_a_unit_before_is_counted_again():
    """Counters go on from unit to unit, what is told of each does not."""
    counters = torch.tensor([[5, 2, 7], [0, 0, 7]])
    oddities = Oddities()
    bad = {"a": torch.tensor([[1.0], [torch.inf]]), "b": torch.zeros(2, 3)}
    good = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 3)}
    assert oddities.flags(bad, counters) == [0, FLAG_NON_FINITE | FLAG_SATURATED]
    assert oddities.flags(good, counters) is None
    assert oddities.flags(bad, counters + torch.tensor([[1, 0, 0], [0, 0, 0]])) == [0, FLAG_NON_FINITE]
    assert (oddities.n_nonfinite_rows, oddities.n_saturated) == (2, 2)


def test_rows_that_were_not_all_written_are_refused():
    good, counters = {"a": torch.zeros(2, 1), "b": torch.zeros(2, 3)}, torch.tensor([[0, 0, 7], [0, 0, 6]])
    assert Oddities().flags(good, counters, n_writes=[7, 6]) is None
    with pytest.raises(RuntimeError, match=r"collect at b: rows must have been written 7 times, got 6\. Run again"):
        Oddities().flags(good, counters, n_writes=[7, 7])
    with pytest.raises(RuntimeError, match=r"stream at b: rows must have been written 7 times, got 6\. Run again"):
        Oddities(who="stream").flags(good, counters, n_writes=[7, 7])
