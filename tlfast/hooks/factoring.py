"""A capture that keeps no row of weight gradients: each call adds to the sums that factors are made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backends.interface import Column
from ..errors import broken_rule
from ..spec import Spec
from .captured import Capture
from .factors import Factors
from .layers import Layer, find_layer
from .options import CaptureOptions

# What a spec's name says is added up.
PRODUCTS, SQUARES, EIGENVALUES = "products", "squares", "eigenvalues"


class FactorCapture(Capture):
    """Columns whose rows are the numbers of real tokens of each example, beside ``sums[point, name of the spec]``.

    What a backward that fails has added stays in the sums: they are of no use then.
    """

    def __init__(self, model: nn.Module, options: CaptureOptions, basis: Factors | None = None):
        self.sums: dict[tuple[str, str], Any] = {}
        self._basis = basis
        super().__init__(model, options)

    @property
    def n_empty(self) -> dict[str, int]:
        """By expert, how many of the positions that were counted held no token: those behind each example's own."""
        return {
            tap.name: calls.n_empty[number]
            for module, tap in self._taps
            for calls in self._routed
            for (number, _), layer in calls.layers.items()
            if layer is module
        }

    def _of_weight(self, column: str, name: str, module: nn.Module, spec: Spec, calls: str) -> Column:
        layer, has_bias = check_factored("capture", name, module, spec.bias)
        kind, left, right = spec.label, None, None
        if kind == EIGENVALUES:
            assert self._basis is not None
            left, right = self._basis[name].output_basis.T, self._basis[name].input_basis.T
        sums = self.sums[name, kind] = self._engine.FactorSums("products" if kind == PRODUCTS else "squares")
        weight = self._engine.Weight(
            layer.kind, sums, has_bias, left, right, 1.0, 0, -1, (1, 0.0), layer.window, (None, None, None), ()
        )  # fmt: skip
        return self._engine.Column(column, "none", (), None, self.capacity, calls, "weight", None, None, weight)


def check_factored(who: str, name: str, module: nn.Module, bias: bool) -> tuple[Layer, bool]:
    """A layer that has factors, and whether its bias counts as one more input; ValueError for another."""
    layer = find_layer(who, name, module)
    if not has_factors(layer):
        rule = "be linear layers, or convolutions without groups, for factors"
        remedy = "Name these alone: other weights have no such factors."
        raise ValueError(broken_rule(who, "points", rule, f"{name} ({type(module).__name__})", remedy))
    return layer, bias and layer.has_bias


def has_factors(layer: Layer | None) -> bool:
    """Whether the curvature of a layer is made of one factor for its inputs and one for its outputs."""
    return layer is not None and (layer.kind == "linear" or (layer.window is not None and layer.window[5] == 1))
