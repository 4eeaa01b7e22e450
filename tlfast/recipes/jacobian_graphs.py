"""The forward of a prompt and the backwards through it as two CUDA graphs, for each length of a prompt."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn

from ..hooks.graph_step import Graphs, graphs_for

MOST_LENGTHS = 8  # each keeps the activations of a forward, and the gradients of one backward
Forward = Callable[[torch.Tensor], list[torch.Tensor]]  # tokens -> the outputs of the blocks, with their graph
Backward = Callable[[list[torch.Tensor], torch.Tensor], tuple[torch.Tensor, ...]]  # those and cotangents -> gradients


def graphs_of(model: nn.Module, device: torch.device) -> Graphs | None:
    """What records a model whose tokens are on this device; None where nothing does, or a part lies elsewhere."""
    held = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return graphs_for(device) if device.type == "cuda" and held <= {device} else None


class RecordedPrompt:
    """Prompts of one length: `run` takes the next one through the forward, and each `backward` through its graph.

    What a backward gives is overwritten by the next one.
    """

    def __init__(self, graphs: Graphs, forward: Forward, backward: Backward, tokens: torch.Tensor, n_rows: int):
        self._tokens = tokens.clone()

        def warm_up() -> None:
            residuals = forward(self._tokens)
            backward(residuals, self._zeros(residuals[-1], n_rows))

        graphs.warm_up(warm_up)
        self._forward, self.residuals = graphs.record(lambda: forward(self._tokens))
        self.cotangents = self._zeros(self.residuals[-1], n_rows)
        # Of another recording, so it reads what the first has saved for it, where that is.
        self._backward, self._grads = graphs.record(lambda: backward(self.residuals, self.cotangents))

    @staticmethod
    def _zeros(target: torch.Tensor, n_rows: int) -> torch.Tensor:
        return torch.zeros(n_rows, *target.shape, dtype=target.dtype, device=target.device)

    def run(self, tokens: torch.Tensor) -> None:
        """Take a prompt through the model."""
        self._tokens.copy_(tokens)
        self._forward()

    def backward(self) -> tuple[torch.Tensor, ...]:
        """The gradients at the outputs of the blocks, of what is in ``cotangents``."""
        self._backward()
        return self._grads  # type: ignore[no-any-return]


class Recordings:
    """The recorded lengths of a model, the last used ones; none once one could not be made."""

    def __init__(self, who: str, model: nn.Module):
        self._who, self._model = who, model
        self._made: OrderedDict[tuple[int, ...], RecordedPrompt] = OrderedDict()
        self._refused = False

    def of(self, forward: Forward, backward: Backward, tokens: torch.Tensor, n_rows: int) -> RecordedPrompt | None:
        """The recording for these tokens, behind a run of them; None where there are no graphs."""
        graphs = None if self._refused else graphs_of(self._model, tokens.device)
        if graphs is None:
            return None
        shape = tuple(tokens.shape)
        if shape not in self._made:
            if len(self._made) == MOST_LENGTHS:
                self._made.popitem(last=False)  # before the new one needs memory
            try:
                self._made[shape] = RecordedPrompt(graphs, forward, backward, tokens, n_rows)
            except RuntimeError as error:
                self._refused = True
                self._made.clear()
                reason = " ".join(str(error).split())
                text = (
                    f"{self._who}: backwards run one by one, since no CUDA graph could be made of this model: {reason}"
                )
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return None
        self._made.move_to_end(shape)
        self._made[shape].run(tokens)
        return self._made[shape]
