"""The points of a model: each module, its class, and the shape of what a capture would have there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import broken_rule
from ..hooks.points import match_names
from ..spec import Points
from .tasks import is_encoder_decoder

# Two batches that differ in everything: what differs in the shapes then is the batch, or positions.
_SIZES = ((2, 5, 7), (3, 11, 13))  # examples, positions, positions of a decoder
_LETTERS = "BPL"


class Point(NamedTuple):
    """A module: its name, its class, and the shape of its output; None where it has no tensor, or isn't called."""

    name: str
    kind: str
    shape: tuple[int | str, ...] | None  # "B" examples, "P" positions, "L" those of a decoder, "?" of neither

    @property
    def shown(self) -> str:
        """The shape as text."""
        return "-" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"


def list_points(model: nn.Module, points: Points = "**") -> list[Point]:
    """Return the points that ``points`` mean, all by default, in the model's order, by calling it on made-up input.

    It takes a model of tokens, an encoder-decoder, or one of images; weights on the meta device do.

    Raises:
        ValueError: for names that match nothing.
        RuntimeError: where the model can't be called so; it says why.

    Example:
        >>> import torch
        >>> from tlfast.collecting.point_list import list_points
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> [(point.name, point.shown) for point in list_points(model, "*")]
        [('0', '[B, P, 4]'), ('1', '[B, P, 9]')]
    """
    modules = {name: module for name, module in model.named_modules() if name}
    wanted = match_names("points", modules, points)
    seen = [_shapes(model, {name: modules[name] for name in wanted}, sizes) for sizes in _SIZES]
    return [
        Point(name, type(modules[name]).__name__, _named(*(shapes.get(name) for shapes in seen))) for name in wanted
    ]


def _named(one: torch.Size | None, other: torch.Size | None) -> tuple[int | str, ...] | None:
    if one is None or other is None or len(one) != len(other):
        return None
    sizes = list(zip(one, other, strict=True))
    letters: dict[tuple[int, int], str] = dict(zip(zip(*_SIZES, strict=True), _LETTERS, strict=True))
    return tuple(letters.get(pair, "?") if pair[0] != pair[1] else pair[0] for pair in sizes)


def _shapes(model: nn.Module, modules: dict[str, nn.Module], sizes: Sequence[int]) -> dict[str, torch.Size]:
    """The shape of the first tensor that each module returned last."""
    found: dict[str, torch.Size] = {}

    def see(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values = output.values() if isinstance(output, dict) else output
            parts = [output] if isinstance(output, torch.Tensor) else values if hasattr(values, "__iter__") else []
            tensor = next((part for part in parts if isinstance(part, torch.Tensor)), None)
            if tensor is not None:
                found[name] = tensor.shape

        return hook

    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(see(name)).remove)
        stack.callback(lambda: [module.train() for module in training] and None)
        model.eval()
        try:
            model(**_inputs(model, *sizes)) if hasattr(model, "config") else model(_tokens(model, *sizes[:2]))
        except Exception as error:  # whatever a model raises where its input isn't made up well
            got = f"{type(model).__name__}: {' '.join(str(error).split())[:200]}"
            rule, remedy = "run on made-up input", "Call tlfast.capture with input of its own."
            raise RuntimeError(broken_rule("points", "model", rule, got, remedy)) from error
    return found


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _tokens(model: nn.Module, n: int, n_positions: int) -> torch.Tensor:
    return torch.ones(n, n_positions, dtype=torch.int64, device=_device(model))


def _inputs(model: Any, n: int, n_positions: int, n_decoded: int) -> dict[str, torch.Tensor]:
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        size, channels = getattr(model.config, "image_size", 224), getattr(model.config, "num_channels", 3)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {main: _zeros(model, n, channels, height, width)}
    if main in ("input_values", "input_features"):
        given = {main: _zeros(model, n, *_sizes_of_sound(model, main))}
    else:
        given = {main: _tokens(model, n, n_positions)}
    if is_encoder_decoder(model):
        given["decoder_input_ids"] = _tokens(model, n, n_decoded)
    return given


def _zeros(model: nn.Module, *sizes: int) -> torch.Tensor:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.zeros(sizes, dtype=dtype, device=_device(model))


def _sizes_of_sound(model: Any, main: str) -> tuple[int, ...]:
    """The sizes of one example of a model of sound: a second of samples, or frames with their bands."""
    config = model.config
    bands, frames = getattr(config, "num_mel_bins", None), getattr(config, "max_length", None)
    if main == "input_values":
        return (16_000,) if bands is None else (frames or 1024, bands)  # of AST frames have this name, too
    if hasattr(config, "max_source_positions") and bands is not None:
        return bands, 2 * config.max_source_positions  # of Whisper, which halves them
    return 100, getattr(config, "feature_projection_input_dim", getattr(config, "input_feat_per_channel", 80))
