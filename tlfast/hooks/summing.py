"""A capture whose rows go into running sums: each batch is added up, and forgotten."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch

from ..errors import broken_rule
from .captured import Capture
from .running import RunningSums
from .tokens import Tokens

_WHO = "into"


class IntoSums:
    """Adds the rows of each `Capture.batch` to `RunningSums`; made by `Capture.into`."""

    def __init__(self, cap: Capture, sums: RunningSums) -> None:
        encoded = next((name for name, (_, spec) in cap.wanted.items() if spec.encoding is not None), None)
        if encoded is not None:
            rule, remedy = "be None where rows are added up", "Leave it out: nothing is stored."
            raise ValueError(
                broken_rule(_WHO, f"encoding of {encoded}", rule, repr(cap.wanted[encoded][1].encoding), remedy)
            )
        self._cap, self._sums = cap, sums
        self._padded: set[str] = set()  # columns that the open batch tells of padding

    @property
    def units(self) -> NoReturn:
        """RuntimeError: sums have no plan."""
        self._no_plan("units")

    @property
    def left(self) -> NoReturn:
        """RuntimeError: sums have no plan."""
        self._no_plan("left")

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """RuntimeError: sums have no plan."""
        self._no_plan("batches")

    def _no_plan(self, what: str) -> NoReturn:
        rule, remedy = "be asked of a dataset", "Nobody knows how many rows there will be: loop over the data."
        raise RuntimeError(broken_rule(_WHO, what, rule, "running sums", remedy))

    def __enter__(self) -> IntoSums:
        if self._cap.receiver is not None:
            rule, got = "go into one place", f"{self._cap.receiver!r} already"
            raise RuntimeError(broken_rule(_WHO, "a capture", rule, got, "Leave that block first."))
        self._check_empty("Read them, and call cap.clear().")
        self._cap.receiver = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cap.receiver = None
        if error is None:
            self._check_empty("Run each backward inside cap.batch(), or outside the capture.")

    def _check_empty(self, remedy: str) -> None:
        if self._cap.rows:
            rule, got = "be those of batches alone", f"{self._cap.rows} others"
            raise RuntimeError(broken_rule(_WHO, "rows in the capture", rule, got, remedy))

    def expect(self, ids: Sequence[Any] | None, tokens: Tokens | None) -> None:
        """Check that nothing else is in the capture."""
        self._check_empty("Run each backward inside cap.batch(), or outside the capture.")
        self._padded = self._cap.padded()

    def took(self) -> None:
        """Add the rows of the batch, but those of points that did not fire."""
        try:
            self._sums.add(self._rows())
        finally:
            self._cap.clear()

    def _rows(self) -> dict[str, torch.Tensor]:
        cap, missing = self._cap, self._cap.missing
        rows = {}
        for name in cap.names:
            if cap.is_known(name):
                absent = missing[name][cap.where(name)[0]] if cap.wanted[name][1].per == "token" else missing[name]
                found = cap[name]
                if name in self._padded and self._keeps_positions(name, found.dim()):
                    got, remedy = "zeros at padding", 'Reduce positions by reduce= and over=, or say per="token".'
                    raise ValueError(broken_rule(_WHO, f"rows at {name}", "have real positions alone", got, remedy))
                rows[name] = found[(~absent).to(found.device)] if absent.any() else found
        return rows

    def _keeps_positions(self, name: str, n_dims: int) -> bool:
        """Whether rows, of ``n_dims`` with that of the rows themselves, have the gradient's dimension 1."""
        dims = self._cap.wanted[name][1].dims
        calls = self._cap.kept_as["calls"] == "stack"
        rank = n_dims - calls + len(dims) - (0 in dims)  # of the gradient, with heads as a dimension of their own
        return rank > 1 and 1 not in {dim + rank if dim < 0 else dim for dim in dims}

    def failed(self) -> None:
        """Leave the rows of the batch out."""
        self._cap.clear()
