"""How rows of weight gradients were projected: what a dataset says of it, and bergson's processor_config.yaml."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from math import prod
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
_HARMLESS = {
    "points", "reduce", "over", "dtype", "output", "name", "of", "per", "encoding", "project", "bias", "heads",
    "summed",
}  # fmt: skip


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
    said = [(spec.get("project"), bool(spec.get("bias")), bool(spec.get("summed"))) for spec in found]
    if any(other != said[0] for other in said):
        rule = "be the same for all rows of weights"
        got = f"{said[0]} and {next(other for other in said if other != said[0])}"
        raise dataset_error(_WHO, "projection, bias and summed", rule, got, "Collect them into a dataset each.")
    settings = PROCESSOR | {"include_bias": said[0][1]} | _settings(said[0][0], said[0][2])
    if any(spec.get("normalizer") is not None for spec in found):
        rule, got = "be of gradients that aren't normalized", "normalized ones, and a digest of the normalizers"
        remedy = "bergson divides its queries by normalizers.pth, whose numbers a dataset hasn't: export it to npy."
        raise dataset_error(_WHO, "rows of weights", rule, got, remedy)
    odd = sorted({f"{key}={spec[key]!r}" for spec in found for key in spec.keys() - _HARMLESS})
    odd += ["reduce='norm'"] if any(spec.get("reduce") == "norm" for spec in found) else []
    if odd:
        rule, remedy = "say nothing that bergson's own queries don't do, too", "Export it to npy."
        raise dataset_error(_WHO, "the spec of rows of weights", rule, ", ".join(odd), remedy)
    return settings


def _settings(project: Any, summed: bool) -> dict[str, Any]:
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
    if (project.get("form", "two-sided") == "one-sided") != summed:
        rule, remedy = "be two-sided for each module, or one-sided and summed", "Export it to npy."
        raise dataset_error(_WHO, "the projection", rule, project.get("form", "two-sided"), remedy)
    odd = sorted(project.keys() - {*_SAID, "scheme", "form"})
    if odd:
        rule = f"have no other settings than {', '.join(_SAID)}"
        raise dataset_error(_WHO, "the projection", rule, ", ".join(odd), "Export it to npy.")
    target = {"projection_target": "global"} if summed else {}
    return target | {key: project[name] for name, key in _SAID.items() if name in project}


def inside_base(columns: Iterable[str], headers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names of columns as bergson has those of their modules: inside of ``model.base_model``.

    Raises:
        DatasetError: for a module that lies outside of it, or two columns of one module.
    """
    prefixes = {prefix for header in headers for prefix in _bases_of(header)}
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


def _bases_of(header: Mapping[str, Any]) -> list[str]:
    """Where a model of transformers has its base model, or an import put it; nothing where that isn't known."""
    model, imported = (header.get(key) for key in ("model", "imported"))
    base = imported.get("base") if isinstance(imported, Mapping) else None
    kind = model.get("class") if isinstance(model, Mapping) else None
    if base is None and isinstance(kind, str) and kind.isidentifier():
        if kind.startswith("PeftModel"):
            return ["base_model"]
        try:
            base = getattr(import_module("transformers"), kind, None).base_model_prefix  # type: ignore[union-attr]
        except (ImportError, AttributeError):
            return []
    return [str(base)] if base else []


def modules_of(
    name: str, column: Column, processor: Mapping[str, Any], heads: Collection[int], factor: int | None
) -> dict[str, int]:
    """Return the modules of bergson that a column has the rows of, each with its values in a row of the file.

    They are the module's own, or, where the column has ``heads``, those of each one. A row per token may be the two
    factors of bergson's, of outputs, which has ``factor`` numbers, then of inputs.

    Raises:
        DatasetError: for a column that isn't of weights, or whose rows have another shape.
    """
    remedy, dim = "Leave it out with points=.", processor["projection_dim"]
    if column.of != WEIGHT:
        raise dataset_error(_WHO, f"point {name!r}", "be of weights as others are", f"one of {column.of}", remedy)
    shape, module = tuple(column.row_shape), name.removesuffix(ENDING)
    if processor["projection_target"] == "global":
        if shape != (dim,):
            raise dataset_error(_WHO, f"point {name!r}", f"have rows of [{dim}]", list(shape), remedy)
        return {module: dim}
    if not name.endswith(ENDING):  # the module would have another name there, which bergson's queries don't
        rule = f"be called <module>{ENDING}"
        raise dataset_error(_WHO, f"point {name!r}", rule, "another name", remedy)
    n_heads = shape[0] if len(shape) == 3 and shape[0] in heads else 0
    one = shape[1:] if n_heads else shape
    if factor is not None:
        return {module: factor * (shape[0] - factor)}
    if dim is not None and one != (dim, dim):
        rule = f"have rows of [{dim}, {dim}]"
        raise dataset_error(_WHO, f"point {name!r}", rule, list(shape), remedy)
    if dim is None and column.per == "token":
        rule = "be projected to have rows per token, or be factors whose sizes the dataset notes"
        raise dataset_error(_WHO, f"point {name!r}", rule, f"rows of {list(shape)}", remedy)
    size = prod(one) if dim is None else dim * dim
    return {f"{module}.head_{head}": size for head in range(n_heads)} or {module: size}


def check_linear(columns: Iterable[str], about: Mapping[str, Any]) -> None:
    """Raise DatasetError for a column that its dataset notes to be of another layer than a linear one.

    bergson takes a convolution for a linear layer of its channels, fails at its input, and hooks no embedding or norm.
    """
    kinds = about.get("layers")
    for name in columns:
        kind = kinds.get(name) if isinstance(kinds, Mapping) else None
        if kind is not None:
            rule, got = "be of a linear layer", f"one of the kind {kind}"
            remedy = "bergson has no such rows: leave it out with points=, or export it to npy."
            raise dataset_error(_WHO, f"point {name!r}", rule, got, remedy)


def heads_of(headers: Iterable[Mapping[str, Any]]) -> set[tuple[int, int]]:
    """Return the heads, (how many, how wide), as which specs take the outputs of modules."""
    specs = [spec for header in headers for spec in header.get("specs", ()) if spec.get("of") == WEIGHT]
    return {(spec["heads"][0], spec["heads"][1]) for spec in specs if spec.get("heads")}
