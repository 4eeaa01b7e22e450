"""The positions that a column keeps, found in the padded tensors of a step: those of each example's real tokens."""

from __future__ import annotations

from typing import Any

import torch

from ..backends.plain import plain
from ..errors import broken_rule


def positions_of_step(who: str, name: str, given: Any) -> torch.Tensor:
    """What a step gives by a name: int64 [B] or [B, k] on the host, or bool [B, P]; an error for anything else."""
    rule = "be whole numbers [B] or [B, k], or bool [B, P]"
    try:
        found = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:  # no numbers, lists of several lengths, numbers beyond int64
        remedy = "Give a tensor, or lists of whole numbers."
        raise TypeError(broken_rule(who, f"at[{name!r}]", rule, type(given).__name__, remedy)) from error
    found = plain(who, f"at[{name!r}]", found).detach()
    n_dims = (2,) if found.dtype == torch.bool else (1, 2)
    whole = not (found.is_floating_point() or found.is_complex())
    if not whole or found.dim() not in n_dims or (found.dim() == 2 and found.shape[1] == 0):
        got = f"{found.dtype} {list(found.shape)}"
        raise ValueError(broken_rule(who, f"at[{name!r}]", rule, got, "Give a position for each example."))
    if found.dtype == torch.bool:
        return found
    if name.endswith("mask"):  # 0 and 1 would be the first two positions
        rule, got, remedy = "be bool where its name ends in mask", str(found.dtype), "Use .bool(), or another name."
        raise ValueError(broken_rule(who, f"at[{name!r}]", rule, got, remedy))
    return found.cpu().long()


def real_positions(who: str, wanted: int | tuple[int, ...] | torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
    """Where in padded tensors the wanted real tokens lie: int64 [B] or [B, k] on the host.

    None where they lie at the very numbers ``wanted``, for all examples alike.

    Args:
        who: for errors.
        wanted: a position of each example, or several: 0 is the first of its real tokens, -1 the last. Those of each
            example are [B] or [B, k].
        mask: bool [B, P], True at real tokens. One on a GPU is waited for.

    Raises:
        ValueError: for an example that has no such token, naming it.
    """
    if mask.dim() != 2:
        remedy = "Positions are dimension 1."
        raise ValueError(broken_rule(who, "mask", "be [B, P] where there is an at=", list(mask.shape), remedy))
    real = mask.cpu()
    per_example = isinstance(wanted, torch.Tensor)
    numbers = torch.as_tensor(wanted)
    one = numbers.dim() == (1 if per_example else 0)
    if per_example and len(numbers) != len(real):
        rule, remedy = f"have positions for {len(real)} examples, as the mask has", "Give those of this very batch."
        raise ValueError(broken_rule(who, "at", rule, len(numbers), remedy))
    several = numbers.shape[-1] if not one else 1
    numbers = numbers.reshape(len(real) if per_example else 1, several).expand(len(real), several)
    n_real = real.sum(1, keepdim=True)
    counted = torch.where(numbers < 0, numbers + n_real, numbers)
    outside = (counted < 0) | (counted >= n_real)
    if bool(outside.any()):
        example, k = outside.nonzero()[0].tolist()
        n, s = int(n_real[example]), "s" * (int(n_real[example]) != 1)
        got = f"{int(numbers[example, k])} for example {example}, which has {n} real token{s}"
        raise ValueError(broken_rule(who, "at", "be a real position of each example", got, "Check both, and the mask."))
    found = torch.searchsorted(real.cumsum(1), counted + 1)
    if not per_example and bool((found == numbers % max(real.shape[1], 1)).all()):
        return None
    return found[:, 0] if one else found


def chosen_mask(who: str, chosen: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A mask that chooses positions, all of them real; ValueError where one isn't."""
    if mask is None:
        return chosen
    if chosen.shape != mask.shape:
        rule, remedy = f"have the shape {list(mask.shape)} of the mask", "Give that of this very batch."
        raise ValueError(broken_rule(who, "at", rule, list(chosen.shape), remedy))
    padded = (chosen.to(mask.device) & ~mask).nonzero()
    if len(padded):
        example, position = padded[0].tolist()
        got = f"position {position} of example {example}, which is padding"
        raise ValueError(broken_rule(who, "at", "choose real positions alone", got, "Check both, and the mask."))
    return chosen
