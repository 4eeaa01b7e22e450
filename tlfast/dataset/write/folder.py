"""The folder of a dataset, at a path or a URL: whose it is, making it, extending it, clearing it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ..errors import DatasetError, dataset_error
from ..format import extension
from ..format.card import recounted
from ..format.commits import FOLDERS
from ..format.description import CARD, CONFIG, EXAMPLES, FILE_NAME, FORMAT, MAX_BYTES, Description
from ..places.durable import LOCK_NAME, TEMPORARY
from ..places.write_store import WriteFolder, WriteStore, WriteUrl, as_write_store

OURS = {  # which names in its folders are of a dataset; a CRC32C in a name is that of an object store
    "commits": re.compile(r"u[0-9]{6,18}\.json", re.ASCII),
    "data": re.compile(r"u[0-9]{6,18}(-[0-9a-f]{8})?\.safetensors", re.ASCII),
    "rows": re.compile(r"u[0-9]{6,18}(-[0-9a-f]{8})?\.parquet", re.ASCII),
    extension.FOLDER: extension.FILE,
}
Place = str | PathLike[str] | WriteFolder | WriteUrl


def holds_dataset(out: Place, who: str) -> bool:
    """Whether a dataset.json of this format lies in ``out``, of whatever version and however damaged."""
    try:
        return f'"{FORMAT}"' in as_write_store(out).read(FILE_NAME, who, MAX_BYTES).decode(errors="replace")
    except DatasetError:
        return False


def refuse_stranger(out: Place, who: str) -> None:
    """Raise DatasetError where ``out`` is neither empty nor a dataset of tlfast.

    The leavings of a run that was killed before it wrote dataset.json are nothing.
    """
    store = as_write_store(out)
    try:
        names = [name for name in store.entries() if not TEMPORARY.fullmatch(name) and name != LOCK_NAME]
        got = f"a {'folder' if isinstance(store, WriteFolder) else 'place'} with {some(sorted(names))}"
    except NotADirectoryError:
        names, got = [""], "a file"
    if names and not holds_dataset(store, who):
        remedy = f"Choose another {store.noun}; tlfast never deletes what it did not write."
        rule = f"be {store.empty}, or a tlfast dataset"
        raise dataset_error(who, "out", rule, f"{store.where('')}: {got}", remedy)


def some(names: list[str]) -> str:
    """Name the first of some files, for a message."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def our_files(store: WriteStore, who: str) -> list[str]:
    """Return all files of the dataset, commits first and dataset.json last: so a kill between leaves no half-truth.

    Raises DatasetError where anything else lies there, so that clearing never removes a stranger's file.
    """
    files: list[str] = []
    strangers: list[str] = []
    top = store.entries()
    for part, names in OURS.items():
        if not top.get(part, True):
            strangers.append(part)
            continue
        inside = store.entries(part) if part in top else {}
        for name, is_folder in sorted(inside.items(), reverse=True):  # of extensions the last first
            known = names.fullmatch(name) or TEMPORARY.fullmatch(name)
            (files if known and not is_folder else strangers).append(f"{part}/{name}")
    for name, is_folder in sorted(top.items()):
        if not is_folder and (name in (CONFIG, CARD, EXAMPLES, LOCK_NAME, FILE_NAME) or TEMPORARY.fullmatch(name)):
            files.append(name)
        elif name not in OURS:
            strangers.append(name)
    if strangers:
        remedy = "Move these away first; tlfast never deletes what it did not write."
        raise dataset_error(who, "out", "hold only a tlfast dataset to be overwritten", some(strangers), remedy)
    return sorted(files, key=lambda name: name == FILE_NAME)


def clear(store: WriteStore, files: Sequence[str]) -> None:
    """Remove the files of a dataset, in this order, and their folders."""
    for name in files:
        store.remove(name)
    store.remove_folders(list(OURS))
    store.sync()


def create(store: WriteStore, description: Description, config: str, card: str, who: str) -> None:
    """Make the folder and write dataset.json, once: with two processes at once the first wins. Then what is missing."""
    store.make_folders([""])
    if not store.exists(FILE_NAME):
        store.warn_unless_first_wins(who)
        store.create(FILE_NAME, description.to_bytes())
    store.make_folders(FOLDERS)
    for name, text in ((CONFIG, config), (CARD, card)):
        if not store.exists(name):
            store.create(name, text.encode())
    store.sync()


def publish_extension(store: WriteStore, new: Description, config: str, cards: tuple[str, str]) -> None:
    """Publish the last extension of ``new``, once: of two processes at once the first wins, and both may go on.

    config.yaml becomes ``config``, and the card the second of ``cards`` where it is still the first; in one of another
    version of tlfast the number of examples is changed. A card of one's own stays.

    Raises DatasetError where another extension has its number.
    """
    added = new.extensions[-1]
    if store.exists(added.path):
        _refuse_another(store, added)
    # Card and config first: a run that is killed here is repeated with the same ones.
    there = _card(store)
    if there is not None and (card := recounted(there, *cards)) != there:
        store.replace(CARD, card.encode())
    if config:
        store.replace(CONFIG, config.encode())
    store.make_folders((extension.FOLDER,))
    store.sync()
    if not store.create(added.path, added.to_bytes()):
        _refuse_another(store, added)


def _card(store: WriteStore) -> str | None:
    """The card that is there; None where there is none that tlfast could have written."""
    try:
        return store.read(CARD, "extend", MAX_BYTES).decode()
    except (DatasetError, UnicodeDecodeError):  # it is longer, a link, not there, or another's
        return None


def _refuse_another(store: WriteStore, added: extension.Extension) -> None:
    if store.read(added.path, "extend", extension.MAX_BYTES) != added.to_bytes():
        rule, got = "be free for this extension", f"one by other examples in {store.where(added.path)}"
        raise dataset_error("extend", "out", rule, got, "Another run has extended it; start again to see it.")


def check_disk_space(out: Path, n_bytes: int, who: str, freed: int = 0) -> None:
    """Raise DatasetError where the disk of ``out`` has less than ``n_bytes`` free (``freed`` are about to be)."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + freed
    if free < n_bytes:
        rule = f"have {n_bytes / 1e9:.3f} GB free for this dataset"
        remedy = "Free some space, choose another disk, or collect fewer points or examples."
        raise dataset_error(who, "out", rule, f"{free / 1e9:.3f} GB at {out}", remedy)
