"""What a scoring found: the best rows of each query, or the scores of all rows, with the examples they belong to."""

from __future__ import annotations

import io
import json
import os
from typing import Any

import torch

from ..dataset.errors import extra
from ..dataset.places.durable import write_small
from ..dataset.read.decoding import text_of
from ..dataset.read.found import FOUND, SearchResult
from ..dataset.read.search import Best, Block
from ..dataset.read.views import Readable
from .every_score import check_out, exists

_SHOWN_ROWS = 8
_PART = 1 << 16  # rows whose scores are compared at once


class Scores(SearchResult):
    """Made by `tlfast.score`: ``found[q]`` is a list of dicts, best first; it prints as a table.

    Attributes:
        dataset: what was scored; with ``where=`` the view of those rows.
        indices: int64 [Q, k]: the rows, best first, -1 where there are no more; with ``k=None`` all rows in order.
        scores: [Q, k]; NaN where there are no more, and of rows that aren't finite.
        metric: the method.
        points: the columns whose scores were added up.
        n_skipped: rows that were left out, as they aren't finite.
        positions: with ``per="token"`` int64 [Q, k]: which token of the example; else None.
        queries: the dataset or view that the queries are of, or the ids of query examples; None of tensors.
        is_all: whether these are the scores of all rows in order.
    """

    def __init__(
        self,
        ds: Any,
        indices: torch.Tensor,
        scores: torch.Tensor,
        method: str,
        points: list[str],
        *,
        positions: torch.Tensor | None = None,
        n_skipped: int = 0,
        queries: Any = None,
        asked: Any = None,
        is_all: bool = False,
    ) -> None:
        super().__init__(ds, indices, scores, positions, method, points)
        self.dataset = ds
        self.n_skipped, self.queries, self.is_all = n_skipped, queries, is_all
        self._asked = asked  # what has the examples of the queries, where that isn't `queries`

    def query_texts(self) -> list[str] | None:
        """Return the text of each query, by its dataset's tokenizer, without one as numbers; None of other queries."""
        asked = self._asked if isinstance(self.queries, (list, type(None))) else self.queries
        if asked is None:
            return None
        tokenizer = asked.tokenizer()
        return [text_of(tokenizer, asked.examples[row]["input_ids"]) for row in range(len(asked))]

    def best(self, k: int) -> Scores:
        """Return the ``k`` best rows of each query, of those that are here."""
        n_queries, n = self.scores.shape
        positions = None if self.positions is None else self.positions[:, :k]
        if not self.is_all:
            indices, scores = self.indices[:, :k], self.scores[:, :k]
        else:
            kept = Best(n_queries, min(k, n), self.scores)
            for start in range(0, n, _PART):
                rows = torch.arange(start, min(n, start + _PART))
                part = self.scores[:, start : start + _PART]
                kept.add(slice(0, n_queries), part, Block({}, rows, None, len(rows)))
            indices, scores = kept.rows, kept.scores
        more: dict[str, Any] = {"n_skipped": self.n_skipped, "queries": self.queries, "asked": self._asked}
        return Scores(self._ds, indices, scores, self.metric, self.points, positions=positions, **more)

    def to_dict(self, *, texts: bool = False) -> dict[str, list[Any]]:
        """Return the rows that were found as columns: query, rank, score, row, id, source, start and length.

        With ``per="token"`` there is also the token's position in its example.

        Args:
            texts: the text of each, too, by the dataset's tokenizer; without one the tokens as numbers.
        """
        there = self.indices >= 0
        query, rank = there.nonzero(as_tuple=True)
        rows = self.indices[there].numpy()
        names = ["id", "source", "start", "length", *(["input_ids"] if texts else [])]
        table = self._ds.examples.arrow(rows, names)
        found: dict[str, list[Any]] = {
            "query": query.tolist(), "rank": rank.tolist(), "score": self.scores[there].tolist(), "row": rows.tolist(),
        }  # fmt: skip
        if self.positions is not None:
            found["position"] = self.positions[there].tolist()
        found |= {name: table.column(name).to_pylist() for name in names[:4]}
        if texts:
            found["text"] = [text_of(self._tokenizer, tokens) for tokens in table.column("input_ids").to_pylist()]
        return found

    def to_pandas(self, *, texts: bool = False) -> Any:
        """Return `to_dict` as a data frame; needs the extra ``hub``."""
        return extra("pandas", "Scores.to_pandas", "hub").DataFrame(self.to_dict(texts=texts))

    def to_parquet(self, out: str | os.PathLike[str], *, texts: bool = True) -> None:
        """Write `to_dict` as a Parquet file, whole or not at all; ValueError where there is one of this name.

        The file's metadata say the method, the points, what these hold (``ds.holds``) and the texts of the queries, for
        ``tlfast report --found``.
        """
        path = check_out(out, (".parquet",))
        pa, parquet = extra("pyarrow", "Scores.to_parquet"), extra("pyarrow.parquet", "Scores.to_parquet")
        kinds = {"score": pa.from_numpy_dtype(self.scores.numpy().dtype), "source": pa.string(), "text": pa.string()}
        said = self.to_dict(texts=texts)
        columns = {name: pa.array(values, kinds.get(name, pa.int64())) for name, values in said.items()}
        made = io.BytesIO()
        about: dict[str, Any] = {"method": self.metric, "points": self.points, "n_skipped": self.n_skipped}
        if isinstance(self._ds, Readable):
            about["holds"] = {point: self._ds.holds(point) for point in self.points}
        table = pa.table(columns).replace_schema_metadata(
            {FOUND: json.dumps({**about, "n_queries": len(self), "queries": self.query_texts() if texts else None})}
        )
        parquet.write_table(table, made)
        if not write_small(path, made.getvalue(), replace=False):
            raise exists(path)

    def _cells(self) -> list[list[str]]:
        return self.best(_SHOWN_ROWS)._cells() if self.is_all else super()._cells()

    def _note(self) -> str:
        skipped = f"; {self.n_skipped} rows left out, which aren't finite" if self.n_skipped else ""
        return super()._note() + skipped
