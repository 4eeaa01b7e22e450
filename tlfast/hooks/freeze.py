"""No parameter gradients: the graph starts at the embedding's output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..backends.no_graph import STARTS
from ..backends.outputs import replace_output, select_output
from ..errors import broken_rule
from .points import find_points, refuse_scripted

Embedding = str | nn.Module | Sequence[str | nn.Module]


def find_embedding(model: nn.Module) -> nn.Module:
    """The module that looks tokens up: ``get_input_embeddings()``, ``embed``, or the first ``nn.Embedding``."""
    own, named = _own_embedding(model), getattr(model, "embed", None)
    if own is not None:
        return own
    if isinstance(named, nn.Module):
        return named
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module
    raise ValueError(
        broken_rule(
            "freeze", "model", "have an embedding", type(model).__name__,
            "Pass embedding=<the module whose output the gradients start from>.",
        )
    )  # fmt: skip


def find_embeddings(model: nn.Module) -> list[nn.Module]:
    """All modules that look tokens up, `find_embedding` first: which of them are called isn't known beforehand.

    An encoder and a decoder have embeddings of their own. They may share the weight of the first, which then may never
    be called itself.
    """
    first = find_embedding(model)
    # Not every module that starts something: nothing else needs the graph of a vision tower beside a language model.
    kinds = (nn.Embedding, type(first))
    weights = {id(p) for p in first.parameters(recurse=False)}
    inner = getattr(first, "original_component", None)  # in a bridge of TransformerLens, whose hook point is behind it
    others: list[nn.Module] = [inner] if isinstance(inner, nn.Module) else []
    for module in model.modules():
        own = _own_embedding(module)
        others += [own] if isinstance(own, kinds) else []
        shares = any(id(p) in weights for p in module.parameters(recurse=False))
        others += [module] if shares and isinstance(module, kinds) else []
    return list(dict.fromkeys([first, *others]))


def _own_embedding(module: nn.Module) -> nn.Module | None:
    get: Any = getattr(module, "get_input_embeddings", None)
    if not callable(get):
        return None
    try:
        found = get()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


class StartGraph:
    """Forward hook of an embedding: its output requires grad."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.called = name, module, False
        # Compiled code can't call requires_grad_() on a tensor of its own; there the output gets its edge from a zero.
        self.zero = torch.zeros((), requires_grad=True)

    def __call__(self, module: nn.Module, args: object, output: object) -> object | None:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.called = True
        tensor, key = select_output(output, None)
        if tensor is None or not tensor.is_floating_point():
            who, rule, given = f"the output of {self.name}", "hold a floating-point tensor", type(output).__name__
            raise TypeError(broken_rule("freeze", who, rule, given, "Name another module by embedding=."))
        if not torch.is_grad_enabled() or tensor.requires_grad:
            return None
        if compiling:
            start = tensor + self.zero.to(tensor)
        else:
            # Not the leaf itself, which code that goes on in place may not change; and no view, which is one with it.
            start = torch.ops.aten._unsafe_view(tensor.detach().requires_grad_(), tensor.shape)
        started: object = replace_output(output, key, start)
        return started


def starting_modules(model: nn.Module) -> list[nn.Module]:
    """The modules at which the `freeze` that was entered last starts the graph; outside of one, `find_embeddings`."""
    return [start.module for start in STARTS[-1]] if STARTS else find_embeddings(model)


@contextmanager
def freeze(model: nn.Module, embedding: Embedding | None = None) -> Iterator[nn.Module]:
    """Stop all parameter gradients inside the context, and let the embedding's output require grad instead.

    Activation gradients stay the same to the bit, and every weight-gradient product is skipped. On exit each parameter
    has the ``requires_grad`` that it had, also after an exception. Modules before the embedding see no gradient.

    Args:
        model: any module.
        embedding: the module whose output starts the graph (the first floating-point tensor of it), its name, or
            several; found by itself for Hugging Face models, encoders and decoders too, and for models with an
            ``nn.Embedding``.

    Raises:
        ValueError: if no embedding is found, or the one that is named isn't in the model.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
        >>> with tlfast.freeze(model):
        ...     model(torch.tensor([[1, 2]])).sum().backward()
        >>> model[1].weight.grad is None
        True
    """
    refuse_scripted("freeze", "model", "", model)
    with _frozen(model, _starts(model, embedding)):
        yield model


def _starts(model: nn.Module, embedding: Embedding | None) -> list[tuple[str, nn.Module]]:
    """The modules at which the graph starts, each with its name."""
    if embedding is not None:
        return list(find_points("freeze", model, embedding, "embedding").items())
    names = {module: name for name, module in model.named_modules()}
    return [(names.get(module, type(module).__name__), module) for module in find_embeddings(model)]


@contextmanager
def _frozen(model: nn.Module, found: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """No parameter gradients; the graph starts at what these modules put out, each with its name."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    by_name = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    starts = [StartGraph(name, module) for name, module in found]
    handles = [start.module.register_forward_hook(start) for start in starts]
    STARTS.append(starts)
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        STARTS.remove(starts)
        for handle in handles:
            handle.remove()
        for p, required in before:
            p.requires_grad_(required)
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.is_meta and name in by_name:  # accelerate, which keeps it elsewhere, makes a new one at each use
                p.requires_grad_(by_name[name])


def starts_at_inputs(model: nn.Module) -> bool:
    """Whether floats that a model is given are looked up nowhere: it names no embedding of its own.

    Any other ``nn.Embedding`` may belong to something else in it.
    """
    return _own_embedding(model) is None and not isinstance(getattr(model, "embed", None), nn.Module)


@contextmanager
def at_work(model: nn.Module, embedding: Embedding | None = None, at_inputs: bool = False) -> Iterator[None]:
    """No dropout, no parameter gradients, gradients on; the model is as before afterwards.

    ``at_inputs``: the graph starts at what the model is given as well, which whoever calls it must see to; so there
    need be no embedding.
    """
    refuse_scripted("freeze", "model", "", model)
    try:
        starts = _starts(model, embedding)
    except ValueError:
        if not at_inputs:
            raise
        starts = []
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with _frozen(model, starts), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True
