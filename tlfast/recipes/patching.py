"""Attribution patching: what putting the clean activation back would do to a metric, by one backward for all points."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..backends.choice import reduce_product_into
from ..errors import broken_rule
from ..hooks.freeze import Embedding, at_work
from ..spec import Points, one_of
from .native_forms import native_forms
from .pairs import Inputs, Metric, Pairs, call, check_model, check_pairs, in_batches, metric_of
from .places import Place, Watch, find_places, hook_dict_of

Granularity = Literal["node", "head", "position", "latent"]
GRANULARITIES = ("node", "head", "position", "latent")
# Where heads lie side by side, by the names of modules and of hook points.
_GIVEN = re.compile(r"(?i:att(?:n|ention)\b.*\.)(o_proj|out_proj|c_proj|dense|out_lin|wo|o|proj)$")
_MADE = re.compile(r"(?i:att(?:n|ention)\b.*\.)(q|k|v|query|key|value)(_proj|_lin)?$")
_HOOKED = re.compile(r"(?:^|\.)(hook_z|hook_result|hook_(?:rot_)?[qkv]|hook_[qkv]_input|[qkv]\.hook_out|o\.hook_in)$")
_KEYS_VALUES = re.compile(r"^(hook_(rot_)?)?([kv]|key|value)(_proj|_lin|\.hook_out)?$")
_SHARED = ("num_key_value_heads", "n_key_value_heads")
BATCH_SIZE = 16  # pairs: enough for matrix products at their full speed, at the lengths of such prompts
ERROR = ":error"  # behind the name of a point: what its SAE doesn't explain


@dataclass(frozen=True)
class Attribution:
    """What `attribution_patching` found.

    Args:
        scores: of each point a tensor [pairs], then [P] where positions are kept, then [heads] or [latents].
        metric: the metric of the corrupted inputs: [pairs], or [] where it is one number.
        granularity: as it was asked for.
    """

    scores: dict[str, torch.Tensor]
    metric: torch.Tensor
    granularity: str

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.scores[name]

    def mean(self) -> dict[str, torch.Tensor]:
        """Of each point the mean over the pairs."""
        return {name: scores.double().mean(0).to(scores.dtype) for name, scores in self.scores.items()}

    def top(self, k: int = 10) -> list[tuple[str, tuple[int, ...], float]]:
        """(point, index, score) of the k largest by magnitude in the mean over the pairs; the index is () of a node."""
        found = []
        for name, scores in self.mean().items():
            flat = scores.flatten()
            values, places = flat.abs().topk(min(k, flat.numel()))
            del values
            for place in places.tolist():
                index = torch.unravel_index(torch.tensor(place), scores.shape) if scores.dim() else ()
                found.append((name, tuple(int(i) for i in index), float(flat[place])))
        return sorted(found, key=lambda one: -abs(one[2]))[:k]


def attribution_patching(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    points: Points | Mapping[str, Any],
    granularity: Granularity = "node",
    *,
    per_position: bool = False,
    side: Literal["output", "input"] | None = None,
    heads: int | None = None,
    batch_size: int | None = BATCH_SIZE,
    output: int | str | None = None,
    embedding: Embedding | None = None,
) -> Attribution:
    """Estimate what patching each clean activation into the corrupted run would add to a metric (Nanda, 2023).

    The score of a point is ``sum gradient * (clean - corrupted)``: the gradient of the metric in the *corrupted* run,
    the difference towards the *clean* one. It is positive where the patch would raise the metric: denoising. For
    noising, from the clean run towards the corrupted one, give the two in the other order.

    The model runs in eval mode, makes no parameter gradient, and is as before afterwards. In float32 and float64 norms
    and GELUs that are written out in Python run as torch's own, the same but for rounding. The clean run ends behind
    the last point. Of each point one activation is kept, of ``batch_size`` pairs: that of the clean run, which the
    difference replaces as the corrupted run passes. Its product with the gradient is added up in float32 (float64 for
    float64) where the backward brings it, and no gradient is kept.

    Args:
        model: any module that begins with an embedding: of Hugging Face, a HookedTransformer, a TransformerBridge.
        clean, corrupted: token ids [pairs, P], or mappings of the model's arguments with one shape in both. Of an
            ``attention_mask``, the same in both, padding is left out of all sums; with padding on the left the
            positions of the real tokens are given to a model that takes ``position_ids``, if they aren't there.
        metric: ``metric(logits, pairs)`` gives [pairs], or one number where all pairs go at once; ``pairs.index`` says
            which they are (`Pairs`). A row of the scores is of one pair: with a mean over the pairs, its part in that.
        points: names, globs, modules or a predicate; hook points by their names and aliases on a TransformerLens model.
            For "latent" a mapping of names to SAEs.
        granularity: "node", a number a pair; "position", [P]; "head", [heads]; "latent", [latents]. An SAE has
            ``encode`` and ``decode``; the score is of ``decode``'s gradient and the difference of codes, in the model
            as it is: what an SAE doesn't explain stands under ``point:error``, and the sum of both is that of the node
            where ``decode`` is affine.
        per_position: keep the positions of "head" and "latent" as well: [pairs, P, heads].
        side: "output", or "input" for what a module is given. None: "input" for "head", since the heads lie side by
            side in what the output projection is given, but "output" at hook points.
        heads: how many lie side by side; None is what the config says, at what an output projection is given, at
            queries, keys and values, and at the hook points of these.
        batch_size: pairs in a pass; None is all of them. No score depends on it but by rounding.
        output: which output (or input) of a module, as in `tlfast.Spec`.
        embedding: what starts the graph, as in `tlfast.freeze`.

    Returns:
        An `Attribution`: ``scores[name]`` in the points' order, and the metric of the corrupted inputs.

    Raises:
        ValueError, TypeError: for inputs that don't pair, points that aren't there or aren't called once in a forward,
            tensors without positions or heads, and a metric of another shape.
        RuntimeError: for a metric without a gradient.

    Example:
        >>> import torch
        >>> from tlfast.recipes import attribution_patching
        >>> model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5))
        >>> clean, corrupted = torch.tensor([[0, 1]]), torch.tensor([[2, 1]])
        >>> def metric(logits, pairs):
        ...     return logits[:, 0, 0]
        >>> found = attribution_patching(model, clean, corrupted, metric, "0", "position")
        >>> logits = [model(tokens)[0, 0, 0] for tokens in (clean, corrupted)]
        >>> torch.allclose(found["0"][0, 0], logits[0] - logits[1], atol=1e-6), found["0"][0, 1]  # a linear model
        (True, tensor(0.))
    """
    who = "attribution_patching"
    check_model(who, model)
    one_of(who, "granularity", granularity, GRANULARITIES)
    n_pairs = check_pairs(who, clean, corrupted)
    saes = _saes(who, points, granularity)
    if per_position and granularity in ("node", "position"):
        remedy = 'Choose granularity="position".' if granularity == "node" else "Leave per_position out."
        raise ValueError(broken_rule(who, "per_position", 'go with "head" or "latent"', repr(granularity), remedy))
    if heads is not None and granularity != "head":
        raise ValueError(broken_rule(who, "heads", 'go with granularity="head"', repr(granularity), "Leave it out."))
    if side is None:
        side = "input" if granularity == "head" and not hook_dict_of(model) else "output"
    one_of(who, "side", side, ("output", "input"))
    places = find_places(who, model, list(points) if saes else points, side, output)  # type: ignore[arg-type]
    n_heads = [_heads_at(who, model, place, heads) if granularity == "head" else None for place in places]
    by_position = per_position or granularity == "position"
    study = Study(who, places, n_pairs, by_position, n_heads, saes)
    value = study.run(model, clean, corrupted, metric, batch_size, embedding)
    return Attribution(study.named(), value, granularity)


def _saes(who: str, points: Any, granularity: str) -> list[Any] | None:
    if (granularity == "latent") != isinstance(points, Mapping):
        rule, got = 'be a mapping of names to SAEs for "latent", and for nothing else', type(points).__name__
        raise TypeError(broken_rule(who, "points", rule, got, 'Pass {"blocks.3.hook_resid_post": sae}.'))
    if not isinstance(points, Mapping):
        return None
    for name, sae in points.items():
        if not callable(getattr(sae, "encode", None)) or not callable(getattr(sae, "decode", None)):
            rule = "have encode and decode"
            raise TypeError(broken_rule(who, f"the SAE of {name}", rule, type(sae).__name__, "Pass an SAE."))
    return list(points.values())


def _heads_at(who: str, model: nn.Module, place: Place, heads: int | None) -> int:
    """How many heads lie side by side at a place; ValueError where none are known to.

    A stream of the same width can be cut into as many parts, which are nobody's.
    """
    if heads is not None:
        if type(heads) is not int or heads < 1:
            raise ValueError(broken_rule(who, "heads", "be a positive number", repr(heads), "Leave it out."))
        return heads
    hooked = bool(hook_dict_of(model))
    found = (_HOOKED if hooked else _GIVEN if place.side == "input" else _MADE).search(place.name)
    if found is None:
        rule = "be a point of heads: what an output projection is given, or queries, keys and values"
        example = "blocks.*.attn.hook_z" if hooked else "model.layers.*.self_attn.o_proj"
        got = f"{place.name} ({place.side})"
        remedy = f'Take "{example}", or say heads= if there are heads.'
        raise ValueError(broken_rule(who, "points", rule, got, remedy))
    repeated = getattr(getattr(model, "cfg", None), "ungroup_grouped_query_attention", False)
    return heads_of(who, model, shared=bool(_KEYS_VALUES.match(found.group(1))) and not repeated)


def heads_of(who: str, model: nn.Module, shared: bool = False) -> int:
    """How many heads the config of a model says that its attention has; ``shared`` for those of keys and values."""
    for config in (getattr(model, "cfg", None), getattr(model, "config", None)):
        inner: Any = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
        for name in (*(_SHARED if shared else ()), "n_heads", "num_attention_heads", "n_head"):
            found = getattr(inner, name, None)
            if isinstance(found, int):
                return found
    raise ValueError(broken_rule(who, "heads", "be in the model's config", type(model).__name__, "Pass heads=."))


class Study:
    """The scores of the places, and between the runs of a pass the differences of their activations.

    Args:
        who: the caller, for errors.
        places: where to look.
        n_pairs: how many there are in all.
        by_position: whether positions are kept.
        heads: of each place how many heads are kept, or None.
        saes: of each place its SAE, or None for all.
    """

    def __init__(
        self,
        who: str,
        places: list[Place],
        n_pairs: int,
        by_position: bool,
        heads: list[int | None],
        saes: list[Any] | None = None,
    ):
        self.who, self.places, self.n_pairs = who, places, n_pairs
        self.by_position, self.heads, self.saes = by_position, heads, saes
        self._scores: dict[str, torch.Tensor] = {}
        self._clean: list[torch.Tensor | None] = [None] * len(places)
        self._corrupted: list[torch.Tensor | None] = [None] * len(places)  # for SAEs, which encode both

    def run(
        self,
        model: nn.Module,
        clean: Inputs,
        corrupted: Inputs,
        metric: Metric,
        batch_size: int | None,
        embedding: Embedding | None = None,
    ) -> torch.Tensor:
        """Take all pairs through the model; returns the metric of the corrupted inputs."""
        values, watched = [], [place.module for place in self.places]
        with at_work(model, embedding), native_forms(model, watched), Watch(self.who, model, self.places) as watch:
            for rows, pairs in in_batches(self.who, clean, corrupted, batch_size, self.n_pairs):
                self.begin(rows, pairs)
                with torch.no_grad():
                    watch.forward(partial(call, model, pairs.clean), self.keep_clean, stop=True)
                out = watch.forward(partial(call, model, pairs.corrupted), self.take_corrupted)
                value = metric_of(self.who, metric, out, pairs, alone=len(pairs) == self.n_pairs)
                del out
                watch.backward(value, self.score)
                values.append(value.detach())
        return torch.cat(values) if value.dim() else values[0]

    def begin(self, rows: slice, pairs: Pairs) -> None:
        self.rows, self.pairs = rows, pairs

    def keep_clean(self, number: int, act: torch.Tensor) -> None:
        """A copy, for a model may change its own in place; into the memory of the pass before."""
        act = self._checked(number, act)
        buffer = self._clean[number]
        if buffer is None or buffer.shape != act.shape or buffer.dtype != act.dtype:
            buffer = self._clean[number] = torch.empty_like(act, memory_format=torch.contiguous_format)
        buffer.copy_(act)

    def take_corrupted(self, number: int, act: torch.Tensor) -> None:
        act, clean = self._checked(number, act), self._clean[number]
        assert clean is not None
        if clean.shape != act.shape:
            rule = f"have one shape in both runs ({list(clean.shape)})"
            name = self.places[number].name
            raise ValueError(broken_rule(self.who, name, rule, list(act.shape), "Pad both to one length."))
        if self.saes is not None:
            self._corrupted[number] = act.clone()
        elif act.dtype in (torch.bfloat16, torch.float16):  # whose difference it can't hold
            self._clean[number] = clean.float().sub_(act)
        else:
            clean.sub_(act)

    def _checked(self, number: int, act: torch.Tensor) -> torch.Tensor:
        """An activation, with a dimension of heads where these are asked for."""
        name, heads = self.places[number].name, self.heads[number]
        by_position = self.by_position or heads is not None
        if act.dim() < (3 if by_position else 1) or len(act) != len(self.pairs):
            rule = (
                "be [pairs, P, ...] where positions or heads are told apart" if by_position else "begin with the pairs"
            )
            remedy = 'Choose granularity="node", or another point.' if by_position else "Take another point."
            raise ValueError(broken_rule(self.who, name, rule, list(act.shape), remedy))
        return self._by_head(number, act)

    def _by_head(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        heads = self.heads[number]
        if heads is None or (tensor.dim() == 4 and tensor.shape[2] == heads):
            return tensor
        if tensor.dim() == 3 and tensor.shape[2] % heads == 0:
            return tensor.reshape(*tensor.shape[:2], heads, -1)
        rule = f"be [pairs, P, {heads} heads, d], or flat [pairs, P, {heads} x d]"
        remedy = "Take the output projection, whose input it is, or pass heads=."
        raise ValueError(broken_rule(self.who, self.places[number].name, rule, list(tensor.shape), remedy))

    def score(self, number: int, grad: torch.Tensor) -> None:
        """What the backward brings to a place, times the difference there."""
        name, delta = self.places[number].name, self._clean[number]
        assert delta is not None
        if self.saes is not None:
            self._score_latents(number, name, grad)
            return
        grad = self._by_head(number, grad)
        kept = {0, 1} if self.by_position else {0}
        kept = kept | {2} if self.heads[number] else kept
        self._sum(name, grad, delta, kept)

    def _sum(self, name: str, grad: torch.Tensor, delta: torch.Tensor, kept: set[int]) -> None:
        """Into the rows of this pass the sum over all dimensions but those that are kept."""
        over = tuple(dim for dim in range(grad.dim()) if dim not in kept)
        shape = [size for dim, size in enumerate(grad.shape) if dim in kept]
        mask = self.pairs.mask if grad.dim() >= 3 else None
        mask = None if mask is None else mask.to(grad.device)
        if name not in self._scores:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            self._scores[name] = torch.empty((self.n_pairs, *shape[1:]), dtype=dtype, device=grad.device)
        scores = self._scores[name]
        if list(scores.shape[1:]) != shape[1:]:
            rule = f"have one shape in all passes ({list(scores.shape[1:])})"
            raise ValueError(broken_rule(self.who, name, rule, shape[1:], "Pad all pairs to one length."))
        reduce_product_into(scores[self.rows], grad, delta, "sum" if over else "none", over or -1, mask)

    def _score_latents(self, number: int, name: str, grad: torch.Tensor) -> None:
        sae: Any = self.saes[number]  # type: ignore[index]
        clean, corrupted = self._clean[number], self._corrupted[number]
        self._corrupted[number] = None
        with torch.no_grad():
            # An SAE that normalizes keeps of the last encoding what its decoding needs.
            codes = sae.encode(clean)
            unexplained = clean.float() - sae.decode(codes).float()  # type: ignore[union-attr]
            ours = sae.encode(corrupted)
        with torch.enable_grad():
            ours.requires_grad_()
            decoded = sae.decode(ours)
            (towards,) = torch.autograd.grad(decoded, ours, grad.to(decoded.dtype))
        with torch.no_grad():
            unexplained -= corrupted.float() - decoded.float()  # type: ignore[union-attr]
            by_position = {0, 1} if self.by_position else {0}
            self._sum(name, towards, codes.sub_(ours.detach()), by_position | {towards.dim() - 1})
            self._sum(name + ERROR, grad, unexplained, by_position)

    def named(self) -> dict[str, torch.Tensor]:
        """The scores in the order of the places."""
        names = [place.name for place in self.places]
        return {one: self._scores[one] for name in names for one in (name, name + ERROR) if one in self._scores}
