"""Run as a program: ``python collect_fields.py KIND OUT`` collects examples that are more than tokens, of `KINDS`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from task_models import N_CLASSES, Pixels, examples_of, task_model
from tiny_models import collect

N_UNITS, ROWS_PER_UNIT = 40, 4


def classify(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")


def images():
    """Given once, and so spooled; the last of each unit is a bad one."""
    draw = torch.Generator().manual_seed(0)
    for k in range(N_UNITS * ROWS_PER_UNIT):
        yield {"x": torch.randn(3, 16, 16, generator=draw), "labels": k % N_CLASSES, "name": f"image {k}"}
        if k % ROWS_PER_UNIT == 0:
            yield {"x": torch.zeros(2), "labels": 0, "name": "none"}


def as_dict(examples):
    """A batch as users put it together: tensors by name, one of them in a mapping of its own."""
    width = max(len(example["input_ids"]) for example in examples)
    ids = torch.tensor([[*example["input_ids"], *[0] * (width - len(example["input_ids"]))] for example in examples])
    more = {"weights": torch.stack([example["weight"] for example in examples])}
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "more": more}


def weighted(model, batch):
    """The next-token loss of each example, times its weight out of the mapping within the batch."""
    logits = model(batch.input_ids, attention_mask=None if batch.mask is None else batch.mask.long()).logits
    each = F.cross_entropy(logits.mT, batch.next_tokens, ignore_index=-100, reduction="none").sum(1)
    return each * batch["more"]["weights"]


def weighted_examples():
    examples = examples_of("plain", N_UNITS * ROWS_PER_UNIT)
    return [example | {"weight": 1 + k % 3} for k, example in enumerate(examples)]


KINDS = {
    "images": lambda: (
        Pixels(), images(),
        {"points": ["first", "head"], "embedding": "first", "reduce": "none", "loss": classify, "keep_fields": ["name"],
         "batch_examples": 2},
    ),
    "a batch that is a dict": lambda: (
        task_model("llama", "causal"), weighted_examples(),
        {"points": "model.layers.*", "loss": weighted, "collate": as_dict, "batch_tokens": 40},
    ),
}  # fmt: skip


def main(kind: str, out: Path) -> None:
    torch.set_num_threads(1)
    model, examples, settings = KINDS[kind]()
    collect(model, out, examples, dtype="bfloat16", rows_per_unit=ROWS_PER_UNIT, **settings)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
