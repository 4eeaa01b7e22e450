"""What does an example weigh? Its influence by EK-FAC, against training again without it.

    python examples/leave_one_out.py [--examples 60] [--wrong 6]

A tiny network learns to tell three clouds of points apart, some of them with a wrong label. Then it is trained again
without each example in turn: by how much the loss on held-out points rises without it is what the example is worth.
Influence functions say that without training again, by the gradients of the trained network and the curvature of its
loss: `tlfast.factors` adds up the curvature, with labels drawn from the network's own predictions, and `tlfast.score`
finds what each example is worth. The two are compared, and so are plain dot products of gradients and their cosines.

Runs offline, in a few seconds on a CPU. Needs tlfast alone.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import tlfast

WIDTH, CLASSES, HELD_OUT = 8, 3, 60
DECAY = 0.01  # of the weights, so that there is one best network
LAYERS = ["0", "2"]
DRAWS = 20  # of labels for each example, of which the curvature is the mean


def clouds(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [n, 2] around the corners of a triangle, and which corner that is."""
    labels = torch.arange(n) % CLASSES
    angles = 2 * torch.pi * labels / CLASSES
    corners = torch.stack([angles.cos(), angles.sin()], 1)
    return corners + 0.45 * torch.randn(n, 2, generator=generator), labels


def train(x: torch.Tensor, y: torch.Tensor, kept: torch.Tensor, steps: int) -> list[torch.Tensor]:
    """Train as many networks as ``kept`` [networks, examples] has rows, each on its examples; their parameters.

    All begin alike and are trained side by side: of products this small that is as quick as training one.
    """
    sizes = [(WIDTH, 2), (WIDTH,), (CLASSES, WIDTH), (CLASSES,)]
    start = [torch.randn(*size, generator=torch.Generator().manual_seed(1)) / size[-1] ** 0.5 for size in sizes]
    weights = [one.expand(len(kept), *one.shape).clone().requires_grad_() for one in start]
    optimizer = torch.optim.Adam(weights, lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        hidden = torch.tanh(x @ weights[0].mT + weights[1][:, None])
        logits = hidden @ weights[2].mT + weights[3][:, None]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), y.repeat(len(kept)), reduction="none")
        decay = DECAY / 2 * sum(one.square().sum() for one in weights)
        optimizer.zero_grad()
        ((kept * losses.view(kept.shape)).sum() / len(y) + decay).backward()
        optimizer.step()
        schedule.step()
    return [one.detach() for one in weights]


def network(weights: list[torch.Tensor], number: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES))
    for parameter, values in zip(model.parameters(), weights, strict=True):
        parameter.data = values[number].clone()
    return model


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """The loss, a sum over examples."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")


def drawn_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """The same of labels that are drawn from the predictions: its gradients have the curvature as second moments."""
    logits = model(batch["x"])
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=drawn_loss.generator)  # type: ignore[attr-defined]
    return nn.functional.cross_entropy(logits, labels[:, 0], reduction="sum")


def examples_of(x: torch.Tensor, y: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"x": point, "y": label} for point, label in zip(x, y, strict=True)]


def rank_correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(arguments: list[str] | None = None) -> None:
    """Train, train again without each example, score, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--wrong", type=int, default=6, help="how many of them have a wrong label")
    parser.add_argument("--steps", type=int, default=600, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    n = options.examples
    x, y = clouds(n, generator)
    y[: options.wrong] = (y[: options.wrong] + 1) % CLASSES
    others = clouds(HELD_OUT, generator)

    kept = torch.cat([torch.ones(1, n), 1 - torch.eye(n)])  # the first network has all examples
    weights = train(x, y, kept, options.steps)
    asked = {"x": others[0], "y": others[1]}
    losses = torch.stack([loss_of(network(weights, k), asked).detach() / HELD_OUT for k in range(n + 1)])
    worth = losses[1:] - losses[0]
    print(f"trained on {n} examples, {options.wrong} with a wrong label: held-out loss {losses[0]:.3f} nats")

    model, data = network(weights, 0), examples_of(x, y)
    drawn_loss.generator = torch.Generator().manual_seed(2)  # type: ignore[attr-defined]
    settings: dict[str, Any] = {"bias": True, "embedding": LAYERS[0]}  # nothing here looks tokens up
    points = [{"x": point} for point in x] * DRAWS
    curvature = tlfast.factors(model, points, LAYERS, kinds=("kfac", "ekfac"), loss=drawn_loss, **settings)
    settings |= {"examples": data, "points": LAYERS, "mean": True, "loss": loss_of, "k": None}
    found = {
        method: tlfast.score(model, examples_of(*others), method, **settings, **more).scores[0]
        for method, more in (("ekfac", {"moments": curvature}), ("dot", {}), ("cosine", {}))
    }
    said = ", ".join(f"{method} {rank_correlation(scores, worth):.2f}" for method, scores in found.items())
    print(f"rank correlation with training again without each: {said}")

    worst = found["ekfac"].argsort()[: options.wrong]
    n_wrong = int((worst < options.wrong).sum())
    print(f"of the {options.wrong} examples that harm most by ekfac, {n_wrong} have a wrong label\n")
    print("example   label      ekfac    loss without it")
    for number in [*worst[:3].tolist(), *found["ekfac"].argsort(descending=True)[:3].tolist()]:
        label = "wrong" if number < options.wrong else "right"
        print(f"{number:7}   {label}   {found['ekfac'][number] / n:+8.4f}           {worth[number]:+8.4f}")


if __name__ == "__main__":
    main()
