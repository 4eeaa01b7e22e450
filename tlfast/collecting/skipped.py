"""Examples that can't be used: skipped and remembered with the reason, or the end of the run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

from ..errors import broken_rule

BadPolicy = Literal["skip", "stop"]

MOST = 100_000  # recorded in one JSON file, which every reader holds in memory

_ADDRESS = re.compile(r" ?<[^<>]* at 0x[0-9a-fA-F]+>")


def without_addresses(reason: str) -> str:
    """A text without the objects of this process that it names, which are others in the next.

    Example:
        >>> from tlfast.collecting.skipped import without_addresses
        >>> without_addresses("no image file <_io.BytesIO object at 0x7fb5d5a5a700>")
        'no image file'
    """
    return _ADDRESS.sub("", reason)


class RefusedExamples(ValueError):
    """Examples, as they were made, can't be used: not one of them, not all of them, or not with what is asked of them.

    What else is wrong with data, or with how they are read, is another ValueError.
    """


class BadExamples:
    """What was left out, and why.

    Args:
        policy: "skip", or "stop" to end at the first.
        skipped: (source, start, reason) of those that were left out before; or another such list, which may still grow.
        most: how many may be skipped: more are a mistake, not an exception.
    """

    def __init__(
        self,
        policy: BadPolicy = "stop",
        skipped: Iterable[tuple[str, int, str]] | BadExamples = (),
        most: int = MOST,
    ) -> None:
        self.policy, self._most = policy, most
        self._before = skipped if isinstance(skipped, BadExamples) else None
        self._own: list[list[str | int]] = []
        for source, start, reason in () if isinstance(skipped, BadExamples) else skipped:
            self.leave_out(source, start, reason)

    @property
    def skipped(self) -> list[list[str | int]]:
        """All of them, as they stand in dataset.json."""
        return self._own if self._before is None else [*self._before.skipped, *self._own]

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """Skip inside, whatever the policy, also what is left out before."""
        policy, self.policy = self.policy, "skip"
        try:
            with nullcontext() if self._before is None else self._before.skipping():
                yield
        finally:
            self.policy = policy

    def forget(self) -> None:
        """Begin anew."""
        self._own.clear()

    def recall(self, skipped: Iterable[Iterable[str | int]]) -> None:
        """Know what was left out when the same data were read before; nothing else."""
        if self._before is not None:
            self._before.forget()
        self._own = [list(entry) for entry in skipped]

    def take_back(self, n: int) -> list[list[str | int]]:
        """Forget those behind the first ``n``, and return them: what is read early is told later."""
        own = n - (len(self) - len(self._own))
        taken, self._own = self._own[own:], self._own[:own]
        return taken

    def add(self, skipped: Iterable[list[str | int]]) -> None:
        """Know what was taken back."""
        self._own += skipped

    def leave_out(self, source: str, start: int, reason: str, error: str | None = None) -> None:
        """Skip an example; with the policy "stop" raise ``error`` as RefusedExamples, where there is one."""
        if error is not None and self.policy == "stop":
            raise RefusedExamples(error)
        if len(self) == self._most:
            got = f"one more: {source!r} at {start}, {reason}"
            remedy = 'bad_examples="stop" ends at the first, to look at it.'
            raise RefusedExamples(
                broken_rule("collect", "examples", f"have {self._most} bad ones at most", got, remedy)
            )
        self._own.append([source, start, reason])

    def __len__(self) -> int:
        return len(self._own) + (0 if self._before is None else len(self._before))

    def __str__(self) -> str:
        first = "; ".join(f"{source or 'one'} at {start}: {reason}" for source, start, reason in self.skipped[:3])
        more = f"; and {len(self) - 3} more" if len(self) > 3 else ""
        return f"{len(self)} bad example{'s' * (len(self) != 1)} skipped ({first}{more})"
