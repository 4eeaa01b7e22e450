"""Kronecker factors and second moments of modules: sums over all examples, and the inverse curvature that they make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from ..errors import broken_rule
from ..spec import one_of
from .normalizers import AdafactorNormalizer, AdamNormalizer, Normalizer
from .sums_file import Read, read_sums, write_sums

FactorKind = Literal["kfac", "ekfac", "adam"]
FACTOR_KINDS: tuple[str, ...] = get_args(FactorKind)
# What is added up for each kind, beside the numbers of examples and tokens.
SUMS = {"kfac": ("inputs", "outputs"), "ekfac": ("eigenvalues",), "adam": ("squares",)}
_FORMAT, _VERSION = "tlfast-factors", 1
_WHO = "Factors"


@dataclass
class ModuleFactors:
    """What is known of one module with a weight [O, I]; float64, on the device of the module.

    With the bias (``bias``) I counts one more input, which is 1 at each token, and the bias is the last column of the
    weight. ``n_examples`` were added up, of ``n_tokens`` real tokens.

    Raises:
        AttributeError: for what wasn't asked for, or can't be made of what was.
    """

    name: str
    n_outputs: int
    n_inputs: int
    bias: bool
    n_examples: int = 0
    n_tokens: int = 0
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    basis: tuple[torch.Tensor, torch.Tensor] | None = None  # Q_S [O, O] and Q_A [I, I], an eigenvector a column

    @property
    def inputs(self) -> torch.Tensor:
        """A [I, I]: the sum over real tokens of a a^T, where a is what the module is given; symmetric to the bit."""
        return self._sum("inputs", "kfac")

    @property
    def outputs(self) -> torch.Tensor:
        """S [O, O]: the sum over real tokens of g g^T, where g is the gradient at the output; symmetric to the bit."""
        return self._sum("outputs", "kfac")

    @property
    def eigenvalues(self) -> torch.Tensor:
        """Lam [O, I]: the mean over examples of (Q_S^T G Q_A)^2, where G is the example's weight gradient (EK-FAC)."""
        return self._sum("eigenvalues", "ekfac") / self.n_examples

    @property
    def kfac_eigenvalues(self) -> torch.Tensor:
        """[O, I]: what `eigenvalues` are if inputs and gradients don't depend on each other, nor a token on another.

        The product of an eigenvalue of S with one of A, divided by the numbers of tokens and of examples.
        """
        of_outputs, of_inputs = self.factor_eigenvalues
        return of_outputs[:, None] * of_inputs

    @property
    def factor_eigenvalues(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[O] and [I]: those of S and of A, each divided by the root of the number of tokens and of examples."""
        output_basis, input_basis = self.output_basis, self.input_basis
        of_outputs = torch.einsum("ok,op,pk->k", output_basis, self.outputs, output_basis)
        of_inputs = torch.einsum("ik,ij,jk->k", input_basis, self.inputs, input_basis)
        both = max(1, self.n_tokens * self.n_examples) ** 0.5  # an expert may get no token: its sums are zeros
        return of_outputs.clamp_min(0) / both, of_inputs.clamp_min(0) / both

    @property
    def second_moment(self) -> torch.Tensor:
        """v [O, I]: the mean over examples of G^2, what Adam tracks of the gradients of single examples."""
        return self._sum("squares", "adam") / self.n_examples

    @property
    def output_basis(self) -> torch.Tensor:
        """Q_S [O, O]: a column is an eigenvector of S, the least eigenvalue first."""
        return self._basis()[0]

    @property
    def input_basis(self) -> torch.Tensor:
        """Q_A [I, I]: a column is an eigenvector of A, the least eigenvalue first."""
        return self._basis()[1]

    def _basis(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.basis is None:
            remedy = "Call eigen() first."
            raise AttributeError(broken_rule(_WHO, f"the basis of {self.name!r}", "have been made", "none", remedy))
        return self.basis

    def _sum(self, name: str, kind: str) -> torch.Tensor:
        if name not in self.sums:
            rule, got = "be of the kinds that were asked for", f"{', '.join(self.sums) or 'a basis'} alone"
            remedy = f"Say kinds=({kind!r},)."
            raise AttributeError(broken_rule(_WHO, f"{name} of {self.name!r}", rule, got, remedy))
        return self.sums[name]

    def merged(self, other: ModuleFactors) -> ModuleFactors:
        """These sums and those of other examples."""
        sums = {name: total + other.sums[name].to(total.device) for name, total in self.sums.items()}
        n_examples, n_tokens = self.n_examples + other.n_examples, self.n_tokens + other.n_tokens
        return replace(self, n_examples=n_examples, n_tokens=n_tokens, sums=sums)

    def with_eigen(self) -> ModuleFactors:
        """With the eigenvectors of both sums."""
        return replace(self, basis=(_eigenvectors(self.outputs), _eigenvectors(self.inputs)))


def _eigenvectors(total: torch.Tensor) -> torch.Tensor:
    """The eigenvectors of a symmetric matrix, a column each; the largest number of each is positive."""
    vectors = torch.linalg.eigh(total).eigenvectors
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    turned: torch.Tensor = vectors * torch.where(largest < 0, -1.0, 1.0).to(vectors)
    return turned


def with_reasons(modules: Mapping[str, str]) -> str:
    """Names of modules, each with what is said of it; the first eight, and how many more there are."""
    some = [f"{name or 'the model'} ({why})" for name, why in list(modules.items())[:8]]
    return ", ".join([*some, f"and {len(modules) - 8} more"] if len(modules) > 8 else some)


class Factors:
    """Kronecker factors of the curvature, and second moments, of some modules; made by `tlfast.factors`.

    ``factors[name]`` is a `ModuleFactors`. Sums are float32 within a block of 4,096 rows at most, and float64 between
    blocks; they don't depend on how examples were split into batches or parts but for that rounding.

    Args:
        kinds: what was added up: "kfac", "ekfac" and "adam".
        modules: what is known of each.
        identity: a text that says of what the sums are; parts are merged only if theirs are equal.

    Example:
        >>> import torch, tlfast
        >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
        >>> texts = [[1, 2, 3], [4, 5], [6, 7, 8]]
        >>> found = tlfast.factors(model, texts, "1", kinds=("kfac", "ekfac"))
        >>> found["1"].n_tokens, found["1"].inputs.shape, found["1"].eigenvalues.shape
        (8, torch.Size([4, 4]), torch.Size([9, 4]))
        >>> found.precondition({"1": torch.randn(2, 9, 4)})["1"].shape
        torch.Size([2, 9, 4])
    """

    def __init__(self, kinds: Sequence[str], modules: Mapping[str, ModuleFactors], *, identity: str = "") -> None:
        self.kinds = tuple(sorted(set(kinds), key=FACTOR_KINDS.index))
        self.identity = identity
        self.skipped: list[tuple[str, int, str]] = []  # examples that were left out
        self.left_out: dict[str, str] = {}  # modules that a glob meant, and why they have no factors
        self.about: dict[str, Any] = {}  # the model, as a dataset's header says it
        self._modules = dict(modules)

    @property
    def names(self) -> list[str]:
        """The modules."""
        return list(self._modules)

    def __getitem__(self, name: str) -> ModuleFactors:
        """What is known of a module; KeyError for another."""
        if name not in self._modules:
            rule, remedy = f"be one of {', '.join(self.names[:8])}", "See factors.names."
            raise KeyError(broken_rule(_WHO, "a name", rule, repr(name), remedy))
        return self._modules[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        lines = [f"<tlfast.Factors of {', '.join(self.kinds)}>"]
        for name, of in self._modules.items():
            size = f"[{of.n_outputs}, {of.n_inputs}]{', the bias last' * of.bias}"
            lines.append(f"  {name!r}: {size}, {of.n_examples} examples, {of.n_tokens} tokens")
        if self.left_out:
            lines.append(f"  left out: {with_reasons(self.left_out)}")
        return "\n".join(lines)

    # What is made of the sums.

    @property
    def has_basis(self) -> bool:
        """Whether `eigen` has been called, here or before these were made."""
        return all(of.basis is not None for of in self._modules.values())

    def eigen(self) -> Factors:
        """The same with the eigenvectors of A and S, by `torch.linalg.eigh` in float64 where the sums are.

        Merge all parts first: other sums have other eigenvectors.

        Raises:
            ValueError: without the kind "kfac", and where there are eigenvectors already.
        """
        if "kfac" not in self.kinds:
            rule, got = 'have the kind "kfac" for eigenvectors', ", ".join(self.kinds)
            raise ValueError(broken_rule(_WHO, "the factors", rule, got, 'Say kinds=("kfac",).'))
        if self.has_basis:
            raise ValueError(broken_rule(_WHO, "the factors", "have no eigenvectors yet", "some", "Use these."))
        made = Factors(self.kinds, {n: of.with_eigen() for n, of in self._modules.items()}, identity=self.identity)
        return self._told(made)

    def beside(self, other: Factors) -> Factors:
        """These and other kinds of the same modules, examples and eigenvectors."""
        modules = {n: replace(of, sums={**of.sums, **other[n].sums}) for n, of in self._modules.items()}
        made = Factors([*self.kinds, *other.kinds], modules, identity=self.identity)
        return self._told(made)

    def _told(self, made: Factors) -> Factors:
        """With what is said of these."""
        made.skipped, made.left_out, made.about = list(self.skipped), dict(self.left_out), dict(self.about)
        return made

    def precondition(
        self,
        gradients: Mapping[str, torch.Tensor],
        *,
        damping: float | None = None,
        damping_factor: float = 0.1,
        kind: Literal["ekfac", "kfac"] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Weight gradients times the inverse of the curvature: Q_S ((Q_S^T G Q_A) / (Lam + damping)) Q_A^T.

        The dot product of a query's gradient, preconditioned, with an example's gradient is the influence of the
        example on the query, by EK-FAC or K-FAC.

        Args:
            gradients: by module [..., O, I], not projected, with the bias as the factors have it; names may end in
                ":weight", as those of a capture's columns do.
            damping: what is added to each eigenvalue; None: ``damping_factor`` of the module's mean eigenvalue.
            damping_factor: 0.1, as is usual.
            kind: whose eigenvalues: "ekfac" or "kfac"; None: "ekfac" where there are such, else "kfac".

        Returns:
            The same names; in the gradient's dtype and on its device. The products are made in float64.

        Raises:
            KeyError: for a module that isn't here.
            ValueError: for other shapes, no eigenvectors, a damping that is negative, or zero where an eigenvalue is;
                for a module's name that is that of another's column, too.
        """
        chosen = kind or ("ekfac" if "ekfac" in self.kinds else "kfac")
        one_of(_WHO, "kind", chosen, ("ekfac", "kfac"))
        for argument, value in (("damping", damping), ("damping_factor", damping_factor)):
            if value is not None and not 0 <= value < float("inf"):
                rule = "be a number that isn't negative"
                raise ValueError(
                    broken_rule(f"{_WHO}.precondition", argument, rule, value, "Say 0.1, or leave it out.")
                )
        if not self.has_basis:
            rule, remedy = "have eigenvectors", "Call eigen() first."
            raise ValueError(broken_rule(f"{_WHO}.precondition", "the factors", rule, "none", remedy))
        return {
            name: self._preconditioned(self._meant(name), given, damping, damping_factor, chosen)
            for name, given in gradients.items()
        }

    def _meant(self, name: str) -> ModuleFactors:
        """The module of a name, or of a column's, which is the module's with ":weight" behind it."""
        module = name.removesuffix(":weight")
        if name != module and name in self and module in self:
            rule, remedy = "name one module", f"Say {module!r}, or {f'{name}:weight'!r}."
            got = f"{name!r}, which is a module and a column of {module!r}"
            raise ValueError(broken_rule(f"{_WHO}.precondition", "a name", rule, got, remedy))
        return self[name if name in self else module]

    def _preconditioned(
        self, of: ModuleFactors, given: torch.Tensor, damping: float | None, factor: float, kind: str
    ) -> torch.Tensor:
        who, shape = f"{_WHO}.precondition at {of.name}", (of.n_outputs, of.n_inputs)
        if given.shape[-2:] != shape:
            rule, remedy = f"be [..., {shape[0]}, {shape[1]}]", "Give gradients that aren't projected, and bias= alike."
            raise ValueError(broken_rule(who, "a gradient", rule, list(given.shape), remedy))
        values = of.eigenvalues if kind == "ekfac" else of.kfac_eigenvalues
        damped = values + (float(values.mean()) * factor if damping is None else damping)
        if not (damped > 0).all():
            rule, remedy = "make each eigenvalue positive", "Say damping_factor=0.1, or a larger damping."
            if not values.any():  # of which any part is zero, too
                remedy = "No gradient has reached it: leave it out, or say damping=."
            raise ValueError(broken_rule(who, "damping", rule, "a zero", remedy))
        with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
            rotated = of.output_basis.T @ given.to(values) @ of.input_basis
            return (of.output_basis @ (rotated / damped) @ of.input_basis.T).to(given)

    def normalizers(self, kind: Literal["adam", "adafactor"] = "adam") -> dict[str, Normalizer]:
        """What divides gradients by the root of their second moments, by module: of the kind "adam".

        Raises:
            AttributeError: without that kind.

        Example:
            >>> import torch, tlfast
            >>> model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
            >>> found = tlfast.factors(model, [[1, 2, 3], [4, 5]], "1", kinds="adam")
            >>> found.normalizers("adafactor")["1"](torch.randn(2, 9, 4)).shape
            torch.Size([2, 9, 4])
        """
        one_of(f"{_WHO}.normalizers", "kind", kind, ("adam", "adafactor"))
        made: dict[str, Normalizer] = {}
        for name, of in self._modules.items():
            v = of.second_moment
            if kind == "adam":
                made[name] = AdamNormalizer(v)
            else:
                weight, bias = (v[:, :-1], v[:, -1]) if of.bias else (v, None)
                made[name] = AdafactorNormalizer(weight.mean(1), weight.mean(0), bias)
        return made

    # Parts.

    def merge(self, other: Factors) -> Factors:
        """Add another part's sums to these, in float64; returns these. Parts that share examples count them twice.

        Raises:
            ValueError: for other kinds, another identity, other modules or eigenvectors. Nothing is added then.
        """
        for what in ("kinds", "identity"):
            ours, theirs = getattr(self, what), getattr(other, what)
            if ours != theirs:
                remedy = "Factors of other things can't be added up."
                raise ValueError(broken_rule(_WHO, what, f"be {ours!r} in both parts", repr(theirs), remedy))
        shapes = [
            [(of.name, of.n_outputs, of.n_inputs, of.bias) for of in part._modules.values()] for part in (self, other)
        ]
        if sorted(shapes[0]) != sorted(shapes[1]):
            rule, got = "be the same in both parts", f"{other!r}"
            raise ValueError(broken_rule(_WHO, "modules", rule, got, "They are not of one model."))
        for name, of in self._modules.items():
            if not _same_basis(of.basis, other[name].basis):
                remedy = 'Merge parts of kinds=("kfac",), call eigen(), and give that as basis= to each part.'
                rule = "be the same in both parts"
                raise ValueError(broken_rule(_WHO, f"the eigenvectors of {name}", rule, "others", remedy))
            if of.basis is not None and "kfac" in self.kinds:
                rule, got = "have no eigenvectors where sums of products are merged", "some"
                remedy = 'Merge parts of kinds=("kfac",) before eigen().'
                raise ValueError(broken_rule(_WHO, "the factors", rule, got, remedy))
        self._modules = {name: of.merged(other[name]) for name, of in self._modules.items()}
        self.skipped += other.skipped
        self.about = self.about or dict(other.about)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a file of numpy (npz), whole or not at all."""
        tensors: dict[str, torch.Tensor] = {}
        for k, of in enumerate(self._modules.values()):
            tensors |= {f"{k}.{name}": total for name, total in of.sums.items()}
            if of.basis is not None:
                tensors |= {f"{k}.output_basis": of.basis[0], f"{k}.input_basis": of.basis[1]}
        said = {
            "format": _FORMAT, "version": _VERSION, "kinds": self.kinds, "identity": self.identity,
            "skipped": self.skipped, "basis": self.has_basis,
            "modules": [
                [of.name, of.n_outputs, of.n_inputs, of.bias, of.n_examples, of.n_tokens]
                for of in self._modules.values()
            ],
            **({"left_out": self.left_out} if self.left_out else {}),
            **({"about": self.about} if self.about else {}),
        }  # fmt: skip
        write_sums(path, said, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Read what `save` wrote, to the bit; on the CPU.

        Raises:
            ValueError: for a file that `save` didn't write.
            OSError: for one that can't be read.
        """
        return read_sums(_WHO, path, (_FORMAT, _VERSION), cls._read)

    @classmethod
    def _read(cls, said: Any, tensor: Read) -> Factors:
        modules = {}
        names = [name for kind in said["kinds"] for name in SUMS[kind]]
        for k, (name, n_outputs, n_inputs, bias, n_examples, n_tokens) in enumerate(said["modules"]):
            sums = {one: tensor(f"{k}.{one}") for one in names}
            basis = (tensor(f"{k}.output_basis"), tensor(f"{k}.input_basis")) if said["basis"] else None
            modules[name] = ModuleFactors(name, n_outputs, n_inputs, bias, n_examples, n_tokens, sums, basis)
        made = cls(said["kinds"], modules, identity=said["identity"])
        made.skipped = [(source, start, reason) for source, start, reason in said["skipped"]]
        made.left_out = {str(name): str(why) for name, why in said.get("left_out", {}).items()}
        made.about = dict(said.get("about", {}))
        return made


def _same_basis(
    ours: tuple[torch.Tensor, torch.Tensor] | None, theirs: tuple[torch.Tensor, torch.Tensor] | None
) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return all(torch.equal(one, other.to(one.device)) for one, other in zip(ours, theirs, strict=True))
