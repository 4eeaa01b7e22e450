"""The ways to store gradients that `collect` is compared with, and how their rows are read back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss

from .rivals import first_tensor


@dataclass(frozen=True)
class Work:
    """What all variants do: this frozen model, these batches, the gradients of these points, kept in bfloat16."""

    model: nn.Module
    batches: list[Batch]
    points: tuple[str, ...]
    reduce: str  # mean or none
    rows_per_unit: int

    @property
    def n_examples(self) -> int:
        """Examples in all batches."""
        return sum(len(batch.input_ids) for batch in self.batches)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one point's row."""
        width = int(self.model.config.n_embd)  # type: ignore[union-attr, arg-type]
        return (width,) if self.reduce == "mean" else (self.batches[0].input_ids.shape[1], width)

    @property
    def row_bytes(self) -> int:
        """The bytes of one example at all points."""
        return 2 * len(self.points) * int(np.prod(self.row_shape))

    def kept(self, grad: torch.Tensor) -> torch.Tensor:
        """What is kept of a gradient, by hand."""
        return grad.mean(1) if self.reduce == "mean" else grad

    def backward(self, batch: Batch) -> None:
        """One forward and backward, with the loss that `collect` uses."""
        next_token_loss(self.model, batch).backward()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Variant:
    """One way to do the work into a folder, and to read a point's rows back."""

    run: Callable[[Work, Path], object]
    read: Callable[[Work, Path, str], torch.Tensor] | None


@contextmanager
def hooked(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def floor(work: Work, out: Path) -> None:
    """The same frozen forward and backward; nothing is captured."""
    with tlfast.freeze(work.model):
        for batch in work.batches:
            work.backward(batch)


def collect(work: Work, out: Path) -> None:
    """The main job."""
    examples = [batch.input_ids for batch in work.batches]
    tlfast.collect(
        work.model, examples, out, points=list(work.points), reduce=work.reduce, dtype=torch.bfloat16,
        batch_tokens=examples[0].numel(), rows_per_unit=work.rows_per_unit, progress=False,
    )  # fmt: skip


def read_dataset(work: Work, out: Path, point: str) -> torch.Tensor:
    """All rows of a collected point."""
    return tlfast.open_dataset(out)[point][:]


def full_hooks_torch_save(work: Work, out: Path) -> None:
    """Full backward hooks, a list for each point, one torch.save with fsync for each unit."""
    held: dict[str, list[torch.Tensor]] = {name: [] for name in work.points}

    def hook(name: str) -> Callable[[nn.Module, object, tuple[torch.Tensor]], None]:
        return lambda module, grad_input, grad: held[name].append(work.kept(grad[0]).to(torch.bfloat16))

    handles = [work.model.get_submodule(name).register_full_backward_hook(hook(name)) for name in work.points]
    with tlfast.freeze(work.model), hooked(handles):
        n_rows = 0
        for batch in work.batches:
            work.backward(batch)
            n_rows += len(batch.input_ids)
            if n_rows % work.rows_per_unit == 0 or n_rows == work.n_examples:
                with (out / f"{n_rows:08d}.pt").open("wb") as file:
                    torch.save({name: torch.cat(rows) for name, rows in held.items()}, file)
                    file.flush()
                    os.fsync(file.fileno())
                for rows in held.values():
                    rows.clear()


def read_saved(work: Work, out: Path, point: str) -> torch.Tensor:
    """All rows of a point from the files of torch.save."""
    return torch.cat([torch.load(path)[point] for path in sorted(out.glob("*.pt"))])


def tensor_hooks_memmap(work: Work, out: Path) -> None:
    """Tensor hooks that write into preallocated memory-mapped rows, flushed at the end."""
    maps = {
        name: np.lib.format.open_memmap(
            out / f"{name}.npy", mode="w+", dtype=np.int16, shape=(work.n_examples, *work.row_shape)
        )
        for name in work.points
    }
    rows = {name: torch.from_numpy(held).view(torch.bfloat16) for name, held in maps.items()}
    start = stop = 0

    def attach(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(grad: torch.Tensor) -> None:
            rows[name][start:stop].copy_(work.kept(grad))

        return lambda module, args, output: (first_tensor(output).register_hook(hook), None)[1]

    handles = [work.model.get_submodule(name).register_forward_hook(attach(name)) for name in work.points]
    with tlfast.freeze(work.model), hooked(handles):
        for batch in work.batches:
            start, stop = stop, stop + len(batch.input_ids)
            work.backward(batch)
        for held in maps.values():
            held.flush()


def read_memmap(work: Work, out: Path, point: str) -> torch.Tensor:
    """All rows of a point from its .npy file."""
    return torch.from_numpy(np.load(out / f"{point}.npy")).view(torch.bfloat16)


FLOOR = "forward and backward (floor)"
COLLECT = "tlfast.collect"
SAVE = "full hooks, torch.save"
MEMMAP = "tensor hooks, memmap"

VARIANTS: dict[str, Variant] = {
    FLOOR: Variant(floor, None),
    SAVE: Variant(full_hooks_torch_save, read_saved),
    MEMMAP: Variant(tensor_hooks_memmap, read_memmap),
    COLLECT: Variant(collect, read_dataset),
}
