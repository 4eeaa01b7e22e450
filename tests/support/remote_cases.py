"""Datasets at URLs for the tests: writing one, and what lies there."""

from __future__ import annotations

import re

from dataset_cases import COLUMNS, HEADER, PLAN, content, make_writer, truth, write_units
from shared_filesystem import SharedFileSystem

from tlfast.dataset import DatasetWriter
from tlfast.dataset.places.remote_store import RemoteStore

ARGUMENTS = {"header": HEADER, "columns": COLUMNS, "plan": PLAN, "config": "reduce: mean\n"}


def remote_writer(url, **changes):
    """A writer to ``url`` with the dataset of `dataset_cases`."""
    return DatasetWriter(url, **(ARGUMENTS | changes))


def make_remote(url, tensors=None, **changes):
    """A complete dataset at ``url``."""
    with remote_writer(url, **changes) as writer:
        write_units(writer, truth() if tensors is None else tensors)


def objects(url):
    """Every object of the dataset at ``url`` but dataset.json, which says when it was made."""
    store = RemoteStore(url)
    names = [name for name, size in store.sizes("", "test").items() if size is not None and name != "dataset.json"]
    for folder in ("data", "rows", "commits"):
        names += [f"{folder}/{name}" for name in store.sizes(folder, "test")]
    return {name: store.read(name, "test", 1 << 30) for name in sorted(names)}


def local_content(folder, **changes):
    """What the same dataset is in a folder of this machine."""
    write_units(make_writer(folder, **changes))
    return {name: data for name, data in content(folder).items() if name != ".lock"}


def staged(tmp_path):
    """The files of units that wait to be uploaded."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if re.match(r"u\d{6}\.", path.name))


def fault(monkeypatch, before):
    """Let the store do ``before(call, path)`` before each request."""
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(before))
