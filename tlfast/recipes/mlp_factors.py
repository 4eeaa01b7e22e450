"""Backward lens: what a layer of an MLP is given, and the gradient at what it puts out, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from ..hooks.capture import capture
from ..hooks.freeze import at_work
from ..hooks.points import find_points
from ..spec import Points, Spec
from .metric import Examples, Metric, device_of, values_of
from .pairs import check_model

_WHO = "backward_lens"
# The matrices of an MLP as the models of transformers call them, within a module that is called after it.
_IN_MLP = re.compile(
    r"(^|\.)(mlp|ffn|feed_forward|output|intermediate|layers\.\d+)\."
    r"(c_fc|c_proj|gate_proj|up_proj|down_proj|gate_up_proj|fc_in|fc_out|fc1|fc2|dense_h_to_4h|dense_4h_to_h)$"
)


@dataclass(frozen=True)
class GradientFactors:
    """The two factors of one matrix' gradient, by example: it is the sum over tokens of their outer products.

    Attributes:
        inputs: [P, I] for each example, what the matrix was given.
        output_gradients: [P, O] for each, the gradient of the metric at what it put out; not a step of descent, which
            would have the other sign.
    """

    inputs: list[torch.Tensor]
    output_gradients: list[torch.Tensor]

    def weight_gradient(self, example: int) -> torch.Tensor:
        """``sum over t of g_t a_t^T`` [O, I] of one example, float32: the gradient of the weight as nn.Linear keeps it.

        A Conv1D of GPT-2 keeps its transpose.
        """
        return self.output_gradients[example].float().T @ self.inputs[example].float()


@dataclass(frozen=True)
class BackwardFactors:
    """What `backward_lens` finds.

    Attributes:
        factors: by the name of the matrix, in the order of the model.
        values: the metric of each example, float64 [N].
    """

    factors: dict[str, GradientFactors]
    values: torch.Tensor

    def __getitem__(self, name: str) -> GradientFactors:
        return self.factors[name]


def backward_lens(
    model: nn.Module,
    batch: Any,
    metric: Metric,
    points: Points | None = None,
    *,
    tokenizer: Any = None,
    embedding: str | nn.Module | None = None,
    batch_examples: int = 16,
    padding_side: str = "right",
    pad_id: int = 0,
) -> BackwardFactors:
    """Give the factors of which the gradients of an MLP's matrices are made (Katz et al., 2024, "Backward Lens").

    The gradient of a weight is ``sum over t of g_t a_t^T``, where a is the matrix' input and g the gradient at its
    output. Of the first matrix a, and of the last one g, is as wide as the residual stream: multiplied with the
    unembedding they are read as tokens, which is left to the caller. No gradient of a weight is computed.

    Args:
        model: a causal language model of Hugging Face, a TransformerBridge or a HookedTransformer; in eval mode and
            frozen meanwhile.
        batch: token sequences, a tensor [B, P], texts, or mappings with fields, as `saliency` takes them.
        metric: (logits [B, P, V], the padded batch) -> [B]; for what training does, the loss of each example.
        points: the matrices; None: those of each layer's MLP, found by their names.
        tokenizer: makes tokens of texts.
        embedding: where the gradients end; None: the model's embedding of tokens.
        batch_examples: examples in a batch.
        padding_side, pad_id: how they are padded.

    Returns:
        `BackwardFactors`: ``found[name].inputs[k]`` [P, I] and ``.output_gradients[k]`` [P, O] of the real tokens of
        example k, on the host, in the dtype of the model.

    Raises:
        ValueError, TypeError: for bad arguments; for a model in which no MLP is found.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> found = tlfast.recipes.backward_lens(model, [[1, 2, 3]], lambda logits, batch: logits[:, :, 5].sum(1), "1")
        >>> found["1"].inputs[0].shape, found["1"].output_gradients[0].shape
        (torch.Size([3, 4]), torch.Size([3, 9]))
    """
    check_model(_WHO, model)
    names = list(find_points(_WHO, model, _matrices(model) if points is None else points))
    examples = Examples(_WHO, batch, tokenizer, batch_examples, padding_side, pad_id)
    inputs: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
    grads: dict[str, dict[int, torch.Tensor]] = {name: {} for name in names}
    values = torch.empty(len(examples.all), dtype=torch.float64)
    specs = [Spec(names), Spec(names, of="act", side="input")]
    with at_work(model, embedding), capture(model, specs, rows=batch_examples) as cap:
        for places, given in examples.batches(device_of(model)):
            cap.clear()
            with cap.batch(given.mask):
                found = values_of(_WHO, metric, model, given)
                found.sum().backward()
            values[places] = found.detach().double().cpu()
            for name in names:
                for kept, rows in ((grads, cap[name]), (inputs, cap[f"{name}:input:act"])):
                    for k, place in enumerate(places):
                        kept[name][place] = examples.real(rows, given, k).cpu().clone()
    order = range(len(examples.all))
    return BackwardFactors(
        {name: GradientFactors([inputs[name][k] for k in order], [grads[name][k] for k in order]) for name in names},
        values,
    )


def _matrices(model: nn.Module) -> Sequence[Any]:
    """Each layer's MLP: of a bridge by its own names, of other models by those that transformers has for them."""
    blocks: Any = getattr(model, "blocks", None)
    if isinstance(getattr(model, "hook_dict", None), dict) and blocks is not None:
        mlps = [getattr(block, "mlp", None) for block in blocks]
        parts = [vars(mlp)["_modules"] for mlp in mlps if mlp is not None]
        found = [part[name] for part in parts for name in ("gate", "in", "out") if name in part]
    else:
        found = [module for name, module in model.named_modules() if _IN_MLP.search(name)]
    if not found:
        got, remedy = f"a {type(model).__name__} without known names", 'Say points="layers.*.mlp.down_proj".'
        raise ValueError(broken_rule(_WHO, "points", "be given where no MLP is found", got, remedy))
    return found
