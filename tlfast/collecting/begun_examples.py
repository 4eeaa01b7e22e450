"""How records become examples of text: as today, and as earlier versions had it, by which what they began goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import broken_rule
from .checks import positions_of, said_positions
from .huggingface import beginning_of_text, end_of_text, more_around
from .resume import has_units, most_have_around, positions_as_begun
from .settings import CollectSettings, columns_of
from .tasks import classifies_whole, has_own_ends, task_of, unwrapped

Around = tuple[list[int], list[int]]


def continues(settings: CollectSettings) -> bool:
    """Whether a dataset with units is continued: what was begun goes on for ever."""
    return not settings.overwrite and has_units(settings.out)


@dataclass(frozen=True)
class Ways:
    """The ways in which the records of a run may become examples: today's, and that of earlier versions.

    Args:
        settings: of the run.
        model: that reads the examples.
        tokenizer: of the model.
        like: the folder of a dataset whose examples these shall be like; "": the one that the run continues, if any.
    """

    settings: CollectSettings
    model: nn.Module
    tokenizer: Any
    like: str = ""

    def way(self, earlier: bool) -> dict[str, Any]:
        """All by which records become other examples than those that earlier versions made of them.

        That is ``first`` and ``last`` (`around`), ``longest``, and ``of_whole``: whether a list of labels is one for
        each class.
        """
        first, last = self.around(earlier)
        return {
            "first": first,
            "last": last,
            "longest": self.longest(earlier),
            "of_whole": classifies_whole(self.model) and not earlier,
        }

    def longest(self, earlier: bool) -> int | None:
        """The most tokens of a record's text, or of a pack of these; None: any number."""
        settings = self.settings
        if settings.seq_len and self.like:  # a text more for a dataset that may have been given too many
            return min(settings.seq_len, positions_of(self.model) or settings.seq_len)
        if settings.seq_len or earlier:
            return settings.seq_len or said_positions(self.model)
        return positions_as_begun(settings.out, self.model, settings.overwrite)

    def around(self, earlier: bool) -> Around:
        """The tokens that are put before and behind each text, beside those that the tokenizer or a template puts.

        Earlier versions put these also where the tokenizer had put them, and an end behind each response.

        Raises:
            ValueError: for tokens that a model isn't to have there, in a dataset that is new.
        """
        settings, columns = self.settings, columns_of(self.settings)
        first = beginning_of_text(self.tokenizer, settings.bos)
        last = end_of_text(self.tokenizer, settings.eos, bool(columns.response))
        if earlier or not has_own_ends(task_of(self.model)):
            return ([], []) if columns.messages else (first, last)
        if columns.messages:
            return [], []
        goes_on = bool(self.like) or continues(settings)
        more = more_around(self.tokenizer, settings.bos, settings.eos, strict=not goes_on)
        if columns.prompt and any(more) and not goes_on:
            argument = "bos" if more[0] else "eos"
            got, remedy = repr(getattr(settings, argument)), "Prompt and response are as the tokenizer makes them."
            rule = f"be auto for prompts of {type(unwrapped(self.model)).__name__}"
            raise ValueError(broken_rule("collect", argument, rule, got, remedy))
        now: Around = ([], []) if columns.prompt else more
        return (first, last) if self.like and self._was_earlier((first, last), now) else now

    def _was_earlier(self, then: Around, now: Around) -> bool:
        """Whether the dataset whose examples these shall be like has what earlier versions put around a text.

        So it is where today's refuse its settings; else its tokens show it.
        """
        settings = self.settings
        try:
            more = more_around(self.tokenizer, settings.bos, settings.eos)
        except ValueError:
            return True
        if columns_of(settings).prompt and any(more):
            return True
        own = list(self.tokenizer("a")["input_ids"])
        first = [*own[:1], *then[0]] if then[0] != now[0] else []
        last = [*(own[-1:] if own[-1:] == then[1] else []), *then[1]] if then[1] != now[1] else []
        return most_have_around(self.like, first, last, settings.seq_len or said_positions(self.model))
