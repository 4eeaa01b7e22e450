"""`tlfast.capture` on the names of TransformerLens: filters, conversions, points that are called several times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from ..hooks.captured import Capture, Change
from ..hooks.options import CaptureOptions
from ..spec import Attach, Backend, Calls, Missing, Over, Reduction, Spec, SpecArguments, as_specs
from .handles import (
    ListedTap,
    ListedWithGradients,
    SameNorm,
    TapHandle,
    convert_at,
    norm_of,
)
from .names import (
    NamesFilter,
    by_identity,
    conversion_of,
    exact_names,
    find_names,
    hook_points,
    is_short_name,
    named_filter,
    spelled_out,
)


class LensCapture(Capture):
    """A `Capture` whose columns are also found by short names and aliases: ``cap["resid_post", 3]``."""

    def _find(self, points: Any) -> dict[str, Any]:
        points = named_filter("capture", self._model, points)
        found = find_names("capture", self._model, points)
        # A filter means a point once, however many names it has; a name that was asked for is a column.
        exact = exact_names(self._model, points, found)
        taken = {id(found[name]) for name in exact & found.keys()}
        swept = by_identity({name: point for name, point in found.items() if id(point) not in taken})
        return {name: point for name, point in found.items() if name in exact or name in swept}

    def _hook(self, module: nn.Module, tap: Any) -> list[Any]:
        convert_at(module, tap)
        # Permanent: the capture ends with its block, and not where the code in it resets the hooks of TransformerLens.
        hooks = TapHandle(module, tap, self._attach, self._engine)
        listed = ListedTap(hooks, ("bwd_hooks",), permanent=True).list(module)
        norm = norm_of(self._model, module)
        if norm is None:
            return [listed]
        before = norm.register_forward_pre_hook(ListedWithGradients(listed))
        return [listed, before, norm.register_forward_hook(SameNorm(listed))]

    def _conversion(self, module: nn.Module) -> Change | None:
        convert: Change | None = conversion_of(module)
        return convert

    def __getitem__(self, name: str | tuple[Any, ...]) -> torch.Tensor:
        """The committed rows of one point, by its name, a short name, ("resid_post", 3), or an alias.

        Raises:
            KeyError: for a name that means no column.
            RuntimeError: if nothing was ever written there.
        """
        if not isinstance(name, str) or name not in self.names:
            full = spelled_out(self._model, name)
            point = hook_points("capture", self._model).get(full)
            aliases = [column for column, tap in zip(self.names, self._taps, strict=False) if tap[0] is point]
            name = full if full in self.names or not aliases else aliases[0]
        return super().__getitem__(name)


def capture(
    model: nn.Module,
    names_filter: NamesFilter | Spec | Sequence[Spec],
    *,
    rows: int,
    reduce: Reduction = "none",
    over: Over = "pos",
    dtype: torch.dtype | str | None = None,
    attach: Attach = "auto",
    backend: Backend = "auto",
    calls: Calls = "sum",
    missing: Missing = "raise",
) -> LensCapture:
    """Capture gradients at the hook points of a TransformerLens model: `tlfast.capture` on its names.

    Args:
        model: a TransformerBridge, a HookedTransformer or any HookedRootModule.
        names_filter: None (all points that are switched on), a name, a short name (``("resid_post", 3)``), a glob, a
            predicate on names, a hook point, several of these, or `tlfast.Spec`s whose points are such filters. A point
            that is switched off is an error by its name, and skipped with a warning by a glob or predicate.
        rows, reduce, over, dtype, attach, backend, missing: as in `tlfast.capture`.
        calls: for a point called several times in a forward, "sum" (the gradient of what all calls were given), "last"
            (what TransformerLens caches), "stack" or "raise".

    Returns:
        A context manager; ``cap[name]`` and ``cap["resid_post", 3]`` are Tensor[rows, ...] of what TransformerLens
        hands to a hook there: conversions are applied. ``reset_hooks()`` leaves the capture alone.

    Raises:
        ValueError, TypeError: for bad arguments, before any hook is registered.

    Example:
        with capture(model, "blocks.*.hook_resid_post", reduce="mean", rows=64) as cap:
            model(tokens, return_type="loss").backward()
        cap["resid_post", -1].shape  # [rows, d_model]
    """
    if names_filter is None or callable(names_filter) or is_short_name(names_filter):
        specs = [Spec(names_filter, reduce, over, dtype)]  # type: ignore[arg-type]
    else:
        specs = as_specs("capture", names_filter, SpecArguments(reduce, over, dtype))  # type: ignore[arg-type]
    if any(spec.side != "output" for spec in specs):
        remedy = "A hook point puts out what it is given: leave side= out."
        raise ValueError(broken_rule("capture", "side", "be output at hook points", "'input'", remedy))
    options = CaptureOptions(specs=specs, rows=rows, attach=attach, backend=backend, calls=calls, missing=missing)
    return LensCapture(model, options)
