"""What is done with weight gradients that are formed for it, in plain Python, as csrc/autograd/whole.cpp does it."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch

from ..errors import broken_rule


class Whole:
    """Gradients G [n, O, I] are normalized at each place, D * G, and projected at once, R vec(D * G).

    Args:
        factor: D [O, I].
        matrix: R [p, O * I].
        sketch: native code that does what ``project`` does; not used here.
        project: takes [n, O * I] to [n, p], in place of a matrix.
    """

    def __init__(
        self,
        factor: torch.Tensor | None,
        matrix: torch.Tensor | None,
        sketch: Any,
        project: Callable[[torch.Tensor], torch.Tensor] | None,
    ):
        self.factor, self.matrix, self.sketch, self.project = factor, matrix, sketch, project
        if factor is None and matrix is None and project is None:
            rule, remedy = "be there beside a sketch, and not beside a matrix", 'Make it by Spec(of="weight").'
            raise ValueError(broken_rule("capture", "project", rule, "none", remedy))

    @property
    def projects(self) -> bool:
        """Whether a row is R vec(D * G)."""
        return self.matrix is not None or self.project is not None

    def normalized(self, gradients: torch.Tensor) -> torch.Tensor:
        """Gradients [n, O, I] times D."""
        if self.factor is None:
            return gradients
        if gradients.shape[1:] != self.factor.shape:
            rule = f"have the shape of a gradient, {list(gradients.shape[1:])}"
            remedy = 'Make it by Spec(of="weight").'
            raise ValueError(broken_rule("capture", "factor", rule, list(self.factor.shape), remedy))
        return gradients * self.factor.to(gradients)

    def projected(self, flat: torch.Tensor) -> torch.Tensor:
        """[n, O * I] to [n, p]."""
        if self.matrix is not None:
            made: torch.Tensor = flat @ self.matrix.to(flat).T
            return made
        assert self.project is not None
        return self.project(flat)

    def sizes(self, gradients: torch.Tensor) -> torch.Tensor:
        """Of magnitudes [n, O, I] those of what is added up for each number of a row: [n, p] where it projects."""
        made = gradients if self.factor is None else gradients * self.factor.abs().to(gradients)
        if not self.projects:
            return made
        n = self.projected(made[:1].flatten(1)).shape[1]
        whole: torch.Tensor = torch.linalg.vector_norm(made.flatten(1), 2, 1, keepdim=True)
        return whole.expand(-1, n) / sqrt(n)
