"""Extensions of a plan: examples that were added to a dataset later, one file each, never an edit of dataset.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import dataset_error
from ..places.store import Store
from .strict_json import checksum_of, parse_json, to_file

FOLDER = "plan"
FILE = re.compile(r"x([0-9]{6})\.json", re.ASCII)
MAX_BYTES = 64 << 20  # as of dataset.json

_VERSION = 1
_REMEDY = "Restore the file as it was."


@dataclass(frozen=True)
class Extension:
    """The examples ``first_example`` and following, ``n_examples`` of them, and what is said of them."""

    number: int  # from 1
    extends: str  # the config_hash of dataset.json, or the checksum of the extension before
    first_example: int
    n_examples: int
    examples: dict[str, Any]

    @property
    def path(self) -> str:
        """The name of its file within the dataset."""
        return f"{FOLDER}/x{self.number:06d}.json"

    @cached_property
    def checksum(self) -> str:
        """SHA-256 of what it says: commits of its units hold it."""
        return checksum_of(self._content())

    def to_bytes(self) -> bytes:
        """Return its file: the same bytes whoever extends the dataset by these examples."""
        return to_file(self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "number": self.number,
            "extends": self.extends,
            "first_example": self.first_example,
            "n_examples": self.n_examples,
            "examples": self.examples,
        }


def read_extensions(store: Store, who: str, config_hash: str, n_examples: int) -> tuple[Extension, ...]:
    """Read the extensions of a dataset in their order; ``n_examples`` are those that dataset.json plans.

    DatasetError where one is missing, damaged, or does not continue what is before it.
    """
    names = store.sizes(FOLDER, who, optional=True)
    numbers = sorted(int(match[1]) for name in names if (match := FILE.fullmatch(name)))
    if numbers != list(range(1, len(numbers) + 1)):
        got = ", ".join(f"x{number:06d}" for number in numbers[:5])
        rule = "hold x000001.json and so on, none missing"
        raise dataset_error(who, store.where(FOLDER), rule, got, "Restore the files.")
    found: list[Extension] = []
    for number in numbers:
        extends = found[-1].checksum if found else config_hash
        found.append(_read(store, number, extends, n_examples, who))
        n_examples += found[-1].n_examples
    return tuple(found)


def _read(store: Store, number: int, extends: str, first_example: int, who: str) -> Extension:
    name = f"{FOLDER}/x{number:06d}.json"
    path = store.where(name)
    value = parse_json(store.read(name, who, MAX_BYTES), who, path)
    if isinstance(value, dict) and value.get("version", _VERSION) != _VERSION:
        rule, got = f"be of format version {_VERSION}", repr(value["version"])[:80]
        raise dataset_error(who, path, rule, got, "Update tlfast to read it.")
    try:
        n_examples, examples, checksum = value["n_examples"], value["examples"], value.pop("checksum")
        extension = Extension(number, extends, first_example, n_examples, examples)
        if type(n_examples) is not int or not 1 <= n_examples < 2**60 or not isinstance(examples, dict):
            raise ValueError("no number of examples, or nothing said of them")
        if not checksum == extension.checksum == checksum_of(value):
            raise ValueError("another checksum, number, or first example")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        rule = f"extend the {first_example} examples before it, and match its own checksum"
        raise dataset_error(who, path, rule, repr(error)[:200], _REMEDY) from error
    return extension
