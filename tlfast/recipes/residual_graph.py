"""A model as a graph: what writes into the residual stream, what reads it, where both are seen; TransformerLens'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import broken_rule
from .norms import Norm
from .places import Place, hook_dict_of

# Under these a point has a dimension of heads that this reading of the graph doesn't expect.
_SPLIT = ("use_split_qkv_input", "use_attn_in")
INPUT = "blocks.0.hook_resid_pre"  # all that is written before the first block


@dataclass
class Writer:
    """Writers whose outputs are seen at one place: a layer's heads, an MLP, what the first block is given."""

    place: Place
    first: int  # of their rows among the writers
    names: list[str]
    weight: torch.Tensor | None = None  # [heads, d_head, d_model], float32: from what is seen to what is written


@dataclass
class Reader:
    """Readers whose gradients are seen at one place, and the way from there back to the residual stream."""

    place: Place
    first: int  # of their columns among the readers
    names: list[str]
    n_writers: int  # how many write before they read
    weight: torch.Tensor | None = None  # [heads, d_head, d_model], float32: from a gradient that is seen to the norm's
    norm: Norm | None = None  # what lies between the residual stream and what the weight reads
    columns: torch.Tensor | None = None  # [heads, d_head]: whose a gradient's columns are, where not in order


@dataclass
class ResidualGraph:
    """Writers, readers and norms of a model."""

    writers: list[Writer]
    readers: list[Reader]
    norms: list[Norm]
    start: nn.Module | None = None  # what is given the stream first; None: the first writer's place puts it out

    @property
    def writer_names(self) -> list[str]:
        return [name for writer in self.writers for name in writer.names]

    @property
    def reader_names(self) -> list[str]:
        return [name for reader in self.readers for name in reader.names]

    def exists(self) -> torch.Tensor:
        """[writers, readers]: whether there is an edge."""
        limits = torch.tensor([reader.n_writers for reader in self.readers for _ in reader.names])
        return torch.arange(len(self.writer_names))[:, None] < limits


def _not_read(who: str, got: str, remedy: str = "See docs/recipes.md for what is read.") -> ValueError:
    rule = "be a HookedTransformer, a TransformerBridge or a decoder whose layers add to the residual stream"
    return ValueError(broken_rule(who, "model", rule, got, remedy))


def residual_graph(who: str, model: Any, given: str = INPUT) -> ResidualGraph:
    """Read a model; ``given`` is where the writer called "input" is seen.

    Raises:
        ValueError: for a model that isn't of TransformerLens, or has parts that aren't known.
    """
    hooks, blocks, cfg = hook_dict_of(model), getattr(model, "blocks", None), getattr(model, "cfg", None)
    if not hooks or blocks is None or cfg is None:
        raise _not_read(who, type(model).__name__)
    split = [flag for flag in _SPLIT if getattr(cfg, flag, False)]
    if split:
        rule, remedy = "be off: gradients are split by heads here without it", "Switch it off."
        raise ValueError(broken_rule(who, f"cfg.{split[0]}", rule, "True", remedy))

    def at(name: str) -> Place:
        if name not in hooks:
            raise _not_read(who, f"a {type(model).__name__} without {name}")
        return Place(name, hooks[name])

    graph = ResidualGraph([Writer(at(given), 0, ["input"])], [], [])
    for number, block in enumerate(blocks):
        _read_block(who, graph, at, f"blocks.{number}", number, block, cfg)
    last = at(f"blocks.{len(blocks) - 1}.hook_resid_post")
    graph.readers.append(Reader(last, len(graph.reader_names), ["logits"], len(graph.writer_names)))
    return graph


def _read_block(
    who: str, graph: ResidualGraph, at: Callable[[str], Place], name: str, number: int, block: Any, cfg: Any
) -> None:
    attention, ln1 = getattr(block, "attn", None), getattr(block, "ln1", None)
    if attention is None or ln1 is None:
        raise _not_read(who, f"{name} without ln1 and attn")
    norm = Norm(Place(f"{name}.ln1", ln1, often=True))
    graph.norms.append(norm)
    n_before = len(graph.writer_names)
    for kind in ("q", "k", "v"):
        weight = _by_heads(who, f"{name}.attn.W_{kind.upper()}", attention, cfg.d_model).transpose(1, 2)
        if kind != "q":
            weight = _own_heads(weight, attention, cfg)
        names = [f"a{number}.h{head}<{kind}>" for head in range(len(weight))]
        place = at(f"{name}.attn.hook_{kind}")
        graph.readers.append(Reader(place, len(graph.reader_names), names, n_before, weight, norm))
    written = _by_heads(who, f"{name}.attn.W_O", attention, cfg.d_model)
    heads = [f"a{number}.h{head}" for head in range(len(written))]
    graph.writers.append(Writer(at(f"{name}.attn.hook_z"), n_before, heads, written))
    if getattr(block, "mlp", None) is None:
        return
    parallel = bool(getattr(cfg, "parallel_attn_mlp", False))
    n_seen = n_before if parallel else len(graph.writer_names)
    ln2 = getattr(block, "ln2", None)
    first, names = len(graph.reader_names), [f"m{number}"]
    if ln2 is not None:
        graph.readers.append(Reader(Place(f"{name}.ln2", ln2, "input"), first, names, n_seen))
    else:
        graph.readers.append(Reader(Place(f"{name}.mlp", block.mlp, "input"), first, names, n_seen, norm=norm))
    graph.writers.append(Writer(at(f"{name}.hook_mlp_out"), len(graph.writer_names), names))


def _by_heads(who: str, name: str, attention: Any, width: int) -> torch.Tensor:
    """A weight of an attention, [heads, ., .]."""
    weight = getattr(attention, name.rsplit(".", 1)[1], None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 3 or width not in weight.shape[1:]:
        got = f"{name} {list(weight.shape) if isinstance(weight, torch.Tensor) else 'missing'}"
        raise _not_read(who, got)
    return weight.detach().float() if weight.dtype != torch.float64 else weight.detach()


def _own_heads(weight: torch.Tensor, attention: Any, cfg: Any) -> torch.Tensor:
    """Of keys or values the heads that there are: a HookedTransformer says each as often as queries share it."""
    n_own = getattr(cfg, "n_key_value_heads", None) or len(weight)
    if getattr(cfg, "ungroup_grouped_query_attention", False) or len(weight) == n_own or len(weight) % n_own:
        return weight
    return weight[:: len(weight) // n_own]
