"""The Jacobian of the last block's output by the outputs of others, of one prompt: row by row, by batched backwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..backends.choice import reduce_into
from ..backends.outputs import replace_output, select_output
from ..errors import broken_rule
from .jacobian_graphs import Recordings
from .slopes import slopes_once

# What torch says of an operation that it runs for one gradient of a batch after the other, as the attention of a CPU.
# The rest of the backward gains more than that costs.
_ONE_BY_ONE = ".*performance drop"


class JacobianRows:
    """Makes ``J_l[k, :] = mean over t of d (sum over t' of h_last[t', k]) / d h_l[t]`` of one prompt after the other.

    Positions t and t' are those from ``skip`` on, without the last. The forward is run once, for one copy of the
    prompt, and a backward takes ``dim_batch`` dimensions k through its graph at once. Where a model has an operation
    that takes no batch of gradients, the prompt is put there ``dim_batch`` times instead; the rows are the same but
    for rounding. On a CUDA device both are recorded at the first prompt of a length, and replayed.

    Args:
        model: the model that the blocks are of.
        blocks: modules in the order of the forward, the last one that of the target; each is called once in a forward,
            and its output has [batch, position, width] first.
        dim_batch: dimensions of the target in one backward.
        skip: leading positions that don't count.
        together: whether a backward takes a batch of gradients; None: as it turns out at the first prompt.
        who: the caller, for errors.
        recorded: whether CUDA graphs are made, where they can be: these rows are used for many prompts.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        dim_batch: int,
        skip: int,
        together: bool | None = None,
        who: str = "fit_jacobian_lens",
        recorded: bool = True,
    ) -> None:
        self._model, self._blocks, self._dim_batch, self._skip, self._who = model, list(blocks), dim_batch, skip, who
        self._held: dict[torch.device, torch.Tensor] = {}  # the rows of one prompt, a block for each device
        self.together = together
        self._recordings = Recordings(who, model) if recorded else None

    def of(self, call: Callable[[torch.Tensor], object], tokens: torch.Tensor) -> list[torch.Tensor]:
        """The matrices of all blocks but the last, float32 [D, D] each, on the host.

        Args:
            call: runs the model on tokens [B, P].
            tokens: int64 [1, P].
        """
        if self.together is None:
            self.together = self._try(call, tokens)
        together = self.together
        rows = self._replayed(call, tokens) if together else None
        if rows is None:
            residuals = self.residuals(call, tokens if together else tokens.expand(self._dim_batch, -1))
            rows = self._rows(residuals, partial(self._backward, residuals, together=together), together)
        # One copy to the host for each device, of all layers there.
        held = {device: block if device.type == "cpu" else block.cpu() for device, block in self._held.items()}
        return [held[device][place] for device, place in rows]

    def _replayed(
        self, call: Callable[[torch.Tensor], object], tokens: torch.Tensor
    ) -> list[tuple[torch.device, int]] | None:
        """The rows of a prompt by CUDA graphs; None where there are none."""
        forward, backward = partial(self.residuals, call), partial(self._backward, again=True, together=True)
        recorded = self._recordings and self._recordings.of(forward, backward, tokens, self._dim_batch)
        if not recorded:
            return None

        def replay(given: torch.Tensor, again: bool) -> tuple[torch.Tensor, ...]:
            return recorded.backward()

        return self._rows(recorded.residuals, replay, True, recorded.cotangents)

    def residuals(self, call: Callable[[torch.Tensor], object], tokens: torch.Tensor) -> list[torch.Tensor]:
        """The output [B, P, D] of each block, of one forward whose graph begins behind the first of them."""
        seen: dict[int, torch.Tensor] = {}
        hooks = [block.register_forward_hook(self._seeing(k, seen)) for k, block in enumerate(self._blocks)]
        try:
            with torch.enable_grad(), slopes_once(self._model):
                call(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        if len(seen) < len(self._blocks):
            absent = next(k for k in range(len(self._blocks)) if k not in seen)
            raise self._wrong("be called in a forward", f"no call of number {absent}")
        return [seen[k] for k in range(len(self._blocks))]

    def _seeing(self, place: int, seen: dict[int, torch.Tensor]) -> Callable[[nn.Module, Any, Any], Any]:
        def see(module: nn.Module, args: Any, output: Any) -> Any:
            tensor, key = select_output(output, None)
            if tensor is None or tensor.dim() != 3:
                got = type(output).__name__ if tensor is None else f"{list(tensor.shape)} of {type(module).__name__}"
                raise self._wrong("put out [batch, position, width]", got)
            if place in seen:
                raise self._wrong("be called once in a forward", f"a second call of {type(module).__name__}")
            if place or tensor.requires_grad:
                seen[place] = tensor
                return None
            # Not the leaf itself, which the code that goes on may not change in place.
            start = torch.ops.aten._unsafe_view(tensor.detach().requires_grad_(), tensor.shape)
            seen[place] = start
            return replace_output(output, key, start)

        return see

    def _wrong(self, rule: str, got: str) -> ValueError:
        remedy = "Name the modules whose outputs are the residual stream: blocks=."
        return ValueError(broken_rule(self._who, "blocks", rule, got, remedy))

    def _try(self, call: Callable[[torch.Tensor], object], tokens: torch.Tensor) -> bool:
        """Whether a backward takes a batch of gradients through this model."""
        residuals = self.residuals(call, tokens)
        cotangents = torch.zeros(2, *residuals[-1].shape, dtype=residuals[-1].dtype, device=residuals[-1].device)
        try:
            self._backward(residuals, cotangents, again=False, together=True)
        except RuntimeError:  # an operation without a rule for it; another error comes again
            return False
        return True

    def _backward(
        self, residuals: list[torch.Tensor], cotangents: torch.Tensor, again: bool, together: bool
    ) -> tuple[torch.Tensor, ...]:
        *sources, target = residuals
        if not target.requires_grad:
            raise self._wrong("lead to the last one", "an output that it isn't made of")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_ONE_BY_ONE, category=UserWarning)
            found = torch.autograd.grad(
                target, sources, cotangents, retain_graph=again, is_grads_batched=together, allow_unused=True
            )
        if any(grad is None for grad in found):
            raise self._wrong("lead to the last one", "an output that it isn't made of")
        return found

    def _rows(
        self,
        residuals: list[torch.Tensor],
        backward: Callable[[torch.Tensor, bool], tuple[torch.Tensor, ...]],
        together: bool,
        cotangents: torch.Tensor | None = None,
    ) -> list[tuple[torch.device, int]]:
        """Fill the blocks of `_held`; where the matrix of each source lies there: device and place.

        ``backward`` takes cotangents, and whether another backward follows; those of a recording have their memory.
        """
        *sources, target = residuals
        width, real, n = target.shape[2], slice(self._skip, target.shape[1] - 1), self._dim_batch
        if any(source.shape != target.shape for source in sources):
            got = ", ".join(str(list(source.shape)) for source in residuals)
            raise self._wrong("have outputs of one shape", got)
        places = self._make_room(sources)
        shape = (n, *target.shape) if together else target.shape
        if cotangents is None:
            cotangents = torch.zeros(shape, dtype=target.dtype, device=target.device)
        ahead = torch.arange(n, device=target.device)
        for start in range(0, width, n):
            stop = min(start + n, width)
            cotangents.zero_()
            # One dimension of the target for each gradient of the batch, at every position that counts.
            first = cotangents[:, 0] if together else cotangents
            first[:, real].transpose(1, 2)[ahead[: stop - start], start + ahead[: stop - start]] = 1.0
            given = cotangents[: stop - start] if together else cotangents
            for (device, place), grad in zip(places, backward(given, stop < width), strict=True):
                each = grad[: stop - start, 0] if together else grad[: stop - start]
                reduce_into(self._held[device][place, start:stop], each[:, real], "mean", over="pos")
        return places

    def _make_room(self, sources: list[torch.Tensor]) -> list[tuple[torch.device, int]]:
        places: list[tuple[torch.device, int]] = []
        counts: dict[torch.device, int] = {}
        for source in sources:
            places.append((source.device, counts.setdefault(source.device, 0)))
            counts[source.device] += 1
        width = sources[0].shape[2]
        for device, count in counts.items():
            if device not in self._held or self._held[device].shape != (count, width, width):
                self._held[device] = torch.empty(count, width, width, device=device)
        return places
