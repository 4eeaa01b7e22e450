"""Philox4x32-10, a counter-based generator (Salmon, Moraes, Dror and Shaw, 2011), as operations on whole arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]
Words = NDArray[np.uint32]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_STEPS = 0x9E3779B9, 0xBB67AE85  # of the key, from round to round
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def key_of(identifier: str, digest: str) -> Key:
    """The first eight bytes of a digest ("md5", "sha256") of the identifier, as two little-endian numbers."""
    found = hashlib.new(digest, identifier.encode(), usedforsecurity=False).digest()
    return int.from_bytes(found[:4], "little"), int.from_bytes(found[4:8], "little")


def philox(key: Key, counter: Sequence[Words]) -> Words:
    """Four random numbers, [..., 4], for each counter of four words, which are broadcast together."""
    x0, x1, x2, x3 = (np.array(x, np.uint64) for x in np.broadcast_arrays(*counter))
    for number in range(10):
        k0, k1 = ((part + number * step) & 0xFFFFFFFF for part, step in zip(key, _STEPS, strict=True))
        x0 *= _MULTIPLIERS[0]
        x2 *= _MULTIPLIERS[1]
        x1 ^= x2 >> _HALF
        x1 ^= np.uint64(k0)
        x3 ^= x0 >> _HALF
        x3 ^= np.uint64(k1)
        x2 &= _LOW
        x0 &= _LOW
        x0, x1, x2, x3 = x1, x2, x3, x0
    return np.stack([x.astype(np.uint32) for x in (x0, x1, x2, x3)], axis=-1)
