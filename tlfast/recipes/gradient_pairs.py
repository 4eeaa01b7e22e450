"""Pairs of activation and gradient, token by token and shuffled: what a gradient SAE is trained on, with no disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..collecting.options import check_positive
from ..collecting.stream import SETTINGS, GradientStream, Units, row_options
from ..dataset.read.shuffle import check_seed
from ..errors import SpeakingAs, broken_rule
from ..spec import Points, Spec

Pairs = dict[str, torch.Tensor]

_WHO = "gradient_sae_pairs"
_PARTS = 4  # of the buffer: what is computed at once is one of them
_BATCH_TOKENS = 4096
_OURS = ("reduce", "over", "of", "ref", "at", "per", "rows_per_unit")  # of the settings of `stream`: they make pairs
_SETTINGS = tuple(name for name in SETTINGS if name not in _OURS)


class PairStream(Iterator[Pairs]):
    """Shuffled batches of pairs, once through all tokens; made by `gradient_sae_pairs`, which says all of it.

    ``names`` are the columns of a batch, ``n_tokens`` the number of all pairs and ``len`` that of all batches,
    ``skipped`` the (source, start, reason) of bad examples.
    """

    def __init__(self, rows: GradientStream) -> None:
        self._rows, self.n_tokens, self.names, self.skipped = rows, rows.n_rows, list(rows.columns), rows.skipped

    def __next__(self) -> Pairs:
        return next(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Give no more batches, and let the memory go."""
        self._rows.close()

    def __enter__(self) -> PairStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def gradient_sae_pairs(
    model: nn.Module,
    batches: Iterable[Any],
    points: Points,
    *,
    buffer_tokens: int = 1 << 16,
    batch_size: int = 2048,
    seed: int = 0,
    drop_last: bool = False,
    loss: str | Callable[..., torch.Tensor] = "next_token",
    dtype: torch.dtype | str | None = None,
    batch_tokens: int = _BATCH_TOKENS,
    padding_side: str = "right",
    **settings: Any,
) -> PairStream:
    """Give (activation, gradient) of every real token at some points to a training loop, shuffled, with no disk.

    Gradient SAEs are trained on these (Olmo et al., 2024, "Features that Make a Difference"): an activation, and what
    it does to the loss. This is `tlfast.stream` with ``of=("act", "grad")`` and ``per="token"``: a forward and a
    backward make the pairs of a part of the examples, with its care for the model; padding is left out, and the tokens
    are drawn at random from a buffer.

    Args:
        model: a causal language model of Hugging Face, or another model of tokens with ``loss``.
        batches: the examples, of tokens and perhaps other fields, as `collect` takes them.
        points: the modules at whose outputs [B, P, D] the pairs are.
        buffer_tokens: how many pairs are held and mixed. While it is filled up, one and a half times as many are in
            memory, whatever the size of the data.
        batch_size: pairs of a batch; the last one may be shorter.
        seed: makes the order.
        drop_last: leave out the last batch, if it is shorter.
        loss: as in `collect`.
        dtype: of the pairs; None: that of the model.
        batch_tokens: positions of one forward.
        padding_side: how sequences are padded.
        settings: the others of `tlfast.stream`, such as fields, collate, side, output or embedding, but none of reduce,
            over, of, ref, at, per and rows_per_unit. ``bad_examples`` is "stop" if nothing else is said.

    Returns:
        An iterator of dicts: for each point "<point>:act" and "<point>", [b, D] each, on the device of the model, and
        "id" and "position", int64 [b] on the host: the example, and which of its tokens. ``len`` is the number of
        batches, ``n_tokens`` that of all pairs. ``close()``, or the end of a ``with`` block, lets the memory go.

    Raises:
        ValueError, TypeError, RuntimeError: as `tlfast.stream`, before the first batch.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> pairs = tlfast.recipes.gradient_sae_pairs(model, [[1, 2, 3], [4, 5]], "0", buffer_tokens=64, batch_size=2)
        >>> [batch["0:act"].shape for batch in pairs]
        [torch.Size([2, 4]), torch.Size([2, 4]), torch.Size([1, 4])]
    """
    check_positive(_WHO, buffer_tokens=buffer_tokens, batch_size=batch_size)
    check_seed(_WHO, seed)
    parts: Any = points if isinstance(points, Sequence) else [points]
    if any(isinstance(part, Spec) for part in parts):
        rule, remedy = "be names, modules or a function", "Give the Spec's points: what a pair has of them is fixed."
        raise TypeError(broken_rule(_WHO, "points", rule, "a Spec", remedy))
    given = {"bad_examples": "stop", **settings, "loss": loss, "dtype": dtype}
    given |= {"batch_tokens": batch_tokens, "padding_side": padding_side}
    pairs = {"of": ("act", "grad"), "reduce": "none", "per": "token"}
    with SpeakingAs(_WHO, "collect"):
        options = row_options(_WHO, _SETTINGS, points, given, **pairs)
        work = Units(model, batches, options, max(1, buffer_tokens // _PARTS), "stop", _WHO)
        least = max(2 * batch_size, _PARTS * max(work.examples.lengths()))
        if buffer_tokens < least:
            rule = f"have room for two batches, and {_PARTS} times for the longest example: {least}"
            raise ValueError(broken_rule(_WHO, "buffer_tokens", rule, buffer_tokens, "Give more, or shorter examples."))
        return PairStream(work.shuffled(buffer_tokens, batch_size, seed, drop_last))
