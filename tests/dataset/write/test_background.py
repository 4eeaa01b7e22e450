"""The writing thread: errors surface in the caller, nothing hangs, what was submitted is whole or absent."""

import errno
import os
import threading

import pytest
from background_cases import Gate, submit
from dataset_cases import PLAN, check_rows, examples, make_writer, rows_of, truth
from threads import SECONDS, within

from tlfast.dataset import BackgroundWriter, open_dataset, verify_dataset


def test_within_notices_a_hang():
    with pytest.raises(AssertionError, match="hangs"):
        within(threading.Event().wait, seconds=0.05)


def test_units_are_durable_when_the_block_ends(tmp_path):
    writer = make_writer(tmp_path)
    with BackgroundWriter(writer) as background:
        for k in range(3):
            submit(background, k)
    check_rows(open_dataset(tmp_path), truth())
    assert background.bytes_written == writer.bytes_written > 0


def test_after_submit_returns_the_unit_before_is_durable(tmp_path):
    with BackgroundWriter(make_writer(tmp_path)) as background:
        for k in range(3):
            tensors = truth()
            submit(background, k, tensors)
            if k:
                check_rows(open_dataset(tmp_path, partial=True), truth())
                assert (tmp_path / "commits" / f"u00000{k - 1}.json").exists()
                for tensor in previous.values():  # its memory may be used again  # noqa: F821
                    tensor.fill_(-1)
            previous = tensors  # noqa: F841
        background.flush()
        assert (tmp_path / "commits" / "u000002.json").exists()
    check_rows(open_dataset(tmp_path), truth())


def test_submit_waits_for_room():
    gate = Gate()
    background = BackgroundWriter(gate, max_pending=2)
    for k in (0, 1):
        within(lambda k=k: submit(background, k))
    third = threading.Thread(target=submit, args=(background, 2))
    third.start()
    third.join(0.1)
    assert third.is_alive()
    gate.open.set()
    third.join(SECONDS)
    within(background.close)
    assert gate.written == ["u000000", "u000001", "u000002"]


FAILURES = {
    "pwrite": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "fdatasync": lambda: OSError(errno.EIO, "Input/output error"),
    "fsync": lambda: OSError(errno.EIO, "Input/output error"),
    "replace": lambda: OSError(errno.EACCES, "Permission denied"),
    "link": lambda: OSError(errno.EDQUOT, "Disk quota exceeded"),
    "posix_fallocate": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "open": lambda: OSError(errno.EMFILE, "Too many open files"),
}


@pytest.mark.parametrize("call", FAILURES)
@pytest.mark.parametrize("surfaces_in", ["submit", "flush", "close", "with"])
def test_a_failed_call_surfaces_and_nothing_is_half_there(tmp_path, monkeypatch, call, surfaces_in):
    writer = make_writer(tmp_path)
    background = BackgroundWriter(writer)
    submit(background, 0)
    background.flush()

    def fail(*arguments, **options):
        raise FAILURES[call]()

    monkeypatch.setattr(os, call, fail)

    def go():
        if surfaces_in == "with":
            with background:
                submit(background, 1)
            return
        submit(background, 1)
        if surfaces_in == "submit":
            submit(background, 2)
        getattr(background, "flush" if surfaces_in == "flush" else "close")()

    with pytest.raises(OSError, match=FAILURES[call]().strerror):
        within(go)
    with pytest.raises(OSError, match=FAILURES[call]().strerror):
        within(lambda: submit(background, 2))
    monkeypatch.undo()
    within(background.close)  # raised once already
    report = verify_dataset(tmp_path, partial=True)
    assert report.ok
    assert report.n_units == 1
    assert not [name for name in os.listdir(tmp_path / "data") if name.endswith(".tmp")]
    resumed = make_writer(tmp_path)
    assert resumed.done == {"u000000"}
    for k in (1, 2):
        resumed.write_unit(PLAN.unit(k), rows_of(PLAN.unit(k), truth()), examples(PLAN.unit(k)))
    check_rows(open_dataset(tmp_path), truth())


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:101], at))
    writer = make_writer(tmp_path, backend="python")
    for unit in PLAN.units:
        writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    monkeypatch.undo()
    check_rows(open_dataset(tmp_path), truth())
    assert verify_dataset(tmp_path).ok


def test_a_filesystem_without_fallocate(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    make_writer(tmp_path).write_unit(PLAN.unit(0), rows_of(PLAN.unit(0), truth()), examples(PLAN.unit(0)))
    check_rows(open_dataset(tmp_path, partial=True), truth())


def test_units_behind_a_failed_one_are_dropped():
    gate = Gate(OSError(errno.EIO, "Input/output error"))
    background = BackgroundWriter(gate, max_pending=3)
    for k in range(3):
        submit(background, k)
    gate.open.set()
    with pytest.raises(OSError, match="Input/output"):
        within(background.close)
    assert gate.written == []
    within(background.close)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_any_error_of_the_thread_surfaces(error):
    gate = Gate(error)
    gate.open.set()
    background = BackgroundWriter(gate)
    submit(background, 0)
    with pytest.raises(type(error)):
        within(background.flush)


def test_an_error_of_the_block_wins_and_whole_units_stay(tmp_path):
    background = BackgroundWriter(make_writer(tmp_path))

    def go():
        with background:
            submit(background, 0)
            raise LookupError("the model failed")

    with pytest.raises(LookupError, match="the model failed"):
        within(go)
    assert len(open_dataset(tmp_path, partial=True)) == 4
    assert not background._thread.is_alive()


def test_two_errors_are_both_told():
    gate = Gate(OSError(errno.EIO, "Input/output error"))
    background = BackgroundWriter(gate)

    def go():
        with background:
            submit(background, 0)
            gate.open.set()
            raise LookupError("the model failed")

    with (
        pytest.warns(RuntimeWarning, match="a unit was not written: OSError.*Input/output"),
        pytest.raises(LookupError, match="the model failed"),
    ):
        go()


def test_closed_and_bad_arguments():
    background = BackgroundWriter(Gate())
    within(background.close)
    within(background.close)
    with pytest.raises(RuntimeError, match="BackgroundWriter: submit must come before close, got u000000"):
        submit(background, 0)
    with pytest.raises(ValueError, match="max_pending must be at least 1, got 0"):
        BackgroundWriter(Gate(), max_pending=0)
