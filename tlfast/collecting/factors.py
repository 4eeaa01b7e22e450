"""Factors of the curvature over all examples, in one call: no dataset, and no row in memory at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..dataset.format.plan import Example
from ..errors import SpeakingAs, broken_rule
from ..hooks.dimensions import UncoveredError
from ..hooks.experts import ExpertLayer
from ..hooks.factoring import EIGENVALUES, PRODUCTS, SQUARES, FactorCapture, check_factored, has_factors
from ..hooks.factors import FACTOR_KINDS, SUMS, FactorKind, Factors, ModuleFactors, with_reasons
from ..hooks.layers import convolution, find_layer, is_taken, linear_layer, owns_weight, weighted_modules
from ..hooks.options import CaptureOptions, TapOptions, taken
from ..hooks.points import as_list, find_points, is_glob, named_points
from ..spec import Points, Spec, one_of
from .fields import is_apart, leaves
from .options import CollectOptions
from .passes import SORTED, Passes
from .probe import Probed
from .stream import SETTINGS, row_options

_WHO = "factors"
_ALLOWED = [
    name for name in SETTINGS
    if name not in ("reduce", "of", "side", "ref", "heads", "at", "per", "project", "normalizer", "summed", "over",
                    "dtype", "output", "rows_per_unit", "attach", "calls", "lens")
]  # fmt: skip
_ADDED = {"kfac": PRODUCTS, "adam": SQUARES, "ekfac": EIGENVALUES}


def factors(
    model: nn.Module,
    batches: Iterable[Any],
    points: Points = "**",
    *,
    kinds: FactorKind | Sequence[FactorKind] = ("kfac",),
    basis: Factors | None = None,
    **settings: Any,
) -> Factors:
    """Add up what the curvature of the loss at some layers is made of, over all examples: no row is kept.

    With a the input of a layer at a token, g the gradient at its output, and G = sum over tokens of g a^T [O, I] the
    weight gradient of an example:

    - "kfac": A = sum of a a^T and S = sum of g g^T, over all real tokens.
    - "ekfac": the eigenvalues Lam = mean over examples of (Q_S^T G Q_A)^2 in the eigenvectors of S and A.
    - "adam": v = mean over examples of G^2.

    The model runs in eval mode and frozen, and is as before afterwards. Padding never counts: that of tokens is masked,
    and batches in which a field of another length than the tokens is padded, as sounds of several lengths are, are
    refused. The gradients are those of the loss that is given: with the labels of the data these are factors of the
    empirical Fisher matrix; those of the Fisher matrix itself (Gauss-Newton) need a loss that draws labels from the
    model's own predictions.

    For several processes, or several calls, give each a part of the examples, save what it returns, and `merge` the
    parts. "ekfac" needs the eigenvectors of all examples first: merge parts of "kfac", call `eigen`, and give that as
    ``basis`` to each part of "ekfac".

    Args:
        model, batches: as in `collect`.
        points: the layers, by name or glob: `torch.nn.Linear`, transformers' Conv1D, or a convolution without groups,
            whose windows stand for tokens: a is a window [channels * kernel], and g the gradient there (Grosse and
            Martens 2016). A glob that means other modules too, as the default does, means these among them; not one
            whose weight is shared or made of others, that does another thing than its class, or whose windows lie over
            padding. What it left out is in ``left_out``.
        kinds: what to add up.
        basis: of "ekfac": `Factors` with eigenvectors. None: "kfac" must be among the kinds, and the examples go
            through the model twice.
        settings: bias (with that of each layer, as one more input, 1), loss and the others that `running` takes, as
            in `collect`, but none that says what of a layer is taken.

    Returns:
        `Factors`; ``skipped`` are the (source, start, reason) of bad examples, and ``left_out`` says of modules with a
        weight that a glob meant, too, why they have none: their class, "a shared weight", or what else.

    Raises:
        ValueError, TypeError: for bad arguments, and all that `collect` refuses, before the first batch.
        FloatingPointError: for sums that are not finite.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> found = tlfast.factors(model, [[1, 2, 3], [4, 5]], "1", bias=True)
        >>> found["1"].inputs.shape, found["1"].outputs.shape
        (torch.Size([5, 5]), torch.Size([9, 9]))
    """
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    _check_kinds(wanted, basis)
    given: Any = points
    if isinstance(given, Spec) or (isinstance(given, Sequence) and any(isinstance(one, Spec) for one in given)):
        rule, remedy = "be names, a glob or modules", "What is taken of a layer is settled: give its name."
        raise TypeError(broken_rule(_WHO, "points", rule, "a Spec", remedy))
    found, swept, left_out = _factored_layers(model, points)
    with SpeakingAs(_WHO, "collect"):
        options = row_options(_WHO, _ALLOWED, list(found), settings, of="weight", reduce="norm")
        work = _Factoring(model, batches, options, found, swept)
        made = work.factors(wanted, basis)
    made.left_out = left_out | work.left_out
    return made


def _check_kinds(wanted: Sequence[str], basis: Factors | None) -> None:
    """ValueError for kinds that are none, or that don't go with the basis."""
    if not wanted:
        got, remedy = "none", 'Say kinds=("kfac",).'
        raise ValueError(broken_rule(_WHO, "kinds", f"name some of {', '.join(FACTOR_KINDS)}", got, remedy))
    for kind in wanted:
        one_of(_WHO, "kinds", kind, FACTOR_KINDS)
    if basis is None:
        if "ekfac" in wanted and "kfac" not in wanted:
            rule, remedy = 'have "kfac" beside "ekfac" without a basis', "Add it, or give basis=factors.eigen()."
            raise ValueError(broken_rule(_WHO, "kinds", rule, ", ".join(wanted), remedy))
        return
    if not isinstance(basis, Factors):
        raise TypeError(broken_rule(_WHO, "basis", "be Factors", type(basis).__name__, "Give Factors.eigen()."))
    if "ekfac" not in wanted or "kfac" in wanted:
        rule, remedy = 'be left out unless kinds has "ekfac", and no "kfac"', "Leave it out, or say kinds=('ekfac',)."
        raise ValueError(broken_rule(_WHO, "basis", rule, f"one with {', '.join(wanted)}", remedy))
    if not basis.has_basis:
        raise ValueError(broken_rule(_WHO, "basis", "have eigenvectors", "none", "Give basis.eigen()."))


def _factored_layers(model: nn.Module, points: Points) -> tuple[dict[str, nn.Module], set[str], dict[str, str]]:
    """The layers with factors that points mean; which of them a glob or predicate alone means; and why it leaves other
    modules with a weight out, by name.

    Of a glob or predicate they are those whose weight is theirs alone; all that are named must be such.

    Raises:
        ValueError: for others that are named, all of which it says, and where there is none.
    """
    found, said = find_points(_WHO, model, points), named_points(_WHO, model, points)
    names = [] if callable(said) else [name for name in as_list(said) if not is_glob(name)]
    names += [name for name, module in found.items() if isinstance(module, ExpertLayer) and name not in names]
    kept: dict[str, nn.Module] = {}
    if names:
        kept = weighted_modules(_WHO, model, Spec(names, of="weight"), {name: found[name] for name in names})
    odd = {name: _kind(layer) for name, layer in kept.items() if not _has_factors(layer)}
    owners = Counter(id(module._parameters.get("weight")) for module in model.modules())
    left_out: dict[str, str] = {}
    modules, swept = dict(model.named_modules(remove_duplicate=False)), set[str]()
    for name, module in found.items():
        if name in names:
            continue
        if not _has_factors(module):
            left_out |= {name: _kind(module)} if owns_weight(module) else {}
            continue
        why = "a weight that a MultiheadAttention takes" if is_taken(modules, name) else _why_none(module, owners)
        if why is not None:
            left_out[name] = why
        else:
            kept[name] = module
            swept.add(name)
    if odd or not kept:
        rule = "be linear layers, or convolutions without groups"
        remedy = "Name torch.nn.Linear, Conv1D of transformers or torch.nn.Conv2d: others have no factors."
        raise ValueError(broken_rule(_WHO, "points", rule, with_reasons(odd or left_out) or "none", remedy))
    order = [name for name in [*found, *kept] if name in kept]
    return {name: kept[name] for name in order}, swept, left_out


def _why_none(module: nn.Module, owners: Mapping[int, int]) -> str | None:
    """Why a layer of a class that has factors has none; None for one that has. ``owners`` of each weight, by id."""
    weight = module._parameters.get("weight")
    if weight is not None and owners[id(weight)] > 1:
        return "a shared weight"
    try:
        find_layer(_WHO, "", module)
    except (ValueError, TypeError):
        does_other = f"{type(module).__name__} with another gradient than its kind"
        return does_other if weight is not None else "a weight that is made of others"
    return None


def _kind(module: nn.Module) -> str:
    """What a module without factors is, in words."""
    return f"{type(module).__name__}{' with groups' if convolution(module) is not None else ''}"


def _has_factors(module: nn.Module) -> bool:
    return has_factors(linear_layer(module) or convolution(module)) or isinstance(module, ExpertLayer)


def _basis_of(basis: Factors, name: str, sizes: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The eigenvectors of a layer; ValueError where there are none, or others."""
    if name not in basis:
        rule, remedy = f"have the layer {name}", "Name the layers that it has."
        raise ValueError(broken_rule(_WHO, "basis", rule, ", ".join(basis.names[:8]), remedy))
    of = basis[name]
    if (of.n_outputs, of.n_inputs) != sizes:
        rule, remedy = f"be of {list(sizes)} at {name or 'the model'}", "Say bias= as it was, and give its model."
        raise ValueError(broken_rule(_WHO, "basis", rule, [of.n_outputs, of.n_inputs], remedy))
    return of.basis


def _sizes(name: str, module: nn.Module, bias: bool) -> tuple[int, int, bool]:
    """(outputs, inputs with that of the bias, whether there is one) of a layer; ValueError for one without factors."""
    layer, has_bias = check_factored(_WHO, name, module, bias)
    return layer.n_outputs, layer.n_inputs + has_bias, has_bias


class _Factoring(Passes):
    """All examples through the model, batch by batch, into sums; twice for eigenvalues of their own eigenvectors."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        options: CollectOptions,
        layers: Mapping[str, nn.Module],
        swept: Iterable[str],
    ) -> None:
        self._sizes = {name: _sizes(name, layer, options.bias) for name, layer in layers.items()}
        self._swept = set(swept)  # layers that may be left out, since nobody has named them
        self.left_out: dict[str, str] = {}
        super().__init__(_WHO, model, batches, options)
        self._check_one_length()

    def _check_one_length(self) -> None:
        """ValueError where a field that isn't as long as the tokens is padded in a batch: no mask covers that."""
        source = self.batching.source
        if source is None or not source.rules.uneven:
            return
        for start in range(0, len(self.examples), SORTED):
            part = self.examples[start : start + SORTED]
            for rows, n_positions in self.batching.parts(part, self.batching.order(part)):
                together = [part[k] for k in rows] if len(rows) > 1 else []
                for name, shapes in self._shapes_apart(together, n_positions).items():
                    odd = next((shape for shape in shapes if shape != shapes[0]), None)
                    if odd is not None:
                        rule = "have one length in each batch, or that of input_ids"
                        got = f"{list(shapes[0][1:])} and {list(odd[1:])} in {name!r}"
                        remedy = "Padding would count there: say batch_examples=1 (--batch-examples 1)."
                        raise ValueError(broken_rule(_WHO, "a field", rule, got, remedy))

    def _shapes_apart(self, examples: Sequence[Example], n_positions: int) -> dict[str, list[torch.Size]]:
        """By field its shapes of each example alone; not of fields that are as long as the tokens of all of these."""
        shapes: dict[str, list[torch.Size]] = {}
        as_tokens: dict[str, bool] = {}
        for one in examples:
            batch = self.batching.batch([one], n_positions)
            length = (batch.input_ids.shape[1],) if self.has_tokens else None
            for name, value in leaves(batch.fields.peek()):
                if isinstance(value, torch.Tensor) and not is_apart(name):
                    shapes.setdefault(name, []).append(value.shape)
                    as_tokens[name] = as_tokens.get(name, True) and value.shape[1:2] == length
        return {name: found for name, found in shapes.items() if not as_tokens[name]}

    def look(self, most: int | None = None) -> Probed:
        """Try a few examples; leave convolutions out that padding gets into, where nobody has named them."""
        while True:
            try:
                return super().look(most)
            except UncoveredError as error:
                swept = {name: self.model.get_submodule(name) for name in error.points if name in self._swept}
                odd = {name: module for name, module in swept.items() if convolution(module) is not None}
                if not odd or len(odd) == len(self._sizes):
                    raise
                for name, module in odd.items():
                    del self._sizes[name]
                    self.left_out[name] = f"{type(module).__name__}, whose windows lie over padding"
            self.specs = [replace(self.specs[0], points=list(self._sizes))]

    def factors(self, kinds: Sequence[str], basis: Factors | None) -> Factors:
        """Add up what these kinds need."""
        theirs = {} if basis is None else basis.about.get("model", {})
        if theirs.get("fingerprint", self.header["model"]["fingerprint"]) != self.header["model"]["fingerprint"]:
            remedy = "Its eigenvectors are of other weights: make it with this model."
            raise ValueError(broken_rule(_WHO, "basis", "be of this model", "one of another", remedy))
        if basis is not None:  # of what nobody has named it may lack what was left out, as here
            for name, (n_outputs, n_inputs, _) in self._sizes.items():
                if name in basis or name not in self._swept:
                    _basis_of(basis, name, (n_outputs, n_inputs))
        with self.at_work():
            probed = self.look()
            made = self._empty([kind for kind in kinds if kind != "ekfac" or basis is not None], basis)
            self._add_up(made, probed)
            if len(made.kinds) < len(set(kinds)):
                made = made.eigen()
                second = self._empty(["ekfac"], made)
                self._add_up(second, probed)
                made = made.beside(second)
        return made

    def _empty(self, kinds: Sequence[str], basis: Factors | None) -> Factors:
        modules = {}
        for name, (n_outputs, n_inputs, has_bias) in self._sizes.items():
            known = None if basis is None else _basis_of(basis, name, (n_outputs, n_inputs))
            modules[name] = ModuleFactors(name, n_outputs, n_inputs, has_bias, basis=known)
        made = Factors(kinds, modules, identity=self.identity)
        made.skipped, made.about = self.skipped, {"model": self.header["model"]}
        return made

    def _add_up(self, made: Factors, probed: Probed) -> None:
        """Take all examples through the model."""
        added = {_ADDED[kind] for kind in made.kinds}
        specs = [replace(self.specs[0], name=name) for name in sorted(added)]
        known = CaptureOptions(specs=specs, rows=self.most, **taken(TapOptions, self.options))
        cap = FactorCapture(self.model, known, made)
        unmasked, decoding = (
            {f"{name}:{label}" for name, label in cap.sums if f"{name}:weight:norm" in columns}
            for columns in (probed.unmasked, probed.decoding)
        )
        counts = {name: _Counts() for name in made}
        with cap.unmasked(unmasked):
            for _ in self.through(cap, decoding):
                for name, count in counts.items():
                    count.add(cap, f"{name}:{specs[0].label}")
        for name, count in counts.items():
            of = made[name]
            of.n_examples, of.n_tokens = count.totals()
            n_empty = cap.n_empty.get(name, 0)
            of.n_tokens -= n_empty
            for label in added:
                totals = cap.sums[name, label].totals()
                if label == PRODUCTS and of.bias and totals:
                    totals[0][-1, -1] -= n_empty  # zeros but for the 1 that stands for the bias
                for kind in (kind for kind in made.kinds if _ADDED[kind] == label):
                    of.sums |= dict(zip(SUMS[kind], totals, strict=True))
            _check_finite(of)


class _Counts:
    """How many examples and tokens a layer has seen, on its device."""

    def __init__(self) -> None:
        self._total: torch.Tensor | None = None

    def add(self, cap: FactorCapture, column: str) -> None:
        """The rows of a batch: tokens of each example, NaN of a layer that it didn't reach."""
        if not cap.is_known(column):
            return
        rows = cap.ring(column).double()
        more = torch.stack([(~rows.isnan()).sum().double(), rows.nansum()])
        self._total = more if self._total is None else self._total + more

    def totals(self) -> tuple[int, int]:
        n_examples, n_tokens = (0, 0) if self._total is None else self._total.tolist()
        return int(n_examples), int(n_tokens)


def _check_finite(of: ModuleFactors) -> None:
    """FloatingPointError where an input or a gradient was not finite, or their squares are beyond float32."""
    for total in of.sums.values():
        if not total.isfinite().all():
            rule, remedy = "be finite", "collect says which example's gradient isn't: look there, or give float64."
            raise FloatingPointError(
                broken_rule(_WHO, f"sums at {of.name or 'the model'}", rule, "NaN or infinity", remedy)
            )
