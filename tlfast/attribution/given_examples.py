"""Examples that went through a model and lie in no dataset, as the results of a scoring read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..dataset.errors import extra
from ..dataset.format.plan import Example
from ..dataset.read.decoding import given_tokenizer


class GivenExamples:
    """What `Scores` asks of a dataset: examples by row, their ids, and a tokenizer where one was given."""

    def __init__(self, examples: Sequence[Example], tokenizer: Any = None) -> None:
        self._given, self._tokenizer = examples, tokenizer
        self.examples = self

    def __len__(self) -> int:
        return len(self._given)

    def __getitem__(self, row: int) -> dict[str, Any]:
        found = self._given[row]
        return {
            "id": found.id, "source": found.source, "start": found.start, "length": found.length,
            "input_ids": torch.as_tensor(found.input_ids, dtype=torch.int64),
        }  # fmt: skip

    def ids_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The ids of some rows."""
        return torch.tensor([self._given[row].id for row in rows.tolist()], dtype=torch.int64)

    def arrow(self, rows: Any, names: Sequence[str]) -> Any:
        """Some columns of some rows, as a table of Arrow."""
        found = [self._given[int(row)] for row in rows]
        columns = {name: [getattr(one, name) for one in found] for name in names if name != "input_ids"}
        if "input_ids" in names:
            columns["input_ids"] = [list(one.input_ids) for one in found]
        return extra("pyarrow", "Scores.to_dict").table(columns)

    def tokenizer(self) -> Any:
        """The tokenizer that was given, or None."""
        return None if self._tokenizer is None else given_tokenizer(self._tokenizer)
