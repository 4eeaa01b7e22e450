"""What each token does to a metric: the scores, and how they are drawn over the text in HTML and in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

_RED, _BLUE = (214, 69, 65), (52, 120, 196)  # what raises the metric, what lowers it
_LEVELS = 5  # of a colour in a terminal: the cube of 256 colours has so many steps


@dataclass
class Attributions:
    """How much each part of each example does to the metric.

    Attributes:
        scores: one tensor for each example, float32 on the host: [P], a number a token, without padding. Of an input
            that isn't tokens a tensor of its shape.
        values: float64 [N], the metric of each example.
        baseline_values: float64 [N], that of each baseline; None where there is none.
        tokens: the text of each token; None where there are no tokens.

    Example:
        >>> import torch
        >>> from tlfast.recipes.attributions import Attributions
        >>> print(Attributions([torch.tensor([1.0, -0.5])], torch.tensor([2.0]), tokens=[["good", " film"]]))
        example 0: 2
          +1.000 #### good
          -0.500 --    film
    """

    scores: list[torch.Tensor]
    values: torch.Tensor
    baseline_values: torch.Tensor | None = None
    tokens: list[list[str]] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"<Attributions of {len(self)} examples; print it, or let a notebook show it>"

    @property
    def delta(self) -> torch.Tensor | None:
        """Float64 [N]: how far the sum of an example's scores is from what the metric changed by; None if unknown.

        With infinitely many steps it is 0 but for rounding (completeness).
        """
        if self.baseline_values is None:
            return None
        sums = torch.stack([each.double().sum() for each in self.scores])
        return sums - (self.values - self.baseline_values)

    def __str__(self) -> str:
        """A line for each token: its score, a bar, the token."""
        lines: list[str] = []
        for k, (scores, tokens) in enumerate(zip(self.scores, self._texts(), strict=True)):
            lines.append(f"example {k}: {float(self.values[k]):.4g}")
            largest = _largest(scores)
            for score, token in zip(scores.flatten().tolist(), tokens, strict=True):
                length = round(4 * abs(score) / largest) if math.isfinite(score) else 0
                lines.append(f"  {score:+.3f} {('#' if score > 0 else '-') * length:4} {_shown(token)}")
        return "\n".join(lines)

    def terminal(self) -> str:
        """The texts with a background for each token, by escape sequences: red raises the metric, blue lowers it."""
        lines = []
        for scores, tokens in zip(self.scores, self._texts(), strict=True):
            largest = _largest(scores)
            marked = (
                f"\x1b[48;5;{_colour(score / largest)}m\x1b[38;5;16m{_shown(token)}\x1b[0m"
                for score, token in zip(scores.flatten().tolist(), tokens, strict=True)
            )
            lines.append("".join(marked))
        return "\n".join(lines)

    def html(self) -> str:
        """The texts as HTML, with a background for each token; every text is escaped, and nothing is loaded."""
        style = "font-family:monospace;line-height:1.9;white-space:pre-wrap;color:#000;background:#fff;padding:0.3em"
        parts = []
        for k, (scores, tokens) in enumerate(zip(self.scores, self._texts(), strict=True)):
            largest = _largest(scores)
            spans = "".join(
                _span(score, largest, token) for score, token in zip(scores.flatten().tolist(), tokens, strict=True)
            )
            parts.append(f'<div style="{style}"><small>{float(self.values[k]):.4g}</small> {spans}</div>')
        return "".join(parts)

    def _repr_html_(self) -> str:
        return self.html()

    def _texts(self) -> list[list[str]]:
        if self.tokens is not None:
            return self.tokens
        return [[f"[{k}]" for k in range(scores.numel())] for scores in self.scores]


def token_texts(tokenizer: Any, examples: Sequence[Sequence[int]]) -> list[list[str]]:
    """The text of each token; its number in brackets without a tokenizer."""
    if tokenizer is None:
        return [[f"[{int(token)}]" for token in tokens] for tokens in examples]
    return [[str(tokenizer.decode([int(token)])) for token in tokens] for tokens in examples]


def _largest(scores: torch.Tensor) -> float:
    finite = scores[torch.isfinite(scores)].abs()
    return float(finite.max()) or 1.0 if finite.numel() else 1.0


def _span(score: float, largest: float, token: str) -> str:
    share = score / largest if math.isfinite(score) else 0.0
    red, green, blue = _RED if share > 0 else _BLUE
    background = f"rgba({red},{green},{blue},{min(1.0, abs(share)):.2f})"
    return f'<span style="background:{background}" title="{score:+.4g}">{escape(token)}</span>'


def _colour(share: float) -> int:
    """The number of a colour in a terminal: white for 0, red for 1, blue for -1."""
    left = _LEVELS - round(_LEVELS * min(1.0, abs(share))) if math.isfinite(share) else _LEVELS
    red, green, blue = (_LEVELS, left, left) if share > 0 else (left, left, _LEVELS)
    return 16 + 36 * red + 6 * green + blue


def _shown(token: str) -> str:
    """A token on one line, without what would steer a terminal."""
    return "".join(sign if sign.isprintable() else "\u00b7" for sign in token)
