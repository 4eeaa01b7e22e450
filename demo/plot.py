"""The picture of the demo: how large gradients are, by layer and by position."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator
from transformers import AutoModelForCausalLM

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss
from tlfast.dataset import GradientDataset

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # after the choice of the backend: one that needs no display

INK, MUTED, GRID = "#1f2328", "#57606a", "#e4e7eb"
BATCH = 16
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def norms_by_position(model_folder: Path, dataset: GradientDataset, most: int = 768) -> torch.Tensor:
    """Mean gradient norm of full-length examples from all over the dataset: float32 [points, positions]."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokens = [example["input_ids"] for example in dataset.examples]
    width = max(map(len, tokens))
    full = [ids for ids in tokens if len(ids) == width]
    full = full[:: -(-len(full) // most)]
    with tlfast.freeze(model), tlfast.capture(model, dataset.points, reduce="norm", over=-1, rows=len(full)) as cap:
        for start in range(0, len(full), BATCH):
            next_token_loss(model, Batch(torch.tensor(full[start : start + BATCH]), None)).backward()
    return torch.stack([cap[point].mean(0) for point in dataset.points])


def draw(model_folder: Path, dataset: GradientDataset, file: Path) -> None:
    """Two panels that share the layers: norm at each position, and the norms of the rows in the dataset."""
    by_position = norms_by_position(model_folder, dataset)
    n_layers, n_positions = by_position.shape
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), sharey=True, width_ratios=[3, 1.25], layout="constrained", dpi=150
    )
    # At the last position no next token is predicted and nothing comes later: its gradient is zero.
    shown = by_position[:, : n_positions - 1].numpy()
    image = left.imshow(
        shown, aspect="auto", origin="lower", cmap="viridis", interpolation="nearest",
        norm=LogNorm(shown.min(), shown.max()), extent=(-0.5, n_positions - 1.5, -0.5, n_layers - 0.5),
    )  # fmt: skip
    bar = figure.colorbar(image, ax=left, pad=0.015, ticks=LogLocator(subs=(1, 2, 5)), format=PLAIN)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, length=0)
    left.set_title("norm at each position, mean over examples", loc="left", fontsize=11, color=INK)
    left.set_xlabel("position in the example (bytes)", color=MUTED)
    left.set_ylabel("block", color=MUTED)
    left.set_yticks(range(n_layers))

    rows = [dataset.norms(point) for point in dataset.points]
    box = right.boxplot(
        [row.numpy() for row in rows], positions=range(n_layers), orientation="horizontal", widths=0.55,
        whis=(5, 95), showfliers=False, patch_artist=True,
        medianprops={"color": INK, "linewidth": 1.5}, whiskerprops={"color": MUTED}, capprops={"color": MUTED},
    )  # fmt: skip
    for patch in box["boxes"]:
        patch.set(facecolor="#9ec5ea", edgecolor=MUTED, linewidth=0.8)
    right.set_xscale("log")
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    right.xaxis.set_major_formatter(PLAIN)
    right.minorticks_off()
    right.set_title(f"norm of the {len(dataset)} stored rows", loc="left", fontsize=11, color=INK)
    right.set_xlabel("mean over positions\n(box: quartiles, line: 5 to 95 %)", color=MUTED)
    right.grid(axis="x", color=GRID, linewidth=0.8)
    right.set_axisbelow(True)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=MUTED, length=0)
    figure.suptitle(
        "Gradients of a small GPT-2 at the output of every block, on Python source it has not seen",
        x=0.01, ha="left", fontsize=13, color=INK,
    )  # fmt: skip
    figure.savefig(file)
    plt.close(figure)
