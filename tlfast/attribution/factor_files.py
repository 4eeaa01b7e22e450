"""Factors of the curvature as the files of kronfluence."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..dataset.errors import extra
from ..errors import broken_rule
from ..hooks.factors import Factors, ModuleFactors
from ..hooks.layers import linear_layer

_WHO = "write_kronfluence"


def write_kronfluence(factors: Factors, folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> None:
    """Write factors as kronfluence 1.0 keeps those that it has fitted.

    Its `Analyzer` reads them as the factors "NAME" where ``folder`` is ``OUTPUT_DIR/ANALYSIS/factors_NAME``. Its
    modules are `torch.nn.Linear` of the same names; kronfluence counts the bias wherever a layer has one, so say
    ``bias=True`` when the factors are made.

    Args:
        factors: with eigenvectors; with the eigenvalues of "ekfac" where kronfluence's strategy is that.
        folder: a new one, or an empty one.
        dtype: in which matrices are stored.

    Raises:
        ValueError: without eigenvectors, and for a folder that has files.
    """
    if not factors.has_basis or "kfac" not in factors.kinds:
        rule, remedy = 'be of "kfac", with eigenvectors', "Call eigen() first."
        raise ValueError(broken_rule(_WHO, "factors", rule, repr(factors), remedy))
    out = Path(folder)
    if out.exists() and any(out.iterdir()):
        raise ValueError(broken_rule(_WHO, "folder", "be empty", f"files in {os.fspath(folder)!r}", "Take another."))
    save = extra("safetensors.torch", _WHO).save_file
    with_values = "ekfac" in factors.kinds
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name in factors:
        for file, tensor in _of_kronfluence(factors[name], with_values).items():
            kept = tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
            files.setdefault(file, {})[name] = kept.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    for file, tensors in files.items():
        save(tensors, out / f"{file}.safetensors")
    said = {"strategy": "ekfac" if with_values else "kfac", "use_empirical_fisher": True}
    (out / "factor_arguments.json").write_text(json.dumps(said, indent=4), encoding="utf-8")


def _of_kronfluence(of: ModuleFactors, with_values: bool) -> dict[str, torch.Tensor]:
    n_tokens = torch.tensor([of.n_tokens])
    made = {
        "activation_covariance": of.inputs,
        "gradient_covariance": of.outputs,
        "num_activation_covariance_processed": n_tokens,
        "num_gradient_covariance_processed": n_tokens.clone(),
        "activation_eigenvectors": of.input_basis,
        "gradient_eigenvectors": of.output_basis,
        "activation_eigenvalues": (of.input_basis * (of.inputs @ of.input_basis)).sum(0) / of.n_tokens,
        "gradient_eigenvalues": (of.output_basis * (of.outputs @ of.output_basis)).sum(0) / of.n_tokens,
    }
    if with_values:
        made |= {
            "lambda_matrix": of.sums["eigenvalues"],
            "num_lambda_processed": torch.tensor([of.n_examples]),
        }
    return made


def read_kronfluence(folder: str | os.PathLike[str], model: nn.Module, *, n_examples: int | None = None) -> Factors:
    """Read the factors that kronfluence 1.0 has fitted, with the strategy "kfac" or "ekfac".

    Args:
        folder: ``OUTPUT_DIR/ANALYSIS/factors_NAME``.
        model: in which the modules are: linear layers.
        n_examples: how many examples there were; needed where there are no Lambda matrices, which say it.

    Returns:
        Factors of "kfac", and of "ekfac" where there are Lambda matrices; with the eigenvectors that are there.

    Raises:
        ValueError: for another folder or strategy, other modules or shapes.
    """
    who, place = "read_kronfluence", Path(folder)
    said = place / "factor_arguments.json"
    strategy = json.loads(said.read_text(encoding="utf-8")).get("strategy") if said.is_file() else None
    if strategy not in ("kfac", "ekfac"):
        rule, got = 'hold factor_arguments.json with the strategy "kfac" or "ekfac"', f"{os.fspath(folder)}: {strategy}"
        raise ValueError(broken_rule(who, "folder", rule, got, "Give factors_NAME of an analysis."))
    load = extra("safetensors.torch", who).load_file
    read = {path.stem: load(path) for path in sorted(place.glob("*.safetensors"))}
    needed = ("activation_covariance", "gradient_covariance", "num_activation_covariance_processed")
    absent = next((name for name in needed if name not in read), None)
    if absent is not None:
        remedy = "Aggregate the partitions of an analysis first."
        raise ValueError(broken_rule(who, "folder", f"hold {absent}.safetensors", os.fspath(folder), remedy))
    has_values = "lambda_matrix" in read and "activation_eigenvectors" in read
    if n_examples is None and not has_values:
        rule, remedy = "be given where there are no Lambda matrices", "Say n_examples=, of how many the factors are."
        raise ValueError(broken_rule(who, "n_examples", rule, "none", remedy))
    modules = {name: _read_module(who, name, model, read, has_values, n_examples) for name in read[needed[0]]}
    return Factors(["kfac", *(["ekfac"] if has_values else [])], modules, identity="kronfluence")


def _read_module(
    who: str, name: str, model: nn.Module, read: Mapping[str, Mapping[str, torch.Tensor]], has_values: bool,
    n_examples: int | None,
) -> ModuleFactors:  # fmt: skip
    known = dict(model.named_modules())
    layer = linear_layer(known[name]) if name in known else None
    a, s = (read[f"{side}_covariance"][name].double() for side in ("activation", "gradient"))
    n_inputs = -1 if layer is None else layer.n_inputs + layer.has_bias  # kronfluence counts each bias
    if layer is None or (len(s), len(a)) != (layer.n_outputs, n_inputs):
        rule, got = "be of linear layers of the model", f"{name!r} of [{len(s)}, {len(a)}]"
        raise ValueError(broken_rule(who, "folder", rule, got, "Give the model that it was made of."))
    sums, n = {"inputs": (a + a.T) / 2, "outputs": (s + s.T) / 2}, n_examples
    if has_values:
        sums["eigenvalues"] = read["lambda_matrix"][name].double()
        n = int(read["num_lambda_processed"][name])
    basis = None
    if "activation_eigenvectors" in read:
        basis = read["gradient_eigenvectors"][name].double(), read["activation_eigenvectors"][name].double()
    n_tokens = int(read["num_activation_covariance_processed"][name])
    return ModuleFactors(name, len(s), len(a), layer.has_bias, n or 0, n_tokens, sums, basis)
