"""Sums as a file of numpy (npz): what they say as JSON, and their arrays, to the bit."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from zipfile import BadZipFile

import numpy as np
import torch

from ..errors import broken_rule

Made = TypeVar("Made")
Read = Callable[[str], torch.Tensor]


def write_sums(path: str | os.PathLike[str], said: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the file, whole or not at all."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            np.savez(file, said=np.array(json.dumps(dict(said))), **cast(dict[str, Any], arrays))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_sums(who: str, path: str | os.PathLike[str], kind: tuple[str, int], make: Callable[[Any, Read], Made]) -> Made:
    """What ``make`` makes of what such a file says and of its tensors, on the CPU, which it reads by name.

    Raises:
        ValueError: for a file that isn't of the format and version ``kind``, or of which nothing can be made.
        OSError: for one that can't be read.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            said = json.loads(str(file["said"]))
            if (said["format"], said["version"]) != kind:
                raise ValueError(f"{said['format']} {said['version']}")
            return make(said, lambda name: torch.from_numpy(file[name]))
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        got = f"{os.fspath(path)!r}: {error}"
        raise ValueError(
            broken_rule(who, "path", f"be a file that {who}.save wrote", got, "Check the path.")
        ) from error
