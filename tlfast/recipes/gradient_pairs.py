"""Pairs of activation and gradient, token by token and shuffled: what a gradient SAE is trained on, with no disk."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..collecting.examples import as_examples
from ..collecting.options import check_positive
from ..collecting.stream import stream
from ..dataset.format.plan import Example
from ..errors import broken_rule
from ..spec import Points

Pairs = dict[str, torch.Tensor]

_WHO = "gradient_sae_pairs"
_PARTS = 4  # of the buffer: what is computed at once is one of them
_BATCH_TOKENS = 4096


class PairStream(Iterator[Pairs]):
    """Shuffled batches of pairs, once through all tokens; made by `gradient_sae_pairs`, which says all of it."""

    def __init__(self, batches: Generator[Pairs, None, None], n_tokens: int, n_batches: int, names: list[str]) -> None:
        self._batches, self.n_tokens, self._n_batches, self.names = batches, n_tokens, n_batches, names

    def __next__(self) -> Pairs:
        return next(self._batches)

    def __len__(self) -> int:
        return self._n_batches

    def close(self) -> None:
        """Give no more batches, and let the memory go."""
        self._batches.close()

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
) -> PairStream:
    """Give (activation, gradient) of every real token at some points to a training loop, shuffled, with no disk.

    Gradient SAEs are trained on these (Olmo et al., 2024, "Features that Make a Difference"): an activation, and what
    it does to the loss. A forward and a backward make the pairs of a part of the examples, as `tlfast.stream` does and
    with its care for the model; padding is left out, and the tokens are drawn at random from a buffer.

    Args:
        model: a causal language model of Hugging Face, or another model of tokens with ``loss``.
        batches: token sequences or batches of them, as `collect` takes them, without other fields.
        points: the modules at whose outputs [B, P, D] the pairs are.
        buffer_tokens: how many pairs are held and mixed. While it is filled up, twice and a half as many are in memory,
            whatever the size of the data.
        batch_size: pairs of a batch; the last one may be shorter.
        seed: makes the order.
        drop_last: leave out the last batch, if it is shorter.
        loss: as in `collect`.
        dtype: of the pairs; None: that of the model.
        batch_tokens: positions of one forward.
        padding_side: how sequences are padded.

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
    examples = as_examples(batches)
    longest = max(example.length for example in examples)
    least = max(2 * batch_size, _PARTS * longest)
    if buffer_tokens < least:
        rule = f"have room for two batches, and {_PARTS} times for the longest example: {least}"
        raise ValueError(broken_rule(_WHO, "buffer_tokens", rule, buffer_tokens, "Give more, or shorter examples."))
    n_rows = max(1, buffer_tokens // (_PARTS * longest))
    settings: Any = dict(
        of=("act", "grad"), reduce="none", seq_len=longest, rows_per_unit=n_rows, loss=loss, dtype=dtype,
        batch_tokens=max(batch_tokens, longest), padding_side=padding_side,
    )  # fmt: skip
    given = stream(model, examples, points, buffer_rows=2 * n_rows, batch_size=n_rows, seed=seed, **settings)
    n_tokens = sum(example.length for example in examples)
    made = _shuffled(_tokens(given, examples, padding_side), buffer_tokens, batch_size, seed, drop_last)
    n_batches = n_tokens // batch_size if drop_last else -(-n_tokens // batch_size)
    return PairStream(made, n_tokens, n_batches, list(given.columns))


def _tokens(rows: Iterable[Pairs], examples: list[Example], padding_side: str) -> Iterator[Pairs]:
    """The rows [b, P, D] of examples as rows [n, D] of their real tokens."""
    lengths = torch.tensor([example.length for example in examples])
    for given in rows:
        ids = given.pop("id")
        here = lengths[ids]
        n_positions = next(iter(given.values())).shape[1]
        first = n_positions - here if padding_side == "left" else torch.zeros_like(here)
        places = torch.arange(n_positions) - first[:, None]
        real = (places >= 0) & (places < here[:, None])
        chosen = real.flatten().nonzero()[:, 0]
        tokens = {name: block.flatten(0, 1).index_select(0, chosen.to(block.device)) for name, block in given.items()}
        yield {"id": ids.repeat_interleave(here), "position": places[real], **tokens}


def _shuffled(
    parts: Iterator[Pairs], most: int, batch_size: int, seed: int, drop_last: bool
) -> Generator[Pairs, None, None]:
    """Batches drawn from a buffer of at most ``most`` tokens, which is filled again when a part of it has gone."""
    draw = torch.Generator().manual_seed(seed)
    held: Pairs = {}
    waiting: Pairs | None = next(parts, None)
    while held or waiting is not None:
        while waiting is not None and _size(held) + _size(waiting) <= most:
            held = {name: torch.cat([held[name], rows]) for name, rows in waiting.items()} if held else waiting
            waiting = next(parts, None)
        order = torch.randperm(_size(held), generator=draw)
        # With more to come, give out so much that the next part has room.
        n = len(order) if waiting is None else max(0, _size(held) + _size(waiting) - most)
        n_batches = n // batch_size if waiting is None else -(-n // batch_size)
        for k in range(min(n_batches, len(order) // batch_size)):
            yield _picked(held, order[k * batch_size : (k + 1) * batch_size])
        rest = order[min(n_batches, len(order) // batch_size) * batch_size :]
        if waiting is None:
            if len(rest) and not drop_last:
                yield _picked(held, rest)
            return
        held = _picked(held, rest) if len(rest) else {}


def _size(rows: Pairs) -> int:
    return len(rows["id"]) if rows else 0


def _picked(rows: Pairs, places: torch.Tensor) -> Pairs:
    return {name: held.index_select(0, places.to(held.device)) for name, held in rows.items()}
