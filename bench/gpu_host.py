"""What 48 taps cost the host of a GPU, and that no step waits, allocates, or copies from pageable memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch

import tlfast

from .clock import Clock
from .measure import WrongResult, interleave
from .report import Cell, Claim, Findings, Table, cost_rows
from .rivals import AUTO, BARE, EMPTY, FULL_HOOK, TENSOR_HOOK, VARIANTS, Attach, Keep
from .training import Job, check_variants, sampler

PREDICTION = (
    "host: a tap is a pre-hook, a fit of sizes and strides and one launch with 1760 bytes of parameters: 5.5-6.5 us a "
    "point, so the target of 2 us will be missed; Python tensor hooks 20-25 us (two launches of torch and a Python "
    "call), empty full hooks 45-50 us; no wait, no allocation and no pageable copy in any step"
)
MODULES = ("ln_2", "attn", "mlp", "")  # of each of 12 blocks: 48 points
# What a step must not do. Source: names of the CUDA runtime's and driver's functions as CUPTI traces them, and of
# copies as kineto does ("Memcpy DtoH (Device -> Pageable)").
FORBIDDEN = {
    "waits": ("cudaStreamSynchronize", "cuStreamSynchronize"),
    "allocations": ("cudaMalloc", "cudaMallocAsync", "cuMemAlloc", "cuMemAlloc_v2", "cudaHostAlloc"),
    "pageable copies": (),
}


def forbidden(names: Iterable[str]) -> Counter[str]:
    """How many of the traced events are of each forbidden kind."""
    found = Counter(dict.fromkeys(FORBIDDEN, 0))
    for name in names:
        for kind, calls in FORBIDDEN.items():
            found[kind] += name in calls
        found["pageable copies"] += name.startswith("Memcpy") and "Pageable" in name
    return found


def make_job(clock: Clock, n_layers: int, n_steps: int) -> Job:
    """A small GPT-2, frozen from outside, so small that the GPU is done before the host is."""
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    batch, length, width = 4, 32, 64
    config = GPT2Config(
        n_layer=n_layers, n_embd=width, n_head=4, n_positions=length, vocab_size=512, bos_token_id=0, eos_token_id=0,
        use_cache=False,
    )  # fmt: skip
    # Attention as plain products: the fused kernels may add up in another order in the next run, and the gradients of
    # one run are the truth for another here.
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(clock.device).eval()
    tokens = torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(0)).to(clock.device)
    names = tuple(f"transformer.h.{layer}.{part}".rstrip(".") for layer in range(n_layers) for part in MODULES)
    keep = Keep(names, "mean", torch.bfloat16, (batch, width), n_steps + 2, clock.device)
    return Job(model, lambda: model(input_ids=tokens, labels=tokens).loss, [], keep)


def check_waits(job: Job, attach: Attach, clock: Clock, n_steps: int) -> Counter[str]:
    """Count what a number of steps must not do; the first steps have allocated what the others use."""
    with attach(job.model, replace(job.keep, n_steps=2 * n_steps + 2)):
        for _ in range(n_steps):
            job.step()
        clock.finish()
        return forbidden(clock.waits(lambda: [job.step() for _ in range(n_steps)]))


def run(clock: Clock, quick: bool = False, variants: dict[str, Attach] | None = None) -> Findings:
    """Measure the host's time of a step under every variant, and count."""
    if variants is None:
        variants = {name: VARIANTS[name] for name in (BARE, EMPTY, FULL_HOOK, TENSOR_HOOK, AUTO)}
    n_layers, n_steps, rounds = (2, 1, 2) if quick else (12, 10, 9)
    job = make_job(clock, n_layers, n_steps)
    found = Findings()
    with tlfast.freeze(job.model):
        check_variants(job, variants)
        counts = {name: check_waits(job, variants[name], clock, 3) for name in (BARE, AUTO)}
        above = {kind: counts[AUTO][kind] - counts[BARE][kind] for kind in FORBIDDEN}
        if any(count > 0 for count in above.values()):
            raise WrongResult(f"{AUTO}: steps must not wait, allocate or copy from pageable memory, got {above}")
        ways = {name: sampler(job, attach, n_steps, beside=clock.finish) for name, attach in variants.items()}
        measured = interleave(ways, rounds)
    n_points = len(job.keep.points)
    rows = cost_rows(measured, BARE, n_points)
    found.tables.append(
        Table(f"host, {n_points} points: us of the queueing thread; above the floor, us a point", BARE,
              ["variant", "median", "min", "ratio_to_floor", "total_above_floor", "forward_above_floor",
               "backward_above_floor", "min_above_floor"], rows)
    )  # fmt: skip
    kept: list[dict[str, Cell]] = [{"variant": name, **count, "ratio_to_floor": 1} for name, count in counts.items()]
    found.tables.append(
        Table("host: calls of the CUDA runtime in 3 steps", BARE, ["variant", *FORBIDDEN, "ratio_to_floor"], kept)
    )
    cost = measured[AUTO]["total"].above(measured[BARE]["total"]) * 1e6 / n_points
    found.claims.append(Claim(f"host time of a tap at {n_points} taps", "at most", 2, cost, " us"))
    for kind in FORBIDDEN:
        found.claims.append(Claim(f"{kind} in 3 steps with taps", "at most", 0, counts[AUTO][kind], ""))
    return found
