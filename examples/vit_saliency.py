"""Where does an image model look? Gradient times activation at its patches, collected for each image and drawn as text.

    python examples/vit_saliency.py [--out saliency] [--steps 300]

A tiny ViT learns to tell squares, crosses and rings, one in a noisy image, and images of noise alone. Each image with a
shape then gives a row of a number for each patch: the gradient of what speaks for the shape, its logit less that of
"nothing", times the embedding of the patch, added up over its width.

Runs offline, in less than a minute on a CPU. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, ViTConfig

import tlfast

SHAPES = {
    "square": ["####", "####", "####", "####"],
    "cross": ["#..#", ".##.", ".##.", "#..#"],
    "ring": ["####", "#..#", "#..#", "####"],
    "nothing": ["....", "....", "....", "...."],
}
NOTHING = 3  # its class
PATCH, SIDE = 4, 4  # pixels of a patch, patches of a side
POINT = "vit.embeddings.patch_embeddings"
COLUMN = f"{POINT}:grad*act"
SHADES = " .:-=+*#%@"


def draw(n: int, n_classes: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Images [1, 16, 16] of noise and a shape, which fills the patch ``place``; of the first classes, in turn."""
    forms = torch.tensor([[[pixel == "#" for pixel in line] for line in shape] for shape in SHAPES.values()]).float()
    examples = []
    for k in range(n):
        image = 0.3 * torch.randn(1, PATCH * SIDE, PATCH * SIDE, generator=generator)
        place = int(torch.randint(SIDE * SIDE, (), generator=generator))
        top, left = PATCH * (place // SIDE), PATCH * (place % SIDE)
        image[0, top : top + PATCH, left : left + PATCH] += forms[k % n_classes]
        examples.append({"pixel_values": image, "labels": k % n_classes, "place": place})
    return examples


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train on new images; returns how many of the last ten batches it names rightly."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    right = []
    for _ in range(steps):
        examples = draw(48, len(SHAPES), generator)
        labels = torch.tensor([example["labels"] for example in examples])
        logits = model(pixel_values=torch.stack([example["pixel_values"] for example in examples])).logits
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(float((logits.argmax(1) == labels).float().mean()))
    return sum(right[-10:]) / len(right[-10:])


def shape_logit(model: Any, batch: Any) -> torch.Tensor:
    """Of each image [B]: how far the logit of its shape stands above that of no shape."""
    logits = model(pixel_values=batch["pixel_values"]).logits
    return logits.gather(1, batch["labels"][:, None])[:, 0] - logits[:, NOTHING]


def side_by_side(image: torch.Tensor, saliency: torch.Tensor) -> str:
    """The image, and to its right its patches by how much they speak for the class, as characters."""
    pictures = []
    for values in (image, saliency.reshape(SIDE, SIDE).repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)):
        levels = (values.clamp(min=0) / values.max() * (len(SHADES) - 1)).round().int()
        pictures.append(["".join(2 * SHADES[level] for level in line) for line in levels.tolist()])
    return "\n".join(f"{left} | {right}".rstrip() for left, right in zip(*pictures, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """Train, collect, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("saliency"), help="the dataset; one that is there goes")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    config = ViTConfig(
        image_size=PATCH * SIDE, patch_size=PATCH, num_channels=1, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=64, num_labels=len(SHAPES),
    )  # fmt: skip
    model = AutoModelForImageClassification.from_config(config)
    print(f"trained: {train(model, options.steps, generator):.0%} of the shapes are named rightly")

    examples = draw(300, NOTHING, generator)
    tlfast.collect(
        model, examples, options.out, points=POINT, of="grad*act", reduce="sum", over=2, loss=shape_logit,
        embedding=POINT, keep_fields=("labels", "place"), overwrite=True, progress=False,
    )  # fmt: skip
    ds = tlfast.open_dataset(options.out)
    rows = ds[COLUMN][:].float()  # [images, patches]
    for k in range(NOTHING):
        print(f"\n{list(SHAPES)[ds.examples[k]['labels']]}, and the patches that say so")
        print(side_by_side(examples[k]["pixel_values"][0], rows[k]))
    places = torch.tensor([ds.examples[k]["place"] for k in range(len(ds))])
    print(f"\nthe patch of the shape is the brightest in {(rows.argmax(1) == places).float().mean():.0%} of the images")


if __name__ == "__main__":
    main()
