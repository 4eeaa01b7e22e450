"""What is said of an output that no gradient can reach, by either backend: also where `freeze` starts the graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from ..errors import broken_rule
from .outputs import other_outputs, select_output


class Start(Protocol):
    """An embedding at whose output `freeze` starts the graph."""

    name: str
    module: nn.Module
    called: bool


STARTS: list[Sequence[Start]] = []  # those of each `freeze` that is entered


def no_graph(who: str, side: str, output: object, which: int | str | None) -> RuntimeError:
    """The error for an output, or an input, that no gradient can reach, with what there is to do about it here."""
    got = "a tensor without a graph: no gradient can reach it"
    others = other_outputs(output, select_output(output, which)[1])
    starts = STARTS[-1] if STARTS else []
    remedy = 'Use freeze(model) to start the graph at the embedding, or pass missing="nan".'
    if others:
        remedy = f'Choose one that has a graph, {others}, or pass missing="nan".'
    elif starts:
        called = [start.name for start in starts if start.called]
        at = ", ".join(called or [start.name for start in starts])
        got += f", since freeze starts the graph at {at}{'' if called else ', which was not called'}"
        remedy = 'Pass embedding=<a module that is called before this point>, or missing="nan".'
    return RuntimeError(broken_rule(who, side, "require grad", got, remedy))
