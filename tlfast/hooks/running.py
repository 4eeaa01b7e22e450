"""Sums over the rows of a whole run, none of which is kept: float32 within a block of rows, float64 between blocks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import broken_rule
from ..spec import one_of
from .sums_file import Read, read_sums, write_sums

Stat = Literal["sum", "mean", "moment2", "moment2_full", "max"]
STATS: tuple[str, ...] = get_args(Stat)

BLOCK_ROWS = 512  # that are added up in float32
_PANEL = 256  # columns of the second moments that are made at once: what lies below the diagonal isn't made
# Rows of such sizes are squared and added up in float32 without an overflow, and without losing the largest.
_SMALLEST, _LARGEST = 2.0**-30, 2.0**50
_FORMAT, _VERSION = "tlfast-running-sums", 1
_WHO = "RunningSums"


@dataclass
class RowSums:
    """What is known of the rows of one column, on the device of its rows; float64.

    ``n`` rows were added up, and ``n_skipped`` left out since they are not finite. ``sum``, ``mean`` (which is the sum
    divided by n), ``moment2`` (the mean of the squares) and ``max`` have the shape of a row; ``moment2_full`` is
    [D, D], the mean of the products of each two of its D values.

    Raises:
        AttributeError: for a statistic that wasn't asked for.
    """

    name: str
    shape: tuple[int, ...]
    n: int = 0
    n_skipped: int = 0
    totals: dict[str, torch.Tensor] = field(default_factory=dict)  # flat; of moment2_full what isn't below the diagonal

    @property
    def sum(self) -> torch.Tensor:
        """The sum of all rows."""
        return self._total("sum").view(self.shape)

    @property
    def mean(self) -> torch.Tensor:
        """The mean of all rows; NaN without a row."""
        return self.sum / self.n

    @property
    def moment2(self) -> torch.Tensor:
        """The mean of the squares of each value; NaN without a row."""
        return self._total("moment2").view(self.shape) / self.n

    @property
    def moment2_full(self) -> torch.Tensor:
        """The mean of the outer product of each flat row with itself: [D, D], symmetric to the bit."""
        upper = self._total("moment2_full").triu()
        return (upper + upper.triu(1).T) / self.n

    @property
    def max(self) -> torch.Tensor:
        """The largest value at each place; -inf without a row."""
        return self._total("max").view(self.shape)

    def _total(self, stat: str) -> torch.Tensor:
        if stat not in self.totals:
            remedy = f"Give RunningSums stats=({stat!r},)."
            rule, got = "be one of the stats that were asked for", f"{', '.join(self.totals)} alone"
            raise AttributeError(broken_rule(_WHO, f"{stat} of {self.name!r}", rule, got, remedy))
        return self.totals[stat]

    def add(self, rows: torch.Tensor, largest: float) -> None:
        """Add finite rows [n, D], none of whose values is larger than ``largest``."""
        wide = rows.dtype == torch.float64 or not (_SMALLEST <= largest <= _LARGEST or largest == 0)
        rows = rows.to(torch.float64 if wide else torch.float32)
        self.n += len(rows)
        for stat, total in self.totals.items():
            if stat == "max":
                torch.maximum(total, rows.amax(0), out=total)
            elif stat == "moment2_full":
                for block in rows.split(BLOCK_ROWS):
                    _add_products(total, block)
            else:
                for blocks in _in_blocks(rows):
                    total += (blocks if stat == "sum" else blocks.square()).sum(1).double().sum(0)

    def merge(self, other: RowSums) -> None:
        """Add what other rows came to."""
        self.n, self.n_skipped = self.n + other.n, self.n_skipped + other.n_skipped
        for stat, total in self.totals.items():
            theirs = other.totals[stat].to(total.device)
            torch.maximum(total, theirs, out=total) if stat == "max" else total.add_(theirs)


def _in_blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """The rows as [blocks, BLOCK_ROWS, D], and then those that are left, [1, n, D]."""
    n_whole = len(rows) // BLOCK_ROWS * BLOCK_ROWS
    if n_whole:
        yield rows[:n_whole].unflatten(0, (-1, BLOCK_ROWS))
    if n_whole < len(rows):
        yield rows[n_whole:].unsqueeze(0)


def _add_products(total: torch.Tensor, block: torch.Tensor) -> None:
    """Add block.T @ block, panel by panel, down to the diagonal."""
    if torch.get_float32_matmul_precision() != "highest":  # the user's choice is of his model's products
        block = block.double()
    for start in range(0, block.shape[1], _PANEL):
        stop = min(start + _PANEL, block.shape[1])
        total[:stop, start:stop] += block[:, :stop].T @ block[:, start:stop]


class RunningSums:
    """Sums over all rows of a run: the sum, the mean, second moments, the maximum; no row is kept.

    Padding never counts: rows that keep their positions, with zeros at the padding of some, are an error.

    Rows come from a capture (``cap.into(sums)``), from `tlfast.running`, or by `add`. At most 512 rows at a time are
    added up in float32 (float64 rows, and those with values beyond 2^50 or all below 2^-30, in float64), and what they
    come to in float64. So a sum over n rows is off by at most ``(513 * 2^-24 + n * 2^-53) * sum|x|`` (of ``moment2``
    ``sum(x^2)``, and 2^-149 for each square; of ``moment2_full`` ``sum|x y|``), whatever the batches were: two splits,
    or parts that were merged, differ by twice that at most. A maximum is exact.

    Args:
        stats: what to keep: "sum" or "mean" (either gives both), "moment2", "moment2_full" (D x D values in float64)
            and "max".
        non_finite: for a row with a NaN or an infinity: "stop" raises, and nothing of its batch is added; "skip" leaves
            the row out and counts it in ``n_skipped``.
        identity: a text that says of what the sums are; parts are merged only if theirs are equal.

    Raises:
        ValueError: for unknown words.

    Example:
        >>> import torch, tlfast
        >>> model, sums = torch.nn.Linear(4, 3), tlfast.RunningSums(("mean", "max"))
        >>> with tlfast.capture(model, "", rows=2, of="act") as cap, cap.into(sums):
        ...     for x in torch.ones(5, 2, 4):
        ...         with cap.batch():
        ...             model(x).sum().backward()
        >>> sums[":act"].n, sums[":act"].mean.shape
        (10, torch.Size([3]))
    """

    def __init__(
        self,
        stats: Stat | Sequence[Stat] = ("sum", "moment2"),
        *,
        non_finite: Literal["stop", "skip"] = "stop",
        identity: str = "",
    ) -> None:
        words: list[str] = [stats] if isinstance(stats, str) else list(stats)
        if not words:
            raise ValueError(broken_rule(_WHO, "stats", f"name some of {', '.join(STATS)}", "none", 'Say "sum".'))
        for word in words:
            one_of(_WHO, "stats", word, STATS)
        one_of(_WHO, "non_finite", non_finite, ("stop", "skip"))
        self.stats = tuple(dict.fromkeys("sum" if word == "mean" else word for word in words))
        self.non_finite, self.identity = non_finite, identity
        self.skipped: list[tuple[str, int, str]] = []  # examples that were left out: see `tlfast.running`
        self.about: dict[str, Any] = {}  # the model and specs of the rows, as a dataset's header says them
        self._columns: dict[str, RowSums] = {}

    @classmethod
    def of_columns(cls, stats: Sequence[Stat], columns: Iterable[RowSums], *, identity: str = "") -> RunningSums:
        """Sums that were made elsewhere, with the totals of all of ``stats``."""
        made = cls(stats, identity=identity)
        made._columns = {column.name: column for column in columns}
        return made

    @property
    def names(self) -> list[str]:
        """The columns of which there is a row."""
        return list(self._columns)

    def __getitem__(self, name: str) -> RowSums:
        """What is known of a column; KeyError where it has no row."""
        if name not in self._columns:
            rule, remedy = f"be one of {', '.join(self.names[:8]) or 'none yet'}", "See sums.names."
            raise KeyError(broken_rule(_WHO, "a name", rule, repr(name), remedy))
        return self._columns[name]

    def __contains__(self, name: object) -> bool:
        return name in self._columns

    def __repr__(self) -> str:
        lines = [f"<tlfast.RunningSums of {', '.join(self.stats)}>"]
        for name, column in self._columns.items():
            skipped = f", {column.n_skipped} skipped" * bool(column.n_skipped)
            lines.append(f"  {name!r}: {column.n} rows {list(column.shape)}{skipped}")
        return "\n".join(lines)

    def add(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Add rows by column: [n, *row shape] of a floating dtype, all of them or none.

        Raises:
            ValueError: for rows of another shape than those before.
            FloatingPointError: for a row that is not finite, with ``non_finite="stop"``.
        """
        flat = {
            name: self._checked(name, given).detach().reshape(len(given), -1)
            for name, given in rows.items()
            if len(given)
        }
        with torch.no_grad():
            largest = {name: _largest(values) for name, values in flat.items()}
            skipped = dict.fromkeys(flat, 0)
            for name in [name for name, size in zip(flat, _on_host(largest), strict=True) if not np.isfinite(size)]:
                good = flat[name].isfinite().all(1)
                skipped[name] = int((~good).count_nonzero())
                if self.non_finite == "stop":
                    got = f"NaN or infinity in {skipped[name]} of {len(good)} rows"
                    remedy = 'non_finite="skip" leaves such rows out, and counts them.'
                    raise FloatingPointError(broken_rule(_WHO, f"rows at {name}", "be finite", got, remedy))
                flat[name] = flat[name][good]
                largest[name] = _largest(flat[name])
            for name, size in zip(flat, _on_host(largest), strict=True):
                column = self._column(name, tuple(rows[name].shape[1:]), flat[name])
                column.n_skipped += skipped[name]
                if len(flat[name]):
                    with torch.autocast(flat[name].device.type, enabled=False):
                        column.add(flat[name], size)

    def _checked(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        known = self._columns.get(name)
        if not rows.is_floating_point() or not rows[0].numel():
            got = f"{rows.dtype} {list(rows.shape[1:])}"
            raise ValueError(broken_rule(_WHO, f"a row at {name}", "have floating values", got, "Leave it out."))
        if known is not None and known.shape != tuple(rows.shape[1:]):
            rule, remedy = f"have shape {list(known.shape)} as those before", 'Reduce what changes, or say per="token".'
            raise ValueError(broken_rule(_WHO, f"a row at {name}", rule, list(rows.shape[1:]), remedy))
        return rows

    def _column(self, name: str, shape: tuple[int, ...], rows: torch.Tensor) -> RowSums:
        if name not in self._columns:
            n = rows.shape[1]
            made = RowSums(name, shape)
            for stat in self.stats:
                size = (n, n) if stat == "moment2_full" else (n,)
                start = -torch.inf if stat == "max" else 0.0
                made.totals[stat] = torch.full(size, start, dtype=torch.float64, device=rows.device)
            self._columns[name] = made
        return self._columns[name]

    # Parts.

    def merge(self, other: RunningSums) -> RunningSums:
        """Add another part's sums to these, in float64; returns these. Parts that share rows count them twice.

        Raises:
            ValueError: for other stats, another identity, or rows of another shape. Nothing is added then.
        """
        for what in ("stats", "identity"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if (set(ours) != set(theirs)) if what == "stats" else ours != theirs:
                remedy = "Sums of other things can't be added up."
                raise ValueError(broken_rule(_WHO, what, f"be {ours!r} in both parts", repr(theirs), remedy))
        for name, column in other._columns.items():
            if name in self and self[name].shape != column.shape:
                rule, got = f"have shape {list(self[name].shape)} in both parts", list(column.shape)
                raise ValueError(broken_rule(_WHO, f"a row at {name}", rule, got, "They are not of one model."))
        for name, column in other._columns.items():
            empty = torch.empty(
                0, next(iter(column.totals.values())).shape[0], device=column._total(self.stats[0]).device
            )
            self._column(name, column.shape, empty).merge(column)
        self.skipped += other.skipped
        self.about = self.about or dict(other.about)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a file of numpy (npz), whole or not at all."""
        said = {
            "format": _FORMAT, "version": _VERSION, "stats": self.stats, "non_finite": self.non_finite,
            "identity": self.identity, "skipped": self.skipped,
            "columns": [[c.name, c.shape, c.n, c.n_skipped] for c in self._columns.values()],
            **({"about": self.about} if self.about else {}),
        }  # fmt: skip
        arrays = {
            f"{k}.{stat}": total
            for k, column in enumerate(self._columns.values())
            for stat, total in column.totals.items()
        }
        write_sums(path, said, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunningSums:
        """Read what `save` wrote, to the bit; on the CPU.

        Raises:
            ValueError: for a file that `save` didn't write.
            OSError: for one that can't be read.
        """
        return read_sums(_WHO, path, (_FORMAT, _VERSION), cls._read)

    @classmethod
    def _read(cls, said: Any, tensor: Read) -> RunningSums:
        made = cls(said["stats"], non_finite=said["non_finite"], identity=said["identity"])
        made.skipped = [(source, start, reason) for source, start, reason in said["skipped"]]
        made.about = dict(said.get("about", {}))
        for k, (name, shape, n, n_skipped) in enumerate(said["columns"]):
            totals = {stat: tensor(f"{k}.{stat}") for stat in made.stats}
            made._columns[name] = RowSums(name, tuple(shape), n, n_skipped, totals)
        return made


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, in float64; NaN where there is a NaN, 0 without a row."""
    if not rows.numel():
        return torch.zeros((), dtype=torch.float64, device=rows.device)
    largest: torch.Tensor = rows.abs().amax().double()  # a NaN makes it NaN
    return largest


def _on_host(values: Mapping[str, torch.Tensor]) -> list[float]:
    """The values as numbers; one wait where all are on one device."""
    given = list(values.values())
    if len({value.device for value in given}) == 1:
        numbers: list[float] = torch.stack(given).tolist()
        return numbers
    return [float(value) for value in given]
