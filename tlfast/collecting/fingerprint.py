"""What a dataset says of its model, specs, tokenizer and examples: equal where a run may continue another one's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..dataset.errors import extra
from ..dataset.format.plan import Example, FieldExample
from ..errors import broken_rule
from .spool import Examples

_SAMPLES = 1024  # values of each parameter that are hashed: training changes nearly all, and reading all takes minutes


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes and shapes of all parameters and buffers, and of evenly spaced values of each."""
    digest = hashlib.sha256()
    for name, entry in model.state_dict().items():
        if isinstance(entry, torch.Tensor):
            tensor = _whole(model, name, entry)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
            for part in _parts(tensor.detach()):
                values = part.reshape(-1)[:: max(1, part.numel() // _SAMPLES)]
                digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a tensor is made of: itself, or the codes and scales of a quantised weight."""
    if type(tensor) is torch.Tensor or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _parts(getattr(tensor, name))


def _whole(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it lies in pieces on several ranks, which all must ask for it, or is kept elsewhere."""
    gather: Any = getattr(tensor, "full_tensor", None)
    if gather is not None:
        gathered: torch.Tensor = gather()
        return gathered
    if tensor.is_meta:
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if not hasattr(module, "_hf_hook"):  # what accelerate puts there
            remedy = "Load the weights first."
            raise ValueError(broken_rule("collect", "model", "have its weights", f"{name} on meta", remedy))
        # What device_map leaves on the disk or in the CPU's memory is brought for as long as it is used.
        with extra("accelerate", "collect", "device-map").utils.align_module_device(module, torch.device("cpu")):
            brought: torch.Tensor = getattr(module, leaf).detach().clone()
        return brought
    return tensor


def examples_fingerprint(examples: Iterable[Example]) -> str:
    """SHA-256 of all tokens, sources and starts, and of the other fields where there are any."""
    if isinstance(examples, Examples):
        return examples.sha256()
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.source}\0{example.start} {example.length};".encode())
        digest.update(memoryview(example.input_ids))  # type: ignore[arg-type]
        if isinstance(example, FieldExample):
            digest.update(example.digest)
    return digest.hexdigest()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What a dataset says of the model, as JSON."""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    # A tied parameter is one tensor under two names, until accelerate brings it for each of them in turn.
    tied = getattr(model, "all_tied_weights_keys", None) or ()
    return {
        # fully_shard puts a class of its own before the model's.
        "class": type(model).__name__ if not _is_fsdp(model) else type(model).__mro__[2].__name__,
        "parameters": sum(p.numel() for name, p in model.named_parameters() if name not in tied),
        "dtypes": dtypes,
        "fingerprint": model_fingerprint(model),
    }


def _is_fsdp(model: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)
