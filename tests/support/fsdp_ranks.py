"""What each rank of tests/collecting/scale/test_fsdp.py does: capture and collect on a model sharded by fully_shard."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import collect, sequences, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tlfast
import tlfast.collecting.loss
from tlfast.collecting.fingerprint import describe_model
from tlfast.collecting.fsdp import is_sharded
from tlfast.dataset.format.plan import Plan

POINTS = "transformer.h.*"
SETTINGS = {"rows_per_unit": 4, "batch_tokens": 32}
N_EXAMPLES = 18  # 5 units, the last of 2: with two ranks a round with one unit, and rounds whose units differ in steps


def examples():
    return sequences(N_EXAMPLES)


def sharded(reshard):
    model = tiny_model()
    for block in model.transformer.h:
        fully_shard(block, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


def gradients(model, ids, attach):
    with tlfast.freeze(model), tlfast.capture(model, POINTS, rows=len(ids), attach=attach) as cap:
        model(ids).logits.logsumexp(-1).sum().backward()
        return {name: cap[name].clone() for name in cap.names}


def check_capture(rank):
    plain = tiny_model().eval()
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(rank))
    other = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(1 - rank))
    for attach in ("tensor", "full"):
        model = sharded(reshard=attach == "tensor").eval()
        model(ids).logits.sum().backward()  # parameter gradients, as in training
        model.zero_grad(set_to_none=True)
        truth, found = gradients(plain, ids, attach), gradients(model, ids, attach)
        wrong = gradients(plain, other, attach)
        for name, wanted in truth.items():
            # Each rank has the very weights once they are gathered: no rounding anywhere.
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=0)
            assert not torch.equal(found[name], wrong[name]), "every rank has gradients of its own batch"
        assert all(p.grad is None for p in model.parameters()), "frozen parameters get no gradient"
    assert describe_model(model) == describe_model(plain)


def check_collect(rank, out):
    model, plain = sharded(reshard=True), tiny_model()
    n_steps = []

    def count_steps(model, batch):
        n_steps.append(1)
        return tlfast.collecting.loss.next_token_loss(model, batch)

    count_steps.__module__, count_steps.__qualname__ = "loss", "loss"
    if rank == 0:
        collect(plain, out / "plain", examples(), share=(0, 1), loss=count_steps, **SETTINGS)
    n_steps.clear()
    first = collect(model, out / "sharded", examples(), units="1:2", loss=count_steps, **SETTINGS)
    assert first.n_rows + first.n_rows_elsewhere == 4
    report = collect(model, out / "sharded", examples(), loss=count_steps, **SETTINGS)
    assert report.n_rows + report.n_rows_elsewhere == N_EXAMPLES - 4
    assert report.n_units == 2, "four units are left for two ranks"
    taken = [None, None]
    dist.all_gather_object(taken, len(n_steps))
    assert taken[0] == taken[1], taken
    assert Plan(N_EXAMPLES, 4).n_units == 5
    dist.barrier()


def told_by_hooks(kind, rank, native):
    """What full backward hooks of every module are called with, and what one that doubles makes of the gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    told = []

    def hook(name, factor):
        def tell(module, grad_input, grad_output):
            grads = [grad if grad is None else grad.clone() for grad in (*grad_input, *grad_output)]
            told.append((name, grads))
            return None if factor == 1 else tuple(grad if grad is None else grad * factor for grad in grad_input)

        return tell

    run = DistributedDataParallel(model) if kind == "ddp" else model
    if kind == "fsdp":
        for layer in (model[0], model[2], model):
            fully_shard(layer)
    with tlfast.accelerate_hooks() if native else contextlib.nullcontext():
        for number, (name, module) in enumerate(run.named_modules()):
            module.register_full_backward_hook(hook(name, 2 if number == 2 else 1))
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(rank), requires_grad=True)
        for _ in range(2):  # DDP rebuilds its buckets after the first
            run(x).square().sum().backward()
    whole = [grad.full_tensor() if kind == "fsdp" else grad for grad in (param.grad for param in model.parameters())]
    return told, [x.grad, *whole]


def check_full_hooks(rank):
    """Full backward hooks that are native: beside DDP and fully_shard they are told what PyTorch's are, to the bit."""
    for kind in ("ddp", "fsdp"):
        (wanted, grads), (found, native_grads) = (told_by_hooks(kind, rank, native) for native in (False, True))
        assert [call[0] for call in found] == [call[0] for call in wanted]
        assert len(found) == 2 * (5 if kind == "ddp" else 4)
        for mine, theirs in zip([*(c[1] for c in found), native_grads], [*(c[1] for c in wanted), grads], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if b is not None)


def check_refusals(out):
    model = sharded(reshard=True)
    for settings, text in (
        ({"cuda_graph": "on"}, 'cuda_graph must be "auto" or "off" for a sharded model, got "on" with FSDPGPT2'),
        ({"overwrite": True}, "overwrite must be off where several processes collect"),
        ({"share": (0, 1)}, "share must be None for a sharded model"),
    ):
        refused(text, collect, model, out / "refused", examples(), **settings)
    assert not (out / "refused").exists()
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallel = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 8))
    parallelize_module(parallel, mesh["tensor"], {"1": ColwiseParallel()})
    rule = "model must be sharded by fully_shard alone, got"
    refused(f"{rule} Sequential with a parameter placed ", is_sharded, parallel)
    refused(f"{rule} FSDPSequential with a parameter placed ", is_sharded, fully_shard(parallel, mesh=mesh["data"]))
    refused("model must be unwrapped, got DistributedDataParallel", is_sharded, DistributedDataParallel(tiny_model()))


def refused(text, call, *arguments, **settings):
    with pytest.raises(ValueError, match=re.escape(text)):
        call(*arguments, **settings)


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="tlfast runs in pure Python")
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # of a full backward hook
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check_capture(dist.get_rank())
    check_collect(dist.get_rank(), Path(sys.argv[1]))
    check_refusals(Path(sys.argv[1]))
    check_full_hooks(dist.get_rank())
    print(f"rank {dist.get_rank()} is done\n", end="", flush=True)
    dist.destroy_process_group()
