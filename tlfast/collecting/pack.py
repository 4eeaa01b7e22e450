"""From rows in a ring to the fields of a unit's block: rows or tokens chosen, padding squeezed out, encoded."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import ModuleType

import torch

from ..dataset.format.encodings import ENCODED_DTYPES, STOCHASTIC, Encoded, encode
from ..dataset.format.layout import CODES, SCALES, Column
from ..dataset.format.rounding import Rounding, rounding_of
from ..errors import broken_rule
from ..hooks.tokens import Tokens as Tokens
from ..hooks.tokens import token_rows
from ..spec import Spec, stored_dtype

Block = dict[str, torch.Tensor]

# Rows that are encoded at a time: on a CPU what its cache holds between two steps, on a device little beside the ring.
_CPU_BYTES, _DEVICE_BYTES = 1 << 20, 64 << 20


class Pack:
    """Puts the rows of a unit, from rings in any order, into its block: in one pass each, where the ring lies.

    Args:
        columns: what the rings hold. Of a column per example a ring is [rows, *row shape], of one per token
            [rows, positions, *row shape].
        native: what encodes rows on the CPU, the same bits sooner; None: torch does.

    Example:
        >>> import torch
        >>> from tlfast.collecting.pack import Pack, Tokens
        >>> from tlfast.dataset import Column
        >>> pack = Pack({"h": Column(torch.float32, (), per="token")})
        >>> rings, block = {"h": torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]])}, {"h": torch.empty(3)}
        >>> pack.put(rings, pack.choose(rings, torch.tensor([1, 0]), Tokens([1, 2])), block)
        >>> block["h"]
        tensor([3., 1., 2.])
    """

    def __init__(self, columns: Mapping[str, Column], native: ModuleType | None = None):
        self.columns, self._native = columns, native
        self.per_token = [name for name, column in columns.items() if column.per == "token"]

    def choose(
        self,
        rings: Mapping[str, torch.Tensor],
        places: torch.Tensor,
        tokens: Tokens | None = None,
        pinned: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Return which rows of each ring make up the block, int64 on the host; `put` takes them to the rings' devices.

        Args:
            rings: by column.
            places: where the row of each example lies in the ring, int64 [examples], on the host.
            tokens: of each example, in the same order; needed by columns per token.
            pinned: whether a CUDA device copies the numbers by itself.
        """
        widths = {name: ring.shape[1] for name, ring in rings.items() if self.columns[name].per == "token"}
        chosen = {width: token_rows("Pack", places, tokens, width) for width in set(widths.values())}
        if pinned:
            places, chosen = places.pin_memory(), {width: rows.pin_memory() for width, rows in chosen.items()}
        return {name: chosen[widths[name]] if name in widths else places for name in rings}

    def roundings(self, first_example: int | None, n_examples: int, tokens: Tokens | None) -> dict[str, Rounding]:
        """Whose rows the block has, for the columns that are rounded by that.

        Args:
            first_example: the number of the first example in the plan; those of the others follow.
            n_examples: how many there are.
            tokens: as in `choose`.
        """
        found = {}
        for name, column in self.columns.items():
            if column.encoding in STOCHASTIC:
                if first_example is None:
                    rule, remedy = f"be known to encode {name!r} as {column.encoding}", "Say the unit's first example."
                    raise ValueError(broken_rule("Pack", "first_example", rule, "none", remedy))
                lengths = tokens.lengths if tokens is not None and column.per == "token" else [1] * n_examples
                found[name] = rounding_of(name, first_example, lengths)
        return found

    def put(
        self,
        rings: Mapping[str, torch.Tensor],
        chosen: Mapping[str, torch.Tensor],
        block: Block,
        roundings: Mapping[str, Rounding] | None = None,
    ) -> None:
        """Fill the fields of a block; waits for no device. ``roundings``: see there."""
        there: dict[tuple[int, torch.device], torch.Tensor] = {}
        for name, ring in rings.items():
            column, place = self.columns[name], (id(chosen[name]), ring.device)
            if place not in there:
                there[place] = chosen[name].to(ring.device, non_blocking=True)
            rows = ring.flatten(0, 1) if column.per == "token" else ring
            if column.encoding is None:
                _gather(rows, there[place], block[name])
            else:
                out = Encoded(block[name + CODES], block[name + SCALES])
                rounding = (roundings or {}).get(name)
                _encode(rows, there[place], column.encoding, out, self._native, rounding)

    def take(self, rings: Mapping[str, torch.Tensor], chosen: Mapping[str, torch.Tensor]) -> Block:
        """Return the rows by column as they are in the rings, and where these lie: not encoded."""
        return {
            name: (ring.flatten(0, 1) if name in self.per_token else ring).index_select(0, chosen[name].to(ring.device))
            for name, ring in rings.items()
        }

    def contents(self, block: Block) -> dict[str, torch.Tensor | Encoded]:
        """Return a block by column, as DatasetWriter.write_unit takes it."""
        return {
            name: block[name] if column.encoding is None else Encoded(block[name + CODES], block[name + SCALES])
            for name, column in self.columns.items()
        }


def column_of(who: str, spec: Spec, ring: torch.Tensor) -> Column:
    """What a dataset holds of the rows in a ring; ValueError where it can't hold them so."""
    if spec.per == "token" and ring.dim() < 2:
        rule, remedy = 'have the positions as dimension 1 with per="token"', 'Use per="example" there.'
        raise ValueError(broken_rule(who, "a gradient", rule, f"rows {list(ring.shape[1:])}", remedy))
    shape = tuple(ring.shape[2 if spec.per == "token" else 1 :])
    dtype = stored_dtype(who, spec.dtype) or ring.dtype
    if spec.encoding is None:
        return Column(dtype, shape, spec.of, spec.per)
    if dtype not in ENCODED_DTYPES:
        rule, remedy = "be float32, bfloat16 or float16 to be encoded", 'dtype="float32" rounds them before.'
        raise ValueError(broken_rule(who, "rows", rule, dtype, remedy))
    if not prod(shape):
        raise ValueError(broken_rule(who, "a row", "have a value to be encoded", list(shape), "Leave encoding= out."))
    return Column(torch.float32, shape, spec.of, spec.per, spec.encoding)


def _gather(rows: torch.Tensor, chosen: torch.Tensor, out: torch.Tensor) -> None:
    if out.shape != (len(chosen), *rows.shape[1:]):  # torch would let `out` grow, over what lies behind it
        got, remedy = f"{list(rows.shape[1:])} for {list(out.shape[1:])}", "Make the Pack for these columns."
        raise ValueError(broken_rule("Pack", "rows of a ring", "have the shape of their column", got, remedy))
    if out.device == rows.device and out.dtype == rows.dtype:
        torch.index_select(rows, 0, chosen, out=out)
    else:
        out.copy_(rows.index_select(0, chosen))


def _encode(
    rows: torch.Tensor,
    chosen: torch.Tensor,
    encoding: str,
    out: Encoded,
    native: ModuleType | None,
    rounding: Rounding | None,
) -> None:
    rounding = None if rounding is None else rounding.to(rows.device)
    n_bytes = _CPU_BYTES if rows.device.type == "cpu" else _DEVICE_BYTES
    step = max(1, n_bytes // max(1, 4 * prod(rows.shape[1:])))
    for part in (slice(start, start + step) for start in range(0, len(chosen), step)):
        values, target = rows.index_select(0, chosen[part]), Encoded(out.codes[part], out.scales[part])
        of_part = None if rounding is None else rounding.part(part)
        if out.codes.device == rows.device:
            encode(values, encoding, target, native, of_part)
        else:
            for there, here in zip(target, encode(values, encoding, None, native, of_part), strict=True):
                there.copy_(here)
