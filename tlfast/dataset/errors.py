"""What goes wrong with a dataset: the one exception, and the imports that need an extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import broken_rule


class DatasetError(ValueError):
    """A dataset folder, or what was to be written to it, is not as the format says."""


class NoDataset(DatasetError):
    """There is none at the place that was named."""


def dataset_error(who: str, argument: str, rule: str, got: object, remedy: str) -> DatasetError:
    """Return a DatasetError with the text ``<who>: <argument> must <rule>, got <value>. <what to do>``."""
    return DatasetError(broken_rule(who, argument, rule, got, remedy))


def extra(module: str, who: str, name: str = "collect") -> Any:
    """Import ``module``, which is not needed to import tlfast; ImportError naming the extra where it is missing."""
    try:
        return import_module(module)
    except ImportError as error:
        remedy = f"Run: pip install 'tlfast[{name}]'"
        raise ImportError(broken_rule(who, module.partition(".")[0], "be installed", str(error), remedy)) from error
