"""tlfast: capture gradients inside the backward pass, reduce and store them, at the speed of the backward pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import markup as _markup
from .hooks import into as _into

if TYPE_CHECKING:
    from .attribution.scores import score
    from .backends.choice import backend, reduce_into, reduce_product_into
    from .collecting.factors import factors
    from .collecting.run import collect
    from .collecting.running import running
    from .collecting.stream import stream
    from .dataset import open_dataset
    from .hooks.capture import attach, capture
    from .hooks.captured import Capture
    from .hooks.factors import Factors
    from .hooks.freeze import freeze
    from .hooks.full_hooks import (
        accelerate_hooks,
        install_hooks,
        register_full_backward_hook,
        register_full_backward_pre_hook,
        uninstall_hooks,
    )
    from .hooks.graph_step import graph_step
    from .hooks.normalizers import read_optimizer
    from .hooks.running import RunningSums
    from .projections.projection import Projection
    from .spec import Spec

# What is imported when it is first asked for: `tlfast --help` needs no torch, a capture no dataset.
_HOMES = {
    "Capture": "hooks.captured",
    "Factors": "hooks.factors",
    "Projection": "projections.projection",
    "RunningSums": "hooks.running",
    "Spec": "spec",
    "accelerate_hooks": "hooks.full_hooks",
    "attach": "hooks.capture",
    "backend": "backends.choice",
    "capture": "hooks.capture",
    "collect": "collecting.run",
    "factors": "collecting.factors",
    "freeze": "hooks.freeze",
    "graph_step": "hooks.graph_step",
    "install_hooks": "hooks.full_hooks",
    "open_dataset": "dataset",
    "read_optimizer": "hooks.normalizers",
    "reduce_into": "backends.choice",
    "reduce_product_into": "backends.choice",
    "register_full_backward_hook": "hooks.full_hooks",
    "register_full_backward_pre_hook": "hooks.full_hooks",
    "running": "collecting.running",
    "score": "attribution.scores",
    "stream": "collecting.stream",
    "uninstall_hooks": "hooks.full_hooks",
}
_ROOMS = (
    "attribution", "backends", "batches", "collecting", "dataset", "hooks", "loss", "projections", "recipes", "report",
    "stopping", "transformer_lens",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return found
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _into_dataset(*given: Any, **named: Any) -> _into.Into:
    opened: _into.Into = import_module(f"{__name__}.collecting.into").IntoDataset(*given, **named)
    return opened


def _report_page(dataset: Any, **named: Any) -> Any:
    return import_module(f"{__name__}.report").report_page(dataset, **named)


def _into_sums(*given: Any) -> _into.Into:
    opened: _into.Into = import_module(f"{__name__}.hooks.summing").IntoSums(*given)
    return opened


_into.openers["dataset"] = _into_dataset
_into.openers["sums"] = _into_sums
_markup.makers["report"] = _report_page


__version__ = "0.1.0"
__all__ = [
    "Capture",
    "Factors",
    "Projection",
    "RunningSums",
    "Spec",
    "accelerate_hooks",
    "attach",
    "backend",
    "capture",
    "collect",
    "factors",
    "freeze",
    "graph_step",
    "install_hooks",
    "open_dataset",
    "read_optimizer",
    "reduce_into",
    "reduce_product_into",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "running",
    "score",
    "stream",
    "uninstall_hooks",
]
