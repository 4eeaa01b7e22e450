"""Factors, and second moments, as the files of other libraries."""

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
from ..hooks.layers import projected_name
from ..hooks.normalizers import AdamNormalizer, Normalizer
from ..projections.projection import Projection

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


def write_bergson_normalizers(
    normalizers: Mapping[str, Normalizer], path: str | os.PathLike[str], model: nn.Module
) -> None:
    """Write normalizers as the ``normalizers.pth`` of bergson 2.5, whose names are those inside the model's base.

    Args:
        normalizers: by module, as `read_optimizer` and `Factors.normalizers` give them.
        path: the file.
        model: in which the modules are.

    Raises:
        ValueError: for a module that the model hasn't.
    """
    who, base = "write_bergson_normalizers", Projection(1, scheme="bergson-2")
    modules, saved = dict(model.named_modules()), {}
    for name, normalizer in normalizers.items():
        if name not in modules:
            rule, remedy = "be of modules of the model", "Give the model that they were made of."
            raise ValueError(broken_rule(who, "normalizers", rule, repr(name), remedy))
        if isinstance(normalizer, AdamNormalizer):
            n_inputs = modules[name]._parameters["weight"].numel() // len(normalizer.second_moment)
            v, bias = normalizer.second_moment, None
            if v.shape[1] == n_inputs + 1:
                v, bias = v[:, :-1], v[:, -1]
            said = {"__class__": "AdamNormalizer", "weight_avg_sq": v, "bias_avg_sq": bias}
        else:
            row, col, bias = normalizer.row, normalizer.col, normalizer.bias
            said = {"__class__": "AdafactorNormalizer", "row": row, "col": col, "bias_avg_sq": bias}
        saved[projected_name(model, name, base)] = {
            key: value.float().contiguous() if isinstance(value, torch.Tensor) else value
            for key, value in said.items()
            if value is not None
        }
    torch.save(saved, path)
