"""The ways to get one unit's rows onto the disk, durable, that the bench of datasets compares, and their memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tlfast.collecting.drain import UnitMemory
from tlfast.dataset import DatasetWriter, Example, Plan
from tlfast.dataset.format.layout import PAGE_BYTES, Column, as_integers, unit_layout
from tlfast.dataset.format.plan import Unit
from tlfast.dataset.places.durable import PendingFile, sync_folder
from tlfast.dataset.write import native as native_writer
from tlfast.dataset.write.payload import writing

from .memory import peak_above

RAW = "raw O_DIRECT"
NATIVE = "tlfast unit file"
WHOLE = "tlfast write_unit"
PYTHON = "tlfast unit file, pure Python"
SAVE_FILE = "safetensors.save_file"
RAW_BYTES = 8 << 20  # a write: at 4 and 16 MiB the disk is no faster


@dataclass(frozen=True)
class Input:
    """One unit as it lies after the drain, and what its row table says."""

    unit: Unit
    columns: dict[str, Column]
    memory: torch.Tensor  # all its bytes, in the order of the file
    tensors: dict[str, torch.Tensor]
    examples: list[Example]

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.memory.nbytes


def make_input(dtype: str, n_bytes: int, width: int = 768, n_points: int = 24, n_tokens: int = 128) -> Input:
    """Random rows of ``width`` at each point, together about ``n_bytes``."""
    column = Column(getattr(torch, dtype), (width,))
    columns = {f"blocks.{k}.hook_resid_post": column for k in range(n_points)}
    n_rows = n_bytes // (n_points * column.row_bytes)
    room = UnitMemory(columns, n_rows, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    tensors = room.block(n_rows)
    for tensor in tensors.values():
        tensor.normal_(generator=generator)
    tokens = list(range(n_tokens))
    examples = [Example(k, tokens, "text", k * n_tokens, n_tokens) for k in range(n_rows)]
    return Input(Plan(n_rows, n_rows).unit(0), columns, room.bytes_of(n_rows), tensors, examples)


def raw(unit: Input, out: Path) -> None:
    """Nothing but the bytes: whole pages past the cache, the rest through it; no checksum, no norm, no header."""
    whole = unit.n_bytes // PAGE_BYTES * PAGE_BYTES
    data = unit.memory.numpy()
    fd = os.open(out / "raw.tmp", os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_DIRECT", 0))
    try:
        os.posix_fallocate(fd, 0, whole)
        for start in range(0, whole, RAW_BYTES):
            os.pwrite(fd, data[start : min(start + RAW_BYTES, whole)].data, start)
        os.fdatasync(fd)
    finally:
        os.close(fd)
    os.replace(out / "raw.tmp", out / "raw")
    sync_folder(out)


def unit_file(native: bool) -> Callable[[Input, Path], None]:
    """The unit's safetensors file alone, with checksum and norms."""

    def write(unit: Input, out: Path) -> None:
        layout = unit_layout(unit.columns, unit.unit)
        with PendingFile(out / "unit.safetensors", layout.n_bytes) as file:
            file.start_with(layout.header)
            in_order = {name: unit.tensors[name] for name in layout.blocks}
            with writing(file, in_order, native_writer.loaded() if native else None):
                pass
            file.seal()
            file.rename()
        sync_folder(out)

    return write


def write_unit(unit: Input, out: Path) -> None:
    """All of it: the folder, the unit file, the row table, the commit."""
    plan = Plan(len(unit.unit), len(unit.unit))
    writer = DatasetWriter(out, header={}, columns=unit.columns, plan=plan)
    writer.write_unit(unit.unit, unit.tensors, unit.examples)


def _synced(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)
    sync_folder(path.parent)


def save_file(unit: Input, out: Path) -> None:
    """The safetensors library, and an fsync."""
    from safetensors.torch import save_file as save

    save(unit.tensors, out / "saved.safetensors")
    _synced(out / "saved.safetensors")


def memmap(unit: Input, out: Path) -> None:
    """One numpy memmap of all rows, flushed."""
    mapped = np.memmap(out / "rows.bin", np.uint8, "w+", shape=(unit.n_bytes,))
    mapped[:] = unit.memory.numpy()
    mapped.flush()
    sync_folder(out)


def torch_save(unit: Input, out: Path) -> None:
    """torch.save, and an fsync."""
    torch.save(unit.tensors, out / "rows.pt")
    _synced(out / "rows.pt")


VARIANTS: dict[str, Callable[[Input, Path], None]] = {
    RAW: raw,
    NATIVE: unit_file(native=True),
    WHOLE: write_unit,
    PYTHON: unit_file(native=False),
    SAVE_FILE: save_file,
    "numpy memmap, flush": memmap,
    "torch.save": torch_save,
}


def bytes_of(tensors: dict[str, torch.Tensor]) -> bytes:
    """The payload that they make."""
    return b"".join(as_integers(tensor).tobytes() for tensor in tensors.values())


def main() -> None:
    """Print how much memory a variant takes above its input; a process of its own, started by `memory.measure`."""
    torch.set_num_threads(1)
    arguments, variant, folder = json.loads(sys.argv[1])
    with tempfile.TemporaryDirectory(dir=folder) as out, contextlib.suppress(FileExistsError):
        VARIANTS[variant](make_input(arguments["dtype"], 1 << 20), Path(out))  # loads what is loaded late
    unit = make_input(**arguments)
    gc.collect()
    with tempfile.TemporaryDirectory(dir=folder) as out:
        print(peak_above(lambda: VARIANTS[variant](unit, Path(out))))


if __name__ == "__main__":
    main()
