"""The two ways in: capture the gradients of a model's points, or attach a sink to one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..backends.choice import pick_backend
from ..backends.plain import destination
from ..errors import broken_rule
from ..spec import (
    REDUCTIONS,
    At,
    Attach,
    Backend,
    Calls,
    Encoding,
    Heads,
    Missing,
    Normalizing,
    Of,
    Over,
    Per,
    Points,
    Project,
    Reduction,
    Ref,
    Side,
    Spec,
    SpecArguments,
    as_specs,
    one_of,
    parse_over,
)
from .attachment import check_not_compiled, hook_module
from .captured import Capture
from .options import CaptureOptions

Sink = Callable[[torch.Tensor], None] | torch.Tensor


def capture(
    model: nn.Module,
    points: Points | Spec | Sequence[Spec],
    *,
    rows: int,
    reduce: Reduction = "none",
    over: Over = "pos",
    dtype: torch.dtype | str | None = None,
    output: int | str | None = None,
    of: Of | Sequence[Of] = "grad",
    side: Side = "output",
    ref: Ref | None = None,
    heads: Heads | None = None,
    at: At | None = None,
    per: Per = "example",
    encoding: Encoding | None = None,
    project: Project | None = None,
    bias: bool = False,
    normalizer: Normalizing | None = None,
    summed: bool = False,
    attach: Attach = "auto",
    backend: Backend = "auto",
    calls: Calls = "raise",
    missing: Missing = "raise",
) -> Capture:
    """Capture the gradient with respect to the output of some modules, while backward runs.

    Args:
        model: any module, not yet compiled.
        points: a name, a glob (``*`` within one part of a dotted name, ``**`` across dots), a module of the model, a
            list of these, a predicate on names, a `Spec` or a list of them. Then ``reduce``, ``over``, ``dtype``,
            ``output``, ``of``, ``side``, ``ref``, ``heads``, ``at``, ``per``, ``encoding``, ``project``, ``bias``,
            ``normalizer`` and ``summed`` are theirs, and an error here.
        rows: how many rows to hold; memory is taken at the first gradient.
        reduce: none, sum, mean, last, norm or absmax.
        over: the dimensions reduced: "pos" (1), "batch" (0), numbers, or several.
        dtype: the stored dtype, or its name ("bfloat16"); None keeps the gradient's.
        output: index or key of the output to take; None is the first tensor.
        of: "grad"; "act", the output itself, in columns named ``point:act``; "grad*act", their product; "grad*ref",
            that of the gradient with ``ref``; "weight", the gradient of the module's weight for each example (a glob
            means modules with parameters of their own then); or several of them. "act", "grad*act" and "weight" not
            with attach="full".
        side: "output", or "input" for what the modules are given, in columns named ``point:input``. Neither that.
        ref: of "grad*ref": a tensor, or a function of what ``cap.batch(batch=)`` is given; None: each step says it by
            ``cap.batch(refs=)``. See `Spec`.
        heads: (n, d): the last dimension is taken as [n, d].
        at: a position, a list of them, or the name by which each step gives them: see `Spec`.
        per: "example", or "token": ``cap[name]`` is Tensor[tokens, ...], of the real tokens that the mask of
            `Capture.batch` keeps, and ``cap.where(name)`` says whose they are.
        encoding: how `Capture.into` stores rows in a dataset: "int8", "int8:64", "float8_e4m3fn" or "int4:64",
            perhaps with ":stochastic" behind it.
        project: of "weight": the size of each side of a projected gradient, or a `Projection`. See `Spec`.
        bias: of "weight": with the gradient of the bias, where a module has one.
        normalizer: of "weight": a normalizer, or a mapping from points to such, that divides gradients before they are
            projected. See `Spec`.
        summed: of "weight" with a one-sided projection: the rows of all points added up, in one column
            ``gradients:weight``.
        attach: "tensor" (native, without the GIL), "full" (``register_full_backward_hook``), or "auto": tensor.
        backend: "native", "python" or "auto".
        calls: for a module called several times in one backward: "raise", "sum" (of the gradients, before the
            reduction; of the products, behind it; activations of several calls have none), "last" (the last one to
            fire, which is the first call), "stack" (call index before the row's dimensions).
        missing: for a point without a gradient in a backward: "raise", or "nan" rows, flagged in ``cap.missing``.

    Returns:
        A context manager; ``cap[name]`` is Tensor[rows, ...]; row r is the same example at every point.

    Raises:
        ValueError, TypeError: for bad arguments, before any hook is registered.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
        >>> with tlfast.capture(model, "0", rows=8) as cap:
        ...     model(torch.ones(2, 4)).sum().backward()
        >>> cap["0"].shape
        torch.Size([2, 3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(broken_rule("capture", "model", "be an nn.Module", type(model).__name__, "Pass the model."))
    given = SpecArguments(
        reduce, over, dtype, output, of, side, ref, heads, at, per, encoding, project, bias, normalizer, summed
    )
    specs = as_specs("capture", points, given)
    options = CaptureOptions(specs=specs, rows=rows, attach=attach, backend=backend, calls=calls, missing=missing)
    return Capture(model, options)


class AttachHandle:
    """Takes a sink off its module: `remove`, or the end of a ``with`` block."""

    def __init__(self, backwards: Any, handles: list[Any]):
        self._backwards, self._handles = backwards, handles

    def remove(self) -> None:
        """Detach; a backward whose forward ran before doesn't reach the sink any more."""
        self._backwards.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> AttachHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach(
    module: nn.Module,
    sink: Sink,
    *,
    reduce: Reduction = "none",
    over: Over = "pos",
    output: int | str | None = None,
    attach: Attach = "auto",
    backend: Backend = "auto",
) -> AttachHandle:
    """Send every gradient with respect to a module's output to a sink: for authors of hook libraries.

    Args:
        module: the module whose output's gradient is wanted, not yet compiled.
        sink: a preallocated tensor, into which each gradient is reduced and cast (natively, without the GIL), or a
            callable that is given each gradient. The gradient belongs to autograd: read it, clone what is to be kept,
            and return nothing.
        reduce: the reduction of a tensor sink.
        over: the dimensions that it reduces.
        output: index or key of the output to take; None is the first tensor.
        attach: "tensor", "full" or "auto", as in `capture`.
        backend: "native", "python" or "auto".

    Returns:
        A handle with ``remove()``, also a context manager. Calls without a gradient don't reach the sink.

    Raises:
        TypeError: if the sink is neither a tensor nor callable. What a callable raises ends the backward.

    Example:
        >>> import torch, tlfast
        >>> layer, row = torch.nn.Linear(2, 3), torch.empty(3)
        >>> with tlfast.attach(layer, row, reduce="sum", over="batch"):
        ...     layer(torch.ones(4, 2)).sum().backward()
        >>> row
        tensor([4., 4., 4.])
    """
    who = "attach"
    if not isinstance(module, nn.Module):
        raise TypeError(broken_rule(who, "module", "be an nn.Module", type(module).__name__, "Pass the module."))
    if not isinstance(sink, torch.Tensor) and not callable(sink):
        raise TypeError(
            broken_rule(who, "sink", "be a tensor or callable", type(sink).__name__, "Pass a function of the gradient.")
        )
    if isinstance(sink, torch.Tensor):
        sink = destination(who, "sink", sink)
    one_of(who, "attach", attach, ("auto", "tensor", "full"))
    one_of(who, "backend", backend, ("auto", "native", "python"))
    one_of(who, "reduce", reduce, REDUCTIONS)
    dims = () if reduce == "none" else parse_over(who, over)
    check_not_compiled(who, module)
    devices = {p.device.type for p in module.parameters()}
    made_for = devices | ({sink.device.type} if isinstance(sink, torch.Tensor) else set())
    engine = pick_backend(who, backend, made_for)
    backwards = engine.Backwards(engine.Ledger(1), "nan")
    tap = engine.Tap(backwards, type(module).__name__, engine.SinkKeeper(sink, reduce, dims), output)
    return AttachHandle(backwards, hook_module(module, tap, attach, engine))
