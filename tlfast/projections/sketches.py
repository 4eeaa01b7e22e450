"""Count sketches and Hadamard sketches: the signs, shifts and samples that make them, and the matrices that they are.

Both cut the columns into blocks and add up what they make of each. They are defined for any column by itself, so that a
matrix of more columns begins with one of fewer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .entries import Entries, counted, signs
from .philox import Key

Numbers = NDArray[np.int64]

# The third word of a counter; 0 is for the entries of dense matrices.
INPUT_SIGNS, SHIFTS, OUTPUT_SIGNS, SAMPLES = 1, 2, 3, 4


@dataclass(frozen=True)
class CountSketch:
    """Each column goes, with a sign, into one row of each part: blocks of columns, turned by a shift, are added up.

    Args:
        signs: [n_parts, columns].
        shifts: [n_parts, blocks]; place j of a block goes to row (j + shift) % width of the part.
        width: columns of a block, and rows of a part.
    """

    signs: Entries
    shifts: Numbers
    width: int

    @classmethod
    def make(cls, key: Key, dim: int, n_parts: int, start: int, stop: int) -> CountSketch:
        """That of the columns from ``start``, where a block begins, to ``stop``."""
        width = dim // n_parts
        part, block = np.arange(n_parts, dtype=np.uint32), np.arange(start // width, -(-stop // width), dtype=np.uint32)
        drawn = counted(key, block, part[:, None], SHIFTS)[..., 0]
        shifts = (drawn.astype(np.uint64) * np.uint64(width)) >> np.uint64(32)
        return cls(signs(key, n_parts, start, stop, INPUT_SIGNS), shifts.astype(np.int64), width)

    def sources(self) -> Numbers:
        """Which column, of whole blocks, each place of the turned blocks comes from, [n_parts, blocks, width]."""
        place, block = np.arange(self.width), np.arange(self.shifts.shape[1])[:, None]
        found: Numbers = block * self.width + (place - self.shifts[..., None]) % self.width
        return found

    def matrix(self) -> Entries:
        """Its entries, +1, -1 and 0: [n_parts * width, columns]."""
        n_parts, columns = self.signs.shape
        column, part = np.arange(columns), np.arange(n_parts)[:, None]
        block, place = column // self.width, column % self.width
        made = np.zeros((n_parts * self.width, columns), np.float32)
        made[part * self.width + (place + self.shifts[:, block]) % self.width, column] = self.signs
        return made


@dataclass(frozen=True)
class HadamardSketch:
    """Blocks of columns with random signs go through a Hadamard matrix, get signs again, and are added up.

    Args:
        input_signs: [columns].
        output_signs: [blocks, width].
        samples: [dim], the rows of the Hadamard matrix that are kept, in ascending order.
        width: columns of a block, the smallest power of two that is at least dim.
    """

    input_signs: Entries
    output_signs: Entries
    samples: Numbers
    width: int

    @classmethod
    def make(cls, key: Key, dim: int, start: int, stop: int) -> HadamardSketch:
        """That of the columns from ``start``, where a block begins, to ``stop``."""
        width = 1 << (dim - 1).bit_length()
        last = -(-stop // width) * width
        drawn = counted(key, np.arange(width, dtype=np.uint32), np.zeros(1, np.uint32), SAMPLES)[..., 0]
        return cls(
            signs(key, 1, start, stop, INPUT_SIGNS)[0],
            signs(key, 1, start, last, OUTPUT_SIGNS).reshape(-1, width),
            np.sort(np.argsort(drawn, kind="stable")[:dim]),
            width,
        )

    def matrix(self) -> Entries:
        """Its entries, +1 and -1: [dim, columns]."""
        column = np.arange(len(self.input_signs))
        block, place = column // self.width, column % self.width
        both = self.samples[:, None] & place
        for half in (16, 8, 4, 2, 1):  # the parity of the bits that both have
            both ^= both >> half
        made: Entries = (1 - 2 * (both & 1)).astype(np.float32)
        made *= self.output_signs[block, self.samples[:, None]]
        made *= self.input_signs
        return made
