"""One point's rows per token: by example, each with its own length, or all tokens behind each other."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import torch

from ...errors import broken_rule
from ..format.row_table import ExampleTable
from .columns import GradientColumn, row_numbers
from .unit_files import UnitFiles

Array = np.ndarray[Any, Any]


class TokenSpans:
    """Which tokens of a dataset belong to which example, by the lengths in the row tables; read unit by unit."""

    def __init__(self, examples: ExampleTable, files: UnitFiles) -> None:
        self._examples = examples
        self._files = files
        self._offsets: dict[int, Array] = {}

    def __len__(self) -> int:
        return len(self._files.examples)

    @property
    def n_tokens(self) -> int:
        """How many tokens all examples have."""
        return len(self._files.tokens)

    def _of_unit(self, k: int) -> Array:
        """Where in the unit the tokens of each of its examples begin, and where the last ends: int64 [rows + 1]."""
        if k not in self._offsets:  # that the lengths add up to the tokens of the commit is checked where they are read
            lengths = self._examples.table(k).column("length").to_numpy()
            self._offsets[k] = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        return self._offsets[k]

    def bounds(self, rows: Array) -> tuple[Array, Array]:
        """Return where the tokens of each example start and stop among all tokens: int64, of the shape of ``rows``."""
        units, starts, stops = self._files.examples.unit_of(rows), np.empty_like(rows), np.empty_like(rows)
        for k in np.unique(units).tolist():
            here, offsets = units == k, self._of_unit(k) + self._files.tokens.starts[k]
            local = rows[here] - self._files.examples.starts[k]
            starts[here], stops[here] = offsets[local], offsets[local + 1]
        return starts, stops

    def where(self, tokens: Array) -> tuple[Array, Array]:
        """Return the example of each token, and the token's position in it: int64, of the shape of ``tokens``."""
        units, rows, positions = self._files.tokens.unit_of(tokens), np.empty_like(tokens), np.empty_like(tokens)
        for k in np.unique(units).tolist():
            here, offsets = units == k, self._of_unit(k)
            local = tokens[here] - self._files.tokens.starts[k]
            row = np.searchsorted(offsets, local, side="right") - 1
            rows[here], positions[here] = row + self._files.examples.starts[k], local - offsets[row]
        return rows, positions


class TokenColumn:
    """The rows of one point per token: ``column[example]`` is [length, *row shape], a copy.

    A slice, a list, an int tensor or a mask of examples gives a list of such tensors. ``column.flat`` has the rows of
    all tokens behind each other, to be indexed as other points are by examples; `where` says whose they are.

    Raises:
        IndexError: for an example outside the dataset.
        TypeError: for any other index.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import Column, DatasetWriter, Example, Plan, open_dataset
        >>> out, plan = tempfile.mkdtemp(), Plan(2, 2)
        >>> columns = {"h": Column(torch.float32, (), per="token")}
        >>> writer = DatasetWriter(out, header={}, columns=columns, plan=plan)
        >>> examples = [Example(0, [7, 8], "a", 0, 2), Example(1, [9], "a", 2, 1)]
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([1.0, 2.0, 3.0])}, examples)
        True
        >>> column = open_dataset(out)["h"]
        >>> column[0], column.flat[2], column.where(2)
        (tensor([1., 2.]), tensor(3.), (tensor(1), tensor(0)))
    """

    def __init__(self, flat: GradientColumn, spans: TokenSpans) -> None:
        self.flat = flat
        self._spans = spans

    @property
    def name(self) -> str:
        """The name of the point."""
        return self.flat.name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows."""
        return self.flat.dtype

    @property
    def shape(self) -> NoReturn:
        """AttributeError: examples differ in length."""
        rule, remedy = "be asked of a column per example", "See column.flat.shape and column.lengths()."
        raise AttributeError(broken_rule("TokenColumn", "shape", rule, f"{self.name!r}, per token", remedy))

    def __len__(self) -> int:
        return len(self._spans)

    def __repr__(self) -> str:
        rows = f"{len(self)} examples, {list(self.flat.shape)}"
        return f"TokenColumn({self.name!r}, {str(self.dtype).removeprefix('torch.')}, {rows})"

    def __getitem__(self, index: Any) -> Any:
        """Return the rows of an example, or a list of those of several."""
        chosen = np.arange(len(self))[index] if isinstance(index, slice) else index
        rows = row_numbers(chosen, len(self))
        values, lengths = self.joined(rows.reshape(-1))
        return values if rows.ndim == 0 else list(values.split(lengths.tolist()))

    def joined(self, rows: Array) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of some examples (int64 [n]) behind each other, and how many each has: int64 [n]."""
        starts, stops = self._spans.bounds(rows)
        lengths = torch.from_numpy(stops - starts)
        if len(rows) and (starts[1:] == stops[:-1]).all():  # one stretch
            return self.flat[int(starts[0]) : int(stops[-1])], lengths
        spans = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True)]
        return self.flat[np.concatenate([np.empty(0, np.int64), *spans])], lengths

    def lengths(self) -> torch.Tensor:
        """Return how many tokens each example has: int64 [examples]."""
        starts, stops = self._spans.bounds(np.arange(len(self)))
        return torch.from_numpy(stops - starts)

    def where(self, index: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the example and the position of each of the rows ``flat[index]``: int64, of the index's shape.

        ``example`` is its row in the dataset (``ds.examples[example]``), ``position`` counts its real tokens from 0.
        """
        n = len(self.flat)
        tokens = np.arange(n)[index] if isinstance(index, slice) else row_numbers(index, n)
        rows, positions = self._spans.where(np.atleast_1d(tokens))
        return torch.from_numpy(rows.reshape(tokens.shape)), torch.from_numpy(positions.reshape(tokens.shape))
