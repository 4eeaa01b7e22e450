"""Models whose parameters lie in pieces on several ranks (FSDP2), which therefore take their steps together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..dataset.format.plan import Example, Unit
from ..errors import broken_rule
from .unit import Runner
from .unit_queue import Share, Todo


def is_sharded(model: nn.Module, cuda_graph: str = "auto") -> bool:
    """Whether ranks must step together, since each holds but a piece of the parameters.

    Raises:
        ValueError: where activations are in pieces too (tensor parallelism): ranks with other data would spoil them;
            for DistributedDataParallel and the first FSDP, which wait for other ranks in ways of their own; where CUDA
            graphs are asked for, which can't wait for others.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, (DistributedDataParallel, FullyShardedDataParallel)):
        remedy = "Pass the module inside, or shard it with fully_shard."
        raise ValueError(broken_rule("collect", "model", "be unwrapped", type(model).__name__, remedy))
    parts = [p for p in model.parameters() if isinstance(p, DTensor)]
    fully = any(isinstance(module, FSDPModule) for module in model.modules())
    # FSDP2 alone gives a parameter one placement that is no replica, replicated FSDP2 too.
    if parts and not (fully and all(sum(not p.is_replicate() for p in part.placements) <= 1 for part in parts)):
        got = f"{type(model).__name__} with a parameter placed {list(parts[0].placements)}"
        remedy = "Use device_map, or the unsharded model."
        raise ValueError(broken_rule("collect", "model", "be sharded by fully_shard alone", got, remedy))
    if parts and cuda_graph == "on":
        got = f'"on" with {type(model).__name__}'
        raise ValueError(
            broken_rule("collect", "cuda_graph", 'be "auto" or "off" for a sharded model', got, "Leave it out.")
        )
    return bool(parts)


def share_of_group() -> Share:
    """This rank's share among all ranks of the default process group."""
    return Share(torch.distributed.get_rank(), torch.distributed.get_world_size())


def agreed(units: Sequence[Unit]) -> list[Unit]:
    """The units as rank 0 lists them, on all ranks: a commit may appear between the looks of two."""
    said = [list(units)]
    torch.distributed.broadcast_object_list(said)
    return said[0]


class Lockstep(Todo):
    """The units of one rank, in rounds: in each round every rank does one and takes as many steps as the longest needs.

    A step gathers parameters from all ranks, so one that took fewer would leave the others waiting for ever.

    Args:
        units: the same on all ranks.
        share: this rank's.
        examples: all of the plan.
        runner: takes the steps.
    """

    def __init__(self, units: Sequence[Unit], share: Share, examples: Sequence[Example], runner: Runner):
        super().__init__(units, share, set)
        self._listed, self._share, self._examples, self._runner = units, share, examples, runner
        self._shortest = min(examples, key=lambda example: example.length)  # the cheapest to wait with

    def overtaken(self) -> bool:
        """False: the other ranks count on every step."""
        return False

    def __iter__(self) -> Iterator[Unit]:
        index, count = self._share.index, self._share.count
        for start in range(0, len(self._listed), count):
            units = self._listed[start : start + count]
            mine = units[index] if index < len(units) else None
            n_steps = [self._runner.n_steps(list(self._examples[unit.start : unit.stop])) for unit in units]
            self._runner.idle(max(n_steps) - (n_steps[index] if mine else 0), self._shortest)
            if mine is not None:
                self.taken.append(mine)
                yield mine
            self.n_rows_elsewhere += sum(len(unit) for unit in units if unit is not mine)
