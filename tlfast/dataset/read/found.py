"""What a search found: rows, scores, and the examples they belong to, as tensors, dicts and a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from ...markup import shortened, table
from ..format.row_table import ExampleRow
from .decoding import given_tokenizer, text_of

FOUND = "tlfast"  # among the metadata of a Parquet file: what its rows were found by, as JSON
_SHOWN_QUERIES, _SHOWN_ROWS = 4, 8
_TEXT_WIDTH = 60


class SearchResult(Sequence[list[dict[str, Any]]]):
    """The best rows for each query: made by ``ds.search``. ``found[q]`` is a list of dicts; it prints as a table.

    Attributes:
        indices: int64 [Q, k]: the rows of what was searched, best first; -1 where there are no more.
        scores: [Q, k], float32 or float64; NaN where there are no more.
        positions: of a point per token int64 [Q, k]: which token of the example; else None.
        metric: "dot", "cosine", or "faiss" of what an index has found.
        points: whose rows were scored.
    """

    def __init__(
        self,
        ds: Any,
        indices: torch.Tensor,
        scores: torch.Tensor,
        positions: torch.Tensor | None,
        metric: str,
        points: list[str],
    ) -> None:
        self.indices, self.scores, self.positions = indices, scores, positions
        self.metric, self.points = metric, points
        self._ds = ds

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def ids(self) -> torch.Tensor:
        """The ids of the examples: int64 [Q, k]; -1 where there are no more."""
        there = self.indices >= 0
        found = torch.full_like(self.indices, -1)
        found[there] = self._ds.ids_of(self.indices[there])
        return found

    def __getitem__(self, query: Any) -> Any:
        """Return what was found for a query: dicts as of ``ds.examples[row]``, with row, score and position."""
        if isinstance(query, slice):
            return [self[q] for q in range(*query.indices(len(self)))]
        rows, scores = self.indices[query], self.scores[query].tolist()
        numbers = rows[rows >= 0].numpy()
        found = []
        for at, row in enumerate(numbers.tolist()):
            more = {} if self.positions is None else {"position": int(self.positions[query, at])}
            found.append(ExampleRow({"row": row, "score": scores[at], **more, **self._ds.examples[row]}))
        return found

    def best(self, k: int) -> SearchResult:
        """Return the ``k`` best rows of each query, of those that are here."""
        positions = None if self.positions is None else self.positions[:, :k]
        return SearchResult(self._ds, self.indices[:, :k], self.scores[:, :k], positions, self.metric, self.points)

    def query_texts(self) -> list[str] | None:
        """Return the text of each query; None where nobody knows it."""
        return None

    def texts(self, tokenizer: Any = None) -> list[list[str]]:
        """Return the text of each row that was found, by a tokenizer as of ``ds.sample``."""
        used = self._tokenizer if tokenizer is None else given_tokenizer(tokenizer)
        return [[text_of(used, hit["input_ids"]) for hit in hits] for hits in self]

    @cached_property
    def _tokenizer(self) -> Any:
        return self._ds.tokenizer()

    def _cells(self) -> list[list[str]]:
        token = [] if self.positions is None else ["token"]
        cells = [["query", "score", "row", *token, "id", "source", "text"]]
        for query, hits in enumerate(self[:_SHOWN_QUERIES]):
            for hit in hits[:_SHOWN_ROWS]:
                text = shortened(text_of(self._tokenizer, hit["input_ids"]), _TEXT_WIDTH)
                at = [] if self.positions is None else [str(hit["position"])]
                numbers = [str(query), f"{hit['score']:.5g}", str(hit["row"]), *at, str(hit["id"])]
                cells.append([*numbers, shortened(hit["source"], 24), text])
        return cells

    def _note(self) -> str:
        n, k = self.indices.shape
        shown = f"{min(n, _SHOWN_QUERIES)} of {n} queries, {min(k, _SHOWN_ROWS)} of {k} rows each"
        return f"{self.metric} with {', '.join(self.points[:3])}{', ...' * (len(self.points) > 3)}; {shown}"

    def __repr__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([*(line.rstrip() for line in lines), self._note()])

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        return table(head, rows, self._note())
