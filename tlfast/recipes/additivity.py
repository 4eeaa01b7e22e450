"""Whether a model is the graph that it was read as: what is written adds up to the stream, what is read to its norm."""

from __future__ import annotations

import torch

from ..errors import broken_rule
from .places import Place
from .residual_graph import ResidualGraph

# How far two sums may be apart that are equal but for rounding, in units of the dtype's epsilon and of the size of what
# was added: two roundings a layer, whose errors add up like a random walk. A norm or a factor on the way does more.
ROUNDINGS = 16.0


class Additivity:
    """Sums over the first pass of a study, and the error where they don't meet."""

    def __init__(self, who: str, graph: ResidualGraph):
        self.who, self.graph = who, graph
        self._streams: dict[Place, torch.Tensor] = {}
        self._sizes: dict[Place, float] = {}
        self._read: dict[Place, torch.Tensor] = {}

    def clean(self, place: Place, stream: torch.Tensor) -> None:
        """The stream of the clean run where a norm, or the end, reads it."""
        self._streams[place] = stream.to(torch.promote_types(stream.dtype, torch.float32), copy=True)
        self._sizes[place] = float(self._streams[place].norm())

    def corrupted(self, place: Place, stream: torch.Tensor) -> None:
        """The same of the corrupted run; of several calls the first."""
        if place in self._sizes and place not in self._read:
            self._sizes[place] += float(stream.norm())
            self._streams[place] -= stream
            self._read[place] = self._streams[place]

    def check_written(self, deltas: torch.Tensor, dtype: torch.dtype) -> None:
        """The differences of the writers, [writers, ...], are those of the stream; ValueError where they aren't."""
        ends = {reader.norm.place: reader.n_writers for reader in self.graph.readers if reader.norm is not None}
        ends[self.graph.readers[-1].place] = len(deltas)
        for place, n_writers in ends.items():
            apart = float((deltas[:n_writers].sum(0) - self._read[place]).norm())
            bound = ROUNDINGS * torch.finfo(dtype).eps * self._sizes[place]
            if not apart <= bound:
                got = f"{apart:.2g} apart before {place.name}, {bound:.2g} allowed"
                raise self._not_additive("what heads and MLPs write", "the residual stream", got)
        self._read, self._sizes, self._streams = {}, {}, {}

    def part(self, place: Place, grads: torch.Tensor) -> None:
        """Gradients of readers, [readers, ...], at the output of a norm."""
        self._sizes[place] = self._sizes.get(place, 0.0) + float(grads.flatten(1).norm(dim=1).sum())
        self._read[place] = grads.sum(0) + self._read.get(place, 0)

    def whole(self, place: Place, grad: torch.Tensor) -> None:
        """The gradient at the output of one call of a norm."""
        self._streams[place] = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True) + self._streams.get(
            place, 0
        )

    def check_read(self, dtype: torch.dtype) -> None:
        """The readers behind each norm are all that reads it; ValueError where they aren't."""
        for place, whole in self._streams.items():
            apart = float((whole - self._read[place]).norm())
            bound = ROUNDINGS * torch.finfo(dtype).eps * (self._sizes[place] + float(whole.norm()))
            if not apart <= bound:
                got = f"{apart:.2g} apart at {place.name}, {bound:.2g} allowed"
                raise self._not_additive("the gradients of its readers", "that of the norm", got)

    def _not_additive(self, what: str, whole: str, got: str) -> ValueError:
        remedy = "A norm, a factor or a part that isn't known lies between: use attribution_patching for its nodes."
        return ValueError(broken_rule(self.who, what, f"add up to {whole}", got, remedy))
