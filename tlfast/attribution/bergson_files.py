"""Second moments of rows and factors as the files of bergson 2.5: ``hessians.pth``, and those of K-FAC."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..dataset.errors import extra
from ..errors import broken_rule
from ..hooks.bergson_normalizers import known_name, linear_at, loaded, our_names
from ..hooks.bergson_normalizers import read_bergson_normalizers as read_bergson_normalizers
from ..hooks.bergson_normalizers import write_bergson_normalizers as write_bergson_normalizers
from ..hooks.experts import ExpertLayer, submodule
from ..hooks.factors import Factors, ModuleFactors
from ..hooks.layers import linear_layer
from ..hooks.running import RowSums, RunningSums

_ENDING = ":weight"  # of the names of columns
_HESSIANS, _EIGEN = "hessians.pth", "hessians_eigen.pth"
# Folders of a run of bergson's K-FAC: in each a shard_0.safetensors.
_OF_FACTORS = {
    "activation_sharded": lambda of: of.inputs,
    "gradient_sharded": lambda of: of.outputs,
    "eigen_activation_sharded": lambda of: of.input_basis,
    "eigen_gradient_sharded": lambda of: of.output_basis,
    "eigenvalue_sharded": lambda of: of.kfac_eigenvalues,
    "factor_eig_a": lambda of: of.factor_eigenvalues[1],
    "factor_eig_g": lambda of: of.factor_eigenvalues[0],
}  # fmt: skip
_CORRECTED = "eigenvalue_correction_sharded"
_TOKENS = "total_processed.pt"


# Second moments of rows.


def write_bergson_hessians(sums: RunningSums, folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Write the second moments of projected rows as bergson's ``hessians.pth`` and ``hessians_eigen.pth``.

    The first has the mean of x x^T over rows x of each module, [p^2, p^2] float32, the other its eigenvalues, the least
    first, and eigenvectors. Written into an index, as ``tlfast export --to bergson`` makes them, they are what bergson
    preconditions its rows with. With heads each has its own, as there.

    Args:
        sums: of ``tlfast.running(model, ..., Spec(points, of="weight", project=...), stats="moment2_full")``.
        folder: one that exists; files of these names are replaced.
        model: whose modules they are of.

    Raises:
        ValueError: for other sums, for a module that the model hasn't, and for one that isn't a linear layer.
    """
    who, hessians = "write_bergson_hessians", dict[str, torch.Tensor]()
    if "moment2_full" not in sums.stats or not sums.names:
        rule, got = 'have rows, and stats="moment2_full"', f"{', '.join(sums.stats)} of {len(sums.names)} columns"
        raise ValueError(broken_rule(who, "sums", rule, got, 'Say tlfast.running(..., stats="moment2_full").'))
    for column in sums.names:
        shape, moment = sums[column].shape, sums[column].moment2_full
        module = column.removesuffix(_ENDING)
        name = known_name(who, "sums", model, module)
        linear_at(who, "sums", model, module)
        if len(shape) != 3:
            hessians[name] = moment
            continue
        size = prod(shape[1:])
        for head in range(shape[0]):
            part = slice(head * size, (head + 1) * size)
            hessians[f"{name}.head_{head}"] = moment[part, part]
    kept, eigen = {}, {}
    for name, moment in hessians.items():
        values, vectors = torch.linalg.eigh(moment.cpu())
        kept[name] = moment.cpu().float().contiguous()
        eigen[name] = values.float(), vectors.float().contiguous()
    torch.save(kept, Path(folder) / _HESSIANS)
    torch.save(eigen, Path(folder) / _EIGEN)


def read_bergson_hessians(
    folder: str | os.PathLike[str], model: nn.Module, *, n_rows: int | None = None
) -> RunningSums:
    """Read bergson's ``hessians.pth``: the second moments of its rows, as `tlfast.score` takes them for "trackstar".

    Args:
        folder: of an index, or a run of its ``hessian`` with the method "autocorrelation".
        model: whose modules they are of.
        n_rows: how many rows they are the mean of; None: what ``info.json`` in the folder says.

    Returns:
        Sums of ``moment2_full`` by column, "MODULE:weight". Rows are flat there: their shape isn't in the file.

    Raises:
        ValueError: for another file, one without second moments, a module that the model hasn't, and where nobody says
            how many rows there were.
        OSError: for one that can't be read.
    """
    who, place = "read_bergson_hessians", Path(folder)
    found = loaded(who, place / _HESSIANS)
    if not found or not all(_is_square(moment) for moment in found.values()):
        got = "none" if not found else "others"
        remedy = "bergson writes them with the method autocorrelation."
        raise ValueError(broken_rule(who, str(place / _HESSIANS), "hold second moments by module", got, remedy))
    if n_rows is None and (place / "info.json").is_file():
        said = json.loads((place / "info.json").read_text(encoding="utf-8"))
        n_rows = said.get("num_grads", said.get("num_items"))
    if type(n_rows) is not int or n_rows < 1:
        rule, remedy = "be given where no info.json says it", "Say n_rows=, of how many they are the mean."
        raise ValueError(broken_rule(who, "n_rows", rule, repr(n_rows), remedy))
    columns = []
    for theirs, name in our_names(who, place / _HESSIANS, model, list(found)).items():
        total = _symmetric(found[theirs]) * n_rows
        columns.append(RowSums(f"{name}{_ENDING}", (len(total),), n_rows, 0, {"moment2_full": total}))
    return RunningSums.of_columns(["moment2_full"], columns, identity="bergson")


def _is_square(moment: Any) -> bool:
    return isinstance(moment, torch.Tensor) and moment.dim() == 2 and moment.shape[0] == moment.shape[1]


# Kronecker factors.


def write_bergson_factors(factors: Factors, folder: str | os.PathLike[str], model: nn.Module) -> None:
    """Write factors as a run of bergson's ``hessian`` with the method "kfac" leaves them, in one shard.

    `bergson.hessians.preconditioner.FactoredPreconditioner.from_path(folder)` reads them, with ``ev_correction=True``
    those of "ekfac". bergson counts the positions that predict a token, and so leaves the last of each text out; these
    factors count all real tokens, of which the last one's gradients are zeros.

    Args:
        factors: with eigenvectors; with the eigenvalues of "ekfac" where bergson's correction is wanted.
        folder: a new one, or an empty one.
        model: in which the modules are.

    Raises:
        ValueError: without eigenvectors, for a folder that has files, for a module that the model hasn't, and for one
            that isn't a linear layer.
    """
    who = "write_bergson_factors"
    if not factors.has_basis or "kfac" not in factors.kinds:
        rule, remedy = 'be of "kfac", with eigenvectors', "Call eigen() first."
        raise ValueError(broken_rule(who, "factors", rule, repr(factors), remedy))
    out = Path(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(broken_rule(who, "folder", "be empty", f"files in {os.fspath(folder)!r}", "Take another."))
    save = extra("safetensors.torch", who).save_file
    made: dict[str, Callable[[ModuleFactors], torch.Tensor]] = dict(_OF_FACTORS)
    if "ekfac" in factors.kinds:
        made[_CORRECTED] = lambda of: of.eigenvalues
    names = {name: known_name(who, "factors", model, name) for name in factors}
    for name in names:
        linear_at(who, "factors", model, name)
    _check_dense(who, "factors", model, names)
    for kind, take in made.items():
        (out / kind).mkdir(parents=True)
        tensors = {known: take(factors[name]).cpu().float().contiguous() for name, known in names.items()}
        save(tensors, out / kind / "shard_0.safetensors")
    torch.save(torch.tensor(max(factors[name].n_tokens for name in factors)), out / _TOKENS)


def read_bergson_factors(folder: str | os.PathLike[str], model: nn.Module, *, n_examples: int | None = None) -> Factors:
    """Read the factors that bergson's ``hessian`` with the method "kfac" has fitted, of any number of shards.

    Args:
        folder: of the run.
        model: in which the modules are.
        n_examples: how many documents there were; None: what the eigenvalues tell.

    Returns:
        Factors of "kfac", and of "ekfac" where the eigenvalues were corrected; with the eigenvectors that are there.

    Raises:
        ValueError: for another folder, factors of another method, other modules or shapes.
    """
    who, place = "read_bergson_factors", Path(folder)
    _check_method(who, place)
    parts = {kind: _shards(who, place / kind) for kind in (*_OF_FACTORS, _CORRECTED) if not kind.startswith("factor_")}
    inputs, outputs = parts["activation_sharded"], parts["gradient_sharded"]
    if not inputs or set(inputs) != set(outputs) or not (place / _TOKENS).is_file():
        rule, remedy = f"hold activation_sharded, gradient_sharded and {_TOKENS}", "Give the folder of a run."
        raise ValueError(broken_rule(who, "folder", rule, os.fspath(folder), remedy))
    _check_whole(who, parts)
    n_tokens = int(torch.load(place / _TOKENS, map_location="cpu", weights_only=True))
    plain, corrected = parts["eigenvalue_sharded"], parts[_CORRECTED]
    if n_examples is None and not plain:
        rule, remedy = "be given where there are no eigenvalues", "Say n_examples=."
        raise ValueError(broken_rule(who, "n_examples", rule, "none", remedy))
    modules = {}
    names = our_names(who, folder, model, list(inputs))
    _check_dense(who, "folder", model, names.values())
    for theirs, name in names.items():
        a, s = (_symmetric(part[theirs]) for part in (inputs, outputs))
        layer = linear_layer(submodule(model, name))
        fits = layer is not None and len(s) == layer.n_outputs and len(a) in (layer.n_inputs, layer.n_inputs + 1)
        if layer is None or not fits:
            rule, got = "be of linear layers of this size", f"[{len(s)}, {len(a)}] at {name!r}"
            raise ValueError(broken_rule(who, "folder", rule, got, "Give the model that it was made of."))
        n = n_examples or max(1, round(float(a.trace() * s.trace() / (n_tokens * plain[theirs].double().sum()))))
        sums = {"inputs": a, "outputs": s}
        if corrected:
            sums["eigenvalues"] = corrected[theirs].double() * n
        basis = None
        if parts["eigen_activation_sharded"]:
            basis = (
                parts["eigen_gradient_sharded"][theirs].double(), parts["eigen_activation_sharded"][theirs].double(),
            )  # fmt: skip
        has_bias = len(a) > layer.n_inputs
        modules[name] = ModuleFactors(name, len(s), len(a), has_bias, n, n_tokens, sums, basis)
    return Factors(["kfac", *(["ekfac"] if corrected else [])], modules, identity="bergson")


def _check_dense(who: str, argument: str, model: nn.Module, names: Iterable[str]) -> None:
    """ValueError for experts: the files have one number of positions, and each of these gets some of them."""
    odd = next((name for name in names if isinstance(submodule(model, name), ExpertLayer)), None)
    if odd is not None:
        rule, remedy = "be of layers that get all tokens", "The files have one number of tokens for all: leave it out."
        raise ValueError(broken_rule(who, argument, rule, f"{odd}, an expert", remedy))


def _check_whole(who: str, parts: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """ValueError where a kind of tensor lacks a module that another has, or eigenvectors are of one side alone."""
    modules = set(parts["activation_sharded"])
    sides = [bool(parts[kind]) for kind in ("eigen_activation_sharded", "eigen_gradient_sharded")]
    odd = next((kind for kind, held in parts.items() if held and set(held) != modules), None)
    if odd is None and sides[0] != sides[1]:
        odd = "eigen_gradient_sharded" if sides[0] else "eigen_activation_sharded"
    if odd is not None:
        rule, got = f"hold the same modules in {odd} as in others", f"{len(parts[odd])} in place of {len(modules)}"
        raise ValueError(broken_rule(who, "folder", rule, got, "It is damaged, or the run hasn't ended: fit it again."))


def _check_method(who: str, place: Path) -> None:
    """ValueError where config.yaml says that the files are those of another method."""
    if not (place / "config.yaml").is_file():
        return
    said = extra("yaml", who).safe_load((place / "config.yaml").read_text(encoding="utf-8"))
    for settings in _found(said, "hessian_cfg"):
        method = settings.get("method", "kfac") if isinstance(settings, dict) else "kfac"
        if method != "kfac":
            rule, remedy = 'be of the method "kfac"', "Other methods keep other sums in files of the same names."
            raise ValueError(broken_rule(who, "folder", rule, repr(method), remedy))


def _found(said: Any, key: str) -> Iterator[Any]:
    """What stands by a key, anywhere in what YAML says."""
    if isinstance(said, dict):
        for name, value in said.items():
            if name == key:
                yield value
            yield from _found(value, key)
    elif isinstance(said, list):
        for value in said:
            yield from _found(value, key)


def _shards(who: str, folder: Path) -> dict[str, torch.Tensor]:
    """What lies in shard_0, shard_1, ... of a folder, whose rows lie behind each other; nothing without a folder."""
    load, found = extra("safetensors.torch", who).load_file, dict[str, list[torch.Tensor]]()
    for number in count():
        path = folder / f"shard_{number}.safetensors"
        if not path.is_file():
            return {name: torch.cat(rows) for name, rows in found.items()}
        for name, rows in load(path).items():
            found.setdefault(name, []).append(rows)
    return {}


def _symmetric(total: torch.Tensor) -> torch.Tensor:
    wide = total.double()
    return (wide + wide.T) / 2
