"""Several texts in one example: positions begin anew, none sees another, no token is the next of another's."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import broken_rule
from .batches import Batch
from .fields import NOT_ASKED_FOR, FieldsOfBatch
from .loss import accepted_names, token_logits

_WHO = "collect"
_ROUNDINGS = 4  # the same sums in another order, two texts in a batch; in a pack in other blocks, too


def packed(examples: Sequence[Any], longest: int) -> list[dict[str, Any]]:
    """Put examples behind each other, in their order, as many as fit ``longest`` tokens.

    Args:
        examples: `Example`s, or mappings with ``input_ids`` and ``labels``.
        longest: tokens of an example, at most.

    Returns:
        Mappings with ``input_ids``, ``position_ids``, ``labels``, ``source`` and ``start``, those of the first.
        The labels leave out the first token of each text, which none is before.

    Example:
        >>> from tlfast.collecting.packing import packed
        >>> from tlfast.dataset import Example
        >>> (one,) = packed([Example(0, [5, 6], "a", 0, 2), Example(1, [7, 8, 9], "b", 0, 3)], 8)
        >>> one["position_ids"].tolist(), one["labels"].tolist()
        ([0, 1, 0, 1, 2], [-100, 6, -100, 8, 9])
    """
    return list(packs(examples, longest))


def packs(examples: Iterable[Any], longest: int) -> Iterator[dict[str, Any]]:
    """Yield what `packed` lists."""
    pack: list[Any] = []
    room = longest
    for example in examples:
        n = len(_tokens(example))
        if n > room and pack:
            yield _joined(pack)
            pack, room = [], longest
        pack.append(example)
        room -= n
    if pack:
        yield _joined(pack)


def _tokens(example: Any) -> Sequence[int]:
    tokens: Sequence[int] = example["input_ids"] if isinstance(example, Mapping) else example.input_ids
    return tokens


def _joined(pack: Sequence[Any]) -> dict[str, Any]:
    ids, first = array("i"), pack[0]
    labels, positions = [], []
    for example in pack:
        tokens = _tokens(example)
        own = np.array(example["labels"] if isinstance(example, Mapping) else tokens, np.int64)
        own[:1] = NOT_ASKED_FOR
        ids.extend(tokens)
        labels.append(own)
        positions.append(np.arange(len(tokens), dtype=np.int64))
    source, start = (first["source"], first["start"]) if isinstance(first, Mapping) else (first.source, first.start)
    return {
        "input_ids": ids, "position_ids": np.concatenate(positions), "labels": np.concatenate(labels),
        "source": source, "start": start,
    }  # fmt: skip


def preference_pair(prompt: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> dict[str, Any]:
    """The example of a prompt with two answers, tokens all of them, for the loss "preference".

    Both are texts of their own in it, the prompt with the one and the prompt with the other.

    Returns:
        A mapping with ``input_ids``, ``position_ids``, ``labels``, and ``preference_mask``: 1 at the chosen answer, -1
        at the rejected one.

    Example:
        >>> from tlfast.collecting.packing import preference_pair
        >>> pair = preference_pair([5, 6], [7], [8, 9])
        >>> list(pair["input_ids"]), pair["preference_mask"].tolist()
        ([5, 6, 7, 5, 6, 8, 9], [0, 0, 1, 0, 0, -1, -1])
    """
    for argument, given in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not len(given):
            remedy = "A prompt is a token at least: the beginning of text, say."
            raise ValueError(broken_rule("preference_pair", argument, "hold tokens", "none", remedy))
    texts = [
        {"input_ids": [*prompt, *answer], "labels": [NOT_ASKED_FOR] * len(prompt) + [*answer], "source": "", "start": 0}
        for answer in (chosen, rejected)
    ]
    signs = [0] * len(prompt) + [1] * len(chosen) + [0] * len(prompt) + [-1] * len(rejected)
    return _joined(texts) | {"preference_mask": np.array(signs, np.int64)}


@torch.no_grad()
def check_packs(model: nn.Module, packs: Iterable[Mapping[str, Any]]) -> None:
    """Take the first pack of several texts through a model, and each of its texts alone.

    Raises:
        ValueError: where the logits differ by more than rounding: the model lets one text see another, or gives them
            positions of its own.
    """
    if "position_ids" not in accepted_names(model):
        got = f"{type(model).__name__}, which takes none"
        raise ValueError(broken_rule(_WHO, "pack", "be for a model that takes position_ids", got, "Leave it out."))
    pack = next((pack for pack in packs if (pack["position_ids"] == 0).sum() > 1), None)
    if pack is None:  # nothing is packed
        return
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    ids, positions = torch.tensor([list(pack["input_ids"])]), torch.tensor(pack["position_ids"])[None]
    starts = [*np.flatnonzero(pack["position_ids"] == 0).tolist(), ids.shape[1]]

    def logits(first: int, last: int, n: int = 1) -> torch.Tensor:
        fields = FieldsOfBatch({"position_ids": positions[:, first:last].expand(n, -1)})
        batch = Batch(ids[:, first:last].expand(n, -1), None, fields=fields)
        return token_logits(model, batch.to(device))[0].double()

    def off(found: torch.Tensor) -> float:
        return float((found - alone).norm() / alone.norm())

    alone = torch.cat([logits(first, last) for first, last in pairwise(starts)])
    rounding = off(torch.cat([logits(first, last, 2) for first, last in pairwise(starts)]))
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo().eps)
    change = off(logits(0, ids.shape[1]))
    if not change <= _ROUNDINGS * (rounding + eps):
        rule, got = "be for a model whose texts don't see each other", f"logits that are off by {change:.1e}"
        remedy = "Leave it out: each text is an example then."
        raise ValueError(broken_rule(_WHO, "pack", rule, f"{type(model).__name__}, with {got}", remedy))
