"""A fitted Jacobian lens and its file, and the file of a fit that is half done: TransformerLens' own formats."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..dataset.places.durable import write_small
from ..errors import broken_rule

_PLAIN = (bool, int, float, str)


@dataclass
class FittedLens:
    """A Jacobian lens: ``jacobians[l]`` [D, D] takes the output of block l to that of the last block.

    Attributes:
        jacobians: by layer, float32 on the host.
        n_prompts: how many prompts they are the mean of.
        d_model: D, the width of the residual stream.
        metadata: what TransformerLens keeps of a fit: model, corpus, settings.

    Example:
        >>> import torch
        >>> from tlfast.recipes.lens_file import FittedLens
        >>> parts = [FittedLens({0: torch.full((2, 2), float(k))}, n_prompts=k, d_model=2) for k in (1, 3)]
        >>> FittedLens.merge(parts).jacobians[0][0, 0]
        tensor(2.5000)
    """

    jacobians: dict[int, torch.Tensor]
    n_prompts: int
    d_model: int
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def source_layers(self) -> list[int]:
        """The layers that there are matrices for, rising."""
        return sorted(self.jacobians)

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Write the file that TransformerLens' ``JacobianLens.load`` reads; it is there whole, or not at all."""
        check_plain("save", self.metadata)
        content = {
            "J": {layer: self.jacobians[layer].to(dtype) for layer in self.source_layers},
            "n_prompts": self.n_prompts,
            "source_layers": self.source_layers,
            "d_model": self.d_model,
            **({"metadata": self.metadata} if self.metadata else {}),
        }
        write_whole(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FittedLens:
        """Read such a file, of whoever wrote it. ValueError for another one."""
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or not {"J", "d_model"} <= content.keys():
            remedy = "Half of a fit is read by the same call of fit_jacobian_lens."
            raise ValueError(broken_rule("load", str(path), "be a Jacobian lens", "another file", remedy))
        jacobians = {int(layer): matrix.float() for layer, matrix in content["J"].items()}
        named: Mapping[str, Any] = content.get("metadata") or {}
        return cls(jacobians, int(content.get("n_prompts", 0)), int(content["d_model"]), dict(named))

    @classmethod
    def merge(cls, lenses: Sequence[FittedLens]) -> FittedLens:
        """The lens of all prompts, of lenses of some prompts each: the mean, weighted by ``n_prompts``.

        Raises:
            ValueError: for lenses of other layers, models, corpora or settings, or of no prompts.
        """
        lenses = list(lenses)
        remedy = "Merge parts of one fit, which differ in their prompts alone."
        if not lenses or any(lens.n_prompts < 1 for lens in lenses):
            raise ValueError(
                broken_rule("merge", "lenses", "have prompts", [each.n_prompts for each in lenses], remedy)
            )
        told = [{**lens.metadata, "n_prompts": 0, "layers": lens.source_layers, "d": lens.d_model} for lens in lenses]
        for other in told[1:]:
            odd = next((name for name in told[0].keys() | other.keys() if told[0].get(name) != other.get(name)), None)
            if odd is not None:
                got = f"{told[0].get(odd)!r} and {other.get(odd)!r}"
                raise ValueError(broken_rule("merge", odd, "be the same in all lenses", got, remedy))
        total = sum(lens.n_prompts for lens in lenses)
        merged = {
            layer: sum((lens.jacobians[layer] * lens.n_prompts for lens in lenses), torch.zeros(())) / total
            for layer in lenses[0].source_layers
        }
        named = {**lenses[0].metadata, "n_prompts": total} if lenses[0].metadata else {}
        return cls(merged, total, lenses[0].d_model, named)


def check_plain(who: str, metadata: Any, place: str = "metadata") -> None:
    """ValueError for what ``torch.load(weights_only=True)`` would not read again."""
    if metadata is None or type(metadata) in _PLAIN:
        return
    if type(metadata) in (list, tuple):
        for k, part in enumerate(metadata):
            check_plain(who, part, f"{place}[{k}]")
        return
    if type(metadata) is dict and all(type(key) is str for key in metadata):
        for key, part in metadata.items():
            check_plain(who, part, f"{place}.{key}")
        return
    rule, remedy = "be None, numbers, texts, and lists and dicts of them by texts", "Write it as text."
    raise ValueError(broken_rule(who, place, rule, type(metadata).__name__, remedy))


def write_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a file of torch that is whole or absent, also where the process or the machine dies."""
    memory = io.BytesIO()
    torch.save(content, memory)
    write_small(path, memory.getvalue(), replace=True)
