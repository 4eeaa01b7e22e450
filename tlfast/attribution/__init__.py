"""Data attribution: which examples of a dataset a query's gradient belongs to."""

from __future__ import annotations

from .factor_files import write_bergson_normalizers, write_kronfluence
from .faiss_index import faiss_index, query_vectors
from .methods import METHODS
from .result import Scores
from .scores import score

__all__ = [
    "METHODS", "Scores", "faiss_index", "query_vectors", "score", "write_bergson_normalizers", "write_kronfluence",
]  # fmt: skip
