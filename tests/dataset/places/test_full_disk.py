"""A full disk is told of once and waited for; then the unit is whole, or the run ends with all that was committed."""

import errno
import os
import re
import subprocess
import threading

import pytest
from dataset_cases import PLAN, check_rows, content, examples, make_base, make_writer, rows_of, truth, write_units
from threads import within

from tlfast.dataset import BackgroundWriter, open_dataset, verify_dataset
from tlfast.dataset.places.full_disk import FullDisk

LONG_S, SHORT_S = 600.0, 0.05


class Filling:
    """Lets a disk be full for the first ``n`` writes of unit u000001."""

    def __init__(self, writer, n, number=errno.ENOSPC):
        self.writer, self.n_left, self.number = writer, n, number
        self.n_tries = 0
        self.bytes_written = 0

    def write_unit(self, unit, *rest):
        self.bytes_written += 100
        if unit.name == "u000001":
            self.n_tries += 1
            if self.n_left:
                self.n_left -= 1
                raise OSError(self.number, os.strerror(self.number), "data/x.tmp")
        return self.writer.write_unit(unit, *rest)


def run(background):
    """Write the whole plan."""
    with background:
        for unit in PLAN.units:
            background.submit(unit, rows_of(unit, truth()), examples(unit))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_freed_in_time(tmp_path, monkeypatch, number):
    monkeypatch.setattr("tlfast.dataset.places.full_disk._RETRY_S", 0.001)
    said, filling = [], Filling(make_writer(tmp_path), 3, number)
    within(lambda: run(BackgroundWriter(filling, 1, LONG_S, said.append)))
    check_rows(open_dataset(tmp_path), truth())
    assert verify_dataset(tmp_path).ok
    assert (filling.n_tries, filling.bytes_written) == (4, 300)  # a failed try counts for nothing
    reason = re.escape(os.strerror(number))
    assert len(said) == 1
    assert re.fullmatch(rf"u000001 waits for room on the disk \({reason}\): free some within 600 s, or .*", said[0])


def test_a_disk_that_stays_full(tmp_path, capsys):
    filling = Filling(make_writer(tmp_path), 10**9)
    with pytest.raises(OSError, match=r"No space left on device, and still after 0 s: 'data/x\.tmp'"):
        within(lambda: run(BackgroundWriter(filling, 1, SHORT_S)))
    assert filling.n_tries > 1
    assert capsys.readouterr().err.startswith("u000001 waits for room on the disk (No space left on device)")
    assert open_dataset(tmp_path, partial=True).units == PLAN.units[:1]
    write_units(make_writer(tmp_path))
    assert content(tmp_path) == content(make_base(tmp_path / "undisturbed"))


def test_other_errors_and_no_patience_are_errors_at_once(tmp_path):
    for number, wait_s in ((errno.EIO, LONG_S), (errno.ENOSPC, 0.0)):
        filling = Filling(make_writer(tmp_path / str(number)), 10**9, number)
        with pytest.raises(OSError, match=os.strerror(number)):
            within(lambda: run(BackgroundWriter(filling, 1, wait_s)))  # noqa: B023
        assert filling.n_tries == 1


def test_how_long_it_is_full_is_shown_and_an_error_of_the_block_ends_the_waiting(tmp_path):
    full = threading.Event()
    background = BackgroundWriter(Filling(make_writer(tmp_path), 10**9), 1, LONG_S, lambda line: full.set())

    def go():
        with background:
            assert background.full_s == 0.0
            for unit in PLAN.units[:2]:
                background.submit(unit, rows_of(unit, truth()), examples(unit))
            assert full.wait(60)
            assert background.full_s > 0.0
            assert not background.flush(0.01)
            background.check()  # not failed, not yet
            raise KeyboardInterrupt

    with (
        pytest.warns(RuntimeWarning, match=r"a unit was not written: OSError\(28, 'No space left on device'\)"),
        pytest.raises(KeyboardInterrupt),
    ):
        within(go)
    assert len(open_dataset(tmp_path, partial=True)) == 4


def test_check_raises_an_earlier_failure_and_waits_for_nothing(tmp_path):
    failed = threading.Event()

    class Broken:
        bytes_written = 0

        def write_unit(self, *job):
            failed.set()
            raise OSError(errno.EIO, "Input/output error")

    background = BackgroundWriter(Broken(), 2)
    background.check()
    background.submit(PLAN.unit(0), {}, [])
    assert failed.wait(60)
    with pytest.raises(OSError, match="Input/output"):
        within(background.flush)
    with pytest.raises(OSError, match="Input/output"):
        background.check()
    background.close()


def test_an_abandoned_writer_is_not_waited_for():
    begun, end = threading.Event(), threading.Event()

    class Slow:
        bytes_written = 0

        def write_unit(self, *job):
            begun.set()
            end.wait(60)

    background = BackgroundWriter(Slow(), 2)
    background.submit(PLAN.unit(0), {}, [])
    assert begun.wait(60)
    background.abandon()
    within(background.close)
    assert background._thread.is_alive()
    end.set()
    background._thread.join(60)


def test_waiting_ends_when_it_is_given_up():
    disk = FullDisk(LONG_S, lambda line: disk.give_up())

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device$"):
        within(lambda: disk.write("u000000", full))


@pytest.fixture
def small_disk(tmp_path):
    """A filesystem of 256 KiB in memory; skips where it can't be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_real_full_disk(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.dataset.places.full_disk._RETRY_S", 0.001)
    writer, ballast = make_writer(small_disk / "d"), small_disk / "ballast"

    def free(line):
        assert "No space left on device" in line
        assert open_dataset(small_disk / "d", partial=True).units == PLAN.units[:1]
        ballast.unlink()

    with BackgroundWriter(writer, 1, LONG_S, free) as background:
        for unit in PLAN.units:
            background.submit(unit, rows_of(unit, truth()), examples(unit))
            if unit.start == 0:
                within(background.flush)
                statistics = os.statvfs(small_disk)
                ballast.write_bytes(bytes(statistics.f_bavail * statistics.f_frsize))
    assert not ballast.exists()
    check_rows(open_dataset(small_disk / "d"), truth())
    assert content(small_disk / "d") == content(make_base(tmp_path / "undisturbed"))
