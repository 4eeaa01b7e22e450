"""Which heads does a model need? One backward estimates what removing each would do; removing them one by one checks.

    python examples/head_attribution.py [--steps 300]

A GPT-2 of two layers learns to copy: random tokens are said twice, and the second half can be read off the first. What
a head puts out is a slice of the input of its layer's output projection, which `side="input"` captures without a change
of the model. Gradient times activation, added up over the slice and the positions, is what the right logits would lose
if the head put out zeros, as far as a straight line can say. Then each head is set to zero, one by one: the order is
about the same, and the straight line says too little of the heads that matter most. Where a model has learnt a harder
task in part, or heads stand in for each other, the two can disagree: so check before you believe the estimate.

Runs offline, in less than a minute on a CPU. Needs transformers, which tlfast[collect] brings.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tlfast

VOCABULARY, HALF = 16, 8  # tokens, and how long a sequence is before it is said again
LAYERS, HEADS, WIDTH = 2, 8, 64
POINTS = "transformer.h.*.attn.c_proj"


def sequences(n: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [n, 2 x HALF]: random ones, said twice."""
    half = torch.randint(VOCABULARY, (n, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def copied(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [n, HALF, VOCABULARY] where the second half is to be copied, and its tokens [n, HALF]."""
    return model(tokens, use_cache=False).logits[:, HALF - 1 : -1], tokens[:, HALF:]


def metric(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of each sequence [n]: how far the logit of the right token stands above the mean of all, averaged over places.

    The loss of a model that is sure is flat, so it would hide the heads.
    """
    logits, right = copied(model, tokens)
    return (logits.gather(2, right[..., None])[..., 0] - logits.mean(2)).mean(1)


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train to copy; returns how often it does in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        logits, right = copied(model, sequences(64, generator))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((logits.argmax(2) == right).float().mean())


def estimated(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """How much the metric falls without each head, [LAYERS, HEADS], by one forward and one backward."""
    with (
        tlfast.freeze(model),
        tlfast.capture(model, POINTS, reduce="sum", over="pos", of="grad*act", side="input", rows=len(tokens)) as cap,
    ):
        metric(model, tokens).sum().backward()
    # A row is of an example, [WIDTH]: of that a head has its part.
    return torch.stack([cap[name].mean(0).unflatten(0, (HEADS, -1)).sum(1) for name in cap.names])


@torch.no_grad()
def ablated(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The same, [LAYERS, HEADS], by a forward for each head."""
    falls = torch.empty(LAYERS, HEADS)
    whole = metric(model, tokens).mean()
    for layer in range(LAYERS):
        for head in range(HEADS):

            def remove(module: Any, inputs: Any, head: int = head) -> Any:
                heads = inputs[0].unflatten(-1, (HEADS, -1)).clone()
                heads[..., head, :] = 0
                return (heads.flatten(-2),)

            with model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(remove):
                falls[layer, head] = whole - metric(model, tokens).mean()
    return falls


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of the ranks."""
    ranks = torch.stack([x.flatten().argsort().argsort().float() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(arguments: list[str] | None = None) -> None:
    """Train, estimate, ablate, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=2 * HALF, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    right = train(model, options.steps, generator)
    model.eval()
    tokens = sequences(256, generator)
    print(f"trained: {right:.0%} of the second half is copied rightly")
    fast, slow = estimated(model, tokens), ablated(model, tokens)
    print("layer head  estimated  ablated")
    for place in slow.flatten().argsort(descending=True).tolist():
        print(f"{place // HEADS:5} {place % HEADS:4} {fast.flatten()[place]:10.3f} {slow.flatten()[place]:8.3f}")
    print(f"rank correlation of the two: {spearman(fast, slow):.2f}")


if __name__ == "__main__":
    main()
