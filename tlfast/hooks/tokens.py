"""Which positions of padded rows are real tokens, and where their rows lie when the padding is squeezed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..errors import broken_rule


class Tokens(NamedTuple):
    """Which positions of each example are real: ``lengths[i]`` of them, from position ``firsts[i]`` on (None: 0)."""

    lengths: Sequence[int]
    firsts: Sequence[int] | None = None

    @property
    def total(self) -> int:
        """Tokens of all examples."""
        return sum(self.lengths)

    @property
    def width(self) -> int:
        """The positions that there must be."""
        firsts = [0] * len(self.lengths) if self.firsts is None else self.firsts
        return max((first + length for first, length in zip(firsts, self.lengths, strict=True)), default=0)


def tokens_of(who: str, mask: torch.Tensor) -> Tokens:
    """The tokens that a mask bool [B, P] keeps; waits for its device. ValueError where they aren't one run."""
    kept = mask.cpu().numpy()
    if kept.ndim != 2:
        got, remedy = f"{list(kept.shape)}", "Give a mask of examples and positions."
        raise ValueError(broken_rule(who, 'mask with per="token"', "be [B, P]", got, remedy))
    lengths, firsts = kept.sum(1), kept.argmax(1) if kept.shape[1] else np.zeros(len(kept), np.int64)
    steps = np.diff(kept.astype(np.int8), axis=1, prepend=0)
    gaps = np.flatnonzero((steps == 1).sum(1) > 1)
    if len(gaps):
        got, remedy = f"a gap in row {gaps[0]}", "Take the rows of packed sequences one by one."
        raise ValueError(broken_rule(who, 'mask with per="token"', "keep one run of tokens", got, remedy))
    return Tokens(lengths.tolist(), firsts.tolist())


def token_rows(who: str, places: torch.Tensor, tokens: Tokens | None, width: int) -> torch.Tensor:
    """The rows of all real tokens where rows and positions (``width`` of them) are one dimension: int64 [tokens].

    Args:
        who: whom errors name.
        places: where the row of each example lies, int64 [examples], on the host.
        tokens: of each example, in the same order.
        width: positions of a row.
    """
    if tokens is None:
        raise ValueError(broken_rule(who, "tokens", "be given for columns per token", "None", "Say the lengths."))
    lengths = np.asarray(tokens.lengths, np.int64)
    firsts = np.zeros_like(lengths) if tokens.firsts is None else np.asarray(tokens.firsts, np.int64)
    if not len(places) == len(lengths) == len(firsts):
        got = f"{len(lengths)} and {len(firsts)} of {len(places)} examples"
        raise ValueError(broken_rule(who, "lengths and firsts", "be of each example", got, "Give one of each."))
    wrong = np.flatnonzero((lengths < 0) | (firsts < 0) | (firsts + lengths > width))
    if len(wrong):
        i = int(wrong[0])
        got, remedy = f"{firsts[i]} to {firsts[i] + lengths[i]}", "Count positions from 0."
        raise ValueError(broken_rule(who, f"tokens of row {i}", f"lie in 0..{width}", got, remedy))
    return torch.from_numpy(np.repeat(places.numpy() * width + firsts, lengths) + positions_within(lengths))


def positions_within(lengths: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The position of each token in its example, counted from 0, of examples of these lengths behind each other."""
    begins = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) - np.repeat(begins, lengths)
