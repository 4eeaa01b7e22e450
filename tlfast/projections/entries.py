"""The entries of dense random matrices, signs and normal numbers, as functions of key, row and column alone.

Normal numbers are made of additions, multiplications, divisions and square roots in float64, which IEEE 754 rounds in
one way, and of nothing that a library of mathematics may round in another: they are the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from .philox import Key, Words, philox

Floats = NDArray[np.float64]
Entries = NDArray[np.float32]

PIECE = 1 << 13  # counters at a time: their numbers stay in a cache
SIGNS_PER_WORD, NORMALS_PER_WORD = 128, 4
# The eight signs of each byte, the lowest bit first.
_SIGNS = (2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") - 1).astype(
    np.float32
)


def signs(key: Key, n_rows: int, start: int, stop: int, purpose: int = 0) -> Entries:
    """+1 and -1, [n_rows, stop - start]: column c is bit c % 128 of the counter (c // 128, row, purpose, 0)."""
    return _entries(key, n_rows, start, stop, SIGNS_PER_WORD, _signs_of, purpose)


def normals(key: Key, n_rows: int, start: int, stop: int, float32_steps: bool = False) -> Entries:
    """Standard normal numbers, [n_rows, stop - start]: column c is number c % 4 of the counter (c // 4, row, 0, 0).

    With ``float32_steps`` the uniform numbers and the angle are rounded to float32, as a GPU has them.
    """
    of_words = _normals_of_float32 if float32_steps else _normals_of
    return _entries(key, n_rows, start, stop, NORMALS_PER_WORD, of_words)


def counted(key: Key, word: Words, row: Words, purpose: int) -> Words:
    """The four random numbers of each counter (word, row, purpose, 0)."""
    return philox(key, (word, row, np.array([purpose], np.uint32), np.zeros(1, np.uint32)))


def _entries(
    key: Key, n_rows: int, start: int, stop: int, per_word: int, of_words: Callable[[Words], Entries], purpose: int = 0
) -> Entries:
    made = np.empty((n_rows, stop - start), np.float32)
    for rows, words in _pieces(n_rows, start // per_word, -(-stop // per_word)):
        row, word = np.arange(*rows, dtype=np.uint32), np.arange(*words, dtype=np.uint32)
        piece = of_words(counted(key, word, row[:, None], purpose)).reshape(len(row), -1)
        first = words[0] * per_word - start  # where the piece begins in what is asked for; -1, -2, ... for the first
        kept = piece[:, max(0, -first) : stop - start - first]
        made[slice(*rows), max(0, first) : max(0, first) + kept.shape[1]] = kept
    return made


def _pieces(n_rows: int, first: int, last: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Ranges of rows and of words that cover all of both."""
    wide = max(1, min(last - first, PIECE))
    high = max(1, PIECE // wide)
    for row in range(0, n_rows, high):
        for word in range(first, last, wide):
            yield (row, min(row + high, n_rows)), (word, min(word + wide, last))


def _signs_of(words: Words) -> Entries:
    found: Entries = _SIGNS[words.astype("<u4").view(np.uint8)]
    return found


def _normals_of(words: Words) -> Entries:
    x = words.astype(np.float64)
    return _box_muller((x[..., 0::2] + 0.5) * 2.0**-32, x[..., 1::2] * 2.0**-32)


def _normals_of_float32(words: Words) -> Entries:
    x = words.astype(np.float32)
    u = (x[..., 0::2] + np.float32(0.5)) * np.float32(2.0**-32)
    angle = np.float32(2 * np.pi) * (x[..., 1::2] * np.float32(2.0**-32))
    return _box_muller(u.astype(np.float64), angle.astype(np.float64) / (2 * np.pi))


def _box_muller(u: Floats, turns: Floats) -> Entries:
    """Two normal numbers of each pair: u in (0, 1] says how long, turns in [0, 1] says where on the circle."""
    radius = np.sqrt(-2.0 * logarithm(u))
    cosine, sine = on_the_circle(turns)
    return np.stack([radius * cosine, radius * sine], axis=-1).astype(np.float32)


def logarithm(u: Floats) -> Floats:
    """ln u to about 1e-16, the same bits everywhere: u = m 2^e with m near 1, ln m = 2 artanh((m - 1) / (m + 1))."""
    m, e = np.frexp(u)
    small = m < 0.7071067811865476
    m, e = np.where(small, 2 * m, m), e - small
    s = (m - 1) / (m + 1)
    square, total = s * s, np.zeros_like(s)
    for k in range(21, 0, -2):  # artanh s = s + s^3 / 3 + s^5 / 5 + ...; s^2 is at most 0.0295
        total *= square
        total += 1 / k
    found: Floats = e * 0.6931471805599453 + 2 * s * total
    return found


def on_the_circle(turns: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of 2 pi times ``turns`` to about 1e-16, the same bits everywhere."""
    quarter = np.rint(4 * turns)
    angle = (turns - quarter / 4) * 6.283185307179586  # at most pi / 4
    square = angle * angle
    cosine, sine = np.ones_like(angle), np.ones_like(angle)
    for k in range(18, 0, -2):  # 1 - x^2/2! + x^4/4! - ... from its end, and the same of the sine, over x
        cosine *= square
        cosine *= -1 / (k * (k - 1))
        cosine += 1
        sine *= square
        sine *= -1 / (k * (k + 1))
        sine += 1
    sine *= angle
    quarter = quarter.astype(np.int64) & 3
    odd = (quarter & 1).astype(bool)
    cosine, sine = np.where(odd, -sine, cosine), np.where(odd, cosine, sine)
    return np.where(quarter >= 2, -cosine, cosine), np.where(quarter >= 2, -sine, sine)
