"""Rows that overflow float16 where an example holds one token, and all files of a dataset that say so."""

from __future__ import annotations

import torch

HUGE = 7  # a token that makes the loss of its example so large that float16 rows overflow


def poisoned_loss(model, batch):
    factor = torch.where((batch.input_ids == HUGE).any(1), 1e6, 1.0)
    embedded = model(batch.input_ids).logits
    labels = batch.next_tokens
    losses = torch.nn.functional.cross_entropy(embedded.mT, labels, ignore_index=-100, reduction="none")
    return (losses.sum(1) * factor).sum()


def poisoned(examples, numbers):
    """The same examples, of which those with these numbers hold the token."""
    clean = [[token if token != HUGE else HUGE + 1 for token in tokens] for tokens in examples]
    return [[*tokens, HUGE] if k in numbers else tokens for k, tokens in enumerate(clean)]


def files_of(folder):
    """The bytes of all files in the folders of a dataset, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent != folder
    }
