"""A dataset that is there already: which of the examples it holds, and whether the rest is to be added to it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..dataset.errors import dataset_error
from ..dataset.format.description import read_description
from ..dataset.format.plan import Example
from ..dataset.places.remote import url_of
from ..dataset.places.store import as_store
from ..dataset.read.reader import open_dataset
from ..dataset.write.folder import holds_dataset, refuse_stranger
from ..dataset.write.writer import DatasetWriter
from ..errors import broken_rule
from .checks import positions_of, positions_once, said_positions
from .identity import NEXT_IN_TEXT, describe_examples
from .json_parts import TWO_VALUES
from .media import NO_FILE
from .options import Resume
from .skipped import without_addresses

Place = str | os.PathLike[str]
Skipped = Sequence[Sequence[Any]]
_LOOKED_AT = 64  # examples that show how those of a dataset were made


def check_folder(out: Place, resume: Resume, overwrite: bool, staging: Place | None = None) -> None:
    """DatasetError where ``out`` is a stranger's, or there, or not, against ``resume``; for ``staging`` of a folder."""
    if staging is not None and not url_of(out):
        remedy = "A folder needs none."
        raise dataset_error("collect", "staging", "be left out unless out is a URL", f"{str(staging)!r}", remedy)
    refuse_stranger(out, "collect")
    if resume == "must" and not holds_dataset(out, "collect"):
        remedy = 'resume="auto" begins one.'
        raise dataset_error("collect", "out", 'be a dataset with resume="must"', f"none at {out}", remedy)
    if resume == "never" and not overwrite and holds_dataset(out, "collect"):
        remedy = 'resume="auto" continues it, overwrite removes it.'
        raise dataset_error("collect", "out", 'be a new folder with resume="never"', f"a dataset at {out}", remedy)


def existing_folder(out: Place) -> str | None:
    """The folder in which ``out`` lies, or will; None where there is none yet."""
    above = os.path.dirname(os.path.abspath(os.path.expanduser(out)))
    return above if os.path.isdir(above) and os.access(above, os.W_OK) else None


def has_units(out: Place) -> bool:
    """Whether a dataset with a unit at least lies in ``out``."""
    return holds_dataset(out, "collect") and bool(as_store(out).sizes("commits", "collect", optional=True))


def own_part(
    out: Place,
    examples: Sequence[Example],
    skipped: Skipped,
    overwrite: bool,
    extend: bool,
    fingerprint: str = "",
) -> tuple[int, int]:
    """How many of the examples, and of the skipped ones, belong to dataset.json itself and not to an extension.

    All of them, unless a dataset is there that begins with the same ones: with a unit, or an extension, since what has
    neither was begun and failed.
    """
    there = read_description(out, "collect") if not overwrite and holds_dataset(out, "collect") else None
    if there is not None and (extend or there.extensions or has_units(out)):
        n, said = there.examples[0]
        n_skipped = _n_skipped(said)
        if n <= len(examples) and _agree(said, examples[:n], skipped[:n_skipped], fingerprint):
            return n, n_skipped
    return len(examples), len(skipped)


def loss_as_begun(out: Place, said: dict[str, Any], unknown: Sequence[str], overwrite: bool) -> dict[str, Any]:
    """What is said of the loss (`describe_loss`), as the dataset that it continues says it: that may know less of it.

    A loss that can't be compared is warned of, unless the user vouches for it.
    """
    more = {"loss_code", "loss_identity"}
    if overwrite or not more & set(said) or not holds_dataset(out, "collect"):
        return said
    there = read_description(out, "collect").header
    known = {key: there[key] for key in more if key in there}
    vouched = "loss_identity" in said
    if there.get("loss") != said["loss"] or (vouched and "loss_identity" in known):
        return said
    if not vouched and (unknown or not known):
        got = f"unknown {', '.join(unknown[:3])}" if known else f"the name {said['loss']} alone"
        rule = "be known by its code in the dataset, to be compared"
        remedy = "Make sure that it is the same; identity=, a text of your own, says that you have."
        warnings.warn(broken_rule("collect", "loss", rule, got, remedy), RuntimeWarning, stacklevel=5)
    return {"loss": said["loss"], **known} if vouched or not known else said


def reasons_as_begun(out: Place, skipped: Sequence[list[Any]], overwrite: bool) -> None:
    """Give what is skipped the reasons of the dataset that is continued: the first ones named objects and paths."""
    if overwrite or not skipped or not holds_dataset(out, "collect"):
        return
    there = (entry for _, said in read_description(out, "collect").examples for entry in said.get("skipped") or ())
    for ours, (*place, reason) in zip(skipped, there, strict=False):
        if ours[:2] == place and is_same_reason(ours[2], str(reason)):
            ours[2] = reason


def is_same_reason(ours: str, begun: str) -> bool:
    """Whether the reason of a dataset is one of today's, with an object of its process in it, or a path of its machine.

    The former was cut at a length that counts the object's address: less of the rest is there, before a bracket.
    """
    if ours.endswith(NO_FILE) and begun.endswith(NO_FILE):
        return ours.partition(" names ")[0] == begun.partition(" names ")[0]
    plain = without_addresses(begun)
    return ours == plain or (plain != begun and ours.startswith(plain.removesuffix(")")))


def records_as_begun(out: Place) -> bool:
    """Whether the dataset that is continued may have records that are left out, or refused, today.

    The first such datasets have records with two values for a key, or of a column, numbers that were rounded, and those
    before a quote that nobody closes. One that left out a record with two values for a key is none of these.
    """
    if not has_units(out):
        return False
    skipped = (entry for _, said in read_description(out, "collect").examples for entry in said.get("skipped") or ())
    return not any(str(reason).endswith(TWO_VALUES) for *_, reason in skipped)


def holds_first(out: Place, examples: Sequence[Example], skipped: Skipped, fingerprint: str = "") -> bool:
    """Whether all examples of the dataset in ``out`` are the first of these, also what was left out among them."""
    start = bad = 0
    for number, (n, said) in enumerate(read_description(out, "collect").examples):
        stop, stop_bad = start + n, bad + _n_skipped(said)
        if stop > len(examples):
            return False
        if not _agree(said, examples[start:stop], skipped[bad:stop_bad], "" if number else fingerprint):
            return False
        start, bad = stop, stop_bad
    return True


def most_have_around(out: Place, first: Sequence[int], last: Sequence[int], longest: int | None) -> bool:
    """Whether most texts of the dataset in ``out`` have these tokens at one end.

    Some of all are looked at, from the first to the last. The longest ones may have been cut, and show their beginning
    alone.
    """
    examples = open_dataset(out, partial=True).examples
    n = len(examples)
    texts = [list(examples[k * n // min(n, _LOOKED_AT)]["input_ids"]) for k in range(min(n, _LOOKED_AT))]
    whole = [ids for ids in texts if len(ids) != longest]
    n_first = sum(ids[: len(first)] == list(first) for ids in texts) if first else 0
    n_last = sum(ids[-len(last) :] == list(last) for ids in whole) if last else 0
    return 2 * n_first > len(texts) or 2 * n_last > len(whole)


def positions_as_begun(out: Place, model: nn.Module, overwrite: bool) -> int | None:
    """How many tokens an example may have where nobody says, in a dataset that may be continued.

    The first ones went by what a model's config says, later ones by every position of padding, and so do the reasons
    of what they left out.
    """
    found = positions_of(model)
    earlier = {said_positions(model), positions_once(model)} - {found}
    if not earlier or overwrite or not holds_dataset(out, "collect"):
        return found
    skipped = (entry for _, told in read_description(out, "collect").examples for entry in told.get("skipped") or ())
    reasons = [str(reason) for *_, reason in skipped]
    begun = (n for n in earlier if any(reason.endswith(f" more than {n}") for reason in reasons))
    return next(begun, found)


def packs_as_begun(out: Place, overwrite: bool) -> int | None:
    """The packed examples of a batch in the dataset that is continued; None: as many as there is room for.

    The first such datasets had one, and say so.
    """
    if overwrite or not holds_dataset(out, "collect"):
        return None
    batching = read_description(out, "collect").header.get("batching")
    found = batching.get("batch_examples") if isinstance(batching, dict) else None
    return found if isinstance(found, int) else None


def next_tokens_as_begun(out: Place, overwrite: bool) -> bool:
    """Whether the last token of a text has no next one in the dataset that may be continued, as in every new one.

    In the first ones with several texts in an example it was the first token of the text behind. They say nothing.
    """
    if overwrite or not holds_dataset(out, "collect"):
        return True
    batching = read_description(out, "collect").header.get("batching")
    return isinstance(batching, dict) and batching.get("next_tokens") == NEXT_IN_TEXT


def add_the_rest(
    writer: DatasetWriter,
    examples: Sequence[Example],
    skipped: Skipped,
    extend: bool,
    config: str | Mapping[str, Any],
) -> None:
    """Extend the dataset by the examples that it lacks.

    Raises:
        DatasetError: where it lacks some and ``extend`` is False, or has others.
    """
    start = bad = 0
    for number, (n, said) in enumerate(writer.description.examples):
        if number and start == len(examples):
            rule = f"be all {writer.plan.n_examples} of the dataset, which was extended"
            remedy = "Give the old examples and the new ones."
            raise dataset_error("collect", "examples", rule, f"the first {start} of them", remedy)
        n_skipped = _n_skipped(said)
        if number and not _agree(said, examples[start : start + n], skipped[bad : bad + n_skipped]):
            rule = f"be those of the dataset, of which extension {number} has {n}"
            got, remedy = f"others from example {start} on", "Give the same as then, or another folder."
            raise dataset_error("collect", "examples", rule, got, remedy)
        start, bad = start + n, bad + n_skipped
    n_new, n_bad = len(examples) - start, len(skipped) - bad
    if (n_new or n_bad) and not extend:
        got = f"the same first {start}, {n_new} more and {n_bad} more bad ones"
        remedy = "extend=True (--extend) appends the new ones; or give another folder."
        raise dataset_error("collect", "examples", "be those of the dataset", got, remedy)
    if n_new:
        writer.extend(n_new, describe_examples(examples[start:], skipped[bad:]), config)


def _n_skipped(said: Mapping[str, Any]) -> int:
    skipped = said.get("skipped")
    return len(skipped) if isinstance(skipped, list) else 0


def _agree(said: Mapping[str, Any], examples: Sequence[Example], skipped: Skipped, fingerprint: str = "") -> bool:
    return all(said.get(key) == value for key, value in describe_examples(examples, skipped, fingerprint).items())
