"""The residual stream of a model: the modules that put it out, how the model is run, how a text becomes tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..collecting.loss import accepted_names
from ..errors import broken_rule
from ..hooks.points import find_points
from ..spec import Points
from .pairs import check_model
from .places import layers_of

_WHO = "fit_jacobian_lens"
_NAME_THEM = 'Name the layers: blocks="model.layers.*".'
_ESTIMATOR = {"estimator": "jacobian_lens"}  # there are others by now


@dataclass(frozen=True)
class ResidualStream:
    """A model by its layers.

    Attributes:
        model: the model.
        blocks: the modules whose outputs [B, P, D] are the stream, in order.
        call: runs the model on tokens [B, P].
        to_tokens: makes tokens of a text; None: nothing does.
        said: what a file of TransformerLens says of the model.
    """

    model: nn.Module
    blocks: list[nn.Module]
    call: Callable[[torch.Tensor], object]
    to_tokens: Callable[[str], Any] | None
    said: dict[str, Any]

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def dtype(self) -> str:
        """The name of the weights' dtype."""
        dtypes = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return str(dtypes[0] if dtypes else torch.get_default_dtype()).removeprefix("torch.")

    def tokens(self, prompt: Any, place: int) -> torch.Tensor:
        """Int64 [1, P] of a prompt, a text or its tokens; ``place`` is its number, for errors."""
        if isinstance(prompt, str):
            if self.to_tokens is None:
                raise _wrong("tokenizer", "be given for texts", None, "Or give each prompt as a list of tokens.")
            prompt = self.to_tokens(prompt)
        tokens = torch.as_tensor(prompt)
        tokens = tokens[None] if tokens.dim() == 1 else tokens
        whole = not tokens.is_floating_point() and tokens.dtype != torch.bool
        if tokens.dim() != 2 or len(tokens) != 1 or not whole:
            got = f"{list(tokens.shape)} {tokens.dtype} for number {place}"
            raise _wrong("prompts", "be texts or tokens [P]", got, "Give them one by one.")
        return tokens.long().cpu()


def residual_stream(model: nn.Module, tokenizer: Any = None, blocks: Points | None = None) -> ResidualStream:
    """Find it in a TransformerBridge or a decoder of Hugging Face; ``blocks`` name it in any other module.

    Raises:
        TypeError, ValueError: where it isn't found, or isn't the one that the model has by itself.
    """
    check_model(_WHO, model)
    points: Any = getattr(model, "hook_dict", None)
    if isinstance(points, dict):
        return _of_bridge(model, points, tokenizer, blocks)
    found = (
        list(find_points(_WHO, model, blocks).values()) if blocks is not None else layers_of(_WHO, model, _NAME_THEM)
    )
    if len(found) < 2:
        raise _wrong("blocks", "be at least two", len(found), "Name all layers, in order.")
    config: Any = getattr(model, "config", None)
    said = {
        "model_name": getattr(config, "_name_or_path", None) or None,
        "model_revision": _revision(config),
        "model_system": "torch" if config is None else "transformers",
        **_ESTIMATOR,
        "tlfast_version": __version__,
    }
    no_cache = {"use_cache": False} if "use_cache" in accepted_names(model) else {}

    def to_tokens(text: str) -> Any:
        return tokenizer(text)["input_ids"]

    return ResidualStream(
        model, found, lambda tokens: model(tokens, **no_cache), None if tokenizer is None else to_tokens, said
    )


def _of_bridge(model: Any, points: dict[str, Any], tokenizer: Any, blocks: Points | None) -> ResidualStream:
    for name, value in (("tokenizer", tokenizer), ("blocks", blocks)):
        if value is not None:
            raise _wrong(name, "be left out for a TransformerBridge", type(value).__name__, "It has its own.")
    if "blocks.0.hook_out" not in points:
        remedy = "Load it with TransformerBridge.boot_transformers, or give the model of Hugging Face."
        raise TypeError(broken_rule(_WHO, "model", "be a TransformerBridge", type(model).__name__, remedy))
    if getattr(model, "compatibility_mode", False) or getattr(model, "_weights_processed", False):
        remedy = "Load it anew with TransformerBridge.boot_transformers."
        raise _wrong("model", "have its weights as they were loaded", "processed ones", remedy)
    from ..transformer_lens.jacobian_lens import names_estimators

    said = {
        "model_name": getattr(model.cfg, "model_name", None),
        "model_revision": _revision(getattr(getattr(model, "original_model", None), "config", None)),
        "transformer_lens_version": version("transformer-lens"),
        "model_system": "TransformerBridge",
        **(_ESTIMATOR if names_estimators() else {}),
        "transformer_lens_fit": True,  # TransformerLens merges no lens of its own with one that lacks it
    }
    found = [points[f"blocks.{layer}.hook_out"] for layer in range(model.cfg.n_layers)]
    return ResidualStream(model, found, lambda tokens: model(tokens, return_type=None), model.to_tokens, said)


def _revision(config: Any) -> str | None:
    revision = getattr(config, "_commit_hash", None)
    return revision if isinstance(revision, str) and revision else None


def _wrong(argument: str, rule: str, got: object, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, argument, rule, got, remedy))
