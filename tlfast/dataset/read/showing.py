"""How a dataset looks in a notebook: a sample of its examples, text beside norms, as lines or as an HTML table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ...markup import shortened, table
from ..format.layout import Column
from ..format.row_table import ExampleRow
from .decoding import text_of

_TEXT_WIDTH = 60  # characters of a text that are shown
_SHOWN_POINTS = 6  # columns of norms that fit beside it


class Sample(Sequence[dict[str, Any]]):
    """Some examples: each a dict as of ``ds.examples[i]`` and its ``text``. It prints as a table.

    ``text`` is the tokens themselves, as numbers, where no tokenizer was there to decode them.
    """

    def __init__(self, examples: list[dict[str, Any]], points: list[str]) -> None:
        self._examples = examples
        self._points = points[:_SHOWN_POINTS]
        self._hidden = len(points) - len(self._points)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self._examples[index]

    def _cells(self) -> list[list[str]]:
        head = ["id", "source", "tokens", *(f"|{point}|" for point in self._points), "text"]
        return [head] + [
            [str(e["id"]), shortened(e["source"], 24), str(e["length"]),
             *(f"{e['norms'][p]:.4g}" for p in self._points), shortened(e["text"], _TEXT_WIDTH)]
            for e in self._examples
        ]  # fmt: skip

    def _note(self) -> str:
        return f"{self._hidden} more points: see sample[0]['norms']" if self._hidden else ""

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join(line.rstrip() for line in [*lines, self._note()] if line)

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        return table(head, rows, self._note())


def take_sample(examples: Sequence[dict[str, Any]], points: list[str], n: int, seed: int, tokenizer: Any) -> Sample:
    """Pick ``n`` examples at random and decode them; see GradientDataset.sample."""
    rows = np.random.default_rng(seed).choice(len(examples), min(max(0, n), len(examples)), replace=False)
    chosen = [examples[row] for row in sorted(rows.tolist())]
    texts = [text_of(tokenizer, example["input_ids"]) for example in chosen]
    return Sample([ExampleRow(e | {"text": text}) for e, text in zip(chosen, texts, strict=True)], points)


def described(title: str, columns: Mapping[str, tuple[Column, str]]) -> str:
    """Return the HTML of what is in a dataset: a line, and the points as a table, with what they hold."""
    rows = [
        [name, str(c.dtype).removeprefix("torch.") + c.notes, str(list(c.row_shape)), holds]
        for name, (c, holds) in columns.items()
    ]
    return f"<p>{escape(title)}</p>" + table(["point", "dtype", "shape of a row", "holds"], rows)
