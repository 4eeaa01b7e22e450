"""A training step of a small GPT-2 with a tap at 48 modules, against the same step without."""

from __future__ import annotations

import torch

from .measure import interleave
from .report import Claim, Result, Table, cost_rows
from .rivals import AUTO, BARE, VARIANTS, Attach, Keep
from .training import Job, check_variants, sampler

PREDICTION = (
    "48 points at 1-5 us each are 0.1-0.25 ms of a step of about 10 ms: tlfast auto +1 to +2 %, Python tensor hooks "
    "+7 %, empty full hooks +25 %, Python full hooks +37 %"
)
MODULES = ("ln_2", "attn", "mlp", "")  # of each block; "" is the block itself
WIDTH, HEADS, VOCABULARY = 64, 4, 512  # a small vocabulary: the unembedding must not hide the blocks


def gpt2_job(n_layers: int, batch: int, length: int, n_steps: int) -> Job:
    """GPT-2 with random weights and ordinary training gradients; no dropout, so that every step is the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layers, n_embd=WIDTH, n_head=HEADS, n_positions=length, vocab_size=VOCABULARY,
        bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    tokens = torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0))
    names = [f"transformer.h.{layer}.{part}".rstrip(".") for layer in range(n_layers) for part in MODULES]
    keep = Keep(tuple(names), "mean", torch.bfloat16, (batch, WIDTH), n_steps + 2)
    return Job(model, lambda: model(input_ids=tokens, labels=tokens).loss, list(model.parameters()), keep)


def run(quick: bool = False, variants: dict[str, Attach] | None = None) -> Result:
    """Measure the whole step under every variant."""
    variants = VARIANTS if variants is None else variants
    n_layers, n_steps, rounds = (2, 1, 3) if quick else (12, 10, 21)
    job = gpt2_job(n_layers, 4, 32, n_steps)
    result = Result(
        "step", PREDICTION,
        {"model": f"GPT-2, {n_layers} layers, d {WIDTH}, {HEADS} heads, vocabulary {VOCABULARY}",
         "batch": 4, "length": 32, "points": len(job.keep.points), "reduce": "mean", "stored": "bfloat16",
         "rounds": rounds, "steps": n_steps, "quick": quick},
    )  # fmt: skip
    check_variants(job, variants)
    measured = interleave({name: sampler(job, attach, n_steps) for name, attach in variants.items()}, rounds)
    rows = cost_rows(measured, BARE, unit=1e3)
    for row in rows:
        times = measured[str(row["variant"])]
        row["overhead_percent"] = (times["total"].ratio(measured[BARE]["total"]) - 1) * 100
        row["overhead_percent_min"] = (times["total"].min / measured[BARE]["total"].min - 1) * 100
        row["overhead_percent_cpu"] = (times["cpu"].ratio(measured[BARE]["cpu"]) - 1) * 100
        row["overhead_us_a_point"] = times["total"].above(measured[BARE]["total"]) * 1e6 / len(job.keep.points)
    result.tables.append(
        Table("one step (forward and backward): ms", BARE,
              ["variant", "median", "min", "overhead_percent", "overhead_percent_min", "overhead_percent_cpu",
               "overhead_us_a_point", "forward_above_floor", "backward_above_floor"], rows)
    )  # fmt: skip
    ratio = measured[AUTO]["total"].ratio(measured[BARE]["total"])
    result.claims.append(Claim("tlfast auto over the floor", "at most", 2.0, (ratio - 1) * 100, " %"))
    return result
