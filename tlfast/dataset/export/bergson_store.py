"""What lies in an index of bergson: its settings, its rows and what is known of its examples, checked and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import dataset_error, extra
from .bergson_projection import PROCESSOR

WHO = "import_bergson"
_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_OLDER = {  # what a key that is missing in processor_config.yaml means
    "projection_type": "normal", "include_bias": False, "projection_scale": "row_norm", "projection_version": 1,
}  # fmt: skip
# The settings of a build that change its rows or say of what they are; the others are of the machine.
_MADE_BY = (
    "model", "revision", "precision", "tokenizer", "data", "loss_fn", "loss_reduction", "label_smoothing",
    "optimizer_state", "split_attention_modules", "attention", "filter_modules", "logit_scale", "peft_init_kwargs",
    "moe_experts", "max_tokens",
)  # fmt: skip
_HASHED_BYTES = 16 << 20  # read at a time


@dataclass(frozen=True)
class Index:
    """An index on disk, of which everything but the rows was read.

    ``sizes`` are the values of a row by module, in the order of the file. ``offsets`` says of an index per token where
    the rows of each example begin: int64 [n_items + 1].
    """

    folder: Path
    dtype: torch.dtype
    sizes: dict[str, int]
    n_items: int
    n_rows: int
    offsets: np.ndarray[Any, Any] | None
    processor: dict[str, Any]
    made_by: dict[str, Any]
    normalized: tuple[str, ...]  # how rows were divided by second moments: names of bergson's classes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, of all modules."""
        return self.dtype.itemsize * sum(self.sizes.values())

    def row_shape(self, module: str) -> tuple[int, ...]:
        """What a row of a module is: [p, p] where it was projected on both sides, else as flat as it is stored."""
        dim, size = self.processor["projection_dim"] or 0, self.sizes[module]
        two_sided = self.processor["projection_target"] == "per_module" and size == dim * dim
        return (dim, dim) if two_sided else (size,)

    def rows(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Read rows ``start`` to ``stop`` of the file: by module [rows, size], views of one block."""
        width = sum(self.sizes.values())
        block = torch.empty(stop - start, width, dtype=self.dtype)
        with (self.folder / "gradients.bin").open("rb") as file:
            file.seek(start * self.row_bytes)
            into = block.view(torch.uint8).numpy().reshape(-1)
            if file.readinto(into.data) != len(into):
                raise _damaged(self.folder / "gradients.bin", f"{stop} rows", "fewer", "It was changed meanwhile.")
        bounds = pairwise(accumulate(self.sizes.values(), initial=0))
        return {module: block[:, low:high] for module, (low, high) in zip(self.sizes, bounds, strict=True)}

    def sha256(self) -> str:
        """SHA-256 of gradients.bin, which makes a dataset of other rows another one."""
        digest = hashlib.sha256()
        with (self.folder / "gradients.bin").open("rb") as file:
            while part := file.read(_HASHED_BYTES):
                digest.update(part)
        return digest.hexdigest()


def read_index(path: str | PathLike[str]) -> Index:
    """Read what is said of an index; DatasetError where it isn't one, or isn't whole."""
    folder = Path(path)
    if not folder.is_dir():
        raise dataset_error(WHO, "index", "be the folder of a build of bergson", folder, "Check the path.")
    for name in ("info.json", "gradients.bin", "processor_config.yaml"):
        if not (folder / name).is_file():
            remedy = (
                "Give the folder of one build of bergson, with its info.json; a build writes the last files at its end."
            )
            raise dataset_error(WHO, "index", f"hold {name}", f"{folder} without it", remedy)
    info = _mapping(folder / "info.json")
    try:
        sizes = {str(name): int(size) for name, size in info["grad_sizes"].items()}
        n_rows, per_token = int(info["num_grads"]), bool(info.get("attribute_tokens", False))
        n_items = int(info.get("num_items", n_rows))
        # Before version 2 there was a structured dtype alone.
        base = info["base_dtype"] if "base_dtype" in info else np.dtype(info["dtype"]["formats"][0]).base.name
        if not sizes or min(sizes.values()) < 1 or n_rows < 1 or n_items < 1 or base not in _DTYPES:
            raise ValueError(f"{len(sizes)} modules, {n_rows} rows of {n_items} examples, {base}")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        rule, got = "say modules with their sizes, rows, and one of " + ", ".join(_DTYPES), str(error)[:200]
        raise dataset_error(WHO, str(folder / "info.json"), rule, got, "Build it anew.") from error
    dtype = _DTYPES[base]
    expected, there = n_rows * sum(sizes.values()) * dtype.itemsize, (folder / "gradients.bin").stat().st_size
    if expected != there:
        raise _damaged(folder / "gradients.bin", f"{expected} bytes, as info.json says", there, "Build it anew.")
    made_by, preprocessed = _settings(folder)
    return Index(
        folder, dtype, sizes, n_items, n_rows, _offsets(folder, n_items, n_rows) if per_token else None,
        _processor(folder), made_by | ({"preprocess": preprocessed} if preprocessed else {}), _normalized(folder),
    )  # fmt: skip


def _damaged(path: Path, rule: str, got: object, remedy: str) -> Exception:
    return dataset_error(WHO, str(path), f"have {rule}", got, remedy)


def _mapping(path: Path) -> dict[str, Any]:
    """What a JSON or YAML file says; DatasetError where that is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text) if path.suffix == ".json" else extra("yaml", WHO).safe_load(text)
    except ImportError:
        raise
    except Exception as error:  # of the parsers, too, of which one knows errors of its own
        value = str(error)
    if not isinstance(value, dict):
        raise dataset_error(WHO, str(path), "hold a mapping", repr(value)[:200], "Build it anew.")
    return value


def _processor(folder: Path) -> dict[str, Any]:
    said = _mapping(folder / "processor_config.yaml")
    unknown = sorted(said.keys() - PROCESSOR.keys())
    if unknown:
        rule, remedy = f"have no other keys than {', '.join(PROCESSOR)}", "It is of a version that isn't known here."
        raise dataset_error(WHO, str(folder / "processor_config.yaml"), rule, ", ".join(unknown), remedy)
    return PROCESSOR | _OLDER | said


def _settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.yaml says of how the rows were made, and of what was done to them then; nothing without one."""
    if not (folder / "config.yaml").is_file():
        return {}, {}
    steps = _mapping(folder / "config.yaml").get("steps")
    for step in steps if isinstance(steps, list) else []:
        for command in step.values() if isinstance(step, Mapping) else []:
            if isinstance(command, Mapping) and isinstance(command.get("index_cfg"), Mapping):
                index, done = command["index_cfg"], command.get("preprocess_cfg") or {}
                if not (
                    done.get("unit_normalize") or done.get("hessian_path") or done.get("aggregation", "none") != "none"
                ):
                    done = {}
                return {key: index[key] for key in _MADE_BY if index.get(key) not in (None, "", [])}, dict(done)
    return {}, {}


def _normalized(folder: Path) -> tuple[str, ...]:
    path = folder / "normalizers.pth"
    if not path.is_file():
        return ()
    states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return tuple(sorted({str(state["__class__"]) for state in states.values()}))


def _offsets(folder: Path, n_items: int, n_rows: int) -> np.ndarray[Any, Any]:
    path = folder / "offsets.npy"
    try:
        offsets = np.load(path, allow_pickle=False)
        fits = offsets.dtype == np.int64 and offsets.shape == (n_items + 1,) and bool((np.diff(offsets) >= 0).all())
        if not fits or offsets[0] != 0 or offsets[-1] != n_rows:
            raise ValueError(f"{offsets.dtype} {list(offsets.shape)}")
    except (OSError, ValueError) as error:
        rule = f"{n_items + 1} rising int64 from 0 to {n_rows}"
        raise _damaged(path, rule, str(error)[:200], "Build it anew.") from error
    return np.asarray(offsets)
