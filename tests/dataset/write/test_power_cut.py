"""A power cut: the disk as it is at the instant when a unit was reported durable holds all units reported until then.

The disk is the image of a loop device, copied without unmounting: what the filesystem had only in memory is not in the
copy, and mounting the copy replays its journal as after a cut. (What a device keeps in a cache of its own can't be lost
here: the kernel's flushes are taken on trust.)
"""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
from dataset_cases import check_rows, examples, make_writer, rows_of, truth
from failing_farm import COLUMNS, PLAN

from tlfast.dataset import DatasetError, open_dataset

IMAGE_BYTES = 32 << 20
# No commit of the journal by the clock: what nobody synced stays in memory until the test is over.
OPTIONS = "loop,commit=600"


def run(*command):
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def mounted(image, folder):
    folder.mkdir()
    run("mount", "-o", OPTIONS, str(image), str(folder))
    try:
        yield folder
    finally:
        run("umount", "--lazy", str(folder))


@pytest.fixture
def image(tmp_path):
    """The image of an empty filesystem; skips where none can be made and mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting an image needs root")
    for program in ("mkfs.ext4", "losetup", "mount"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None:
            pytest.skip(f"{program} is not installed")
    made = tmp_path / "disk.img"
    with open(made, "wb") as file:
        file.truncate(IMAGE_BYTES)
    try:
        run("mkfs.ext4", "-q", "-F", str(made))
        with mounted(made, tmp_path / "probe"):
            pass
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"no loop device can be mounted: {getattr(error, 'stderr', error)}")
    return made


def after_a_cut(image, folder, number):
    """Mount the disk as it is now, in a copy; return the rows of the dataset on it."""
    copy = image.with_name(f"cut-{number}.img")
    shutil.copyfile(image, copy)
    with mounted(copy, folder / f"cut-{number}") as there:
        ds = open_dataset(there / "out", partial=True)
        check_rows(ds, truth(COLUMNS, PLAN))
        report = ds.verify()
        assert report.ok, str(report)
        return len(ds)


def test_what_was_reported_survives_a_power_cut(image, tmp_path, backend):
    with mounted(image, tmp_path / "disk") as disk:
        writer = make_writer(disk / "out", columns=COLUMNS, plan=PLAN, backend=backend)
        assert after_a_cut(image, tmp_path, "empty") == 0
        for unit in PLAN.units:
            assert writer.write_unit(unit, rows_of(unit, truth(COLUMNS, PLAN)), examples(unit))
            assert after_a_cut(image, tmp_path, unit.name) == unit.stop
        del writer


@pytest.mark.parametrize("left_out", [("fdatasync",), ("fsync",), ("fsync", "fdatasync")])
def test_a_sync_that_is_left_out_is_noticed(image, tmp_path, monkeypatch, left_out):
    with mounted(image, tmp_path / "disk") as disk:
        writer = make_writer(disk / "out", columns=COLUMNS, plan=PLAN, backend="python")
        for name in left_out:
            monkeypatch.setattr(os, name, lambda fd: None)
        unit = PLAN.unit(0)
        writer.write_unit(unit, rows_of(unit, truth(COLUMNS, PLAN)), examples(unit))
        try:
            n_rows = after_a_cut(image, tmp_path, "unsynced")
        except (DatasetError, AssertionError):
            n_rows = 0
        assert n_rows == 0, "the rows survived without a sync: this disk shows nothing"
