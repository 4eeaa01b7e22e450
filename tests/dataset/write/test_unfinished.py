"""Units that are finished in the writing thread, and waiting for room: only the disk counts as what is waited for."""

import threading

import pytest
from background_cases import Gate, submit
from dataset_cases import PLAN, examples, make_writer, rows_of, truth
from threads import SECONDS, within

from tlfast.dataset import BackgroundWriter


def test_a_unit_can_be_finished_in_the_thread(tmp_path):
    unit, threads = PLAN.unit(0), []

    def finish():
        threads.append(threading.current_thread().name)
        return rows_of(unit, truth()), None

    with BackgroundWriter(make_writer(tmp_path)) as background:
        background.submit_unfinished(unit, finish, examples(unit))
        background.flush()
    assert threads == ["tlfast-writer"]
    assert (tmp_path / "commits" / "u000000.json").exists()


def test_an_error_of_the_finish_surfaces_in_the_next_submit():
    def finish():
        raise LookupError("not to be finished")

    background = BackgroundWriter(Gate())
    background.submit_unfinished(PLAN.unit(0), finish, examples(PLAN.unit(0)))
    with pytest.raises(LookupError, match="not to be finished"):
        within(lambda: submit(background, 1))


def test_room_is_waited_for_and_only_the_disk_counts_as_waiting():
    gate, ready = Gate(), threading.Event()
    background = BackgroundWriter(gate, max_pending=2)

    def finish():
        assert ready.wait(SECONDS)
        return rows_of(PLAN.unit(0), truth()), None

    background.submit_unfinished(PLAN.unit(0), finish, examples(PLAN.unit(0)))
    assert within(background.wait_for_room)
    submit(background, 1)
    assert not within(lambda: background.wait_for_room(0.01))
    assert background.waited_s == 0, "the unit wasn't ready: nothing waited for the disk"
    ready.set()

    def reach_the_disk():
        while not background._writing:
            threading.Event().wait(0.001)

    within(reach_the_disk)
    assert not within(lambda: background.wait_for_room(0.01))
    assert background.waited_s > 0
    gate.open.set()
    assert within(background.wait_for_room)
    within(background.close)
    assert gate.written == ["u000000", "u000001"]
