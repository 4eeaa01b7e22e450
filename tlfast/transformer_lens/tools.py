"""TransformerLens' own studies on the recipes: its `attribution_patch`, where the installed version has one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

from ..hooks.freeze import at_work
from ..hooks.patches import Patch
from ..recipes.edges import Edges
from ..recipes.pairs import Pairs
from ..recipes.patching import BATCH_SIZE, Study
from ..recipes.places import Place, hook_dict_of
from ..recipes.residual_graph import residual_graph
from .theirs import is_hooked

PACKAGE = "transformer_lens.tools.analysis"
TOOL = f"{PACKAGE}.attribution_patching"
NAME = "attribution_patch"
_WHO = "attribution_patch"
Concerns = Callable[[object], bool]


def patches(concern: Concerns) -> Iterator[Patch]:
    """What stands in place of theirs, where it is imported."""
    tool = sys.modules.get(TOOL)
    original = getattr(tool, NAME, None)
    if tool is None or original is None:
        return
    ours = _patching(original, tool, concern)
    yield tool, NAME, ours
    package = sys.modules.get(PACKAGE)
    if package is not None and vars(package).get(NAME) is original:  # it exports the function under its own name, too
        yield package, NAME, ours


class Waiting(MetaPathFinder):
    """Waits for the import of a tool, which takes seconds, instead of importing it.

    Args:
        arrived: called when the package of the tools has been imported.
    """

    def __init__(self, arrived: Callable[[], None]):
        self._arrived = arrived

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader, self._arrived)
        return spec


class _Telling(Loader):
    """Another loader, which tells when a module has been made; the module knows nothing of it."""

    def __init__(self, inner: Any, done: Callable[[], None]):
        self._inner, self._done = inner, done

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._inner.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        spec: Any = module.__spec__
        spec.loader = module.__loader__ = self._inner
        self._inner.exec_module(module)
        self._done()


def _patching(original: Callable[..., Any], tool: Any, concern: Concerns) -> Callable[..., Any]:
    @wraps(original)
    def attribution_patch(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("model", "clean", "corrupt", "metric_fn", "config"), args, strict=False)) | kwargs
        if concern(given.get("model")) and len(args) <= 5 and _is_ours(**given):
            try:
                return _attributed(tool, **given)
            except _TheirError:
                pass  # theirs says so in its own words
        return original(*args, **kwargs)

    replacing: Any = attribution_patch
    replacing.tlfast_replaced = original
    return attribution_patch


class _TheirError(Exception):
    """Something that theirs refuses, or does in a way that isn't ours."""


def _is_ours(
    model: Any = None, clean: Any = None, corrupt: Any = None, metric_fn: Any = None, config: Any = None, **more: Any
) -> bool:
    """Whether a call is one that theirs would take through, on a model without hooks of anybody's."""
    tokens = [one for one in (clean, corrupt) if isinstance(one, torch.Tensor) and one.dim() == 2 and len(one)]
    if more or len(tokens) != 2 or clean.shape != corrupt.shape or not callable(metric_fn):
        return False
    if not isinstance(model, torch.nn.Module) or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    inner = getattr(model, "original_model", None)
    modules = [*model.modules(), *(inner.modules() if isinstance(inner, torch.nn.Module) else ())]
    if any(module.training for module in modules):
        return False
    return not any(is_hooked(point) for point in hook_dict_of(model).values())


def _attributed(tool: Any, model: Any, clean: Any, corrupt: Any, metric_fn: Any, config: Any = None) -> Any:
    edges = getattr(config, "granularity", "node") == "edge"

    def metric(logits: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """Theirs is a function of one example's logits."""
        values = [metric_fn(logits[row : row + 1]) for row in range(len(pairs))]
        if not all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in values):
            raise _TheirError
        return torch.stack(values)

    try:
        return (_edge_scores if edges else _node_scores)(tool, model, clean, corrupt, metric)
    except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
        raise _TheirError from error


def _node_scores(tool: Any, model: Any, clean: torch.Tensor, corrupt: torch.Tensor, metric: Any) -> Any:
    hooks, n_layers = hook_dict_of(model), int(model.cfg.n_layers)
    names = ["hook_embed"]
    for layer in range(n_layers):
        names += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    heads = [int(model.cfg.n_heads) if name.endswith("hook_z") else None for name in names]
    study = Study(_WHO, [Place(name, hooks[name]) for name in names], len(clean), True, heads)
    study.run(model, clean, corrupt, metric, BATCH_SIZE)
    found = {name: (scores.double().sum(0) / len(clean)).tolist() for name, scores in study.named().items()}
    node = tool.Node
    scores = {node(kind="embed", position=at): value for at, value in enumerate(found["hook_embed"])}
    for layer in range(n_layers):
        for at, values in enumerate(found[f"blocks.{layer}.attn.hook_z"]):
            for head, value in enumerate(values):
                scores[node(kind="attn_head_out", layer=layer, head=head, position=at)] = value
            scores[node(kind="mlp_out", layer=layer, position=at)] = found[f"blocks.{layer}.hook_mlp_out"][at]
    return tool.AttributionResult(node_scores=scores)


def _edge_scores(tool: Any, model: Any, clean: torch.Tensor, corrupt: torch.Tensor, metric: Any) -> Any:
    # What theirs refuses, though edges can be read there: grouped queries, attentions that split no heads.
    tool._check_attention_write_structure(model)
    tool._check_kv_heads_match_query_heads(model)
    with tool._edge_hook_flags(model):
        pass
    graph = residual_graph(_WHO, model, "hook_embed")
    study = Edges(_WHO, graph, per_position=True)
    with at_work(model):
        study.run(model, clean, corrupt, metric, BATCH_SIZE)
    table = (study.scores().double() / len(clean)).tolist()
    scores: dict[Any, float] = {}
    nodes: dict[Any, float] = {}
    for at, rows in enumerate(table):
        writers = [_node(tool, name, at, len(graph.norms)) for name in graph.writer_names]
        readers = [(reader, name) for reader in graph.readers for name in reader.names]
        for column, (reader, name) in enumerate(readers):
            to = _node(tool, name, at, len(graph.norms), reads=True)
            for row in range(reader.n_writers):
                scores[writers[row], to] = rows[row][column]
                nodes[writers[row]] = nodes.get(writers[row], 0.0) + rows[row][column]
    return tool.AttributionResult(node_scores=nodes, edge_scores=scores)


def _node(tool: Any, name: str, position: int, n_layers: int, reads: bool = False) -> Any:
    """Their node of one of our names."""
    if name == "input":
        return tool.Node(kind="embed", position=position)
    if name == "logits":
        return tool.Node(kind="logits", layer=n_layers - 1, position=position)
    if name.startswith("m"):
        return tool.Node(kind="mlp_in" if reads else "mlp_out", layer=int(name[1:]), position=position)
    layer, _, head = name[1:].rstrip(">").partition(".h")
    number, _, kind = head.partition("<")
    kind = f"{kind}_input" if reads else "attn_head_out"
    return tool.Node(kind=kind, layer=int(layer), head=int(number), position=position)
