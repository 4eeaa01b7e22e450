"""Encodings of rows: codes of 8 or 4 bits with a scale for each row, or for each 64 values. See docs/format.md."""

from __future__ import annotations

from math import prod
from types import ModuleType
from typing import NamedTuple

import torch

from ...errors import broken_rule
from .rounding import Rounding


class _Kind(NamedTuple):
    """What the codes of an encoding are."""

    block: int | None  # values that share a scale; None: all of a row
    largest: int  # code
    dtype: torch.dtype
    per_byte: int = 1


_KINDS = {
    "int8": _Kind(None, 127, torch.int8),
    "int8:64": _Kind(64, 127, torch.int8),
    "float8_e4m3fn": _Kind(None, 448, torch.float8_e4m3fn),
    "int4:64": _Kind(64, 7, torch.uint8, per_byte=2),
}
NEAREST = tuple(_KINDS)
_STOCHASTIC = ":stochastic"  # rounded to one of the two codes around it, at random, so that the mean is right
STOCHASTIC = {name + _STOCHASTIC: name for name in NEAREST}
_KINDS |= {name: _KINDS[nearest] for name, nearest in STOCHASTIC.items()}
BLOCKS = {name: kind.block for name, kind in _KINDS.items()}
ENCODED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what float32 holds exactly can be encoded

_NATIVE_NAMES = dict(zip(ENCODED_DTYPES, ("F32", "BF16", "F16"), strict=True))

# A little less than 1/127, so that 127 times a scale never exceeds the value that the scale was made for.
_PER_CODE = {
    kind.largest: float(torch.tensor((1 - 2.0**-22) / kind.largest, dtype=torch.float32)) for kind in _KINDS.values()
}
SMALLEST_SCALE = 2.0**-126  # the smallest normal float32: below it a scale would lose its own digits


class Encoded(NamedTuple):
    """Rows as they are stored: codes [rows, *row shape], scales float32 [rows] or [rows, blocks].

    Codes are int8, or float8_e4m3fn; of "int4:64" uint8 [rows, half as many, rounded up], the first of two in the low
    bits.
    """

    codes: torch.Tensor
    scales: torch.Tensor


def told(encoding: str) -> str:
    """Return in words how rows are stored, and how far off at most what is read is, see docs/format.md.

    Example:
        >>> from tlfast.dataset.format.encodings import told
        >>> told("int8:64")
        'stored as int8 with a scale for each 64 values, off by at most 1/254 of the largest magnitude that shares it'
    """
    kind, is_random = _KINDS[encoding], encoding in STOCHASTIC
    stored = encoding.partition(":")[0] + (" rounded at random, right on average," if is_random else "")
    scales = "row" if kind.block is None else f"{kind.block} values"
    if kind.dtype.is_floating_point:
        share, least = (8, 512) if is_random else (16, 1024)
        bound = f"1/{share} of the value, or 1/{least * kind.largest:,} of the largest magnitude that shares it"
    else:
        bound = f"1/{kind.largest if is_random else 2 * kind.largest} of the largest magnitude that shares it"
    return f"stored as {stored} with a scale for each {scales}, off by at most {bound}"


def code_kind(encoding: str, row_shape: tuple[int, ...]) -> tuple[torch.dtype, tuple[int, ...]]:
    """Return the dtype and the shape of one row's codes."""
    kind = _KINDS[encoding]
    return kind.dtype, row_shape if kind.per_byte == 1 else (-(-prod(row_shape) // kind.per_byte),)


def scale_shape(encoding: str, row_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one row's scales."""
    block = BLOCKS[encoding]
    return () if block is None else (-(-prod(row_shape) // block),)


def encode(
    rows: torch.Tensor,
    encoding: str,
    into: Encoded | None = None,
    native: ModuleType | None = None,
    rounding: Rounding | None = None,
) -> Encoded:
    """Return the codes and scales of rows [rows, *row shape] of float32, bfloat16 or float16.

    A value is its code times the scale of its block, to half a scale: ``|x - decoded| <= scale * (1/2 + 2**-16)``; of
    float8 codes, to ``max(|x| / 16, scale / 1024) * (1 + 2**-16)``. Rounded stochastically it is off by less than twice
    as much, and the mean over all random numbers by ``scale * 2**-14`` at most, of float8 codes ``scale * 2**-12``. A
    block with a NaN or an infinity has a NaN as its scale, and reads back as NaN.

    Args:
        rows: on any device; each row has a value.
        encoding: one of BLOCKS.
        into: where to put them, on the same device; None: in new tensors.
        native: tlfast._disk, which makes the same bits of rows on the CPU; None: torch does.
        rounding: whose rows they are, on their device; needed by a stochastic encoding, and by no other.

    Example:
        >>> import torch
        >>> from tlfast.dataset.format.encodings import encode
        >>> encode(torch.tensor([[0.25, -127.0, 3.0]]), "int8").codes
        tensor([[   0, -127,    3]], dtype=torch.int8)
    """
    n, shape, kind = len(rows), tuple(rows.shape[1:]), _KINDS[encoding]
    if into is None:
        dtype, code_shape = code_kind(encoding, shape)
        codes = torch.empty((n, *code_shape), dtype=dtype, device=rows.device)
        scales = torch.empty((n, *scale_shape(encoding, shape)), dtype=torch.float32, device=rows.device)
        into = Encoded(codes, scales)
    size = prod(shape)
    _check_rounding(encoding, n, rounding)
    if native is not None and n and _at_hand(rows, into):
        flat = rows.reshape(n, size).resolve_neg().contiguous()  # memory, and no tensor, is read
        name, per_code = _NATIVE_NAMES[rows.dtype], _PER_CODE[kind.largest]
        told = native_codes(into, encoding, shape)
        if rounding is None:
            native.encode_rows(flat.data_ptr(), name, per_code, told, None)
        else:
            examples, positions = (part.contiguous() for part in (rounding.examples, rounding.positions))
            random = (*rounding.key, examples.data_ptr(), positions.data_ptr())
            native.encode_rows(flat.data_ptr(), name, per_code, told, random)
        return into
    uniforms = None if rounding is None else rounding.uniforms(size)
    _encode(rows.reshape(n, size).to(torch.float32), kind, into, uniforms)
    return into


def _check_rounding(encoding: str, n: int, rounding: Rounding | None) -> None:
    """ValueError unless it is given where it is needed, for as many rows."""
    wanted = encoding in STOCHASTIC
    if wanted != (rounding is not None):
        rule = "be given where an encoding is stochastic, and there alone"
        got = "none" if rounding is None else "one"
        raise ValueError(broken_rule("encode", f"rounding for {encoding}", rule, got, "Say whose rows they are."))
    if rounding is not None and {tuple(part.shape) for part in rounding[1:]} != {(n,)}:
        shapes = [list(part.shape) for part in rounding[1:]]
        rule = f"have a number for each of {n} rows"
        raise ValueError(broken_rule("encode", "rounding", rule, shapes, "Count them."))


def _at_hand(rows: torch.Tensor, into: Encoded) -> bool:
    """Whether native code can read rows and write codes where they are."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in (rows, *into))
    return on_cpu and rows.dtype in ENCODED_DTYPES and all(part.is_contiguous() for part in into)


def native_codes(stored: Encoded, encoding: str, row_shape: tuple[int, ...]) -> tuple[str, int, int, int, int, int]:
    """Return what tlfast._disk is told of codes and scales that lie contiguous on the CPU."""
    size, what = prod(row_shape), encoding.partition(":")[0]  # the norms of codes don't depend on how they were found
    return what, len(stored.codes), size, BLOCKS[encoding] or size, stored.codes.data_ptr(), stored.scales.data_ptr()


def _encode(values: torch.Tensor, kind: _Kind, into: Encoded, uniforms: torch.Tensor | None) -> None:
    """Encode rows of float32 [rows, values], to the nearest codes, or by random numbers of the same shape."""
    n, size = values.shape
    block = kind.block or size
    n_whole, whole = size // block, size // block * block
    packed = kind.per_byte == 2
    codes = torch.empty((n, size), dtype=torch.int8, device=values.device) if packed else into.codes.view(n, size)
    scales = into.scales.view(n, -(-size // block))
    first = None if uniforms is None else uniforms[:, :whole].unflatten(1, (n_whole, block))
    _quantize(
        values[:, :whole].unflatten(1, (n_whole, block)),
        codes[:, :whole].unflatten(1, (n_whole, block)),
        scales[:, :n_whole],
        kind.largest,
        first,
    )
    if whole < size:
        rest = None if uniforms is None else uniforms[:, None, whole:]
        _quantize(values[:, None, whole:], codes[:, None, whole:], scales[:, n_whole:], kind.largest, rest)
    if packed:
        into.codes.view(n, -(-size // 2)).copy_(_in_pairs(codes))


def _quantize(
    values: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    largest_code: int,
    uniforms: torch.Tensor | None,
) -> None:
    """Fill codes [rows, blocks, values] and scales [rows, blocks]; the same operations, so the same bits, anywhere."""
    if not values.numel():
        return
    largest = values.abs().amax(-1)  # a NaN makes it NaN; a tenth of the time of a norm
    scale = (largest * _PER_CODE[largest_code]).clamp_min_(SMALLEST_SCALE)
    scales.copy_(torch.where(largest.isfinite(), scale, torch.nan))
    quotients = values / scales.unsqueeze(-1)
    if uniforms is not None:
        apart = _apart_by(quotients) if codes.dtype.is_floating_point else None  # of whole numbers: 1
        steps = quotients if apart is None else quotients / apart
        below = steps.floor()
        drawn = below.add_((steps - below) > uniforms)
        quotients = (drawn if apart is None else drawn.mul_(apart)).clamp_(-largest_code, largest_code)
    elif not codes.dtype.is_floating_point:
        quotients.round_()  # half to even, as the cast to float8 rounds
    codes.copy_(quotients.nan_to_num_(nan=0.0))  # what a NaN becomes as an int is the CPU's


def _apart_by(quotients: torch.Tensor) -> torch.Tensor:
    """How far float8 codes around each quotient are from each other: 2^-3 of its power of two, 2^-9 at least."""
    powers = quotients.view(torch.int32) & 0x7F800000
    return (powers.clamp_(min=0x3C800000) - (3 << 23)).view(torch.float32)


def _in_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of -7 to 7 in each byte, uint8 [rows, half]: the first in the low bits, 0 beside a last one."""
    low, high = codes[:, ::2] & 15, codes[:, 1::2] << 4
    pairs = low.clone()
    pairs[:, : high.shape[1]] |= high
    return pairs.view(torch.uint8)


def _apart(pairs: torch.Tensor, size: int) -> torch.Tensor:
    """The ``size`` codes in each row of bytes, int8 [rows, size]."""
    signed = pairs.view(torch.int8)
    both = torch.stack([signed << 4 >> 4, signed >> 4], -1)  # an arithmetic shift keeps the sign
    return both.flatten(1)[:, :size]


def decode(codes: torch.Tensor, scales: torch.Tensor, encoding: str, row_shape: tuple[int, ...]) -> torch.Tensor:
    """Return the rows, float32 [*rows, *row shape], of codes [*rows, *code shape] and scales [*rows, *scale shape]."""
    size, kind = prod(row_shape), _KINDS[encoding]
    block = kind.block or size
    n_whole, whole = size // block, size // block * block
    lead = codes.shape[: codes.dim() - len(code_kind(encoding, row_shape)[1])]
    n = prod(lead)
    values = codes.reshape(n, size) if kind.per_byte == 1 else _apart(codes.reshape(n, -(-size // 2)), size)
    values, scales = values.to(torch.float32), scales.reshape(n, -(-size // block))
    values[:, :whole].unflatten(1, (n_whole, block)).mul_(scales[:, :n_whole, None])
    values[:, whole:] *= scales[:, n_whole:]
    return values.view((*lead, *row_shape))


def wrong_codes(given: Encoded, encoding: str, row_shape: tuple[int, ...]) -> tuple[str, str] | None:
    """Return the rule that codes or scales of the right shapes break, and what they have; None where they break none.

    `encode` makes none of these, and a reader would take them for other values than their norms and flags say.
    """
    codes, scales = given
    if not codes.numel():
        return None
    kind = _KINDS[encoding]
    outside = _outside(codes, kind, prod(row_shape))
    if outside is not None:
        return f"have codes from -{kind.largest} to {kind.largest}", outside
    nan = scales.isnan()
    wrong = ~(nan | ((scales >= SMALLEST_SCALE) & (scales < torch.inf)))
    if wrong.any():
        return "have scales that are NaN, or finite and 2**-126 or more", str(scales[wrong][0].item())
    odd = (nan | (scales * kind.largest).isinf()).view(len(scales), -1).any(1)  # the rows that are worth decoding
    if odd.any():
        codes, scales, nan = codes[odd.to(codes.device)].cpu(), scales[odd].cpu(), nan[odd].cpu()
        if decode(codes, nan.float(), encoding, row_shape).any():
            return "have codes of 0 where the scale is NaN", "another"
        if decode(codes, scales.nan_to_num(nan=1.0), encoding, row_shape).isinf().any():
            return "decode to finite values", "one that overflows"
    return None


def _outside(codes: torch.Tensor, kind: _Kind, size: int) -> str | None:
    """A code that no row has: the one below the smallest, a NaN, or one behind the last of a row; None without one.

    By operations on bytes: every unit that is collected is looked at.
    """
    if kind.dtype == torch.float8_e4m3fn:
        return "nan" if int((codes.view(torch.uint8) & 127).amax()) == 127 else None
    if kind.per_byte == 2:
        if size % 2 and bool((codes[..., -1] >> 4).any()):
            return "another than 0 behind the last"
        both = codes.view(torch.int8)
        found = min(int((both * 16).amin()), int((both & -16).amin())) // 16  # either code, shifted up
    else:
        found = int(codes.amin())
    return str(found) if found < -kind.largest else None


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
