"""Weight gradients by the size that an optimizer has seen there: second moments, or their rows and columns."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from ..errors import broken_rule


@dataclass(frozen=True)
class AdamNormalizer:
    """Divides a gradient at each place by the root of its second moment: G / (sqrt(v) + eps).

    Args:
        second_moment: v [O, I]; with the bias as its last column, where gradients have one.
        eps: as Adam has it.

    Example:
        >>> import torch
        >>> from tlfast.hooks.normalizers import AdamNormalizer
        >>> AdamNormalizer(torch.full((2, 3), 4.0))(torch.ones(2, 3))[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    second_moment: torch.Tensor
    eps: float = 1e-8

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the gradients that it is for."""
        return self.second_moment.shape[0], self.second_moment.shape[1]

    @property
    def factor(self) -> torch.Tensor:
        """What a gradient is multiplied with, [O, I] in float64."""
        return 1 / (self.second_moment.double().sqrt() + self.eps)

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient [..., O, I], in its dtype; ValueError for another shape."""
        v = self.second_moment.to(gradient.device)
        _check_shape(gradient, (v.shape[0], v.shape[1]))
        wide = torch.promote_types(gradient.dtype, torch.float32)
        divided: torch.Tensor = gradient.to(wide) / (v.sqrt() + self.eps).to(wide)
        return divided.to(gradient.dtype)


@dataclass(frozen=True)
class AdafactorNormalizer:
    """The same with the second moment v = row col^T / mean(row), so that a gradient's factors can be normalized apart.

    Args:
        row: [O], the means of v over inputs.
        col: [I], those over outputs.
        bias: [O], the second moment of the bias, where gradients have that as their last column.
        eps: is added to all means.
        bias_eps: is added to the bias'.

    Example:
        >>> import torch
        >>> from tlfast.hooks.normalizers import AdafactorNormalizer
        >>> AdafactorNormalizer(torch.tensor([4.0, 4.0]), torch.full((3,), 4.0))(torch.ones(2, 3))[0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    row: torch.Tensor
    col: torch.Tensor
    bias: torch.Tensor | None = None
    eps: float = 1e-30
    bias_eps: float = 1e-8

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the gradients that it is for."""
        return len(self.row), len(self.col) + (self.bias is not None)

    @property
    def factor(self) -> torch.Tensor:
        """What a gradient is multiplied with, [O, I] in float64."""
        outputs, inputs = self.scales
        factor = outputs[:, None] * inputs
        if self.bias is None:
            return factor
        return torch.cat([factor, (self.bias.double() + self.bias_eps).rsqrt()[:, None]], 1)

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What outputs [O] and inputs [I] are multiplied with, for the same product."""
        row = self.row.double() + self.eps
        return row.mean().sqrt() * row.rsqrt(), (self.col.double() + self.eps).rsqrt()

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        """A gradient [..., O, I], in its dtype; ValueError for another shape."""
        _check_shape(gradient, self.shape)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (gradient.to(wide) * self.factor.to(gradient.device, wide)).to(gradient.dtype)


Normalizer = AdamNormalizer | AdafactorNormalizer


def _check_shape(gradient: torch.Tensor, shape: tuple[int, int]) -> None:
    if tuple(gradient.shape[-2:]) != shape:
        rule, remedy = f"be [..., {shape[0]}, {shape[1]}]", "Give gradients that aren't projected, and bias= alike."
        raise ValueError(broken_rule("a normalizer", "a gradient", rule, list(gradient.shape), remedy))


def check_normalizers(who: str, given: Any, names: Collection[str]) -> None:
    """An error unless ``Spec(normalizer=)`` has a normalizer for each of these points."""
    if given is None:
        return
    rule = "be a normalizer, or a mapping from points to such"
    if isinstance(given, Normalizer):
        if len(names) > 1:
            got = f"one for {len(names)} points"
            raise ValueError(broken_rule(who, "normalizer", rule, got, "Write {point: normalizer}."))
        return
    if not isinstance(given, Mapping) or not all(isinstance(one, Normalizer) for one in given.values()):
        got = type(given).__name__
        remedy = "Give what read_optimizer or Factors.normalizers returns."
        raise TypeError(broken_rule(who, "normalizer", rule, got, remedy))
    absent = next((name for name in names if name not in given), None)
    if absent is not None:
        rule, got = "have an entry for each point", f"none for {absent!r}"
        remedy = f"It has {', '.join(map(repr, list(given)[:8])) or 'none'}: name these points."
        raise ValueError(broken_rule(who, "normalizer", rule, got, remedy))


def normalizer_at(who: str, name: str, given: Any, shape: tuple[int, int]) -> Normalizer | None:
    """That of a point whose gradients have a shape [O, I]; ValueError for one of others."""
    if given is None:
        return None
    found: Normalizer = given[name] if isinstance(given, Mapping) else given
    if found.shape != shape:
        rule, remedy = f"be of gradients [{shape[0]}, {shape[1]}]", "Say bias= where it was made as in the Spec."
        raise ValueError(broken_rule(who, "normalizer", rule, list(found.shape), remedy))
    if not all(bool((tensor.isfinite() & (tensor >= 0)).all()) for tensor in _tensors(found)):
        rule, remedy = "hold means of squares", "Check what it was made of."
        raise ValueError(broken_rule(who, "normalizer", rule, "a negative number, NaN or infinity", remedy))
    return found


def describe_normalizers(given: Any, names: Collection[str]) -> dict[str, Any]:
    """What a dataset says of the normalizers of its points: their kind, and a digest of their numbers in float64."""
    used = {name: given[name] for name in names} if isinstance(given, Mapping) else {"": given}
    digest = hashlib.sha256()
    for name, one in sorted(used.items()):
        said = {field.name: getattr(one, field.name) for field in fields(one)}
        tensors = {key: value for key, value in said.items() if isinstance(value, torch.Tensor)}
        rest = {key: value for key, value in said.items() if key not in tensors}
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        digest.update(repr((name, type(one).__name__, rest, shapes)).encode())
        for tensor in tensors.values():
            digest.update(tensor.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes())
    return {"kind": kinds_of(used.values()), "sha256": digest.hexdigest()}


def kinds_of(normalizers: Iterable[Normalizer]) -> str:
    """What people are told of these: "adam", "adafactor", or "adafactor and adam"."""
    return " and ".join(sorted({"adam" if isinstance(one, AdamNormalizer) else "adafactor" for one in normalizers}))


def _tensors(normalizer: Normalizer) -> list[torch.Tensor]:
    found = [getattr(normalizer, field.name) for field in fields(normalizer)]
    return [one for one in found if isinstance(one, torch.Tensor)]
