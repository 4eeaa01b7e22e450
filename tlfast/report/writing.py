"""Write the report of a dataset: gather its figures, draw them, put them on the page."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from ..dataset import GradientDataset, open_dataset
from ..dataset.errors import dataset_error, extra
from ..dataset.export.export import beside
from ..dataset.format.coverage import completeness, missing_units
from ..dataset.format.layout import DTYPE_NAMES
from ..dataset.places.durable import write_small
from ..markup import Page
from . import charts
from .nearest import nearest_examples
from .page import render
from .positions import norms_by_position, points_with_positions
from .summary import Summary, summarize
from .texts import Decode, decoder
from .timeline import Timeline, commit_times, extension_times, timeline

_WHO = "write_report"
_LONGEST_TABLE = 200  # points
_LONGEST_VALUE = 300  # characters of a setting
_KINDS = {"grad": "gradients", "act": "activations", "weight": "weight gradients"}


def write_report(
    path: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    found: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write one HTML page about the dataset in folder ``path``, complete or not: a file that needs no other.

    It reads the row tables once, and the rows of at most 2048 examples where they keep positions or are tokens'; memory
    doesn't grow with the rows.

    Args:
        path: the dataset's folder, or its URL.
        out: the page; an older one of this name is replaced. None: ``<path>-report.html``; of a URL, in this folder.
        tokenizer: an object with ``decode``, or the name of a tokenizer, for the texts of the largest rows; None: that
            of the dataset if it is on this machine, else tokens are shown.
        found: what a search found in this dataset, `tlfast.score` or ``ds.search``, or the Parquet file of it: the page
            shows these examples with their text.
        progress: called with the number of rows just read.

    Returns:
        The path of the page.

    Raises:
        DatasetError: where the folder is no dataset, is damaged or is empty, and for what was found elsewhere.
        ImportError: naming the extra where matplotlib or Jinja is missing.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan
        >>> from tlfast.report import write_report
        >>> out, plan = tempfile.mkdtemp(), Plan(1, 1)
        >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
        >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([[3.0, 4.0]])}, [Example(0, [1], "a", 0, 1)])
        True
        >>> write_report(out).read_text().startswith("<!doctype html>")
        True
    """
    dataset = _checked(open_dataset(path, partial=True), path)
    target = beside(dataset, "-report.html") if out is None else Path(out)
    if target.is_dir():
        raise dataset_error(_WHO, "out", "be a file", f"{target}, a folder", "Name a file.")
    page = _page(dataset, tokenizer, found, progress)
    write_small(target, page.encode("utf-8", errors="replace"), replace=True)
    return target


def report_page(
    dataset: Any, *, tokenizer: Any = None, found: Any = None, progress: Callable[[int], None] | None = None
) -> Page:
    """Return the page about an open dataset, to be shown in a notebook: ``ds.report()``. See write_report."""
    page = _page(_checked(dataset, dataset.path), tokenizer, found, progress)
    return Page(page, f"Report of {dataset.path}")


def _checked(dataset: Any, path: object) -> GradientDataset:
    for library in ("matplotlib.figure", "jinja2"):
        extra(library, _WHO, "plot")
    if not isinstance(dataset, GradientDataset):
        got = f"several that were merged in {path}"
        raise dataset_error(_WHO, "path", "be one dataset", got, "Report on each of ds.sources.")
    if not len(dataset):
        raise dataset_error(_WHO, "path", "hold at least one unit", f"{path} without any", "Collect something first.")
    return dataset


def _page(dataset: GradientDataset, tokenizer: Any, found: Any, progress: Callable[[int], None] | None) -> str:
    decode, note = decoder(dataset, tokenizer)
    nearest = None if found is None else nearest_examples(dataset, found, decode, _number)
    return render(**_values(dataset, summarize(dataset, progress), decode, note), nearest=nearest)


def _values(dataset: GradientDataset, summary: Summary, decode: Decode, note: str) -> dict[str, Any]:
    info = dataset.info()
    shown = charts.some(dataset.points, _LONGEST_TABLE)
    created = info["about"].get("created", "")
    return {
        "title": os.path.basename(str(dataset.path).rstrip("/")) or str(dataset.path),
        "subtitle": f"{_model(info['header'])}, begun {created}" if created else _model(info["header"]),
        "tiles": _tiles(info, summary),
        "made": [(key, value) for key, value in _made(info)],
        "parts": _parts(dataset),
        "missing": _missing(dataset),
        "skipped": _skipped(dataset),
        "charts": _charts(dataset, summary, created),
        "points": [_point(name, dataset, summary) for name in shown],
        "points_left_out": len(dataset.points) - len(shown),
        "bad": [row | {"points": ", ".join(map(charts.short, row["points"][:6]))} for row in summary.bad],
        "largest": [
            row.example
            | {
                "norm": _number(row.norm),
                "point": charts.short(row.point, 80),
                "text": decode(row.example["input_ids"]),
            }
            for row in summary.largest
        ],
        "largest_note": note,
        "largest_over": _ranked(dataset, summary),
        "footer": f"config hash {info['config_hash']}; made by tlfast report",
    }


def _ranked(dataset: GradientDataset, summary: Summary) -> str:
    """Of which points the norms are that rows are ranked by."""
    if len(summary.ranked) == len(dataset.points):
        return "all points"
    of = dataset.column(summary.ranked[0]).of
    return f"the {len(summary.ranked)} of {len(dataset.points)} points that are {_KINDS.get(of, of)}"


def _model(header: dict[str, Any]) -> str:
    model = header.get("model")
    model = model if isinstance(model, dict) else {}
    name = model.get("name") or model.get("class") or "gradients"
    return f"{name} ({model['parameters']:,} parameters)" if isinstance(model.get("parameters"), int) else str(name)


def _tiles(info: dict[str, Any], summary: Summary) -> list[dict[str, Any]]:
    n_bytes = info["bytes"]
    size = f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
    counts = [
        ("rows", summary.n_rows, False),
        ("tokens", summary.n_tokens, False),
        ("points", len(info["points"]), False),
        ("on disk", size, False),
        ("rows not finite", summary.flags["non-finite"], True),
        ("rows saturated", summary.flags["saturated"], True),
    ]
    if summary.flags["missing"]:
        counts.append(("rows missing a point", summary.flags["missing"], True))
    return [
        {"label": label, "value": f"{value:,}" if isinstance(value, int) else value, "warn": bad and value != 0}
        for label, value, bad in counts
    ]


def _made(info: dict[str, Any]) -> list[tuple[str, str]]:
    header = info["header"] | ({"examples": info["examples"]} if info["examples"] else {})
    known = ("model", "tokenizer", "specs", "loss", "batching", "text", "examples", "grad_scale")
    keys = [key for key in known if key in header] + [key for key in header if key not in known]
    return [(str(key), _line(header[key])) for key in keys[:40]] + [("made", _line(info["about"]))]


def _line(value: Any) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{key} {_line(part)}" for key, part in value.items() if part is not None and key != "skipped")
    elif isinstance(value, list):
        text = " ".join(_line(part) for part in value[:50]) or "none"
    else:
        text = str(value)
        text = text[:12] if len(text) == 64 else text  # a fingerprint
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}\u2026"


def _parts(dataset: GradientDataset) -> list[dict[str, Any]]:
    """How complete the first plan and each of its extensions are."""
    parts = completeness(dataset.plan, dataset.units)
    first = "The plan" if len(parts) == 1 else "The first plan"
    found = [
        {
            "label": f"Extension {part.number}" if part.number else first,
            "done": f"{part.n_examples:,}",
            "planned": f"{part.planned_examples:,}",
            "units": f"{part.n_units:,}",
            "planned_units": f"{part.planned_units:,}",
            "percent": f"{100 * part.n_examples / part.planned_examples:.1f}",
        }
        for part in parts
    ]
    return found if len(found) <= 12 else [*found[:6], *found[-6:]]


def _missing(dataset: GradientDataset) -> str:
    n_missing = dataset.plan.n_units - len(dataset.units)
    if not n_missing:
        return ""
    names = missing_units(dataset.plan, dataset.units, 5)
    return ", ".join(names) + (f" and {n_missing - len(names):,} more units" if n_missing > len(names) else "")


def _skipped(dataset: GradientDataset) -> dict[str, Any]:
    skipped = dataset.skipped
    reasons = Counter(reason for _, _, reason in skipped)
    first = {reason: f"{source} from {start}" for source, start, reason in reversed(skipped)}
    return {
        "total": len(skipped),
        "reasons": [(reason, n, first[reason]) for reason, n in reasons.most_common(10)],
    }


def _point(name: str, dataset: GradientDataset, summary: Summary) -> dict[str, Any]:
    norms, column = summary.norms[name], dataset.column(name)
    return {
        "name": charts.short(name, 80),
        "stored": f"{DTYPE_NAMES[column.dtype]} {list(column.row_shape)}{column.notes}",
        "holds": dataset.holds(name),
        "norms": [_number(norms.percentile(percent)) for percent in (5, 50, 95)] + [_number(norms.largest)],
        "zero": f"{norms.n_zero:,}",
        "non_finite": norms.n_non_finite and f"{norms.n_non_finite:,}",
    }


def _number(value: float) -> str:
    if math.isnan(value):
        return "\u2013"
    return f"{value:,.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def _charts(dataset: GradientDataset, summary: Summary, created: object) -> list[dict[str, str]]:
    with_positions = charts.some(points_with_positions(dataset), charts.LINES)
    line = timeline(commit_times(dataset), created, extension_times(dataset))
    found = [
        (
            "Norm by point",
            "Median (dot), the middle half and the middle 90 % of the rows.",
            charts.percentiles(summary.norms),
        ),
        ("Distribution of row norms", _chosen(dataset), charts.distributions(summary.norms)),
    ]
    if with_positions:
        means = norms_by_position(dataset, with_positions, summary.sample, summary.sample_lengths)
        caption = (
            f"Mean over {len(summary.sample):,} rows, evenly chosen. Positions count the real tokens of each, from 0."
        )
        found.append(("Norm by position", caption, charts.positions(means)))
    else:
        caption = 'The rows don\'t keep positions: they are reduced over them. Collect with reduce="none", or over=-1.'
        found.append(("Norm by position", caption, ""))
    found.append(("Throughput", _speed(line), charts.throughput(line) if line else ""))
    return [{"title": title, "caption": caption, "svg": svg} for title, caption, svg in found]


def _chosen(dataset: GradientDataset) -> str:
    n = len(dataset.points)
    return "Share of the rows with each norm" + (f", {charts.LINES} of {n} points." if n > charts.LINES else ".")


def _speed(line: Timeline | None) -> str:
    if line is None:
        return "The times of the commits don't tell: too few units, or a copy that bears the time of copying."
    pauses = f" Paused {len(line.pauses)} times (dashed)." if line.pauses else ""
    rate = line.n_rows / line.work_s
    took = f"{line.work_s / 60:,.1f} min" if line.work_s >= 60 else f"{line.work_s:.1f} s"
    return f"By the times of the commits: {rate:,.1f} rows per second on average, for {took}.{pauses}"
