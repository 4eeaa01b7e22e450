"""Mapping and pread read the same; which of them is chosen; opening asks the system for each thing once."""

import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from dataset_cases import COLUMNS, PLAN, check_rows, make_dataset, make_writer, same_bits, truth, write_units

from tlfast.dataset import DatasetError, DatasetWriter, Example, Plan, open_dataset
from tlfast.dataset.places import local_file
from tlfast.dataset.places.store import LocalStore


@pytest.mark.parametrize("network, access, mapped", [
    (False, "auto", True), (True, "auto", False), (True, "mmap", True), (False, "pread", False),
])  # fmt: skip
def test_which_access_is_chosen(tmp_path, monkeypatch, network, access, mapped):
    make_dataset(tmp_path)
    monkeypatch.setattr(LocalStore, "network", lambda self: network)
    ds = open_dataset(tmp_path, access=access)
    check_rows(ds, truth())
    assert same_bits(ds["loss"][[0, 5]], truth()["loss"][[0, 5]])
    assert bool(ds._files._open.maps) is mapped


def test_bad_access(tmp_path):
    make_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"access must be one of auto, mmap, pread, got 'fast'. Leave it out"):
        open_dataset(tmp_path, access="fast")
    with pytest.raises(DatasetError, match=r"access must be auto or pread for this store, got mmap"):
        open_dataset(Unmapped(tmp_path), access="mmap")


@dataclass(frozen=True)
class Unmapped(LocalStore):
    """A store that nothing can be mapped from, like one in a network."""

    maps = False


@pytest.mark.parametrize("access", ["mmap", "pread"])
@pytest.mark.parametrize("kept", [2, 100])
def test_both_ways_read_what_was_written(tmp_path, monkeypatch, access, kept):
    monkeypatch.setattr("tlfast.dataset.read.unit_files.most_open", lambda: kept)
    plan, columns = Plan(47, 5), COLUMNS | {"empty": (torch.float32, (0, 3)), "long": (torch.float16, (17000,))}
    make_dataset(tmp_path, plan=plan, columns=columns)
    ds, tensors = open_dataset(tmp_path, access=access), truth(columns, plan)
    generator = np.random.default_rng(0)
    indices = [generator.integers(-47, 47, n) for n in (1, 3, 40, 200)] + [np.arange(47), np.arange(46, -1, -1)]
    for name, tensor in tensors.items():
        for index in indices:
            assert same_bits(ds[name][index], tensor[torch.from_numpy(index)]), (name, index)
        assert same_bits(ds[name][3:44], tensor[3:44])
        assert same_bits(ds[name][1:44:3], tensor[1:44:3])
    assert len(ds._files._open.files) <= kept


@pytest.mark.parametrize("access, gap, expected", [
    ("mmap", -1, [("u000000", 1), ("u000000", 1), ("u000002", 1), ("u000002", 1),
                  ("u000000", 1), ("u000001", 1), ("u000002", 1)]),
    ("mmap", 16, [("u000000", 1), ("u000000", 1), ("u000002", 2), ("u000000", 1), ("u000001", 1), ("u000002", 1)]),
    ("mmap", 32, [("u000000", 4), ("u000002", 2), ("u000000", 1), ("u000001", 1), ("u000002", 1)]),
    ("pread", 0, [("u000002", 1), ("u000000", 1), ("u000000", 1), ("u000002", 1), ("u000000", 1), ("u000002", 1),
                  ("u000001", 1)]),
])  # fmt: skip
def test_rows_that_are_not_in_memory(tmp_path, monkeypatch, access, gap, expected):
    asked = []
    monkeypatch.setattr(local_file.LocalFile, "cached", lambda self, offset: False)
    monkeypatch.setattr(local_file.LocalFile, "will_need", lambda self, offset, n: asked.append((self.name, offset, n)))
    monkeypatch.setattr("tlfast.dataset.read.unit_files._FETCHED_ROWS", 4)
    monkeypatch.setattr("tlfast.dataset.read.unit_files._GAP_BYTES", gap)
    make_dataset(tmp_path)
    ds, rows = open_dataset(tmp_path, access=access), [9, 0, 3, 10, 1, 9, 4]
    assert same_bits(ds["double"][rows], truth()["double"][rows])
    assert [(name[5:12], n // 16) for name, _, n in asked] == expected
    assert all(n % 16 == 0 for _, _, n in asked)


def test_a_file_cut_while_it_is_read(tmp_path):
    make_dataset(tmp_path)
    ds = open_dataset(tmp_path, access="pread")
    ds["double"][[0, 1]]
    os.truncate(tmp_path / "data" / "u000000.safetensors", 4100)
    for index in (slice(0, 4), [0, 3], slice(0, 11)):
        with pytest.raises(DatasetError, match=r"u000000.safetensors must have \d+ bytes, got 4100. It was cut while"):
            ds["blocks.1.attn"][index]


@pytest.mark.parametrize("in_memory", ["all", "none", "some", "unknown"])
def test_over_a_network_what_is_in_memory_needs_no_thread(tmp_path, monkeypatch, in_memory):
    plan, threads = Plan(200, 100), set()
    for path in (make_dataset(tmp_path, plan=plan).path / "data").iterdir():
        path.read_bytes()  # a writer may have gone past the system's memory
    real, n = local_file.LocalFile.read_at_once, 0

    def read_at_once(self, offset, target):
        nonlocal n
        n += 1
        return real(self, offset, target) if in_memory == "all" or (in_memory == "some" and n % 3) else False

    def noting(self, ranges, who, real=LocalStore._fill):
        threads.add(threading.current_thread().name.partition("_")[0])
        real(self, ranges, who)

    if in_memory == "unknown":
        monkeypatch.setattr(local_file, "_DONT_WAIT", 0)
    else:
        monkeypatch.setattr(local_file.LocalFile, "read_at_once", read_at_once)
    monkeypatch.setattr(LocalStore, "_fill", noting)
    monkeypatch.setattr(LocalStore, "network", lambda self: True)
    rows = np.random.default_rng(0).permutation(200)
    found = open_dataset(tmp_path, access="pread")["double"][rows]
    assert same_bits(found, truth(plan=plan)["double"][torch.from_numpy(rows)])
    assert threads == ({"MainThread"} if in_memory == "all" else {"tlfast-reader"})
    assert n < 40 if in_memory == "none" else True, "asking of each what none has is given up"


def test_a_long_stretch_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.dataset.read.unit_files._PIECE_BYTES", 7)
    make_dataset(tmp_path)
    check_rows(open_dataset(tmp_path), truth())


def test_many_threads_read_while_units_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.dataset.read.unit_files.most_open", lambda: 3)
    plan = Plan(60, 2)
    ds, tensors, wrong = make_dataset(tmp_path, plan=plan), truth(plan=plan), []

    def read(seed):
        generator = np.random.default_rng(seed)
        for _ in range(40):
            rows = generator.integers(0, 60, 9)
            if not same_bits(ds["blocks.1.attn"][rows], tensors["blocks.1.attn"][torch.from_numpy(rows)]):
                wrong.append(rows)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORKED = """
import os, sys
from tlfast.dataset import open_dataset
ds = open_dataset(sys.argv[1], access="pread")
rows = list(range(0, 90, 2))
before = ds["h"][rows]
child = os.fork()
if child == 0:
    os._exit(0 if (ds["h"][rows] == before).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_reads_with_threads_of_its_own(tmp_path):
    plan = Plan(90, 45)
    writer = DatasetWriter(tmp_path, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
    write_units(writer)
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path)], timeout=120, check=False)
    assert done.returncode == 0


def test_opening_asks_for_each_thing_once(tmp_path, monkeypatch):
    n = 40
    make_dataset(tmp_path, plan=Plan(n, 1))
    calls = dict.fromkeys(("listdir", "stat", "open", "read", "lstat", "scandir"), 0)

    def count(name, real):
        def counted(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, counted)

    for name in calls:
        count(name, getattr(os, name))
    ds = open_dataset(tmp_path, access="mmap")
    ds.info()
    repr(ds)
    monkeypatch.undo()
    assert calls == {
        "listdir": 3, "stat": 2 * n, "open": n + 1 + 3, "read": n + 1, "lstat": 1, "scandir": 0,
    }  # fmt: skip


def test_a_commit_spelled_otherwise_says_the_same(tmp_path):
    make_dataset(tmp_path)
    path = tmp_path / "commits" / "u000001.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items()))))
    check_rows(open_dataset(tmp_path), truth())


def test_a_pickled_dataset_keeps_its_units(tmp_path):
    writer = make_writer(tmp_path)
    tensors = truth()
    for unit in PLAN.units[:2]:
        examples = [Example(i, [1], "a", 0, 1) for i in range(unit.start, unit.stop)]
        writer.write_unit(unit, {name: t[unit.start : unit.stop] for name, t in tensors.items()}, examples)
    ds = open_dataset(tmp_path, partial=True)
    kept = pickle.dumps(ds)
    write_units(writer)
    assert len(pickle.loads(kept)) == 8
    assert len(open_dataset(tmp_path)) == 11
