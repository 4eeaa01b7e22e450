"""Data attribution: which examples of a dataset a query's gradient belongs to."""

from __future__ import annotations

from .bergson_files import (
    read_bergson_factors,
    read_bergson_hessians,
    read_bergson_normalizers,
    write_bergson_factors,
    write_bergson_hessians,
    write_bergson_normalizers,
)
from .diagnostics import NoiseScale, el2n, gradient_norms, hardest, mean_gradient_norm
from .example_scores import score_examples
from .factor_files import read_kronfluence, write_kronfluence
from .faiss_index import faiss_index, query_vectors
from .methods import METHODS
from .result import Scores
from .scores import score

__all__ = [
    "METHODS", "NoiseScale", "Scores", "el2n", "faiss_index", "gradient_norms", "hardest", "mean_gradient_norm",
    "query_vectors", "read_bergson_factors", "read_bergson_hessians", "read_bergson_normalizers", "read_kronfluence",
    "score", "score_examples", "write_bergson_factors", "write_bergson_hessians", "write_bergson_normalizers",
    "write_kronfluence",
]  # fmt: skip
