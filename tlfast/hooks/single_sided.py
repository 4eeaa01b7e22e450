"""What makes a row of a whole weight gradient: its normalizer, and the one matrix that projects all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..backends.whole import Whole
from ..projections.applying import MOST_KEPT, Projector, native_sketch, projector
from ..projections.kept import once
from ..projections.projection import Projection
from ..spec import Backend


@dataclass(eq=False)
class Projecting:
    """Projects gradients [n, columns] of any dtype, on any device: what that needs is made when such a one comes."""

    projection: Projection
    module: str
    columns: int
    backend: str
    made: dict[tuple[torch.dtype, torch.device], Projector] = field(default_factory=dict)

    def __call__(self, flat: torch.Tensor) -> torch.Tensor:
        """[n, columns] -> [n, dim], scaled."""
        key = flat.dtype, flat.device
        if key not in self.made:
            backend: Backend = "python" if self.backend == "python" else "auto"
            self.made[key] = projector(self.projection, self.module, "single", self.columns, *key, backend)
        return self.made[key](flat)


def single_sided(
    projection: Projection, module: str, columns: int, factor: torch.Tensor | None, backend: str
) -> tuple[Whole, float]:
    """What projects whole gradients of a module, and the factor on its rows.

    A dense matrix is kept where it is small; of others column blocks are made again for each batch.
    """
    if not projection.is_sketch and projection.dim * columns <= MOST_KEPT:
        matrix = once(Projection.matrix, projection, module, "single", columns)
        return Whole(factor, matrix, None, None), projection.scale
    sketch = once(native_sketch, projection, module, "single", columns, backend)
    return Whole(factor, None, sketch, Projecting(projection, module, columns, backend)), 1.0
