"""Merge datasets into one that consists of them: by reference, nothing is copied."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import dataset_error
from ..format.merged import FILE_NAME, MOST_PARTS, Part, to_bytes
from ..places.remote import url_of
from ..places.write_store import WriteFolder, as_write_store
from ..read.merged import MergedDataset
from ..read.reader import GradientDataset, open_dataset
from ..read.views import MAY_DIFFER, check_same_columns, check_same_headers, check_same_types
from .folder import refuse_stranger

_WHO = "merge_datasets"


def merge_datasets(
    out: str | PathLike[str], datasets: Sequence[Any], *, may_differ: Iterable[str] = (), partial: bool = False
) -> MergedDataset:
    """Make one dataset of several runs of the same points, in a new folder that names them; nothing is copied.

    It is opened, verified, read, searched and exported as any other; its rows and ids are those of the first run, then
    those of the second one, and so on. The runs stay where they are: a folder is named relative to ``out``.

    Args:
        out: a new or empty folder.
        datasets: paths, URLs, or open datasets; merged ones too, whose parts are taken.
        may_differ: which keys of their headers may differ, beside ``examples``, ``text`` and ``batching``.
        partial: merge them although units are missing.

    Returns:
        The dataset, open.

    Raises:
        DatasetError: where points, dtypes, shapes, encodings, kept fields, or headers (the model, the loss, ...)
            differ, a dataset is named twice, or ``out`` is not empty. Nothing is made then.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, merge_datasets
        >>> folder, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> for name in "ab":
        ...     writer = DatasetWriter(f"{folder}/{name}", header={}, columns={"h": (torch.float32, ())}, plan=plan)
        ...     assert writer.write_unit(plan.unit(0), {"h": torch.ones(1)}, [Example(0, [1], name, 0, 1)])
        >>> merged = merge_datasets(f"{folder}/both", [f"{folder}/a", f"{folder}/b"])
        >>> merged.ids, merged.examples[1]["source"]
        (tensor([0, 1]), 'b')
    """
    store = as_write_store(out)
    if not isinstance(store, WriteFolder):
        raise dataset_error(_WHO, "out", "be a folder of this machine", out, "Merge them into a folder here.")
    refuse_stranger(store, _WHO)
    if store.entries():
        raise dataset_error(_WHO, "out", f"be {store.empty}", out, "Choose another; nothing is overwritten.")
    sources = _opened(datasets, partial)
    columns = [{point: source.column(point) for point in source.points} for source in sources]
    check_same_columns(_WHO, columns)
    _check_kept([source.kept for source in sources])
    check_same_headers(_WHO, [source.header for source in sources], [*MAY_DIFFER, *may_differ])
    parts = [Part(_named(source, store), source.identity, source.plan.n_examples) for source in sources]
    twice = next((part.path for k, part in enumerate(parts) if part.path in [p.path for p in parts[:k]]), None)
    if twice is not None:
        raise dataset_error(_WHO, "datasets", "be different ones", f"{twice} twice", "Name each once.")
    merged = MergedDataset(store, parts, sources, partial)
    store.make_folders([""])
    if not store.create(FILE_NAME, to_bytes(parts)):
        raise dataset_error(_WHO, "out", f"be {store.empty}", f"{out}, made meanwhile", "Choose another.")
    store.sync()
    return merged


def _opened(datasets: Any, partial: bool) -> list[GradientDataset]:
    given = [datasets] if isinstance(datasets, (str, PathLike)) else list(datasets)
    opened: list[GradientDataset] = []
    for dataset in given:
        ds = open_dataset(dataset, partial=partial) if isinstance(dataset, (str, PathLike)) else dataset
        if not isinstance(ds, (GradientDataset, MergedDataset)):
            remedy = "A view has no folder: see concat_datasets, or export it."
            raise dataset_error(_WHO, "datasets", "be paths or open datasets", type(ds).__name__, remedy)
        opened += ds.sources
    if not 1 <= len(opened) <= MOST_PARTS:
        raise dataset_error(_WHO, "datasets", f"be 1 to {MOST_PARTS}", len(opened), "Name the folders.")
    for ds in opened:
        if len(ds.units) < ds.plan.n_units and not partial:
            rule, got = "be complete", f"{ds.path} with {len(ds.units)} of {ds.plan.n_units} units"
            raise dataset_error(_WHO, "datasets", rule, got, "Complete it first, or merge with partial=True.")
    return opened


def _check_kept(kept: list[dict[str, str]]) -> None:
    check_same_types(_WHO, kept)
    for number, fields in enumerate(kept[1:], 2):
        odd = next((name for name in [*kept[0], *fields] if name not in fields or name not in kept[0]), None)
        if odd is not None:
            got = f"in dataset {1 if odd in kept[0] else number} alone of datasets 1 and {number}"
            remedy = "A merged dataset has all that its parts have; concat_datasets reads what they share."
            raise dataset_error(_WHO, f"field {odd!r}", "be kept by all datasets", got, remedy)


def _named(source: GradientDataset, out: WriteFolder) -> str:
    """The path of a dataset as merged.json has it: relative, so that both can be moved together; or the URL."""
    place = source.path
    if isinstance(place, Path):
        return os.path.relpath(os.path.abspath(place), os.path.abspath(out.folder))
    return place if url_of(place) else str(place)
