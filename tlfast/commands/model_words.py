"""The words of commands that take examples through a model without a dataset: what the model is, and what the data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import Any

from ..collecting.from_text import Collection
from ..collecting.settings import CollectSettings
from .arguments import Arguments

# Flags of `tlfast collect` that say what the model, its loss and the examples are.
_WORDS = (
    "dataset", "split", "name", "column", "prompt_column", "response_column", "messages_column", "label_column",
    "filter", "loss", "task", "adapter", "device", "model_dtype", "bos", "eos", "pattern",
)  # fmt: skip
_NUMBERS, _FLAGS = ("seq_len", "max_examples", "batch_tokens"), ("truncate", "trust_remote_code")
# Which of several data, and what of it: of other data they say nothing.
_OF_ONE_DATA: dict[str, Any] = {"split": "", "name": "", "filter": "", "pattern": "*", "max_examples": 0}


def add_model_words(arguments: Arguments) -> None:
    """Let a command take these words."""
    arguments.add_argument("--text", nargs="+", default=[], metavar="T", help="files or folders of text")
    for name in (*_WORDS, *_NUMBERS):
        kind = int if name in _NUMBERS else str
        arguments.add_argument(_flag(name), type=kind, metavar="X", help="as tlfast collect has it")
    for name in _FLAGS:
        arguments.add_argument(_flag(name), action="store_true", help="as tlfast collect has it")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def model_words(wanted: Any) -> dict[str, Any]:
    """What was said of these, by flag."""
    names = ("text", *_WORDS, *_NUMBERS, *_FLAGS)
    return {_flag(name): getattr(wanted, name) for name in names if getattr(wanted, name)}


class Loaded:
    """A model and its examples, as `tlfast collect` would have them."""

    def __init__(self, settings: CollectSettings) -> None:
        self._settings, self._collection = settings, Collection(settings)
        self.model, self.examples, self.tokenizer = (
            self._collection.model, self._collection.examples, self._collection.tokenizer,
        )  # fmt: skip

    def of_file(self, path: str) -> Any:
        """Examples of the same kind, of other data."""
        data: dict[str, Any] = {"dataset": path} if self._settings.dataset else {"text": (path,)}
        return self._collection.examples_of(replace(self._settings, **_OF_ONE_DATA, **data))

    @property
    def options(self) -> dict[str, Any]:
        """How the model runs, as keywords."""
        batch_tokens = self._settings.batch_tokens
        more = {"batch_tokens": batch_tokens} if batch_tokens else {}
        return {"loss": self._collection.loss, "pad_id": self.tokenizer.pad_token_id or 0, **more}


@contextmanager
def loaded(wanted: Any, points: Sequence[str]) -> Iterator[Loaded]:
    """Load what the words of a command say; no dataset is made."""
    names = (*_WORDS, *_NUMBERS, *_FLAGS)
    said = {name: getattr(wanted, name) for name in names if getattr(wanted, name)}
    with TemporaryDirectory(prefix="tlfast-") as folder:
        settings = CollectSettings(
            model=wanted.model, text=tuple(wanted.text), points=tuple(points), out=os.path.join(folder, "none"),
            of="weight", **said,
        )  # fmt: skip
        yield Loaded(settings)
