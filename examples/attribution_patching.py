"""Attribution patching from end to end: train a small model that copies, corrupt its prompts, see where that matters.

    python examples/attribution_patching.py [--out attribution.png]

A transformer of two layers learns sequences of random tokens that are said twice, so that the second half can
be copied from the first (an induction task). A prompt is corrupted by another token at one position of the first half.
One forward and one backward then estimate, at every layer and position, what putting the clean activation back would do
to the metric: the gradient times the difference of activations. The same patches made one by one check it.

Runs offline, in less than a minute on a CPU. Needs tlfast[transformer-lens,plot].
"""

from __future__ import annotations

import argparse
import time
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import tlfast.transformer_lens as lens

VOCABULARY, HALF = 16, 6  # tokens, and how long a sequence is before it is said again
CORRUPTED = 3  # the position whose token is replaced
COPIED = HALF + CORRUPTED - 1  # the position that predicts the second one of them
TRAINING_S = 25.0


def small_model() -> Any:
    """Two layers of attention; a HookedTransformer up to TransformerLens 3, a bridge from 4 on."""
    shape = dict(
        n_layers=2, d_model=64, n_ctx=2 * HALF, d_head=16, n_heads=4, d_vocab=VOCABULARY, act_fn="gelu",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    library = import_module("transformer_lens")
    try:
        return library.HookedTransformer(library.HookedTransformerConfig(**shape, device="cpu"))
    except ImportError:
        import_module("transformer_lens.model_bridge.sources")
        return library.TransformerBridge.boot_native(shape)


def sequences(n: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [n, 2 x HALF]: random ones, said twice."""
    half = torch.randint(VOCABULARY, (n, HALF), generator=generator)
    return torch.cat([half, half], dim=1)


def train(model: Any, generator: torch.Generator, time_s: float) -> float:
    """Train on the second half; returns how often it is copied rightly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    start, right = time.monotonic(), 0.0
    while time.monotonic() - start < time_s and right < 0.995:
        tokens = sequences(64, generator)
        logits = model(tokens)[:, HALF - 1 : -1]
        target = tokens[:, HALF:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = float((logits[:, 1:].argmax(-1) == target[:, 1:]).float().mean())
    return right


def study(model: Any, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [layers + 1, positions]: estimated by one backward, and found by patching one by one."""
    clean = sequences(32, generator)
    corrupted = clean.clone()
    corrupted[:, CORRUPTED] = (
        clean[:, CORRUPTED] + 1 + torch.randint(VOCABULARY - 1, (32,), generator=generator)
    ) % VOCABULARY
    answer, wrong = clean[:, CORRUPTED], corrupted[:, CORRUPTED]
    rows = torch.arange(32)

    def metric(logits: Any) -> Any:
        """How much the model prefers the clean token where it copies the corrupted one."""
        return (logits[rows, COPIED, answer] - logits[rows, COPIED, wrong]).mean()

    points = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    _, clean_acts, _ = lens.cache_fwd_and_bwd(model, clean, metric, points)
    base, acts, grads = lens.cache_fwd_and_bwd(model, corrupted, metric, points)
    estimated = torch.stack([(grads[name] * (clean_acts[name] - acts[name])).sum((0, 2)) for name in points])
    patched = torch.empty_like(estimated)
    for row, name in enumerate(points):
        for position in range(2 * HALF):

            def patch(value: Any, hook: Any, name: str = name, position: int = position) -> Any:
                value = value.clone()
                value[:, position] = clean_acts[name][:, position]
                return value

            with torch.no_grad(), model.hooks(fwd_hooks=[(name, patch)]):
                patched[row, position] = metric(model(corrupted)).item() - base
    return estimated, patched


def draw(estimated: torch.Tensor, patched: torch.Tensor, path: Path) -> None:
    """Two heatmaps, layer by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    largest = float(max(estimated.abs().max(), patched.abs().max()))
    titles = ("estimated: gradient x (clean - corrupted), one backward", "patched one by one: 36 forwards")
    for axis, scores, title in zip(axes, (estimated, patched), titles, strict=True):
        image = axis.imshow(scores, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_yticks(range(3), ["embedded", "after layer 0", "after layer 1"])
    axes[-1].set_xlabel(f"position (token {CORRUPTED} is corrupted, {COPIED} has to copy it)")
    axes[-1].set_xticks(range(2 * HALF))
    figure.colorbar(image, ax=axes, label="change of the logit difference")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Train, corrupt, score, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("attribution.png"))
    parser.add_argument("--seconds", type=float, default=TRAINING_S, help="of training, at most")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="transformer_lens")  # it says at every norm which path it takes
    start, generator = time.monotonic(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    model = small_model()
    print(f"trained: {train(model, generator, options.seconds):.0%} of the second half is copied rightly")
    estimated, patched = study(model, generator)
    together = torch.corrcoef(torch.stack([estimated.flatten(), patched.flatten()]))[0, 1]
    print(f"estimate and patches: correlation {together:.3f}")
    place = int(patched[1].argmax())
    print(f"after layer 0 the position that matters most is {place}, found by the estimate too: "
          f"{int(estimated[1].argmax()) == place}")  # fmt: skip
    draw(estimated, patched, options.out)
    print(f"{options.out} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
