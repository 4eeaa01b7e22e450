"""What a dataset says of its model, specs, tokenizer and examples: equal where a run may continue another one's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .dataset.plan import Example
from .points import find_points
from .spec import Spec

_SAMPLES = 1024  # values of each parameter that are hashed: training changes nearly all, and reading all takes minutes


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes and shapes of all parameters and buffers, and of evenly spaced values of each."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            values = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLES)]
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def examples_fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of all tokens, sources and starts."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.source}\0{example.start} {example.length};".encode())
        digest.update(memoryview(example.input_ids))  # type: ignore[arg-type]
    return digest.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a dataset says of the model, as JSON."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtypes": dtypes,
        "fingerprint": model_fingerprint(model),
    }


def describe_spec(model: nn.Module, spec: Spec) -> dict[str, Any]:
    """A spec as JSON; the points that a predicate picked stand for it."""
    points = list(find_points("collect", model, spec.points)) if callable(spec.points) else spec.points
    return {
        "points": points if isinstance(points, str) else list(points),
        "reduce": spec.reduce,
        "over": list(spec.dims),
        "dtype": None if spec.dtype is None else str(spec.dtype).removeprefix("torch."),
        "output": spec.output,
        "name": spec.name,
    }
