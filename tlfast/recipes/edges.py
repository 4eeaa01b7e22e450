"""Edge attribution patching: what each edge between two parts of a model carries, by one backward for all edges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..backends.outputs import replace_output, select_output
from ..errors import broken_rule
from ..hooks.freeze import Embedding, at_work
from .additivity import Additivity
from .decoder_graph import decoder_graph
from .native_forms import native_forms
from .norms import Norm
from .pairs import Inputs, Metric, Pairs, call, check_model, check_pairs, in_batches, metric_of
from .places import Place, Watch, hook_dict_of
from .products import outer_into
from .residual_graph import Reader, ResidualGraph, residual_graph

BATCH_SIZE = 8  # pairs: the writers' differences are read again for each group of readers, from the cache if they fit
# Which call of the norm a HookedTransformer makes for which of them; a bridge makes one for all.
_CALLS = {"q>": 0, "k>": 1, "v>": 2}


@dataclass(frozen=True)
class EdgeScores:
    """What `eap` found.

    Args:
        scores: [writers, readers], or [P, writers, readers]; 0 where there is no edge.
        writers: "input" (what the first block is given), "a0.h1" (head 1 of layer 0), "m0" (an MLP).
        readers: "a0.h1<q>", "<k>", "<v>", "m0", "logits". With grouped queries keys and values have fewer heads.
        exists: [writers, readers], whether there is an edge.
        metric: the metric of the corrupted inputs: [pairs], or [].
    """

    scores: torch.Tensor
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: torch.Tensor
    metric: torch.Tensor

    def __getitem__(self, edge: tuple[str, str]) -> torch.Tensor:
        """The score of one edge, ``found["a0.h1", "m1"]``; KeyError for one that isn't there."""
        writer, reader = edge
        if writer not in self.writers or reader not in self.readers:
            raise KeyError(edge)
        row, column = self.writers.index(writer), self.readers.index(reader)
        if not self.exists[row, column]:
            raise KeyError(edge)
        return self.scores[..., row, column]

    def nodes(self) -> dict[str, torch.Tensor]:
        """Of each writer the sum over its edges, which is the score that `attribution_patching` gives it."""
        return dict(zip(self.writers, self.scores.sum(-1).movedim(-1, 0), strict=True))

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """(writer, reader, score) of the k largest by magnitude, over the sum of all positions."""
        scores = self.scores if self.scores.dim() == 2 else self.scores.sum(0)
        size = scores.abs().cpu().masked_fill(~self.exists, -1.0).flatten()
        places = size.topk(min(k, int(self.exists.sum()))).indices.tolist()
        found = [divmod(place, len(self.readers)) for place in places]
        return [(self.writers[row], self.readers[column], float(scores[row, column])) for row, column in found]


def eap(
    model: nn.Module,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    ig_steps: int = 1,
    *,
    per_position: bool = False,
    batch_size: int | None = BATCH_SIZE,
    embedding: Embedding | None = None,
) -> EdgeScores:
    """Estimate what patching each edge of a model from corrupted to clean would add to a metric (Syed et al., 2023).

    ``E[u, v] = sum (clean - corrupted of what u writes) * (gradient at what v reads)``, over positions and the width,
    in the mean over the pairs. Gradients are those of the *corrupted* run, as in `attribution_patching`, and a writer's
    edges add up to its score there. A reader's gradient is that at its own copy of the residual stream, *before* its
    norm: what ``hook_q_input`` and ``hook_mlp_in`` see where TransformerLens splits the stream. Here it isn't split:
    the gradient of a head's queries is taken back through its weights and through the norm as the run computed it,
    which is the same number. Grouped queries are read as they are: a reader for each head of keys and values.

    With ``ig_steps`` m > 1 it is EAP-IG (Hanna et al., 2024): the gradient is the mean over runs whose input to the
    first block is corrupted + k/m (clean - corrupted), k = 0 to m - 1; k = 0 alone is plain EAP.

    The model runs in eval mode, makes no parameter gradient, and is as before afterwards. Kept are the differences that
    the writers make, [writers, batch_size, P, d_model] in float32, and the gradients of one group of readers at a time:
    a matrix product a group. In the first pass it is checked that what was written adds up to the stream, and that the
    readers' gradients add up to that of their norm.

    Args:
        model: a decoder of Hugging Face, a HookedTransformer, or a TransformerBridge from 3.9 on, whose layers add to
            the residual stream what their heads and MLPs put out: norms before them, not behind; parallel layers too.
            How a decoder of Hugging Face is made is seen in a run of the first clean prompt, of two tokens or more.
        clean, corrupted, metric, batch_size, embedding: as in `attribution_patching`. A metric of each pair counts as
            the mean over the pairs, one number as it is.
        ig_steps: runs between corrupted and clean.
        per_position: keep positions: [P, writers, readers].

    Returns:
        `EdgeScores`: ``found["a0.h1", "m1"]``, ``found.top(20)``, ``found.nodes()``.

    Raises:
        ValueError, TypeError: for another model, one whose parts don't add up, or inputs that don't pair.
        RuntimeError: for a metric without a gradient.

    Example:
        found = eap(model, clean, corrupted, lambda logits, pairs: logits[:, -1, 3] - logits[:, -1, 7], ig_steps=5)
        for writer, reader, score in found.top(20):
            print(writer, reader, score)
    """
    who = "eap"
    check_model(who, model)
    n_pairs = check_pairs(who, clean, corrupted)
    if type(ig_steps) is not int or ig_steps < 1:
        raise ValueError(broken_rule(who, "ig_steps", "be 1 or more", repr(ig_steps), "1 is EAP, more EAP-IG."))
    with at_work(model, embedding):
        graph = _graph_of(who, model, clean)
        study = Edges(who, graph, per_position)
        value = study.run(model, clean, corrupted, metric, batch_size, ig_steps)
    scores = study.scores() / (ig_steps * (n_pairs if value.dim() else 1))
    return EdgeScores(scores, tuple(graph.writer_names), tuple(graph.reader_names), graph.exists(), value)


def _graph_of(who: str, model: nn.Module, clean: Inputs) -> ResidualGraph:
    """A model of TransformerLens is read by its hook points, another one by a run of its first prompt."""
    if hook_dict_of(model):
        return residual_graph(who, model)
    _, first = next(in_batches(who, clean, clean, 1, 1))
    return decoder_graph(who, model, lambda: call(model, first.clean))


class Edges:
    """The edges' sums, and of the pass that runs the differences that the writers make."""

    def __init__(self, who: str, graph: ResidualGraph, per_position: bool):
        self.who, self.graph, self.per_position = who, graph, per_position
        self._writers = {writer.place: writer for writer in graph.writers}
        self._readers = {reader.place: reader for reader in graph.readers}
        self.places = list(dict.fromkeys([*self._writers, *self._readers, *(norm.place for norm in graph.norms)]))
        self._norms = {norm.place for norm in graph.norms}
        self._end = graph.readers[-1].place
        self._watch: Watch
        self._deltas = torch.empty(0)  # [writers, pairs, P, d_model]
        self._heads: dict[Place, torch.Tensor] = {}  # of the clean run: [pairs, P, heads, d_head]
        self._along: dict[Place, torch.Tensor] = {}  # of the norms: the writers' dots with 1 and with what it is given
        self._scores: torch.Tensor | None = None
        self._added = 0.0  # times the input's difference, in the run that goes on
        self._check: Additivity | None = Additivity(who, graph)  # of the first pass
        self._dtype = torch.float32  # of the stream

    def run(
        self,
        model: nn.Module,
        clean: Inputs,
        corrupted: Inputs,
        metric: Metric,
        batch_size: int | None,
        ig_steps: int = 1,
    ) -> torch.Tensor:
        """Take all pairs through the model, which is at work; returns the metric of the corrupted inputs."""
        n_pairs, values = check_pairs(self.who, clean, corrupted), []
        with native_forms(model, [place.module for place in self.places]), _Watched(self, model):
            for _, pairs in in_batches(self.who, clean, corrupted, batch_size, n_pairs):
                for step in range(ig_steps):
                    out = self.forward(model, pairs, step / ig_steps)
                    value = metric_of(self.who, metric, out, pairs, alone=len(pairs) == n_pairs)
                    del out
                    self.backward(value)
                    if step == 0:
                        values.append(value.detach())
        return torch.cat(values) if value.dim() else values[0]

    def scores(self) -> torch.Tensor:
        assert self._scores is not None
        return self._scores

    def forward(self, model: nn.Module, pairs: Pairs, part: float) -> Any:
        """The run whose gradients are wanted, ``part`` of the way from corrupted to clean; the first makes the
        differences."""
        if part == 0.0:
            self._tell_norms(None if self._check is None else self._check.clean)
            with torch.no_grad():
                self._watch.forward(lambda: call(model, pairs.clean), self._take_clean, stop=True)
            self._tell_norms(None if self._check is None else self._check.corrupted)
        for norm in self.graph.norms:
            norm.calls.clear()
        self._added = part
        take = self._take_corrupted if part == 0.0 else _nothing
        out = self._watch.forward(lambda: call(model, pairs.corrupted), take)
        self._added = 0.0
        if part == 0.0:
            self._tell_norms(None)
            if self._check is not None:
                self._check.check_written(self._deltas, self._dtype)
            if pairs.mask is not None:
                self._deltas[:, ~pairs.mask.to(self._deltas.device)] = 0
        return out

    def _tell_norms(self, told: Callable[[Place, torch.Tensor], None] | None) -> None:
        for norm in self.graph.norms:
            norm.on_given = told

    def backward(self, value: torch.Tensor) -> None:
        """The backward of a run, which adds to the scores."""
        try:
            self._watch.backward(value, self._take_gradient)
        finally:
            self._along.clear()
            for norm in self.graph.norms:
                norm.calls.clear()
        if self._check is not None:
            self._check.check_read(self._dtype)
            self._check = None

    def _take_clean(self, number: int, act: torch.Tensor) -> None:
        place = self.places[number]
        writer = self._writers.get(place)
        if self._check is not None and place == self._end:
            self._check.clean(place, act)
        if writer is None:
            return
        if writer.weight is not None:
            self._heads[place] = self._by_heads(act, writer.names).to(writer.weight.dtype, copy=True)
            return
        if writer.first == 0:
            n_writers, self._dtype = len(self.graph.writer_names), act.dtype
            if self._deltas.shape != (n_writers, *act.shape) or self._deltas.device != act.device:
                dtype = torch.float64 if act.dtype == torch.float64 else torch.float32
                self._deltas = torch.empty((n_writers, *act.shape), dtype=dtype, device=act.device)
        self._deltas[writer.first].copy_(act.reshape(self._deltas.shape[1:]))  # some take an MLP's tokens flat

    def _take_corrupted(self, number: int, act: torch.Tensor) -> None:
        place = self.places[number]
        writer = self._writers.get(place)
        if self._check is not None and place == self._end:
            self._check.corrupted(place, act)
        if writer is None:
            return
        if writer.weight is None:
            self._deltas[writer.first].sub_(act.reshape(self._deltas.shape[1:]))
            return
        delta = (
            self._heads.pop(place).sub_(self._by_heads(act, writer.names)).movedim(2, 0).flatten(1, 2)
        )  # [heads, pairs x P, d_head]
        written = self._deltas[writer.first : writer.first + len(writer.names)]
        torch.bmm(delta, writer.weight, out=written.flatten(1, 2))

    def _take_gradient(self, number: int, grad: torch.Tensor) -> None:
        place = self.places[number]
        reader = self._readers.get(place)
        if reader is None:
            if self._check is not None and place in self._norms:
                self._check.whole(place, grad)
            return
        if reader.norm is None:
            # Some models take an MLP's tokens flat.
            self._add(reader, grad.to(self._deltas.dtype).reshape(1, *self._deltas.shape[1:]))
        else:
            self._through_norm(reader, reader.norm, grad.to(self._deltas.dtype))

    def _through_norm(self, reader: Reader, norm: Norm, grad: torch.Tensor) -> None:
        """Add the edges of readers behind a norm: back through their weights, and through the norm of this run."""
        if not norm.calls:
            rule, remedy = "run in the forward, with its gradient", "Switch off reentrant checkpoints."
            raise ValueError(broken_rule(self.who, norm.place.name, rule, "a run of it in the backward", remedy))
        call, weight = _CALLS.get(reader.names[0].rpartition("<")[2], 0), reader.weight
        sizes = self._deltas.shape[1:]
        if weight is None:
            heads = grad.reshape(1, -1, sizes[-1])
        else:
            heads = self._by_heads(grad, reader.names, reader.columns).movedim(2, 0).flatten(1, 2)
        if self._check is not None or norm.formula is None:
            grads = (heads if weight is None else torch.bmm(heads, weight)).unflatten(1, sizes[:2])
            total = grads.sum(0)
            if self._check is not None:
                self._check.part(norm.place, grads)
            grads = norm.pulled_back(call, grads.clone() if weight is None else grads)
            if self._check is not None:
                norm.learn(call, total, grads.sum(0))
            self._add(reader, grads)
            return
        x, r = norm.formula.parts(norm.given(call, grad.dtype).reshape(-1, sizes[-1]))
        scale = norm.formula.weight
        if weight is None:
            grads = heads * r if scale is None else heads * (r * scale)
        else:
            grads = torch.bmm(heads * r, weight if scale is None else weight * scale)
        self._add(reader, grads.unflatten(1, sizes[:2]))
        self._add_means(reader, norm, x, grads)

    def _by_heads(self, tensor: torch.Tensor, names: list[str], columns: torch.Tensor | None = None) -> torch.Tensor:
        """[pairs, P, heads, d_head] of what has the heads side by side, or anywhere, in its last dimension."""
        if tensor.dim() == 4:
            return tensor
        flat = tensor.reshape(*self._deltas.shape[1:3], -1)
        return flat.unflatten(2, (len(names), -1)) if columns is None else flat[..., columns.to(tensor.device)]

    def _add_means(self, reader: Reader, norm: Norm, x: torch.Tensor, grads: torch.Tensor) -> None:
        """Take off what a norm takes off a gradient: its mean, and its part along x."""
        assert norm.formula is not None
        assert self._scores is not None
        along = torch.stack([torch.ones_like(x), x] if norm.formula.centred else [x], dim=2)  # [n, d, 1 or 2]
        if norm.place not in self._along:
            self._along[norm.place] = torch.bmm(self._deltas[: reader.n_writers].flatten(1, 2).transpose(0, 1), along)
        ours, theirs = self._along[norm.place], torch.bmm(grads.transpose(0, 1), along)
        out = self._scores[..., : reader.n_writers, reader.first : reader.first + len(grads)]
        sizes = self._deltas.shape[1:3]
        if self.per_position:  # [P, pairs x ways, .]
            ours, theirs = (side.unflatten(0, sizes).permute(1, 0, 3, 2).flatten(1, 2) for side in (ours, theirs))
            out -= torch.bmm(ours.transpose(1, 2), theirs) / x.shape[1]
        else:
            ours, theirs = (side.transpose(1, 2).flatten(0, 1) for side in (ours, theirs))
            out -= ours.T @ theirs / x.shape[1]

    def _add(self, reader: Reader, grads: torch.Tensor) -> None:
        """Add the products of the writers before a group of readers with their gradients [readers, pairs, P, d]."""
        if self._scores is None:
            shape = (len(self.graph.writer_names), len(self.graph.reader_names))
            full = (self._deltas.shape[2], *shape) if self.per_position else shape
            self._scores = torch.zeros(full, dtype=self._deltas.dtype, device=self._deltas.device)
        deltas = self._deltas[: reader.n_writers]
        out = self._scores[..., : reader.n_writers, reader.first : reader.first + len(grads)]
        if not self.per_position:
            outer_into(out, deltas, grads)
            return
        for pair in range(deltas.shape[1]):  # [P, writers, d] x [P, d, readers]
            out += torch.bmm(deltas[:, pair].transpose(0, 1), grads[:, pair].permute(1, 2, 0))

    def move_input(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        """What the first block is given, moved towards the clean one; a hook."""
        if not self._added or torch._C._current_graph_task_id() != -1:
            return None
        return output + (self._added * self._deltas[0]).to(output.dtype)

    def move_given(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The same before the first block; a hook."""
        by_name = select_output(args, None)[0] is None
        tensor, key = select_output(kwargs if by_name else args, None)
        moved = None if tensor is None else self.move_input(module, args, tensor)
        if moved is None:
            return None
        return (args, replace_output(kwargs, key, moved)) if by_name else (replace_output(args, key, moved), kwargs)


def _nothing(number: int, act: torch.Tensor) -> None:
    """What a run between corrupted and clean puts out isn't looked at."""


class _Watched:
    """A study at its model: the taps, the norms' hooks, the hook that moves the input."""

    def __init__(self, study: Edges, model: nn.Module):
        self.study, self.watch = study, Watch(study.who, model, study.places)
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        study = self.study
        study._watch = self.watch
        self.watch.__enter__()
        start = study.graph.start
        if start is None:
            moved = study.graph.writers[0].place.module
            self.handles.append(moved.register_forward_hook(study.move_input))
        else:
            self.handles.append(start.register_forward_pre_hook(study.move_given, with_kwargs=True))
        for norm in study.graph.norms:
            self.handles += norm.hook()

    def __exit__(self, *_: object) -> None:
        self.watch.__exit__()
        for handle in self.handles:
            handle.remove()
