"""A writer that is closed: it writes nothing, in a folder and at a URL, and says so."""

import pytest
from dataset_cases import HEADER, PLAN, check_rows, content, examples, make_writer, rows_of, truth, write_units
from remote_cases import objects

import tlfast.dataset.write.writer as writer_module
from tlfast.dataset import BackgroundWriter, open_dataset

UNIT = PLAN.unit(0)
CLOSED = r"^DatasetWriter: write_unit must come before close, got u000000\. Open it again\.$"


@pytest.fixture(params=["folder", "url"])
def place(request, tmp_path):
    """Where a dataset is written, and a function that returns what lies there."""
    if request.param == "folder":
        return tmp_path / "d", content
    return request.getfixturevalue("url"), objects


def write_first(writer):
    return writer.write_unit(UNIT, rows_of(UNIT, truth()), examples(UNIT))


def left_with_an_error(writer):
    with pytest.raises(KeyError), writer:
        raise KeyError


@pytest.mark.parametrize("end", [lambda writer: writer.close(), left_with_an_error])
def test_nothing_is_written_after_close(place, end):
    out, there = place
    writer = make_writer(out)
    assert not writer.closed
    end(writer)
    assert writer.closed
    before = there(out)
    with pytest.raises(RuntimeError, match=CLOSED):
        write_first(writer)
    with pytest.raises(RuntimeError, match=r"^DatasetWriter: extend must come before close, got 2 examples\. Open it"):
        writer.extend(2, {"tokens": 1})
    with pytest.raises(RuntimeError, match=r"^DatasetWriter: a with block must come before close, got .*\. Open it"):
        writer.__enter__()
    assert there(out) == before
    assert not writer.done
    again = make_writer(out)  # as the error says
    write_units(again)
    again.close()
    check_rows(open_dataset(out), truth())


def test_another_thread_hears_of_it(tmp_path):
    writer = make_writer(tmp_path)
    background = BackgroundWriter(writer)
    writer.close()
    background.submit(UNIT, rows_of(UNIT, truth()), examples(UNIT))
    with pytest.raises(RuntimeError, match=CLOSED):
        background.close()
    assert not list((tmp_path / "commits").iterdir())


def test_it_can_be_closed_twice(place):
    writer = make_writer(place[0])
    write_units(writer)
    writer.close()
    writer.close()
    check_rows(open_dataset(place[0]), truth())


def test_the_dataset_of_another_is_not_touched(tmp_path):
    closed = make_writer(tmp_path)
    closed.close()
    make_writer(tmp_path, header=HEADER | {"seed": 1}, replace_unused=True)
    before = content(tmp_path)
    with pytest.raises(RuntimeError, match=CLOSED):
        write_first(closed)
    assert content(tmp_path) == before


def test_a_unit_that_is_being_written_when_it_is_closed_is_not_committed(place, monkeypatch):
    out, there = place
    writer, encode = make_writer(out), writer_module.encode_rows

    def close_meanwhile(*args):
        writer.close()
        return encode(*args)

    monkeypatch.setattr(writer_module, "encode_rows", close_meanwhile)
    before = there(out)
    with pytest.raises(RuntimeError, match=CLOSED):
        write_first(writer)
    assert there(out) == before


def test_a_folder_without_its_lock_is_not_taken_for_one_without_locks(tmp_path):
    units = make_writer(tmp_path)._units
    assert units.still_there()
    units.release(wait=True)
    assert not units.still_there()
