"""Products that studies are made of, into memory that is there: edges of pairs of points, gathered dots."""

from __future__ import annotations

import torch

from ..backends.choice import native, pick_native
from ..backends.plain import destination, plain
from ..errors import broken_rule

BLOCK = 1 << 22  # numbers of one operand that are converted, or gathered, at a time: 16 MiB of float32
FEW = 8  # rows of gradients up to which a kernel is sooner done on the CPU than matrix products


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

    What feature attribution asks for many latents at once, each active at a position of its own (circuit tracing).
    Nothing of the size [K, B, D] is made: one kernel finds each position by its index, on a GPU and where B is small.
    Else, on the CPU, the directions of one position are taken together, a matrix product each.

    Args:
        out: [K, B], float32 (float64 for float64 gradients).
        grad: [B, P, D], floating point.
        positions: [K], integers from 0 to P - 1, in any order; negative ones count from the end.
        directions: [K, D], floating point: decoder rows, say.

    Returns:
        ``out``. Products and sums are made in its dtype. On a GPU nobody waits for the positions: one that isn't there
        makes a row of NaN.

    Raises:
        ValueError: for shapes, dtypes or devices that don't go together, and for positions that aren't there, before
            anything is written.

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
    with torch.no_grad():
        if memory.numel() and _has_kernel(who, grad):
            _by_kernel(who, memory, grad, positions, directions)
        elif memory.numel():
            _by_matrices(who, memory, grad, positions, directions)
    return out


def _has_kernel(who: str, grad: torch.Tensor) -> bool:
    """Whether one kernel is used, and not a matrix product for each position."""
    where = grad.device.type
    if where == "cuda":
        return pick_native(who, "auto", {where}) is not None
    return where == "cpu" and len(grad) <= FEW and native() is not None


def _by_kernel(
    who: str, out: torch.Tensor, grad: torch.Tensor, positions: torch.Tensor, directions: torch.Tensor
) -> None:
    """All directions at once, each of which is found by its position."""
    n, positions = grad.shape[1], positions.to(grad.device, torch.int64).contiguous()
    wrapped = torch.where(positions < 0, positions + n, positions)
    if grad.device.type == "cpu":
        _check_within(who, wrapped, positions, n)
        torch.ops.tlfast.gather(out, grad, wrapped, directions)
        return
    there = (wrapped >= 0) & (wrapped < n)
    torch.ops.tlfast.gather(out, grad, torch.where(there, wrapped, 0), directions)
    out.masked_fill_(~there.unsqueeze(1), torch.nan)


def _by_matrices(
    who: str, out: torch.Tensor, grad: torch.Tensor, positions: torch.Tensor, directions: torch.Tensor
) -> None:
    """The directions of each position together."""
    order, places, counts = _by_position(who, positions, grad.shape[1])
    at_once = max(1, BLOCK // max(1, grad.shape[2]))
    start = 0
    for place, count in zip(places, counts, strict=True):
        there = grad[:, place].to(out.dtype).T
        for begin in range(start, start + count, at_once):
            rows = order[begin : min(begin + at_once, start + count)]
            out[rows] = directions[rows].to(out.dtype) @ there
        start += count


def _by_position(who: str, positions: torch.Tensor, length: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """The order that brings equal positions together, the positions, and how often each is there."""
    wrapped = torch.where(positions < 0, positions + length, positions)
    order = wrapped.argsort(stable=True)
    found, counts = torch.unique_consecutive(wrapped[order], return_counts=True)
    _check_within(who, found, positions, length)
    return order, found.tolist(), counts.tolist()


def _check_within(who: str, wrapped: torch.Tensor, positions: torch.Tensor, length: int) -> None:
    if len(wrapped) and (int(wrapped.min()) < 0 or int(wrapped.max()) >= length):
        got = f"{int(positions.min())} to {int(positions.max())}"
        raise ValueError(broken_rule(who, "positions", f"lie within {length} positions", got, "Check their order."))
