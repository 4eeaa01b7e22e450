"""SIGTERM and Ctrl-C end a collection between two batches; what a program does with signals of its own stays."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import contextmanager

import pytest
from tiny_models import collect, sequences, tiny_model, unit_bytes

import tlfast
from tlfast.collecting.loss import next_token_loss
from tlfast.collecting.signals import LeaveAtOnce, Terminated, stopping
from tlfast.dataset import BackgroundWriter, DatasetWriter

EXAMPLES = sequences(20)
SETTINGS = {"rows_per_unit": 4, "batch_tokens": 1}  # five units of four batches


@contextmanager
def signals_as_in_a_program():
    """What a new process does with signals; pytest's own way comes back afterwards."""
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.signal(signal.SIGTERM, signal.SIG_DFL)]
    try:
        yield
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


class Signalling:
    """A loss that sends signals to its own process in step ``at``, and counts the steps."""

    def __init__(self, at, *numbers):
        self.at, self.numbers, self.n_steps = at, numbers, 0

    def __call__(self, model, batch):
        self.n_steps += 1
        if self.n_steps == self.at:
            for number in self.numbers:
                os.kill(os.getpid(), number)
        return next_token_loss(model, batch)


def join_writer():
    for thread in threading.enumerate():
        if thread.name == "tlfast-writer":
            thread.join(60)


PROBE = 1
IN_THE_THIRD_UNIT = PROBE + 4 + 4 + 2


@pytest.mark.parametrize("number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_a_signal_is_held_back_until_the_batch_is_done(tmp_path, number, error):
    loss = Signalling(IN_THE_THIRD_UNIT, number)
    with signals_as_in_a_program(), pytest.raises(error, match="2 of 5 units are kept in") as stopped:
        collect(tiny_model(), tmp_path / "out", EXAMPLES, loss=loss, identity="signals", **SETTINGS)
    assert type(stopped.value) is error
    assert loss.n_steps == IN_THE_THIRD_UNIT
    ds = tlfast.open_dataset(tmp_path / "out", partial=True)
    assert (len(ds), ds.verify().ok) == (8, True)
    for name in ("out", "undisturbed"):
        collect(tiny_model(), tmp_path / name, EXAMPLES, loss=Signalling(0), identity="signals", **SETTINGS)
    assert unit_bytes(tmp_path / "out") == unit_bytes(tmp_path / "undisturbed")


def test_terminated_is_exit_code_143_where_nobody_catches_it():
    assert (Terminated("text").code, str(Terminated("text"))) == (143, "text")
    assert not issubclass(Terminated, Exception)  # an `except Exception` around collect does not swallow it


def test_two_ctrl_c_do_not_wait_for_the_unit_that_is_being_written(tmp_path, monkeypatch):
    writing, end = threading.Event(), threading.Event()
    write_unit = DatasetWriter.write_unit

    def slow(self, *job):
        writing.set()
        assert end.wait(60)
        return write_unit(self, *job)

    def loss(model, batch):
        if writing.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return next_token_loss(model, batch)

    monkeypatch.setattr(DatasetWriter, "write_unit", slow)
    with signals_as_in_a_program(), pytest.raises(LeaveAtOnce, match="0 of 5 units are kept in"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, identity="signals", **SETTINGS)
    assert not end.is_set()
    end.set()
    join_writer()
    assert tlfast.open_dataset(tmp_path, partial=True).verify().ok  # it was whole in the end


@pytest.mark.long
def test_a_second_ctrl_c_while_the_first_waits_for_the_disk(tmp_path, monkeypatch):
    """The first ends the run, which waits for the unit on its way to the disk; the second ends this too."""
    closing, end = threading.Event(), threading.Event()
    write_unit, close = DatasetWriter.write_unit, BackgroundWriter.close

    def watched(self):
        closing.set()
        close(self)

    def slow(self, *job):
        os.kill(os.getpid(), signal.SIGINT)
        assert closing.wait(60)
        os.kill(os.getpid(), signal.SIGINT)
        assert end.wait(60)
        return write_unit(self, *job)

    monkeypatch.setattr(BackgroundWriter, "close", watched)
    monkeypatch.setattr(DatasetWriter, "write_unit", slow)
    with signals_as_in_a_program(), pytest.raises(LeaveAtOnce, match="0 of 1 units are kept in"):
        collect(tiny_model(), tmp_path, EXAMPLES)
    assert not end.is_set()
    end.set()
    join_writer()


def test_a_way_of_ones_own_to_take_signals_stays():
    came = []
    mine = lambda number, frame: came.append("mine")  # noqa: E731
    before = [signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)]
    try:
        with stopping() as stop_if_asked:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            stop_if_asked()
        assert came == ["mine"]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_in_another_thread_signals_are_not_touched(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(collect(tiny_model(), tmp_path, EXAMPLES)))
    with signals_as_in_a_program():
        thread.start()
        thread.join(60)
    assert done[0].n_rows == 20


def test_ctrl_c_wins_over_sigterm():
    with signals_as_in_a_program(), stopping() as stop_if_asked:
        stop_if_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Terminated):
            stop_if_asked()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
        with pytest.raises(LeaveAtOnce):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_write_that_failed_ends_the_run_at_the_next_batch(tmp_path, monkeypatch):
    """Not at the end of the unit: that may take minutes."""
    n_steps = 0

    def loss(model, batch):
        nonlocal n_steps
        n_steps += 1
        if n_steps == PROBE + 10 + 2:
            join_writer()  # which ends with the error
        return next_token_loss(model, batch)

    def failing(self, *job):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(DatasetWriter, "write_unit", failing)
    with pytest.raises(OSError, match="Input/output error"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, rows_per_unit=10, batch_tokens=1)
    assert PROBE + 10 < n_steps <= PROBE + 10 + 2
