"""Products that studies are made of, into memory that is there: edges of pairs of points, gathered dots."""

from __future__ import annotations

import torch

from ..backends.plain import destination, plain
from ..errors import broken_rule

BLOCK = 1 << 22  # numbers of one operand that are converted, or gathered, at a time: 16 MiB of float32


def _sums_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_out(who: str, out: torch.Tensor, shape: list[int], like: torch.Tensor) -> None:
    wanted = _sums_in(like.dtype)
    if list(out.shape) != shape or out.dtype != wanted or out.device != like.device:
        raise ValueError(
            broken_rule(
                who, "out", f"be {wanted} {shape} on {like.device}", f"{out.dtype} {list(out.shape)} on {out.device}",
                "Allocate it so.",
            )
        )  # fmt: skip


def _check_floating(who: str, argument: str, given: torch.Tensor) -> None:
    if not given.is_floating_point() or given.dim() < 2:
        rule, got = "be floating point with two dimensions or more", f"{given.dtype} {list(given.shape)}"
        raise ValueError(broken_rule(who, argument, rule, got, "Check its place among the arguments."))


def outer_into(out: torch.Tensor, writers: torch.Tensor, readers: torch.Tensor) -> torch.Tensor:
    """Add the dot product of each writer with each reader: ``out[u, v] += sum writers[u] * readers[v]``.

    One matrix product, whatever the dimensions behind the first are: pairs, positions and the width are summed. It is
    what edge attribution patching is made of.

    Args:
        out: [W, R], float32 (float64 for float64 readers); what is in it is added to.
        writers: [W, ...], floating point: differences of what each writes.
        readers: [R, ...], of the same sizes behind the first: gradients at what each reads.

    Returns:
        ``out``. Products and sums are made in its dtype; operands of another one are converted block by block.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together.

    Example:
        >>> import torch
        >>> from tlfast.recipes import outer_into
        >>> outer_into(torch.zeros(1, 2), torch.ones(1, 3, 4), torch.ones(2, 3, 4))
        tensor([[12., 12.]])
    """
    who = "outer_into"
    writers, readers, memory = (
        plain(who, "writers", writers),
        plain(who, "readers", readers),
        destination(who, "out", out),
    )
    for argument, given in (("writers", writers), ("readers", readers)):
        _check_floating(who, argument, given)
    if writers.shape[1:] != readers.shape[1:] or writers.device != readers.device:
        got = f"{list(writers.shape)} on {writers.device}"
        rule = f"have the sizes of readers behind the first ({list(readers.shape)} on {readers.device})"
        raise ValueError(broken_rule(who, "writers", rule, got, "Take both of the same pairs and positions."))
    _check_out(who, memory, [len(writers), len(readers)], readers)
    with torch.no_grad():
        u, v = writers.reshape(len(writers), -1), readers.reshape(len(readers), -1)
        same = u.dtype == v.dtype == memory.dtype
        step = max(1, u.shape[1] if same else BLOCK // max(1, len(u), len(v)))
        for start in range(0, u.shape[1], step):
            part = [side[:, start : start + step].to(memory.dtype) for side in (u, v)]
            memory.addmm_(part[0], part[1].T)
    return out


def gather_into(
    out: torch.Tensor, grad: torch.Tensor, positions: torch.Tensor, directions: torch.Tensor
) -> torch.Tensor:
    """Dots of gradients with directions that each have a position: ``out[k, b] = sum_d grad[b, positions[k], d] *
    directions[k, d]``.

    What feature attribution asks for many latents at once, each active at a position of its own (circuit tracing). The
    directions of one position are taken together, a matrix product each, so nothing of the size [K, B, D] is made.

    Args:
        out: [K, B], float32 (float64 for float64 gradients).
        grad: [B, P, D], floating point.
        positions: [K], integers from 0 to P - 1, in any order; negative ones count from the end.
        directions: [K, D], floating point: decoder rows, say.

    Returns:
        ``out``. On a device other than the CPU the host waits once, for the positions.

    Raises:
        ValueError: for shapes, dtypes, devices or positions that don't go together, before anything is written.

    Example:
        >>> import torch
        >>> from tlfast.recipes import gather_into
        >>> grad = torch.arange(6.0).reshape(1, 3, 2)
        >>> gather_into(torch.empty(2, 1), grad, torch.tensor([2, 0]), torch.ones(2, 2))
        tensor([[9.],
                [1.]])
    """
    who = "gather_into"
    grad, directions, memory = (
        plain(who, "grad", grad),
        plain(who, "directions", directions),
        destination(who, "out", out),
    )
    for argument, given in (("grad", grad), ("directions", directions)):
        _check_floating(who, argument, given)
    if grad.dim() != 3 or list(directions.shape) != [directions.shape[0], grad.shape[2]]:
        got = f"{list(grad.shape)} and {list(directions.shape)}"
        raise ValueError(broken_rule(who, "grad and directions", "be [B, P, D] and [K, D]", got, "Check the widths."))
    if list(positions.shape) != [len(directions)] or positions.is_floating_point() or positions.dtype == torch.bool:
        got = f"{positions.dtype} {list(positions.shape)}"
        rule = f"be integers, one for each of the {len(directions)} directions"
        raise ValueError(broken_rule(who, "positions", rule, got, "Pass a tensor of indices."))
    _check_out(who, memory, [len(directions), len(grad)], grad)
    order, places, counts = _by_position(who, positions, grad.shape[1])
    at_once = max(1, BLOCK // max(1, grad.shape[2]))
    with torch.no_grad():
        start = 0
        for place, count in zip(places, counts, strict=True):
            there = grad[:, place].to(memory.dtype).T
            for begin in range(start, start + count, at_once):
                rows = order[begin : min(begin + at_once, start + count)]
                memory[rows] = directions[rows].to(memory.dtype) @ there
            start += count
    return out


def _by_position(who: str, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """The order that brings equal positions together, the positions, and how often each is there."""
    wrapped = torch.where(positions < 0, positions + length, positions)
    order = wrapped.argsort(stable=True)
    found, counts = torch.unique_consecutive(wrapped[order], return_counts=True)
    places = found.tolist()
    if places and (places[0] < 0 or places[-1] >= length):
        got = f"{int(positions.min())} to {int(positions.max())}"
        raise ValueError(broken_rule(who, "positions", f"lie within {length} positions", got, "Check their order."))
    return order, places, counts.tolist()
