"""Where does a copied token travel? Attribution patching of a model that copies, checked by patching every place.

    python examples/copied_token.py [--steps 300]

A GPT-2 of two layers learns to copy: random tokens are said twice, and the second half can be read off the first. In
each pair of prompts one token of the first half differs, and the metric is how much the model prefers the clean token
where it has to say it again. `tlfast.recipes.attribution_patching` estimates, by one backward, what putting back the
clean output of each attention and each MLP at each position would add to the metric of the corrupted prompt. Then
every one of these patches is made, a forward each, and the ranks of both are compared.

Runs offline, in less than a minute on a CPU. Needs transformers, which tlfast[collect] brings.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tlfast.recipes import attribution_patching

VOCABULARY, HALF = 16, 8  # tokens, and how long a sequence is before it is said again
LAYERS, HEADS, WIDTH = 2, 4, 64
CHANGED = 3  # the position whose token differs; the model says it again behind position HALF + CHANGED - 1
POINTS = ["transformer.h.*.attn", "transformer.h.*.mlp"]


def sequences(n: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [n, 2 x HALF]: random ones, said twice."""
    half = torch.randint(VOCABULARY, (n, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train to copy; returns how often it does in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = sequences(64, generator)
        logits, right = model(tokens, use_cache=False).logits[:, HALF - 1 : -1], tokens[:, HALF:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), right.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((logits.argmax(2) == right).float().mean())


def exact(model: Any, names: list[str], clean: Any, corrupted: Any, metric: Any) -> dict[str, torch.Tensor]:
    """Of each point [2 x HALF]: what the patch of each position adds to the metric, a forward each."""
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: kept.update({name: first(output)})

    def patched(name: str, position: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            changed = first(output).clone()
            changed[:, position] = kept[name][:, position]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    with torch.no_grad():
        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        model(clean)
        for handle in handles:
            handle.remove()
        before = metric(model(corrupted).logits).mean()
        effects = {name: torch.zeros(clean.shape[1]) for name in names}
        for name in names:
            for position in range(clean.shape[1]):
                with model.get_submodule(name).register_forward_hook(patched(name, position)):
                    effects[name][position] = metric(model(corrupted).logits).mean() - before
    return effects


def first(output: Any) -> torch.Tensor:
    """The tensor in what a module returned."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Correlation of the ranks."""
    ranks = torch.stack([x.flatten().argsort().argsort().float() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(arguments: list[str] | None = None) -> None:
    """Train, estimate, patch, compare."""
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
    print(f"trained: {train(model, options.steps, generator):.0%} of the second half is copied rightly")
    model.eval()
    clean = sequences(64, generator)
    corrupted = clean.clone()
    corrupted[:, CHANGED] = (clean[:, CHANGED] + torch.randint(1, VOCABULARY, (64,), generator=generator)) % VOCABULARY

    def metric(logits: torch.Tensor, pairs: Any = None) -> torch.Tensor:
        """How far the clean token stands above the corrupted one where it is due: a logit difference, [pairs]."""
        rows = torch.arange(len(clean)) if pairs is None else pairs.index
        due = logits[:, HALF + CHANGED - 1]
        return (due.gather(1, clean[rows, CHANGED, None]) - due.gather(1, corrupted[rows, CHANGED, None]))[:, 0]

    found = attribution_patching(model, clean, corrupted, metric, POINTS, "position").mean()
    effects = exact(model, list(found), clean, corrupted, metric)
    # Before the changed token nothing differs, and behind the place where it is due nothing matters: zero in both.
    places = slice(CHANGED, HALF + CHANGED)
    print("point                position  estimated  patched")
    fast, slow = (torch.stack([scores[name][places] for name in found]) for scores in (found, effects))
    for place in slow.abs().flatten().argsort(descending=True).tolist()[:8]:
        name, position = list(found)[place // HALF], place % HALF + CHANGED
        print(f"{name:20} {position:8} {found[name][position]:10.3f} {effects[name][position]:8.3f}")
    print(f"rank correlation of the two, over {fast.numel()} places: {spearman(fast, slow):.2f}")


if __name__ == "__main__":
    main()
