"""Datasets that were merged into one: the parts behind each other, their examples numbered on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..check.verify import Report, verify_dataset
from ..errors import dataset_error
from ..format.merged import Part
from ..format.strict_json import sha256_of
from ..places.store import LocalStore, Store
from .views import DatasetView


class MergedDataset(DatasetView):
    """A dataset of the parts that ``merged.json`` names; made by open_dataset.

    Row numbers and ids count on from one part to the next: in a complete dataset row r is example r. What is told of a
    file or a unit belongs to the parts: ``ds.sources``.
    """

    def __init__(self, store: Store, parts: Sequence[Part], sources: Sequence[Any], partial: bool) -> None:
        for part, source in zip(parts, sources, strict=True):
            if source.identity != part.identity or source.plan.n_examples != part.n_examples:
                rule = f"hold the {part.n_examples} examples that were merged"
                got = f"another dataset, or one that was extended since ({source.plan.n_examples} examples)"
                remedy = "Merge the datasets again, into a new folder."
                raise dataset_error("open_dataset", str(source.path), rule, got, remedy)
        offsets = list(accumulate((part.n_examples for part in parts), initial=0))[:-1]
        super().__init__(sources, None, sources[0].points, offsets=offsets)
        self._store = store
        self._parts = list(parts)
        self._partial = partial

    @property
    def path(self) -> Path | str:
        """The folder, or the URL, of merged.json."""
        return self._store.folder if isinstance(self._store, LocalStore) else self._store.where("").rstrip("/")

    @property
    def header(self) -> dict[str, Any]:
        """How the data were made: what the headers of all parts agree in."""
        headers = [source.header for source in self._sources]
        return {key: value for key, value in headers[0].items() if all(h.get(key) == value for h in headers[1:])}

    @property
    def skipped(self) -> list[tuple[str, int, str]]:
        """The bad examples that were left out of the parts: source, start in it, and the reason of each."""
        return [entry for source in self._sources for entry in source.skipped]

    def verify(self, progress: Callable[[int], None] | None = None) -> Report:
        """Re-read every byte of all parts against its checksum; see verify_dataset."""
        return verify_dataset(self._store, partial=self._partial, progress=progress)

    def info(self) -> dict[str, Any]:
        """Return what is inside, as JSON-able values: of all parts together, and of each."""
        infos = [source.info() for source in self._sources]
        added = ("rows", "planned_rows", "units", "planned_units", "bytes", "non_finite_rows")
        found = {key: sum(info[key] for info in infos) for key in added}
        tokens = [info["examples"].get("tokens") for info in infos]
        examples = {"tokens": sum(tokens)} if all(type(n) is int for n in tokens) else {}
        if "tokens" in infos[0]:
            found["tokens"] = sum(info["tokens"] for info in infos)
        return {
            "path": str(self.path),
            **found,
            "points": infos[0]["points"],
            "holds": {point: self.holds(point) for point in self.points},
            "header": self.header,
            "examples": examples,
            "about": {},
            "config_hash": sha256_of([part.identity for part in self._parts]),
            "parts": [{key: info[key] for key in ("path", *added[:4])} for info in infos],
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return MergedDataset, (self._store, self._parts, self._sources, self._partial)

    def _title(self) -> str:
        return f"MergedDataset({str(self.path)!r}): {len(self)} rows of {len(self._sources)} datasets"
