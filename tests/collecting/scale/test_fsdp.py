"""A model sharded by fully_shard over two ranks (gloo): the gradients, and the bytes, of the unsharded model."""

from __future__ import annotations

import re

import pytest
import torch
from checkout import SUPPORT
from fsdp_ranks import SETTINGS, examples
from processes import WAIT_S, started
from tiny_models import collect, tiny_model, unit_bytes

import tlfast
from tlfast.collecting.fsdp import Lockstep, is_sharded
from tlfast.collecting.unit_queue import Share
from tlfast.dataset.format.plan import Example, Plan


@pytest.mark.long
def test_two_ranks_capture_and_collect_on_a_sharded_model(tmp_path):
    script = SUPPORT / "fsdp_ranks.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(tmp_path)]
    with started(*command) as process:
        shown, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert sorted(re.findall(r"rank \d is done", shown)) == ["rank 0 is done", "rank 1 is done"], shown
    header = tlfast.open_dataset(tmp_path / "plain").header
    assert tlfast.open_dataset(tmp_path / "sharded").header == header
    assert unit_bytes(tmp_path / "sharded") == unit_bytes(tmp_path / "plain")
    collect(tiny_model(), tmp_path / "here", examples(), **SETTINGS)
    assert unit_bytes(tmp_path / "sharded") == unit_bytes(tmp_path / "here")
    assert tlfast.open_dataset(tmp_path / "sharded").verify().ok


class FakeRunner:
    """Counts the steps of a rank: a unit takes as many as its first example has tokens."""

    def __init__(self):
        self.n_taken = 0

    def n_steps(self, examples):
        return examples[0].length

    def idle(self, n_steps, example):
        assert n_steps >= 0
        assert example.length == 1, "the shortest is the cheapest"
        self.n_taken += n_steps


def test_every_rank_takes_as_many_steps():
    units, steps = Plan(7, 1).units, [3, 1, 2, 5, 5, 1, 4]
    for count in (1, 2, 3, 8):
        taken, names = [], []
        for index in range(count):
            runner = FakeRunner()
            made = [Example(i, [], "", 0, n) for i, n in enumerate(steps)]
            todo = Lockstep(units, Share(index, count), made, runner)
            for unit in todo:
                runner.n_taken += steps[unit.start]
                names.append(unit.name)
            taken.append(runner.n_taken)
            assert len(todo.taken) + todo.n_rows_elsewhere == len(units)
        assert len(set(taken)) == 1
        assert taken[0] == sum(max(steps[start : start + count]) for start in range(0, 7, count))
        assert sorted(names) == [unit.name for unit in units]


def test_without_a_process_group_nothing_is_sharded():
    assert not is_sharded(torch.nn.Linear(2, 2))
