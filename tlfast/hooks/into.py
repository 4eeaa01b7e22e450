"""Where the rows of a capture go while its loop runs: what a room above must offer for `Capture.into`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import broken_rule

if TYPE_CHECKING:  # `import tlfast` is without torch
    from .tokens import Tokens


class Into(Protocol):
    """What `Capture.into` returns: a context manager that takes the rows of a capture out of it, unit by unit."""

    @property
    def units(self) -> list[Any]:
        """The units (name, start, stop) that are not written yet."""
        ...

    @property
    def left(self) -> list[int]:
        """The numbers of their examples."""
        ...

    def batches(self, batch_size: int) -> Iterator[list[int]]:
        """The numbers that are left in batches, none of which has examples of two units."""
        ...

    def expect(self, ids: Sequence[Any] | None, tokens: Tokens | None) -> None:
        """Hear of a batch before it runs; ``tokens`` are those of its mask, where columns have a row for each."""
        ...

    def took(self) -> None:
        """Hear that the rows of this batch are in the capture."""
        ...

    def failed(self) -> None:
        """Hear that the batch raised: what rows of it are in the capture are nobody's."""
        ...

    def __enter__(self) -> Into: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_ids(who: str, ids: Any) -> None:
    """TypeError for ids that have no length and no order."""
    if ids is None:
        return
    ordered = hasattr(ids, "__len__") and hasattr(ids, "__getitem__") and not isinstance(ids, Mapping)
    if not ordered or getattr(ids, "ndim", 1) == 0:
        got, remedy = type(ids).__name__, "Give a list with one id for each example."
        raise TypeError(broken_rule(who, "ids", "be a sequence", got, remedy))


# A capture knows no dataset, so the package itself says how one is written (tlfast/__init__.py).
openers: dict[str, Callable[..., Into]] = {}
