"""The ways to capture that are compared: no hook, empty hooks, what a user writes by hand, tlfast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

import tlfast


@dataclass(frozen=True)
class Keep:
    """What every variant keeps of every point: its gradient reduced over positions."""

    points: tuple[str, ...]
    reduce: str  # sum or mean
    dtype: torch.dtype
    row_shape: tuple[int, int]  # [B, D], the same at all points
    n_steps: int  # steps that a ring must hold
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it can't be changed)


# Hooks a model for as long as the context lasts; yields what reads the rows of the last step, None if there are none.
Rows = Callable[[], list[torch.Tensor] | None]
Attach = Callable[[nn.Module, Keep], AbstractContextManager[Rows]]


def first_tensor(output: object) -> torch.Tensor:
    """The output itself, or the first of a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def bare(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    """The floor: no hook at all."""
    yield lambda: None


@contextmanager
def empty_full_hook(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    """What `register_full_backward_hook` costs before anything is done in it."""

    def hook(module: nn.Module, grad_input: object, grad_output: object) -> None:
        pass

    handles = [model.get_submodule(name).register_full_backward_hook(hook) for name in keep.points]
    yield lambda: None
    for handle in handles:
        handle.remove()


@contextmanager
def returning_full_hook(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    """A full backward hook that returns the gradients that it was given, as one that changes them would."""

    def hook(module: nn.Module, grad_input: tuple[torch.Tensor, ...], grad_output: object) -> object:
        return (*grad_input,)

    handles = [model.get_submodule(name).register_full_backward_hook(hook) for name in keep.points]
    yield lambda: None
    for handle in handles:
        handle.remove()


@contextmanager
def python_full_hook(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    """What a user writes today: a full backward hook that reduces and copies into a preallocated row."""
    buf = torch.full((len(keep.points), *keep.row_shape), torch.nan, dtype=keep.dtype, device=keep.device)
    handles = []
    for i, name in enumerate(keep.points):
        if keep.reduce == "sum":

            def hook(module: nn.Module, grad_input: object, grad_output: tuple[torch.Tensor], i: int = i) -> None:
                buf[i].copy_(grad_output[0].sum(1))
        else:

            def hook(module: nn.Module, grad_input: object, grad_output: tuple[torch.Tensor], i: int = i) -> None:
                buf[i].copy_(grad_output[0].mean(1))

        handles.append(model.get_submodule(name).register_full_backward_hook(hook))
    yield lambda: list(buf)
    for handle in handles:
        handle.remove()


@contextmanager
def python_tensor_hook(model: nn.Module, keep: Keep) -> Iterator[Rows]:
    """The best simple rival: a forward hook that puts a tensor hook on the output."""
    buf = torch.full((len(keep.points), *keep.row_shape), torch.nan, dtype=keep.dtype, device=keep.device)
    handles = []
    for i, name in enumerate(keep.points):
        if keep.reduce == "sum":

            def hook(grad: torch.Tensor, i: int = i) -> None:
                buf[i].copy_(grad.sum(1))
        else:

            def hook(grad: torch.Tensor, i: int = i) -> None:
                buf[i].copy_(grad.mean(1))

        def attach(
            module: nn.Module, args: object, output: object, hook: Callable[[torch.Tensor], None] = hook
        ) -> None:
            first_tensor(output).register_hook(hook)

        handles.append(model.get_submodule(name).register_forward_hook(attach))
    yield lambda: list(buf)
    for handle in handles:
        handle.remove()


def called_natively(attach: Attach) -> Attach:
    """The same hooks under `tlfast.accelerate_hooks`."""

    @contextmanager
    def attached(model: nn.Module, keep: Keep) -> Iterator[Rows]:
        with tlfast.accelerate_hooks(), attach(model, keep) as rows:
            yield rows

    return attached


def tlfast_capture(attach: str, backend: str) -> Attach:
    """The capture as a user writes it."""

    @contextmanager
    def attached(model: nn.Module, keep: Keep) -> Iterator[Rows]:
        n_rows = keep.row_shape[0]
        capture = tlfast.capture(
            model, list(keep.points), reduce=keep.reduce, dtype=keep.dtype, rows=keep.n_steps * n_rows,
            attach=attach, backend=backend,
        )  # fmt: skip
        with capture as cap:
            yield lambda: [cap[name][-n_rows:] for name in keep.points]

    return attached


BARE = "bare model (floor)"
EMPTY = "empty full hook"
RETURNING = "returning full hook"
FULL_HOOK = "Python full hook"
NATIVELY = ", called natively"
TENSOR_HOOK = "Python tensor hook"
AUTO = "tlfast auto"
AUTO_FULL = "tlfast full"
AUTO_PYTHON = "tlfast auto, python backend"
FULL_PYTHON = "tlfast full, python backend"

VARIANTS: dict[str, Attach] = {
    BARE: bare,
    EMPTY: empty_full_hook,
    FULL_HOOK: python_full_hook,
    TENSOR_HOOK: python_tensor_hook,
    AUTO: tlfast_capture("auto", "auto"),
    AUTO_FULL: tlfast_capture("full", "auto"),
    AUTO_PYTHON: tlfast_capture("auto", "python"),
    FULL_PYTHON: tlfast_capture("full", "python"),
}

# PyTorch's full backward hooks, as it calls them and natively.
FULL_HOOKS: dict[str, Attach] = {
    **VARIANTS,
    EMPTY + NATIVELY: called_natively(empty_full_hook),
    RETURNING: returning_full_hook,
    RETURNING + NATIVELY: called_natively(returning_full_hook),
    FULL_HOOK + NATIVELY: called_natively(python_full_hook),
}
