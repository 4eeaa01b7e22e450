"""What lies at the URL that a dataset goes to: whose it is, making it, clearing it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from ..errors import dataset_error
from ..format import extension
from ..format.description import CARD, CONFIG, FILE_NAME, FORMAT, MAX_BYTES, Description
from ..places.durable import LOCK_NAME, TEMPORARY
from ..places.remote import local_path
from ..places.remote_store import RemoteStore
from ..places.store import as_store
from . import folder
from .folder import OURS, refuse_other_extension, some


def holds_dataset(out: str | os.PathLike[str], who: str) -> bool:
    """Whether a dataset of tlfast lies in ``out``, a path or a URL, of whatever version and however damaged."""
    place = as_store(out)
    return is_dataset(place, who) if isinstance(place, RemoteStore) else folder.is_dataset(Path(local_path(out)))


def refuse_foreign(out: str | os.PathLike[str], who: str) -> None:
    """Raise DatasetError where something else than a dataset of tlfast lies in ``out``, a path or a URL."""
    place = as_store(out)
    if isinstance(place, RemoteStore):
        refuse_stranger_at(place, who)
    else:
        folder.refuse_stranger(Path(local_path(out)), who)


def is_dataset(store: RemoteStore, who: str) -> bool:
    """Whether a dataset.json of this format is there, of whatever version and however damaged."""
    names = store.sizes("", who)
    return FILE_NAME in names and f'"{FORMAT}"' in store.read(FILE_NAME, who, MAX_BYTES).decode(errors="replace")


def refuse_stranger_at(store: RemoteStore, who: str) -> None:
    """Raise DatasetError where other objects than a dataset of tlfast lie at the URL."""
    names = [name for name in store.sizes("", who) if not TEMPORARY.fullmatch(name)]
    if names and not is_dataset(store, who):
        remedy = "Choose another URL; tlfast never deletes what it did not write."
        got = f"{store.url}: {some(sorted(names))}"
        raise dataset_error(who, "out", "be an empty place, or a tlfast dataset", got, remedy)


def create_at(store: RemoteStore, description: Description, config: str, card: str, who: str) -> None:
    """Put dataset.json there, once: with two processes at once the first wins. Then what is missing."""
    there = store.folder
    if not there.exists(FILE_NAME):
        if not there.refuses_to_replace():
            warnings.warn(
                f"{who}: {store.url} has no conditional put: give each unit one writer at a time. See docs/remote.md.",
                RuntimeWarning,
                stacklevel=2,
            )
        there.create(FILE_NAME, description.to_bytes())
    for name, text in ((CONFIG, config), (CARD, card)):
        if not there.exists(name):
            there.create(name, text.encode())


def publish_extension_at(store: RemoteStore, new: Description, config: str, cards: tuple[str, str], who: str) -> None:
    """Publish the last extension of ``new``, as `folder.publish_extension` does it in a folder."""
    added, there = new.extensions[-1], store.folder
    if there.exists(added.path):
        refuse_other_extension(store.where(added.path), store.read(added.path, who, extension.MAX_BYTES), added)
    if there.exists(CARD) and store.read(CARD, who, MAX_BYTES) == cards[0].encode():
        there.replace(CARD, cards[1].encode())
    if config:
        there.replace(CONFIG, config.encode())
    if not there.create(added.path, added.to_bytes()):
        refuse_other_extension(store.where(added.path), store.read(added.path, who, extension.MAX_BYTES), added)


def clear_at(store: RemoteStore, who: str) -> None:
    """Remove the dataset at the URL: commits first, dataset.json last, so that a kill leaves no half-truth."""
    found: list[str] = []
    strangers: list[str] = []
    for part in ("commits", *(part for part in OURS if part != "commits")):
        for name in sorted(store.sizes(part, who), reverse=True):  # of extensions the last first
            (found if OURS[part].fullmatch(name) else strangers).append(f"{part}/{name}")
    for name, size in sorted(store.sizes("", who).items()):
        if name in (CONFIG, CARD, LOCK_NAME) or TEMPORARY.fullmatch(name):
            found.append(name)
        elif name != FILE_NAME and not (size is None and name in OURS):
            strangers.append(name)
    if strangers:
        remedy = "Move these away first; tlfast never deletes what it did not write."
        raise dataset_error(who, "out", "hold only a tlfast dataset to be overwritten", some(strangers), remedy)
    for name in (*found, FILE_NAME):
        store.folder.remove(name)
