"""What each of two ranks does for tests/hooks/test_full_hooks_among_others.py: hooks on models in parallel."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from told_hooks import Told, both
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Two layers of which the second may be left out, and a checkpoint around the first."""

    def __init__(self, recompute: bool | None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.second, self.recompute = nn.Linear(4, 4), recompute

    def forward(self, x: torch.Tensor, second: bool) -> torch.Tensor:
        x = self.first(x) if self.recompute is None else checkpoint(self.first, x, use_reentrant=self.recompute)
        return self.second(x) if second else x


def doubled(grads: Any) -> Any:
    return tuple(grad if grad is None else 2 * grad for grad in grads)


def run(seen: Told, how: str, recompute: bool | None) -> Any:
    torch.manual_seed(0)
    model = Net(recompute)
    if how == "fully_shard":
        for layer in (model.first[0], model.second, model):
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    for name, module in model.named_modules():
        module.register_full_backward_hook(seen.hook(name, lambda given, _: doubled(given)))
    wrapped: Any = model
    if how != "fully_shard":
        wrapped = DistributedDataParallel(model, find_unused_parameters="unused" in how, static_graph="static" in how)
        wrapped.register_full_backward_pre_hook(seen.pre_hook("wrapped", doubled))
    for step in range(2):
        torch.manual_seed(step + 10 * dist.get_rank())
        wrapped(torch.randn(3, 4, requires_grad=True), "unused" not in how or step == 1).square().sum().backward()
    grads = [param.grad for param in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def main(rank: str, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(rank), world_size=2)
    for how in ("ddp", "ddp, unused", "ddp, static", "fully_shard"):
        for recompute in (None, False, True):
            plain, native = both(lambda seen, how=how, recompute=recompute: run(seen, how, recompute))
            assert native[:3] == plain[:3], (how, recompute, native[2], plain[2])
            assert plain[0], (how, recompute)
            assert plain[2] is None or (how == "ddp, unused" and recompute), plain[2]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
