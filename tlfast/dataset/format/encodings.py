"""Encodings of rows: int8 codes with a scale for each row, or for each block of 64 values. See docs/format.md."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from ...errors import broken_rule

BLOCKS = {"int8": None, "int8:64": 64}  # values that share a scale; None: all of a row
ENCODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what float32 holds exactly can be encoded

_LARGEST_CODE = 127
# A little less than 1/127, so that 127 times a scale never exceeds the value that the scale was made for.
_PER_CODE = float(torch.tensor((1 - 2.0**-22) / _LARGEST_CODE, dtype=torch.float32))
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it a scale would lose its own digits


class Encoded(NamedTuple):
    """Rows as they are stored: codes int8 [rows, *row shape], scales float32 [rows] or [rows, blocks]."""

    codes: torch.Tensor
    scales: torch.Tensor


def scale_shape(encoding: str, row_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one row's scales."""
    block = BLOCKS[encoding]
    return () if block is None else (-(-prod(row_shape) // block),)


def encode(rows: torch.Tensor, encoding: str, into: Encoded | None = None) -> Encoded:
    """Return the codes and scales of rows [rows, *row shape] of float32, bfloat16 or float16.

    A value is its code times the scale of its block, to half a scale: ``|x - decoded| <= scale * (1/2 + 2**-16)``. A
    block with a NaN or an infinity has a NaN as its scale, and reads back as NaN.

    Args:
        rows: on any device; each row has a value.
        encoding: one of BLOCKS.
        into: where to put them, on the same device; None: in new tensors.

    Example:
        >>> import torch
        >>> from tlfast.dataset.format.encodings import encode
        >>> encode(torch.tensor([[0.25, -127.0, 3.0]]), "int8").codes
        tensor([[   0, -127,    3]], dtype=torch.int8)
    """
    n, shape = len(rows), tuple(rows.shape[1:])
    if into is None:
        codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        scales = torch.empty((n, *scale_shape(encoding, shape)), dtype=torch.float32, device=rows.device)
        into = Encoded(codes, scales)
    size = prod(shape)
    block = BLOCKS[encoding] or size
    n_whole, whole = size // block, size // block * block
    values, codes = rows.reshape(n, size).to(torch.float32), into.codes.view(n, size)
    scales = into.scales.view(n, -(-size // block))
    _quantize(
        values[:, :whole].unflatten(1, (n_whole, block)),
        codes[:, :whole].unflatten(1, (n_whole, block)),
        scales[:, :n_whole],
    )
    if whole < size:
        _quantize(values[:, None, whole:], codes[:, None, whole:], scales[:, n_whole:])
    return into


def _quantize(values: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill codes [rows, blocks, values] and scales [rows, blocks]; the same operations, so the same bits, anywhere."""
    if not values.numel():
        return
    largest = torch.linalg.vector_norm(values, torch.inf, -1)  # a NaN makes it NaN
    scale = (largest * _PER_CODE).clamp_min_(SMALLEST_SCALE)
    scales.copy_(torch.where(largest.isfinite(), scale, torch.nan))
    quotients = values / scales.unsqueeze(-1)
    codes.copy_(quotients.round_().nan_to_num_(nan=0.0))  # half to even; what a NaN becomes as an int is the CPU's


def decode(codes: torch.Tensor, scales: torch.Tensor, encoding: str, row_shape: tuple[int, ...]) -> torch.Tensor:
    """Return the rows, float32 [*rows, *row shape], of codes [*rows, *row shape] and scales [*rows, *scale shape]."""
    size = prod(row_shape)
    block = BLOCKS[encoding] or size
    n_whole, whole = size // block, size // block * block
    n = prod(codes.shape[: codes.dim() - len(row_shape)])
    values, scales = codes.reshape(n, size).to(torch.float32), scales.reshape(n, -(-size // block))
    values[:, :whole].unflatten(1, (n_whole, block)).mul_(scales[:, :n_whole, None])
    values[:, whole:] *= scales[:, n_whole:]
    return values.view(codes.shape)


def wrong_codes(given: Encoded, encoding: str, row_shape: tuple[int, ...]) -> tuple[str, str] | None:
    """Return the rule that codes or scales of the right shapes break, and what they have; None where they break none.

    `encode` makes none of these, and a reader would take them for other values than their norms and flags say.
    """
    codes, scales = given
    if not codes.numel():
        return None
    if int(codes.amin()) < -_LARGEST_CODE:
        return f"have codes from -{_LARGEST_CODE} to {_LARGEST_CODE}", str(int(codes.amin()))
    nan = scales.isnan()
    wrong = ~(nan | ((scales >= SMALLEST_SCALE) & (scales < torch.inf)))
    if wrong.any():
        return "have scales that are NaN, or finite and 2**-126 or more", str(scales[wrong][0].item())
    odd = (nan | (scales * _LARGEST_CODE).isinf()).view(len(scales), -1).any(1)  # the rows that are worth decoding
    if odd.any():
        codes, scales, nan = codes[odd.to(codes.device)].cpu(), scales[odd].cpu(), nan[odd].cpu()
        if decode(codes, nan.float(), encoding, row_shape).any():
            return "have codes of 0 where the scale is NaN", "another"
        if decode(codes, scales.nan_to_num(nan=1.0), encoding, row_shape).isinf().any():
            return "decode to finite values", "one that overflows"
    return None


def check_encoding(who: str, name: str, dtype: torch.dtype, row_shape: tuple[int, ...], encoding: object) -> str | None:
    """Return what is wrong with the encoding of a column, as an error's text; None where nothing is."""
    if encoding is None:
        return None
    if not isinstance(encoding, str) or encoding not in BLOCKS:
        rule = f"be None or one of {', '.join(BLOCKS)}"
        return broken_rule(who, f"encoding of {name!r}", rule, repr(encoding)[:80], "A newer tlfast may know more.")
    if dtype != torch.float32:
        rule = "be float32, as decoded rows are"
        remedy = "Rows of bfloat16 and float16 can be written to it."
        return broken_rule(who, f"dtype of the encoded {name!r}", rule, dtype, remedy)
    if not prod(row_shape):
        rule = "have a value in each row"
        return broken_rule(who, f"shape of the encoded {name!r}", rule, list(row_shape), "Leave the encoding out.")
    return None
