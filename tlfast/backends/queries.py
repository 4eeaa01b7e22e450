"""Dot products of weight gradients with queries, by the cheapest of three forms. No gradient of an example is kept.

Does what csrc/autograd/queries.cpp does, in plain Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

_ELEMENTS = 1 << 22  # of what is there at once between two products


class Queries:
    """Queries of a matrix G [O, I]: whole ones [Q, O, I], or products U V of U [Q, O, r] and V [Q, r, I].

    Of a vector G [D] whole ones [Q, D]. Of G = sum_t g_t a_t^T the score is <G, Q> = sum_t g_t^T Q a_t.

    Args:
        given: the queries, or U and V.
        like: gives a matrix where a tensor is, and in its dtype.
    """

    def __init__(
        self, given: Sequence[torch.Tensor], like: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        self._given, self._like = tuple(given), like
        self._product: torch.Tensor | None = None  # of the pairs, where these are larger

    def __len__(self) -> int:
        return len(self._given[0])

    @property
    def _pairs(self) -> bool:
        return len(self._given) == 2

    def of_magnitudes(self) -> Queries:
        """The same of the queries' magnitudes."""
        return Queries([given.abs() for given in self._given], self._like)

    def want_gradients(self, n_positions: int) -> bool:
        """Whether G itself is to be made of so many positions, since that takes the fewest multiplications."""
        if self._take_pairs(n_positions, summed=True):
            return False
        return n_positions * len(self) > n_positions + len(self)

    def _take_pairs(self, n_positions: int, summed: bool) -> bool:
        if not self._pairs:
            return False
        (_, n, r), m = self._given[0].shape, self._given[1].shape[2]
        both = n_positions * len(self)
        each = min(both, n_positions + len(self)) if summed else both
        return both * r * (n + m) <= each * n * m

    def _whole(self) -> torch.Tensor:
        if not self._pairs:
            return self._given[0]
        if self._product is None:
            dtype = torch.promote_types(torch.float32, self._given[0].dtype)
            self._product = torch.bmm(self._given[0].to(dtype), self._given[1].to(dtype))
        return self._product

    def of_gradients(self, gradients: torch.Tensor, start: int = 0) -> torch.Tensor:
        """The scores [B, Q] of gradients [B, ...], or what some of their rows from ``start`` on add to these."""
        flat, first = gradients.flatten(1), start * gradients.shape[-1]
        return flat @ self._like(self._whole(), flat).flatten(1)[:, first : first + flat.shape[1]].T

    def of_positions(self, outputs: torch.Tensor, inputs: torch.Tensor, tokens: bool) -> torch.Tensor:
        """The scores of each position [B, T, Q], of outputs [B, T, O] and inputs [B, T, I].

        ``tokens``: the inputs are the tokens [B, T] of one-hot ones.
        """
        pairwise = self._pairs and (tokens or self._take_pairs(outputs.shape[1], summed=False))
        width = self._given[0].shape[2] if pairwise else outputs.shape[2]
        step = min(max(_ELEMENTS // max(outputs[..., 0].numel() * width, 1), 1), len(self))
        by = self._by_pairs if pairwise else self._by_whole
        parts = [by(outputs, inputs, tokens, slice(start, start + step)) for start in range(0, len(self), step)]
        return torch.cat(parts, -1)

    def _by_pairs(self, outputs: torch.Tensor, inputs: torch.Tensor, tokens: bool, some: slice) -> torch.Tensor:
        """(U^T g) . (V a): of factors of a query that are those of its tokens the Gram matrices' product."""
        left, right = (self._like(given, outputs)[some] for given in self._given)
        of_outputs = outputs @ left.transpose(0, 1).flatten(1)
        flat = right.flatten(0, 1).T
        products = of_outputs * (flat[inputs] if tokens else inputs @ flat)
        return _in_queries(products, len(left)).sum(-1)

    def _by_whole(self, outputs: torch.Tensor, inputs: torch.Tensor, tokens: bool, some: slice) -> torch.Tensor:
        """g . (Q a)."""
        part = self._like(self._whole(), outputs)[some]
        flat = part.flatten(0, 1).T
        made = flat[inputs] if tokens else inputs @ flat
        return (_in_queries(made, len(part)) * outputs.unsqueeze(2)).sum(-1)


def _in_queries(made: torch.Tensor, n: int) -> torch.Tensor:
    split: torch.Tensor = made.unflatten(-1, (n, -1))
    return split
