"""All scores of all rows: in memory, or in a file of numpy that gets its name when it is whole."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from ..dataset.places.durable import PendingFile, sync_folder, write_all
from ..dataset.read.search import Block
from ..errors import broken_rule
from .queries import WHO

_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.float64: np.dtype("<f8")}
MOST_BYTES = 1 << 30  # of scores in memory


def check_out(out: str | os.PathLike[str], endings: tuple[str, ...] = (".npy",)) -> Path:
    """Return the path of a file that can be made; ValueError for another."""
    path = Path(out)
    if path.suffix not in endings:
        remedy = "All scores go to a file of numpy."
        raise ValueError(broken_rule(WHO, "out", f"end in {' or '.join(endings)}", repr(str(out)), remedy))
    if os.path.lexists(path):
        raise exists(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(broken_rule(WHO, "out", "lie in a folder that exists", path, "Make the folder first."))
    return path.absolute()


def exists(path: Path) -> ValueError:
    """What is wrong with a name that is taken."""
    remedy = "Choose another; nothing is overwritten."
    return ValueError(broken_rule(WHO, "out", "be a new name", f"{path}, which exists", remedy))


def check_room(n_queries: int, n_rows: int, dtype: torch.dtype) -> None:
    """ValueError for more scores than belong into memory."""
    n_bytes = n_queries * n_rows * dtype.itemsize
    if n_bytes > MOST_BYTES:
        rule, got = "be a number where all scores fill the memory", f"None with {n_bytes / 1e9:.1f} GB of them"
        raise ValueError(broken_rule(WHO, "k", rule, got, 'Or give out="scores.npy".'))


class InMemory:
    """All scores as a tensor: [queries, rows]."""

    def __init__(self, n_queries: int, n_rows: int, dtype: torch.dtype) -> None:
        self.scores = torch.full((n_queries, n_rows), torch.nan, dtype=dtype)

    def add(self, which: slice, scores: torch.Tensor, block: Block) -> None:
        """Take the scores of the next rows."""
        start = int(block.rows[0])
        self.scores[which, start : start + len(block.rows)] = scores.cpu()


class InFile:
    """All scores in a file, [queries, rows], which `numpy.load(path, mmap_mode="r")` maps.

    It is written in room that is taken before: a full disk is an error, where a mapping would end the process.
    """

    def __init__(self, path: Path, n_queries: int, n_rows: int, dtype: torch.dtype) -> None:
        self._path, self._n_rows, self._dtype = path, n_rows, _NUMPY[dtype]
        head = io.BytesIO()
        said = {"descr": self._dtype.str, "fortran_order": False, "shape": (n_queries, n_rows)}
        np.lib.format.write_array_header_1_0(head, said)
        self._file = PendingFile(path, head.tell() + n_queries * n_rows * self._dtype.itemsize)
        self._file.start_with(head.getvalue())
        self._start = head.tell()

    def __enter__(self) -> InFile:
        return self

    def add(self, which: slice, scores: torch.Tensor, block: Block) -> None:
        """Take the scores of the next rows."""
        start = int(block.rows[0])
        for query, values in enumerate(scores.cpu().contiguous().numpy().astype(self._dtype, copy=False), which.start):
            at = self._start + (query * self._n_rows + start) * self._dtype.itemsize
            write_all(self._file.fd, values.view(np.uint8).data, at, self._path)
            self._file.position += values.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.seal()
                if not self._file.link():
                    raise exists(self._path)
                sync_folder(self._path.parent)
        finally:
            self._file.discard()

    @property
    def scores(self) -> torch.Tensor:
        """The scores, mapped: what is written into the tensor doesn't reach the file."""
        return torch.from_numpy(np.load(self._path, mmap_mode="c"))
