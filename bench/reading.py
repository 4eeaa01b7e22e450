"""The same rows in a tlfast dataset, a plain file, Lance and Hugging Face datasets, and how each reads them."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlfast.dataset import DatasetWriter, Example, Plan, ShuffledBatches, open_dataset
from tlfast.dataset.read.shuffle import Blocks, Group, permutation

WIDTH = 768
ROW_BYTES = 2 * WIDTH
POINT = "h"
MIXED = 16
BLOCK_ROWS = 512  # 768 KiB

Batch = tuple[torch.Tensor, torch.Tensor]  # ids, rows as int16 bits


@dataclass
class Stored:
    """Where the rows lie in each form."""

    folder: Path
    n_rows: int
    hf_rows: int  # Hugging Face's Array2D takes so long that it gets fewer

    @property
    def ours(self) -> Path:
        """The tlfast dataset."""
        return self.folder / "ours"

    @property
    def raw(self) -> Path:
        """Nothing but the rows."""
        return self.folder / "raw.bin"

    @property
    def lance(self) -> Path:
        """A Lance dataset of float16 lists: the same bits."""
        return self.folder / "rows.lance"

    @property
    def hf(self) -> Path:
        """A folder of datasets.save_to_disk, Array2D of float16: the same bits."""
        return self.folder / "hf"


def rows_from(start: int, stop: int) -> np.ndarray[Any, Any]:
    """The bits of rows ``start`` to ``stop``: finite as bfloat16 and as float16, each row different."""
    generator = np.random.default_rng(start)
    rows = generator.integers(0, 0x3C00, (stop - start, WIDTH), dtype=np.int16)
    rows[:, :4] = np.arange(start, stop)[:, None] >> np.array([0, 12, 24, 36]) & 0xFFF
    return rows


def ids_in(rows: torch.Tensor) -> torch.Tensor:
    """The row numbers that rows_from put into rows."""
    return (rows[:, :4].long() << torch.tensor([0, 12, 24, 36])).sum(1)


def store(folder: Path, n_rows: int, rows_per_unit: int, hf_rows: int) -> Stored:
    """Write the rows in every form."""
    import datasets
    import lance
    import pyarrow as pa

    hf_rows = min(hf_rows, n_rows)
    stored, plan = Stored(folder, n_rows, hf_rows), Plan(n_rows, rows_per_unit)
    writer = DatasetWriter(stored.ours, header={}, columns={POINT: (torch.bfloat16, (WIDTH,))}, plan=plan)

    def as_lance() -> Iterator[Any]:
        with open(stored.raw, "wb") as raw:
            for unit in plan.units:
                rows = rows_from(unit.start, unit.stop)
                raw.write(rows.tobytes())
                examples = [Example(i, [i & 0xFFFF], "", 0, 1) for i in range(unit.start, unit.stop)]
                writer.write_unit(unit, {POINT: torch.from_numpy(rows).view(torch.bfloat16)}, examples)
                lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.view(np.float16).reshape(-1)), WIDTH)
                yield pa.record_batch([lists], [POINT])
            os.fsync(raw.fileno())

    schema = pa.schema([pa.field(POINT, pa.list_(pa.float16(), WIDTH))])
    lance.write_dataset(as_lance(), str(stored.lance), schema=schema)
    datasets.disable_progress_bars()
    features = datasets.Features({POINT: datasets.Array2D(shape=(1, WIDTH), dtype="float16")})
    plain = np.fromfile(stored.raw, np.float16, hf_rows * WIDTH).reshape(hf_rows, 1, WIDTH)
    datasets.Dataset.from_dict({POINT: plain}, features=features).save_to_disk(str(stored.hf))
    os.sync()
    return stored


def forget(folder: Path) -> float:
    """Drop what is in memory of all files under a folder; return which share of sampled pages still is there.

    Pages that something maps stay: no variant holds a mapping from one sample to the next.
    """
    there = n = 0
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            for offset in range(0, size, max(4096, size // 8)):
                n += 1
                try:
                    there += os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
                except BlockingIOError:
                    continue
        finally:
            os.close(fd)
    return there / max(1, n)


def raw_rows(stored: Stored) -> np.ndarray[Any, Any]:
    """The plain file, mapped as numpy does it."""
    return np.memmap(stored.raw, np.int16, "r", shape=(stored.n_rows, WIDTH))


def our_batches(stored: Stored, batch_size: int) -> Iterator[Batch]:
    """Batches of a ShuffledBatches, as it comes."""
    for batch in ShuffledBatches(open_dataset(stored.ours), batch_size):
        yield batch["id"], batch[POINT].view(torch.int16)


def lance_batches(stored: Stored, batch_size: int) -> Iterator[Batch]:
    """The same blocks in the same order out of Lance, read ahead by a thread as well."""
    import lance

    dataset = lance.dataset(str(stored.lance))
    blocks = Blocks.cut(np.array([0]), np.array([stored.n_rows]), BLOCK_ROWS)

    def read(group: Group) -> Batch:
        rows = np.concatenate([np.arange(a, b) for a, b in zip(group.starts, group.stops, strict=True)])
        column = dataset.take(rows, columns=[POINT]).column(POINT).combine_chunks()
        bits = column.values.to_numpy(zero_copy_only=True).view(np.int16).reshape(-1, WIDTH)
        return torch.from_numpy(rows), torch.from_numpy(bits.copy())  # Arrow's memory can't be written, torch warns

    with ThreadPoolExecutor(1) as thread:
        groups = list(blocks.groups(0, stored.n_rows, MIXED, (0, 0)))
        ahead = thread.submit(read, groups[0])
        for k, group in enumerate(groups):
            ids, rows = ahead.result()
            if k + 1 < len(groups):
                ahead = thread.submit(read, groups[k + 1])
            for order in torch.from_numpy(group.order).split(batch_size):
                yield ids[order], rows.index_select(0, order)


def hf_batches(stored: Stored, batch_size: int) -> Iterator[Batch]:
    """Shuffled batches of Hugging Face datasets, in torch's format."""
    import datasets

    dataset = datasets.load_from_disk(str(stored.hf)).with_format("torch", dtype=torch.float16)
    order = permutation(stored.hf_rows, 0, 0)
    for at in range(0, stored.hf_rows, batch_size):
        rows = dataset[order[at : at + batch_size]][POINT].view(torch.int16).reshape(-1, WIDTH)
        yield torch.from_numpy(order[at : at + batch_size]), rows


def sequential(path: Path, n_bytes: int, direct: bool) -> None:
    """Read the first bytes of a file in order, 4 MiB at a time: what the disk gives."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        block = mmap.mmap(-1, 4 << 20)  # aligned, as O_DIRECT wants it
        done = 0
        while done < n_bytes:
            n = os.preadv(fd, [block], done)
            if n == 0:
                break
            done += n
    finally:
        os.close(fd)
