"""Datasets on the Hugging Face hub: push a folder, open a repository. Needs the extra ``hub``."""

from __future__ import annotations

import glob
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from ..check.verify import Report
from ..errors import dataset_error, extra
from ..format.description import CARD, CONFIG, FILE_NAME, Description
from ..places.durable import open_regular, read_small
from ..places.local_file import LocalFile
from ..places.store import LocalStore, Store

# What a repository has of a dataset. The hub's viewer reads rows/, by the front matter of the card.
_PAYLOAD = ["data/u*.safetensors", "rows/u*.parquet"]
_SAYS_IT_EXISTS = [FILE_NAME, CARD, CONFIG, "plan/x*.json", "commits/u*.json"]

Opened = TypeVar("Opened", bound="OnHub")


class OnHub:
    """The part of a GradientDataset that knows the Hugging Face hub."""

    _store: Store
    _description: Description
    verify: Callable[[], Report]

    @classmethod
    def from_pretrained(
        cls: type[Opened],
        name: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        partial: bool = False,
    ) -> Opened:
        """Open a folder, or a dataset repository of the Hugging Face hub, which is downloaded into the hub's cache.

        Args:
            name: a folder, or the name of a repository: ``"user/gradients"``.
            revision: a branch, a tag or a commit of the repository.
            token: of the hub; None: the one that `hf auth login` left.
            partial: as for open_dataset.

        Raises:
            DatasetError: as open_dataset.
            ImportError: where huggingface_hub is missing. What else goes wrong, it raises.
        """
        place: Any = Path(name) if Path(name).is_dir() else download(str(name), revision, token)
        return cls._open(place, partial)

    @classmethod
    def _open(cls: type[Opened], place: Any, partial: bool) -> Opened:
        raise NotImplementedError  # open_dataset, which is above this file

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the dataset to a dataset repository of the Hugging Face hub, after verifying it; return the URL.

        What says that units exist is uploaded after all of their data, so a reader never sees half a unit.

        Args:
            repo_id: ``"user/name"``; made if it isn't there.
            private: whether a new repository is private; None: as the hub's settings say.
            token: of the hub; None: the one that `hf auth login` left.
            revision: the branch, made if it isn't there; None: main.
            commit_message: for the repository's history.

        Raises:
            DatasetError: where something is wrong with the dataset, or the repository holds another one.
            ImportError: where huggingface_hub is missing. What else goes wrong, it raises.
        """
        who = "push_to_hub"
        hub = extra("huggingface_hub", who, "hub")
        if not isinstance(self._store, LocalStore):
            raise dataset_error(
                who, "dataset", "lie in a folder of this machine", self._store.where(""), "Copy it here first."
            )
        report = self.verify()
        if not report.ok:
            remedy = "Run `tlfast verify --repair`, then resume."
            raise dataset_error(who, "dataset", "be right before it is shared", report.problems[0], remedy)
        api = hub.HfApi(token=token)
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
        _refuse_another(hub, who, repo_id, self._description.config_hash, revision, token)
        for part in (_PAYLOAD, _SAYS_IT_EXISTS):
            api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=self._store.folder,
                commit_message=commit_message or "Upload a gradient dataset with tlfast",
                allow_patterns=part,
                ignore_patterns=[glob.escape(name) for name in report.unnamed],  # they belong to no unit
                revision=revision,
            )
        return str(url)


def _refuse_another(
    hub: Any, who: str, repo_id: str, config_hash: str, revision: str | None, token: str | bool | None
) -> None:
    try:
        path = hub.hf_hub_download(repo_id, FILE_NAME, repo_type="dataset", revision=revision, token=token)
    except hub.errors.EntryNotFoundError:
        return
    there = json.loads(Path(path).read_text(encoding="utf-8")).get("config_hash")
    if there != config_hash:
        remedy = "Push to a repository of its own."
        raise dataset_error(who, "repo_id", "be new, or hold this dataset", f"{repo_id} with another", remedy)


def download(
    repo_id: str, revision: str | None = None, token: str | bool | None = None, to: str | None = None
) -> LocalStore:
    """Return a store of a repository's dataset: in the hub's cache, or in ``to`` as a folder of its own."""
    hub = extra("huggingface_hub", "from_pretrained", "hub")
    folder = hub.snapshot_download(
        repo_id, repo_type="dataset", revision=revision, token=token, local_dir=to,
        allow_patterns=[*_PAYLOAD, *_SAYS_IT_EXISTS],
    )  # fmt: skip
    return CachedStore(Path(folder)) if to is None else LocalStore(Path(to))


@dataclass(frozen=True)
class CachedStore(LocalStore):
    """A snapshot in the hub's cache, whose files are links to its blobs; no other link is followed."""

    def sizes(self, folder: str, who: str, optional: bool = False) -> dict[str, int | None]:
        """Return the size of each file in a folder, None for what is neither a file nor a link to a blob."""
        found = super().sizes(folder, who, optional)
        for name, size in found.items():
            if size is None:
                info = self._file(f"{folder}/{name}").lstat()
                found[name] = info.st_size if stat.S_ISREG(info.st_mode) else None
        return found

    def read(self, name: str, who: str, limit: int) -> bytes:
        """Return a file's bytes."""
        return read_small(self._file(name), who, limit)

    def read_all(self, names: Sequence[str], who: str, limit: int) -> Iterator[bytes]:
        """Yield each file's bytes."""
        return (self.read(name, who, limit) for name in names)

    def open(self, name: str, who: str) -> LocalFile:
        """Open a file."""
        return LocalFile(name, *open_regular(self._file(name), who))

    def _file(self, name: str) -> Path:
        # <cache>/datasets--<repo>/snapshots/<commit>/<name> -> <cache>/datasets--<repo>/blobs/<hash>, and that may be
        # a link to <cache>/blobs/<hash>, which repositories share.
        path, repository = self.folder / name, self.folder.parent.parent
        for blobs in (repository / "blobs", repository.parent / "blobs"):
            target = Path(os.path.normpath(path.parent / os.readlink(path))) if path.is_symlink() else path
            if blobs in target.parents:
                path = target
        return path
