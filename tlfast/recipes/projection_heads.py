"""Which columns of an attention's projections are whose queries, keys and values: told by their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of each projection (kind, head, its columns) of all heads: queries first, then keys, then values.
Heads = list[list[tuple[str, int, torch.Tensor]]]
_TRIED = 8  # positions: where an attention looks at one token alone, the gradients of keys vanish


def heads_of_projections(projections: list[torch.Tensor], z: torch.Tensor, n_heads: int) -> Heads | None:
    """Tell queries, keys and values of each head apart, however a model lays them.

    What the head puts out at one position moves with its queries at that position alone, and with keys and values at
    earlier ones too. A number of it moves with one column of the values, and with all columns of the keys. Heads that
    share keys and values, as grouped queries do, have the same columns there.

    Args:
        projections: what each puts out, [1, P, width], in a graph that leads to ``z``.
        z: what the output projection is given, [1, P, n_heads x d].
        n_heads: how many heads lie side by side there.

    Returns:
        None where that doesn't account for each column once: an attention of another kind, or gradients that vanish.
    """
    length = z.numel() // z.shape[-1]
    if z.shape[-1] % n_heads or z.shape[-1] // n_heads < 2 or length < 2:
        return None
    by_head = z.reshape(length, n_heads, -1)
    state = _Columns(projections, n_heads)
    for position in range(length - 1, max(0, length - 1 - _TRIED), -1):
        for head in range(n_heads):
            state.add(head, position, by_head[position, head])
        found = state.found()
        if found is not None:
            return found
    return None


class _Columns:
    """Columns of all projections side by side, and which of them each head's output has moved with so far."""

    def __init__(self, projections: list[torch.Tensor], n_heads: int):
        self._projections = projections
        self._widths = [each.shape[-1] for each in projections]
        width = sum(self._widths)
        self._here, self._before, self._keys = (torch.zeros(n_heads, width, dtype=torch.bool) for _ in range(3))

    def _moved(self, number: torch.Tensor) -> torch.Tensor:
        """[P, columns]: where a number's gradient isn't zero."""
        grads: Sequence[torch.Tensor | None] = torch.autograd.grad(
            number, self._projections, retain_graph=True, allow_unused=True
        )
        rows = [
            torch.zeros_like(one) if grad is None else grad for one, grad in zip(self._projections, grads, strict=True)
        ]
        return torch.cat([(row.reshape(-1, row.shape[-1]) != 0).cpu() for row in rows], 1)

    def add(self, head: int, position: int, z: torch.Tensor) -> None:
        weights = torch.linspace(1.0, 2.0, len(z), dtype=z.dtype, device=z.device)
        whole, one, other = (self._moved(number) for number in ((z * weights).sum(), z[0], z[1]))
        self._here[head] |= whole[position]
        self._before[head] |= whole[:position].any(0)
        self._keys[head] |= one[:position].any(0) & other[:position].any(0)

    def found(self) -> Heads | None:
        sides = {"q": self._here & ~self._before, "k": self._keys, "v": self._before & ~self._keys}
        parts: list[tuple[str, int, torch.Tensor]] = []
        for kind, rows in sides.items():
            own = [tuple(row.nonzero()[:, 0].tolist()) for row in rows]
            if not all(own) or (kind == "q" and len(set(own)) < len(own)):
                return None
            parts += [(kind, number, torch.tensor(columns)) for number, columns in enumerate(dict.fromkeys(own))]
        columns = torch.cat([part for _, _, part in parts])
        if not torch.equal(columns.sort().values, torch.arange(sum(self._widths))):
            return None
        made: Heads = []
        first = 0
        for width in self._widths:
            within = [(kind, head, part - first) for kind, head, part in parts if first <= int(part[0]) < first + width]
            if any(int(part[-1]) >= width for _, _, part in within) or len({len(part) for _, _, part in within}) != 1:
                return None
            made.append(within)
            first += width
        return made
