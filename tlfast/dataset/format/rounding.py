"""Random numbers by which rows are rounded: a function of the column, the example and the place. See format.md."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57  # of Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011)
_STEPS = 0x9E3779B9, 0xBB67AE85  # of its key, from round to round
_ROUNDS = 10
_LOW = 0xFFFFFFFF


class Rounding(NamedTuple):
    """Whose rows are rounded: so a row has the same codes whatever batch, process or run it is encoded in.

    Args:
        column: the name of the column.
        examples: int64 [rows], the number of each row's example in the plan.
        positions: int64 [rows], which of its tokens the row is, counted from 0; 0 where the example has one row.
    """

    column: str
    examples: torch.Tensor
    positions: torch.Tensor

    @property
    def key(self) -> tuple[int, int]:
        """The first eight bytes of the SHA-256 of the column's name, as two little-endian numbers."""
        found = hashlib.sha256(self.column.encode(errors="surrogatepass")).digest()
        return int.from_bytes(found[:4], "little"), int.from_bytes(found[4:8], "little")

    def part(self, rows: slice) -> Rounding:
        """The same for some of the rows."""
        return Rounding(self.column, self.examples[rows], self.positions[rows])

    def to(self, device: torch.device) -> Rounding:
        """The same beside rows on a device."""
        return Rounding(self.column, *(part.to(device, non_blocking=True) for part in (self.examples, self.positions)))

    def uniforms(self, n_values: int) -> torch.Tensor:
        """Numbers of [0, 1), multiples of 2**-24: float32 [rows, n_values], on the rows' device.

        Value i takes word i % 4 of Philox at the counter (i // 4, position, low and high half of the example's number).
        """
        numbers = self.examples.unsqueeze(1)
        x = [
            torch.arange(-(-n_values // 4), device=numbers.device).unsqueeze(0), self.positions.unsqueeze(1) & _LOW,
            numbers & _LOW, (numbers >> 32) & _LOW,
        ]  # fmt: skip
        for number in range(_ROUNDS):
            keys = [(part + number * step) & _LOW for part, step in zip(self.key, _STEPS, strict=True)]
            products = x[0] * _MULTIPLIERS[0], x[2] * _MULTIPLIERS[1]  # mod 2**64, of which both halves are read
            high = [(product >> 32) & _LOW for product in products]
            low = [product & _LOW for product in products]
            x = [high[1] ^ x[1] ^ keys[0], low[1], high[0] ^ x[3] ^ keys[1], low[0]]
        words = torch.stack(torch.broadcast_tensors(*x), -1).flatten(1)[:, :n_values]
        return (words >> 8).to(torch.float32) * 2.0**-24


def rounding_of(column: str, first_example: int, lengths: Sequence[int]) -> Rounding:
    """Whose rows are those of a column, for examples of these numbers of rows, the first of which has this number."""
    counts = torch.tensor(list(lengths), dtype=torch.int64)
    examples = torch.arange(first_example, first_example + len(counts)).repeat_interleave(counts)
    before = counts.cumsum(0) - counts
    return Rounding(column, examples, torch.arange(len(examples)) - before.repeat_interleave(counts))
