"""A dataset of which a fuzzer replaces files, and what must hold whatever they say: an error or the right rows.

Whatever the files say, reading raises nothing but DatasetError, executes nothing, opens nothing outside the dataset's
folder, and takes little memory.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from unittest.mock import patch
from zlib import crc32

import torch
from dataset_cases import PLAN, examples, make_writer, rows_of, same_bits, truth, write_units

from tlfast.dataset import DatasetError, open_dataset, verify_dataset
from tlfast.dataset.check.verify import check_unit
from tlfast.dataset.format import row_limits
from tlfast.dataset.format.description import read_description
from tlfast.dataset.places.store import as_store

N_ADDED = 3  # examples of the extension
MAX_GROWTH_KB = 300 << 10  # while the files of one input are read; they have a few MB
MOST_BYTES = 32 << 20  # what its row tables may unpack to: as small as the dataset is

WHOLE_EVERY = 8  # inputs: verify reads all units, of which one is hostile

# What reading a dataset never does. Files and folders it does open, but none outside its own folder.
OPENING = ("open", "os.scandir", "os.listdir", "os.chdir")
FORBIDDEN = (
    "exec", "compile", "import", "pickle.", "marshal.", "subprocess.", "socket.", "ctypes.dlopen", "os.system",
    "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.link", "os.symlink", "os.truncate",
    "os.mkdir", "os.rmdir", "os.chmod", "os.putenv", "shutil.", "tempfile.", "urllib.", "http.",
)  # fmt: skip


class Watch:
    """Notes what this process does while it watches a folder; the hook itself can't be taken out again."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in OPENING:
            inside = isinstance(args[0], int) or f"{os.path.abspath(os.fsdecode(args[0]))}/".startswith(self.folder)
        else:
            inside = not event.startswith(FORBIDDEN)
        if not inside:
            self.seen.append(f"{event} {args!r}"[:300])

    def __call__(self, folder: Path, work) -> None:
        """Do the work; AssertionError if it did what it must not."""
        self.seen, self.folder = [], f"{folder}/"
        try:
            work()
        finally:
            self.folder = None
            if self.seen:
                raise AssertionError(f"reading a dataset did {self.seen}")


WATCH = Watch()


def peak_kb(reset: bool = False) -> int:
    """The most memory that this process has had (VmHWM), or has now if that is reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    [line] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line)


class HostileDataset:
    """A dataset of four units, the last of them an extension's, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        writer = make_writer(folder)
        first = truth()
        write_units(writer, first)
        writer.extend(N_ADDED, {"tokens": 6})
        unit = writer.plan.units[-1]
        self.tensors = {name: torch.cat([rows, rows[:N_ADDED] + 1]) for name, rows in first.items()}
        assert writer.write_unit(unit, rows_of(unit, self.tensors), examples(unit))
        self.original = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
        self.n_rows = PLAN.n_examples + N_ADDED
        self._read()  # whatever is imported late is imported now

    def readable(self, files: dict[str, bytes], same: bool = True) -> bool:
        """Whether the dataset can be read with these files in the place of its own; AssertionError if that isn't safe.

        ``same``: what can be read has the rows that were written.
        """
        for name, data in files.items():
            (self.folder / name).write_bytes(data)
        before_kb = peak_kb(reset=True)
        try:
            with patch.object(row_limits, "MOST_BYTES", MOST_BYTES):
                WATCH(self.folder, lambda: self._read(same, whole=crc32(b"".join(files.values())) % WHOLE_EVERY == 0))
        except DatasetError:
            return False
        else:
            return True
        finally:
            for name in files:
                (self.folder / name).write_bytes(self.original[name])
            grown_kb = peak_kb() - before_kb
            if grown_kb > MAX_GROWTH_KB:
                raise AssertionError(f"reading a dataset took {grown_kb >> 10} MB")

    def _read(self, same: bool = True, whole: bool = True) -> None:
        if whole:
            verify_dataset(self.folder, partial=True)  # reports what is wrong, and raises nothing
        ds = open_dataset(self.folder, partial=True)
        if ds.units:
            check_unit(as_store(self.folder), ds.units[0], read_description(self.folder, "fuzzer"))
        ds.info()
        repr(ds)
        ids = [row for unit in ds.units for row in range(unit.start, unit.stop)]
        for point in ds.points:
            rows = ds[point][:]
            assert len(rows) == len(ids) == len(ds.norms(point))
            assert not same or same_bits(rows, self.tensors[point][ids]), f"other rows of {point}"
        assert [row["id"] for row in ds.examples[:]] == ids
