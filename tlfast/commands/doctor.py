"""What runs on this machine, in which versions, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

from .. import __version__
from ..backends import cuda_status
from ..backends.choice import backend, loaded
from ..dataset.write.native import writer

# Distribution -> the extra that brings it.
_LIBRARIES = {
    "google-crc32c": "collect",
    "pyarrow": "collect",
    "pyyaml": "collect",
    "safetensors": "collect",
    "tokenizers": "collect",
    "tqdm": "collect",
    "transformers": "collect",
    "tyro": "collect",
    "datasets": "hub",
    "huggingface-hub": "hub",
    "pylance": "lance",
    "peft": "peft",
    "jinja2": "plot",
    "matplotlib": "plot",
    "transformer-lens": "transformer-lens",
}


def diagnose() -> Iterator[str]:
    """Yield one line for each thing that matters; what is absent says how to get it."""
    yield f"tlfast        {__version__}"
    yield f"backend       {backend()}"
    yield f"writer        {writer()}"
    if not backend().startswith("native"):
        yield "              to build it: pip install --no-build-isolation -e . (needs a C++ compiler and this torch)"
    yield f"hooks         {_full_hooks()}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    yield f"torch         {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    yield f"gpus          {', '.join(map(_gpu, range(torch.cuda.device_count()))) or 'none'}"
    yield from (f"{'cuda' if n == 0 else '':<13} {line}" for n, line in enumerate(cuda_status.diagnose(loaded())))
    versions = {library: _version(library) for library in ("numpy", *_LIBRARIES)}
    yield from (f"{library:<13} {version}" for library, version in versions.items() if version)
    if versions["transformer-lens"]:
        yield f"              {_backward_hooks()}"
    for name in dict.fromkeys(_LIBRARIES.values()):
        absent = [library for library, needed_by in _LIBRARIES.items() if needed_by == name and not versions[library]]
        if absent:
            yield f"missing       {', '.join(absent)}: pip install 'tlfast[{name}]'"


def _full_hooks() -> str:
    if loaded() is None:
        return "full backward hooks are PyTorch's own; native ones need the native code"
    return (
        "full backward hooks can be native (tlfast.install_hooks); PyTorch's own are used in torch.func, forward-mode "
        "AD, jit.trace, export, make_fx, dispatch modes, compiled code and compiled autograd"
    )


def _backward_hooks() -> str:
    try:
        from ..transformer_lens import check
    except ImportError as error:
        return str(error)
    return check()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpu(number: int) -> str:
    try:
        return torch.cuda.get_device_name(number)
    except RuntimeError as error:  # a driver that shows its devices may still be too old for this torch
        return f"{number} ({str(error).splitlines()[0]})"
