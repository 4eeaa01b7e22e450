"""The folder of a dataset: whose it is, making it, clearing it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import DatasetError, dataset_error
from ..format import extension
from ..format.commits import FOLDERS
from ..format.description import CARD, CONFIG, FILE_NAME, FORMAT, MAX_BYTES, Description, read_description
from ..places.durable import (
    LOCK_NAME,
    TEMPORARY,
    hold,
    locked,
    read_small,
    sync_folder,
    write_small,
)

OURS = {  # which names in its folders are of a dataset; a CRC32C in a name is that of an object store
    "data": re.compile(r"u[0-9]{6,18}(-[0-9a-f]{8})?\.safetensors", re.ASCII),
    "rows": re.compile(r"u[0-9]{6,18}(-[0-9a-f]{8})?\.parquet", re.ASCII),
    "commits": re.compile(r"u[0-9]{6,18}\.json", re.ASCII),
    extension.FOLDER: extension.FILE,
}


def is_dataset(out: Path) -> bool:
    """Whether ``out`` holds a dataset.json of this format, of whatever version and however damaged."""
    try:
        return f'"{FORMAT}"' in read_small(out / FILE_NAME, "tlfast.dataset", MAX_BYTES).decode(errors="replace")
    except DatasetError:
        return False


def is_empty(out: Path) -> bool:
    """Whether nothing lies in ``out`` but the leavings of a run killed before it wrote dataset.json."""
    return not out.exists() or (
        out.is_dir() and all(TEMPORARY.fullmatch(name) or name == LOCK_NAME for name in os.listdir(out))
    )


def refuse_stranger(out: Path, who: str) -> None:
    """Raise DatasetError where ``out`` is neither empty nor a dataset of tlfast."""
    if not is_empty(out) and not is_dataset(out):
        remedy = "Choose another folder; tlfast never deletes what it did not write."
        got = "a file" if out.is_file() else f"a folder with {some(sorted(os.listdir(out)))}"
        raise dataset_error(who, "out", "be a new or empty folder, or a tlfast dataset", f"{out}: {got}", remedy)


def some(names: list[str]) -> str:
    """Name the first of some files, for a message."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def our_files(out: Path, who: str) -> list[Path]:
    """Return all files of the dataset in ``out``, commits first and dataset.json last.

    Raises DatasetError where anything else lies there, so that clearing never removes a stranger's file.
    """
    files: list[Path] = []
    strangers: list[str] = []
    for name in ("commits", "data", "rows", extension.FOLDER):
        folder = out / name
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            strangers.append(name)
        elif folder.is_dir():
            for entry in sorted(os.listdir(folder), reverse=True):  # of extensions the last first
                ours = OURS[name].fullmatch(entry) or TEMPORARY.fullmatch(entry)
                (files.append(folder / entry) if ours else strangers.append(f"{name}/{entry}"))
    for entry in sorted(os.listdir(out)):
        if entry in (CONFIG, CARD, LOCK_NAME) or TEMPORARY.fullmatch(entry):
            files.append(out / entry)
        elif entry not in (*OURS, FILE_NAME):
            strangers.append(entry)
    files += [out / FILE_NAME]
    strangers += [str(file.relative_to(out)) for file in files if file.is_dir() and not file.is_symlink()]
    if strangers:
        remedy = "Move these away first; tlfast never deletes what it did not write."
        raise dataset_error(who, "out", "hold only a tlfast dataset to be overwritten", some(strangers), remedy)
    return files


def clear(out: Path, who: str) -> None:
    """Remove the dataset in ``out``: commits first, dataset.json last, so that a kill leaves no half-truth."""
    for file in our_files(out, who):
        file.unlink(missing_ok=True)
    for name in OURS:
        if (out / name).is_dir():
            (out / name).rmdir()
    sync_folder(out)


def remove_unused(out: Path, description: Description, who: str) -> None:
    """Remove a dataset other than this one that was begun and has no unit, unless a writer of it is alive.

    Of several who find it one removes it; the others wait, and then find what the first has made in its place.
    """
    if read_description(out, who).config_hash == description.config_hash:
        return
    with locked(out):  # whose file stays: others wait for it
        if not is_dataset(out) or read_description(out, who).config_hash == description.config_hash:
            return
        commits = out / "commits"
        if commits.is_symlink() or not commits.is_dir():  # a kill came before it was made, or after it was removed
            _remove_remains(out, who)
        elif not any(map(OURS["commits"].fullmatch, os.listdir(commits))):
            alone = hold(commits, alone=True)
            if alone is not None:
                try:
                    _remove_remains(out, who)
                finally:
                    os.close(alone)


def _remove_remains(out: Path, who: str) -> None:
    for file in our_files(out, who)[:-1]:
        if file.name != LOCK_NAME:
            file.unlink(missing_ok=True)
    for name in OURS:
        if (out / name).is_dir():
            (out / name).rmdir()
    sync_folder(out)
    (out / FILE_NAME).unlink()  # the last, so that a kill leaves remains
    sync_folder(out)


def create(out: Path, description: Description, config: str, card: str) -> None:
    """Make the folder and write dataset.json, once: with two processes at once the first wins. Then what is missing."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / FILE_NAME).exists():
        write_small(out / FILE_NAME, description.to_bytes(), replace=False)
    for name in FOLDERS:
        (out / name).mkdir(exist_ok=True)
    for name, text in ((CONFIG, config), (CARD, card)):
        if not (out / name).exists():
            write_small(out / name, text.encode(), replace=False)
    sync_folder(out)
    sync_folder(out.parent)


def publish_extension(out: Path, new: Description, config: str, cards: tuple[str, str]) -> None:
    """Publish the last extension of ``new``, once: of two processes at once the first wins, and both may go on.

    config.yaml becomes ``config``, and the card the second of ``cards`` where it is still the first.

    Raises DatasetError where another extension has its number.
    """
    added = new.extensions[-1]
    _refuse_another(out, added)
    # Card and config first: a run that is killed here is repeated with the same ones.
    if (out / CARD).exists() and (out / CARD).read_bytes() == cards[0].encode():
        write_small(out / CARD, cards[1].encode(), replace=True)
    if config:
        write_small(out / CONFIG, config.encode(), replace=True)
    (out / extension.FOLDER).mkdir(exist_ok=True)
    sync_folder(out)
    if not write_small(out / added.path, added.to_bytes(), replace=False):
        _refuse_another(out, added)


def _refuse_another(out: Path, added: extension.Extension) -> None:
    path = out / added.path
    if os.path.lexists(path):
        refuse_other_extension(str(path), read_small(path, "extend", extension.MAX_BYTES), added)


def refuse_other_extension(path: str, there: bytes, added: extension.Extension) -> None:
    """Raise DatasetError where the file of an extension holds another one."""
    if there != added.to_bytes():
        rule, got = "be free for this extension", f"one by other examples in {path}"
        raise dataset_error("extend", "out", rule, got, "Another run has extended it; start again to see it.")


def check_disk_space(out: Path, n_bytes: int, who: str, freed: int = 0) -> None:
    """Raise DatasetError where the disk of ``out`` has less than ``n_bytes`` free (``freed`` are about to be)."""
    existing = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free + freed
    if free < n_bytes:
        rule = f"have {n_bytes / 1e9:.3f} GB free for this dataset"
        remedy = "Free some space, choose another disk, or collect fewer points or examples."
        raise dataset_error(who, "out", rule, f"{free / 1e9:.3f} GB at {out}", remedy)
