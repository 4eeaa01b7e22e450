"""No parameter gradients: the graph starts at the embedding's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import broken_rule


def find_embedding(model: nn.Module) -> nn.Module:
    """The module whose output starts the graph: ``get_input_embeddings()``, ``embed``, or the only ``nn.Embedding``."""
    get: Any = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            found = get()
        except NotImplementedError:
            found = None
        if isinstance(found, nn.Module):
            return found
    named = getattr(model, "embed", None)
    if isinstance(named, nn.Module):
        return named
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if embeddings:
        return embeddings[0]
    raise ValueError(
        broken_rule(
            "freeze", "model", "have an embedding", type(model).__name__,
            "Pass embedding=<the module whose output the gradients start from>.",
        )
    )  # fmt: skip


class _StartGraph:
    """Forward hook of the embedding: its output requires grad."""

    def __init__(self) -> None:
        # Compiled code can't call requires_grad_() on a tensor of its own; there the output gets its edge from a zero.
        self.zero = torch.zeros((), requires_grad=True)

    def __call__(self, module: nn.Module, args: object, output: object) -> torch.Tensor | None:
        if not isinstance(output, torch.Tensor):
            given = type(output).__name__
            raise TypeError(broken_rule("freeze", "the embedding's output", "be a tensor", given, "Pass embedding=."))
        if not torch.is_grad_enabled() or output.requires_grad:
            return None
        if torch.compiler.is_compiling():
            return output + self.zero.to(output)
        return output.detach().requires_grad_()


@contextmanager
def freeze(model: nn.Module, embedding: nn.Module | None = None) -> Iterator[nn.Module]:
    """Stop all parameter gradients inside the context, and let the embedding's output require grad instead.

    Activation gradients stay the same to the bit, and every weight-gradient product is skipped. On exit each parameter
    has the ``requires_grad`` that it had, also after an exception. Modules before the embedding see no gradient.

    Args:
        model: any module.
        embedding: the module whose output starts the graph; found by itself for Hugging Face models and models with an
            ``nn.Embedding``.

    Raises:
        ValueError: if no embedding is found.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2))
        >>> with tlfast.freeze(model):
        ...     model(torch.tensor([[1, 2]])).sum().backward()
        >>> model[1].weight.grad is None
        True
    """
    start = find_embedding(model) if embedding is None else embedding
    before = [(p, p.requires_grad) for p in model.parameters()]
    by_name = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    handle = start.register_forward_hook(_StartGraph())
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield model
    finally:
        handle.remove()
        for p, required in before:
            p.requires_grad_(required)
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.is_meta and name in by_name:  # accelerate, which keeps it elsewhere, makes a new one at each use
                p.requires_grad_(by_name[name])
