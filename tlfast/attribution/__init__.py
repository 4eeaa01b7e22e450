"""Data attribution: which examples of a dataset a query's gradient belongs to."""

from __future__ import annotations

from .faiss_index import faiss_index, query_vectors
from .methods import METHODS
from .result import Scores
from .scores import score

__all__ = ["METHODS", "Scores", "faiss_index", "query_vectors", "score"]
