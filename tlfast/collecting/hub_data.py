"""Data sets of the hub, of which one split is fetched, and those that Hugging Face's datasets has saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ..dataset.errors import extra
from ..errors import broken_rule

_WHO = "collect"
_REMEDY = "Check the path, or the name on the hub."
_ONE_SPLIT = "of_one_split"  # a folder in the client's cache, where its own folders of data sets lie anew


def saved_data(path: Path, split: str) -> tuple[Any, str]:
    """What ``save_to_disk`` wrote, and which split that is; ValueError for a ``split`` that there isn't, or must be."""
    datasets = extra("datasets", _WHO, "hub")
    try:
        found = datasets.load_from_disk(str(path))
    except _errors(datasets) as error:
        _refuse(str(path), error)
    if not isinstance(found, Mapping):
        if split:
            raise _wrong_split("be left out for a data set of one", split, "It is taken whole.")
        return found, ""
    split = _chosen(list(found), split)
    return found[split], split


def hub_data(name: str, configuration: str, split: str) -> tuple[Any, str]:
    """A data set of the hub, and which split that is.

    No other split is fetched, unless all of it lies in the client's cache. What was fetched once is read from there.

    Raises:
        ValueError: for a name that the hub hasn't, or a ``split`` that there isn't or that must be said.
    """
    datasets = extra("datasets", _WHO, "hub")
    try:
        if datasets.config.HF_HUB_OFFLINE:
            return _cached(datasets, name, configuration, split)
        builder = datasets.load_dataset_builder(name, configuration or None)
        files: Any = getattr(builder.config, "data_files", None)
        apart = isinstance(files, Mapping) and len(files) > 1 and not os.path.isdir(builder.cache_dir)
        if not apart:
            return _of_all(datasets.load_dataset(name, configuration or None), split)
        split = _chosen(list(files), split)
        builder = datasets.load_dataset_builder(name, configuration or None, cache_dir=_cache_of(datasets, split))
        builder.config.data_files = type(files)({split: files[split]})
        builder.download_and_prepare(verification_mode="no_checks")  # which would miss the other splits
        return builder.as_dataset(split=split), split
    except _errors(datasets) as error:
        if str(error).startswith(f"{_WHO}: "):
            raise
        with suppress(*_errors(datasets)):  # where the hub can't be reached
            return _cached(datasets, name, configuration, split)
        _refuse(name, error)


def _cached(datasets: Any, name: str, configuration: str, split: str) -> tuple[Any, str]:
    """From the cache alone: of the split, else of all of them."""
    if split and os.path.isdir(place := _cache_of(datasets, split)):
        with suppress(*_errors(datasets)):  # it isn't among those
            return _of_all(datasets.load_dataset(name, configuration or None, cache_dir=place), split)
    return _of_all(datasets.load_dataset(name, configuration or None), split)


def _cache_of(datasets: Any, split: str) -> str:
    return os.path.join(str(datasets.config.HF_DATASETS_CACHE), _ONE_SPLIT, split.replace(os.sep, "_"))


def _of_all(found: Any, split: str) -> tuple[Any, str]:
    split = _chosen(list(found), split)
    return found[split], split


def _chosen(splits: list[Any], split: str) -> str:
    names = [str(name) for name in splits]
    if split not in names and (split or len(names) > 1):
        raise _wrong_split(f"be one of {', '.join(names)}", split, "Say --split.")
    return split or names[0]


def _wrong_split(rule: str, split: str, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, "split", rule, repr(split) if split else "none", remedy))


def _errors(datasets: Any) -> tuple[type[Exception], ...]:
    return (OSError, ValueError, RuntimeError, TypeError, KeyError, datasets.exceptions.DatasetsError)


def _refuse(place: str, error: Exception) -> NoReturn:
    got = f"{place!r}: {' '.join(str(error).split())[:300]}"
    rule = "be a file, a folder or a name on the hub"
    raise ValueError(broken_rule(_WHO, "dataset", rule, got, _REMEDY)) from error
