"""Projections applied to tensors: dense ones by a matrix product, sketches by additions in an order of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from types import ModuleType
from typing import Any, cast, get_args

import numpy as np
import torch

from ..backends.choice import pick_native
from ..errors import broken_rule
from ..spec import Backend, one_of
from .projection import MOST_COLUMNS, Projection, Role, check_side, whole_number
from .sketches import CountSketch, HadamardSketch

SKETCHES = ("count-sketch", "hadamard")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_KEPT = 2**26  # entries of a matrix that is kept, 256 MB of float32; a larger one is made again at each call
PIECE = 2**24  # entries of a matrix, or numbers of a tensor, that are worked on at a time


def apply(projection: Projection | None, module: str, role: Role, x: torch.Tensor) -> torch.Tensor:
    """Project the last dimension of a tensor.

    What is applied often is better made once: `projector` makes it.

    Args:
        projection: which one; None leaves the tensor as it is.
        module: the module's name, as ``named_modules`` has it.
        role: "left" for gradients at outputs, "right" for inputs, "single" for whole gradients, flat, if one-sided.
        x: float [..., columns] on any device.

    Returns:
        [..., dim] in the dtype of ``x``, scaled. Sketches add in float32 (float64 of float64), in an order that depends
        on the columns alone, and round once: the same bits on every device and for every batch. A dense kind is
        torch's matrix product in the dtype of ``x``, without autocast.

    Raises:
        ValueError, TypeError: for a role that the projection hasn't, and for what can't be projected.

    Example:
        >>> import torch
        >>> from tlfast import Projection
        >>> from tlfast.projections import apply
        >>> projection, x = Projection(16, "hadamard"), torch.randn(8, 128, 768)
        >>> apply(projection, "h.0.attn.c_attn", "right", x).shape
        torch.Size([8, 128, 16])
    """
    if projection is None:
        return x
    _check_tensor("apply", x)
    return projector(projection, module, role, x.shape[-1], x.dtype, x.device)(x)


def projector(
    projection: Projection,
    module: str,
    role: Role,
    columns: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Projector:
    """Make what `apply` applies: a function of tensors [..., columns] of one dtype on one device.

    Args:
        backend: what runs a sketch: "native" code, on the CPU, or "python", torch's operations, with the same bits.

    Raises:
        ValueError, TypeError: for a role that the projection hasn't, and for a dtype that isn't a float's.
        RuntimeError: for native code that can't be used.

    Example:
        >>> import torch
        >>> from tlfast import Projection
        >>> from tlfast.projections import projector
        >>> of_inputs = projector(Projection(64, "count-sketch"), "h.0.mlp.c_fc", "right", 768)
        >>> of_inputs(torch.ones(2, 5, 768)).shape
        torch.Size([2, 5, 64])
    """
    columns = whole_number("projector", "columns", columns, 0, MOST_COLUMNS)
    one_of("projector", "backend", backend, get_args(Backend))
    if dtype not in DTYPES:
        raise TypeError(broken_rule("projector", "dtype", "be that of floats", dtype, "Cast the tensor."))
    kinds = {"count-sketch": CountSketcher, "hadamard": HadamardSketcher}
    return kinds.get(projection.kind, MatrixProjector)(
        projection, module, role, columns, dtype, torch.device(device), backend
    )


def native_sketch(projection: Projection, module: str, role: Role, columns: int, backend: str) -> Any:
    """What applies a sketch to float32 on the CPU without the GIL; None where Python does it."""
    made = projector(projection, module, role, columns, backend="native" if backend == "native" else "python")
    return made.native if isinstance(made, Sketcher) else None


@dataclass(eq=False)
class Projector:
    """One side of one module's projection, ready for tensors of one width and dtype on one device."""

    projection: Projection
    module: str
    role: Role
    columns: int
    dtype: torch.dtype
    device: torch.device
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_side("projector", self.projection, self.module, self.role)
        self.prepare()

    def prepare(self) -> None:
        """Make what each call needs."""
        raise NotImplementedError

    def refuse_native(self, where: str) -> None:
        """RuntimeError where native code must be used, and there is none for this."""
        if self.backend == "native":
            rule = f"be auto or python {where}"
            raise RuntimeError(broken_rule("projector", "backend", rule, "native", 'Pass backend="auto".'))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., columns] -> [..., dim], as `apply` says."""
        _check_tensor("projector", x)
        if x.shape[-1] != self.columns or x.dtype != self.dtype or x.device.type != self.device.type:
            rule = f"be [..., {self.columns}] of {self.dtype} on {self.device.type}"
            got = f"{list(x.shape)} of {x.dtype} on {x.device.type}"
            raise ValueError(broken_rule("projector", "x", rule, got, "Make another projector for it."))
        with _without_autocast(self.device.type):
            return self.rows(x.reshape(prod(x.shape[:-1]), self.columns)).view(*x.shape[:-1], self.projection.dim)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """[n, columns] -> [n, dim]."""
        raise NotImplementedError


class MatrixProjector(Projector):
    """A dense kind, with its scale in the matrix: kept, or in column blocks where it would be too large."""

    def prepare(self) -> None:
        self.refuse_native("of a dense kind")
        few = self.projection.dim * self.columns <= MOST_KEPT
        self.kept = self._matrix(0, self.columns, self.dtype) if few else None

    def _matrix(self, start: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        made = self.projection.matrix(self.module, self.role, columns, start)
        wide = made.double() if dtype == torch.float64 else made
        return wide.mul_(self.projection.scale).to(self.device, dtype)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept is not None:
            return x @ self.kept.T
        accumulator = _accumulator(self.dtype)
        total = x.new_zeros(len(x), self.projection.dim, dtype=accumulator)
        wide = max(1, PIECE // self.projection.dim)
        for start in range(0, self.columns, wide):
            block = self._matrix(start, min(wide, self.columns - start), accumulator)
            total += x[:, start : start + wide].to(accumulator) @ block.T
        return total.to(self.dtype)


class Sketcher(Projector):
    """A sketch: signs, what the kind does to each block of columns, and the sum of the blocks."""

    def prepare(self) -> None:
        signs, others = self.tables()
        self.input_signs = self.number_table(signs)
        self.native = None
        if (module := self._native_module()) is not None:
            shape = self.projection.block_width, self.projection.dim, self.projection.scale
            self.native = module.Sketcher(*shape, self.input_signs, *others)

    def tables(self) -> tuple[np.ndarray, tuple[torch.Tensor | None, ...]]:
        """Signs of the columns, and what native code takes beside them: shifts, signs of outputs, samples."""
        raise NotImplementedError

    def _native_module(self) -> ModuleType | None:
        if self.device.type == "cpu":
            return pick_native("projector", self.backend, {"cpu"})
        self.refuse_native(f"on {self.device.type}")
        return None

    def number_table(self, made: np.ndarray) -> torch.Tensor:
        """Numbers in the dtype in which is added, where the tensors are."""
        return torch.from_numpy(made).to(self.device, _accumulator(self.dtype))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        if self.native is not None and not torch.compiler.is_compiling():
            made = self.native.rows(x if x.stride(1) == 1 else x.contiguous())
            if made is not None:
                return cast(torch.Tensor, made)
        at_a_time = max(1, PIECE // max(1, self.columns))
        return torch.cat([self._sketched(part) for part in x.split(at_a_time)])

    def _sketched(self, x: torch.Tensor) -> torch.Tensor:
        accumulator = _accumulator(self.dtype)
        sums = [add_up(blocks) for blocks in self.in_blocks(x.to(accumulator))]
        scale = torch.tensor(self.projection.scale, dtype=accumulator)
        return (torch.cat(sums, dim=-1) * scale).to(self.dtype)

    def in_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """[n, columns] -> [n, blocks, rows] for each part of the sketch's rows, whose blocks are to be added up."""
        raise NotImplementedError

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """[n, columns] -> [n, blocks, width], zeros at the end."""
        width = self.projection.block_width
        padded = torch.nn.functional.pad(x, (0, -self.columns % width))
        return padded.view(len(x), padded.shape[1] // width, width)


class CountSketcher(Sketcher):
    """Each block of columns is turned by its shift."""

    def tables(self) -> tuple[np.ndarray, tuple[torch.Tensor | None, ...]]:
        made = cast(CountSketch, self.projection.sketch(self.module, self.role, self.columns))
        self.sources = torch.from_numpy(made.sources()).flatten(1).to(self.device)
        return made.signs, (torch.from_numpy(made.shifts), None, None)

    def in_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for signs, sources in zip(self.input_signs, self.sources, strict=True):
            blocks = self._cut(x * signs)
            yield blocks.flatten(1).index_select(1, sources).view_as(blocks)


class HadamardSketcher(Sketcher):
    """Each block of columns goes through a Hadamard matrix and gets signs again."""

    def tables(self) -> tuple[np.ndarray, tuple[torch.Tensor | None, ...]]:
        made = cast(HadamardSketch, self.projection.sketch(self.module, self.role, self.columns))
        self.output_signs = self.number_table(made.output_signs)
        self.samples = torch.from_numpy(made.samples).to(self.device)
        return made.input_signs[None], (None, self.output_signs, self.samples)

    def in_blocks(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        made = hadamard(self._cut(x * self.input_signs)) * self.output_signs
        yield made if made.shape[-1] == len(self.samples) else made.index_select(-1, self.samples)


def hadamard(y: torch.Tensor) -> torch.Tensor:
    """The last dimension, a power of two, times the Hadamard matrix, by sums and differences of its halves."""
    half = y.shape[-1] // 2
    for _ in range(half.bit_length()):
        first, second = y[..., :half], y[..., half:]
        y = torch.stack((first + second, first - second), dim=-1).flatten(-2)
    return y


def add_up(blocks: torch.Tensor) -> torch.Tensor:
    """[n, blocks, rows] -> [n, rows]: neighbours are added, then their sums, and so on; who has none goes up alone."""
    if not blocks.shape[1]:
        return blocks.new_zeros(len(blocks), blocks.shape[2])
    while blocks.shape[1] > 1:
        pairs = blocks[:, : blocks.shape[1] // 2 * 2]
        sums = pairs[:, 0::2] + pairs[:, 1::2]
        blocks = torch.cat((sums, blocks[:, -1:]), dim=1) if blocks.shape[1] % 2 else sums
    return blocks[:, 0]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_tensor(who: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES or not x.dim():
        got = f"{list(x.shape)} of {x.dtype}"
        raise TypeError(broken_rule(who, "x", "be floats, [..., columns]", got, "Cast or reshape it."))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
