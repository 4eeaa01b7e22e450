"""Export a dataset: into another format, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import dataset_error, extra
from ..places.durable import sync_folder
from ..read.arrow_rows import Rows
from ..read.reader import open_dataset
from ..read.views import Readable
from ..write.folder import check_disk_space
from .formats import FORMATS, Format

_WHO = "export_dataset"
_EXAMPLE_TOKENS = 512  # tokens per example where the dataset doesn't say


def export_dataset(
    path: str | PathLike[str] | Readable,
    out: str | PathLike[str] | None = None,
    *,
    to: str,
    points: Sequence[str] | None = None,
    partial: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write the dataset in folder ``path``, or an open one or a view, in another format, in parts of 32 MiB.

    Args:
        path: the dataset's folder; or an open dataset, or a view of some, whose rows are written.
        out: the new file or folder; None: beside the dataset, named after it. Nothing may be there. A view has no name:
            it must be given.
        to: "parquet" or "arrow" (one file: the columns of the row tables and ``grad:<point>``, flat lists of fixed
            size), "npy" (a folder: an array per point, ids.npy and points.json), "hf" (a folder for
            `datasets.load_from_disk`), "lance" (a Lance dataset; dots in names become ``_``) or "bergson" (a folder,
            its index: rows of weights as its own are, per token too, other rows to search among). bfloat16 becomes
            float32, which holds it exactly. Of points per token each real token is a row, with "id" and "position".
        points: the points to export, in this order; None: all. Those per token and others are exports of their own.
        partial: export the committed units although others are missing.
        progress: called with the number of examples whose rows were just written.

    Returns:
        The path of what was made. It appears under this name when it is whole and on the disk.

    Raises:
        DatasetError: where the dataset is incomplete or damaged, ``out`` exists, the disk is too full, or bergson would
            misread the rows.
        ImportError: naming the extra that the format needs.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, export_dataset
        >>> folder, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> writer = DatasetWriter(folder + "/ds", header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([[3.0, 4.0]])}, [Example(0, [1], "a", 0, 1)])
        True
        >>> export_dataset(folder + "/ds", to="npy").name
        'ds-npy'
    """
    if to not in FORMATS:
        raise dataset_error(_WHO, "to", f"be one of {', '.join(FORMATS)}", repr(to), "Choose a format.")
    form = FORMATS[to]
    for library, name in form.needs:
        extra(library, _WHO, name)
    dataset = path if isinstance(path, Readable) else open_dataset(path, partial=partial)
    if not len(dataset):
        if isinstance(path, Readable):
            raise dataset_error(_WHO, "path", "hold at least one row", "a view without any", "Select some rows.")
        raise dataset_error(_WHO, "path", "hold at least one unit", f"{path} without any", "Collect something first.")
    if out is None and not hasattr(dataset, "path"):
        raise dataset_error(_WHO, "out", "be given for a view", "none", "Name the new file or folder.")
    rows = Rows(dataset, _known(dataset, points), progress, who=_WHO, tokens=form.tokens)
    target = beside(dataset, form.ending) if out is None else Path(out)
    if os.path.lexists(target):
        raise _exists(target)
    if not target.absolute().parent.is_dir():
        raise dataset_error(_WHO, "out", "lie in a folder that exists", target, "Make the folder first.")
    check_disk_space(target, _estimate(rows), _WHO)
    with _made_whole(target, form) as folder:
        form.write(rows, folder, target.absolute())
    return target


def beside(dataset: Any, ending: str) -> Path:
    """Return a path named after the dataset: beside its folder, or in the working folder if it lies elsewhere."""
    if isinstance(dataset.path, Path):
        return Path(f"{os.path.abspath(dataset.path) if dataset.path.name in ('', '..') else dataset.path}{ending}")
    return Path(dataset.path.rstrip("/").rpartition("/")[2] + ending)


def _known(dataset: Readable, points: Sequence[str] | None) -> list[str]:
    if points is None:
        return dataset.points
    wanted = list(dict.fromkeys([points] if isinstance(points, str) else points))
    unknown = [point for point in wanted if point not in dataset]
    if unknown or not wanted:
        rule = f"be some of {', '.join(dataset.points[:5])}{', ...' if len(dataset.points) > 5 else ''}"
        raise dataset_error(_WHO, "points", rule, ", ".join(map(repr, unknown)) or "none", "See ds.points.")
    return wanted


def _exists(target: Path) -> Exception:
    rule = "be a new name"
    return dataset_error(_WHO, "out", rule, f"{target}, which exists", "Choose another; nothing is overwritten.")


def _estimate(rows: Rows) -> int:
    per_example = max(map(_tokens_per_example, rows.dataset.sources))  # those of a view are as long as those around
    norms_and_numbers = 4 * len(rows.dataset.points) + 64
    n_rows = per_example if rows.per_token else 1
    return int(len(rows) * (n_rows * rows.row_bytes + 4 * per_example + norms_and_numbers))


def _tokens_per_example(source: Any) -> float:
    tokens = source.info()["examples"].get("tokens")
    return tokens / source.plan.n_examples if type(tokens) is int else _EXAMPLE_TOKENS


@contextmanager
def _made_whole(target: Path, form: Format) -> Iterator[Path]:
    """Give a folder to write in; what is in it gets the name ``target`` once all of it is on the disk."""
    folder = target.absolute().parent / f".tlfast-{secrets.token_hex(8)}.tmp"
    folder.mkdir()
    try:
        yield folder
        _sync_all(folder)
        try:
            if form.is_file:
                os.link(folder / "data", target)
            else:
                os.rename(folder, target)  # an empty folder of this name is replaced, anything else refused
        except OSError as error:
            if os.path.lexists(target):  # somebody was faster
                raise _exists(target) from error
            raise
        sync_folder(target.absolute().parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for inner, _, files in os.walk(folder):
        for name in files:
            fd = os.open(os.path.join(inner, name), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_folder(Path(inner))
