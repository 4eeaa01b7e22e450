"""How rows of weight gradients were projected: what a dataset says of it, and bergson's processor_config.yaml."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from ..errors import dataset_error
from ..format.layout import WEIGHT, Column

_WHO = "export_dataset"
ENDING = f":{WEIGHT}"  # of the name of a column: "<module>:weight"
VERSION = 2  # of bergson's matrices; those of version 1 depend on the device
# The keys of processor_config.yaml, all of them: a missing one means another value, an unknown one is an error there.
PROCESSOR = {
    "projection_dim": None,
    "reshape_to_square": False,
    "projection_type": "rademacher",
    "projection_target": "per_module",
    "projection_scale": "jl",
    "include_bias": False,
    "projection_seed": None,
    "projection_version": VERSION,
}
# What is said of a projection, but for its scheme, and by which key bergson says it. What has the value of PROCESSOR is
# left out.
_SAID = {
    "dim": "projection_dim",
    "kind": "projection_type",
    "seed": "projection_seed",
    "scale": "projection_scale",
    "square": "reshape_to_square",
}
# What a spec may say of its rows and bergson's queries still be the same: whatever else it says made other rows.
_HARMLESS = {"points", "reduce", "over", "dtype", "output", "name", "of", "per", "encoding", "project", "bias"}


def as_said(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a spec says of rows that bergson projected so: "project", "bias", "summed", where there is any."""
    bias = {"bias": True} if processor["include_bias"] else {}
    if not processor["projection_dim"]:
        return bias
    project = {"dim": processor["projection_dim"], "scheme": f"bergson-{processor['projection_version']}"}
    for name, key in _SAID.items():
        if name != "dim" and processor[key] != PROCESSOR[key]:
            project[name] = processor[key]
    if processor["projection_target"] == "per_module":
        return {"project": project} | bias
    return {"project": project | {"form": "one-sided"}, "summed": True} | bias  # a row of all modules together


def processor_of(headers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return bergson's eight settings of the weight rows of datasets with these headers.

    Raises:
        DatasetError: where they say nothing of it or several things, or bergson's own queries would be other rows.
    """
    found = [spec for header in headers for spec in header.get("specs", ()) if spec.get("of") == WEIGHT]
    if not found:
        rule = "say in its header, under specs, how rows of weights were projected"
        raise dataset_error(_WHO, "the dataset", rule, "nothing of it", "Export it to npy.")
    said = [(spec.get("project"), bool(spec.get("bias"))) for spec in found]
    if any(other != said[0] for other in said):
        rule = "be the same for all rows of weights"
        got = f"{said[0]} and {next(other for other in said if other != said[0])}"
        raise dataset_error(_WHO, "projection and bias", rule, got, "Collect them into a dataset each.")
    settings = PROCESSOR | {"include_bias": said[0][1]} | _settings(said[0][0])
    odd = sorted({f"{key}={spec[key]!r}" for spec in found for key in spec.keys() - _HARMLESS})
    if odd:
        rule, remedy = "say nothing that bergson's own queries don't do, too", "Export it to npy."
        raise dataset_error(_WHO, "the spec of rows of weights", rule, ", ".join(odd), remedy)
    return settings


def _settings(project: Any) -> dict[str, Any]:
    """What differs from PROCESSOR in a projection; none is None."""
    if project is None:
        return {}
    scheme = project.get("scheme", "tlfast-1")
    remedy = (
        "Bergson makes matrices of its own for queries, so its scores would mean nothing: collect with the scheme "
        f"bergson-{VERSION}, or export to npy."
    )
    if scheme != f"bergson-{VERSION}":
        raise dataset_error(_WHO, "the scheme of the projection", f"be bergson-{VERSION}", scheme, remedy)
    if project.get("form", "two-sided") != "two-sided":
        rule, remedy = "be two-sided for each module", "Export it to npy."
        raise dataset_error(_WHO, "the projection", rule, project["form"], remedy)
    odd = sorted(project.keys() - {*_SAID, "scheme", "form"})
    if odd:
        rule = f"have no other settings than {', '.join(_SAID)}"
        raise dataset_error(_WHO, "the projection", rule, ", ".join(odd), "Export it to npy.")
    return {key: project[name] for name, key in _SAID.items() if name in project}


def module_names(columns: Mapping[str, Column], models: Iterable[Any]) -> dict[str, str]:
    """Return the name that bergson has for the module of each column: that inside of ``model.base_model``.

    ``models`` is what headers say of their models.

    Raises:
        DatasetError: for a module that lies outside of it, or two columns of one module.
    """
    prefixes = {_base_of(model.get("class")) for model in models if isinstance(model, Mapping)} - {""}
    names = {column: column.removesuffix(ENDING) for column in columns}
    for prefix in sorted(prefixes):
        inside = [name for name in names.values() if name.startswith(prefix + ".")]
        outside = [name for name in names.values() if not name.startswith(prefix + ".")]
        if inside and outside:
            rule = f"lie inside of {prefix!r}, where bergson looks"
            raise dataset_error(_WHO, f"module {outside[0]!r}", rule, "one outside", "Leave it out with points=.")
        names = {column: name.removeprefix(prefix + ".") for column, name in names.items()}
    twice = [name for name, n in Counter(names.values()).items() if n > 1]
    if twice:
        raise dataset_error(_WHO, f"module {twice[0]!r}", "have one column", "several", "Leave one out with points=.")
    return names


def _base_of(kind: Any) -> str:
    """Where a model of this class of transformers has its base model; "" where that isn't known."""
    if not isinstance(kind, str) or not kind.isidentifier():
        return ""
    if kind.startswith("PeftModel"):
        return "base_model"
    try:
        return str(getattr(import_module("transformers"), kind, None).base_model_prefix)  # type: ignore[union-attr]
    except (ImportError, AttributeError):
        return ""


def check_shapes(columns: Mapping[str, Column], dim: int | None) -> None:
    """DatasetError for a column that isn't of weights, or whose rows aren't [dim, dim] where they are projected."""
    for name, column in columns.items():
        if column.of != WEIGHT:
            rule = "be of weights as others are"
            raise dataset_error(_WHO, f"point {name!r}", rule, f"one of {column.of}", "Leave it out with points=.")
        if dim is not None and tuple(column.row_shape) != (dim, dim):
            rule, got = f"have rows of [{dim}, {dim}]", list(column.row_shape)
            raise dataset_error(_WHO, f"point {name!r}", rule, got, "Leave it out with points=.")
