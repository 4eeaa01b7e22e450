"""The pictures of a report, by matplotlib: SVG that stands inside the page and asks for nothing from outside."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..dataset.errors import extra
from .summary import LOWEST, PER_DECADE, Norms
from .timeline import Timeline

INK, MUTED, GRID, ACCENT, WARN = "#1f2328", "#57606a", "#e4e7eb", "#2f6f9f", "#b3501b"
WIDTH_IN = 6.6  # 475 points: about as wide as the page shows it, so that letters keep their size
LINES = 8  # in one chart: more can't be told apart
NAMED = 28  # points that get a line of their own, with their name


def some(names: Sequence[str], most: int) -> list[str]:
    """Return at most so many of the names, evenly chosen, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    return [names[k] for k in np.unique(np.linspace(0, len(names) - 1, most).round().astype(int))]


def short(name: str, most: int = 34) -> str:
    """A name that fits beside a chart; nothing in it acts on matplotlib or on the page."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name) or "(the model itself)"
    return plain if len(plain) <= most else f"{plain[: most // 2]}\u2026{plain[-(most // 2 - 1) :]}"


def percentiles(norms: Mapping[str, Norms]) -> str:
    """Norm by point: the median, the middle half and the middle 90 % of the rows."""
    names = list(norms)
    by_name = len(names) <= NAMED
    values = np.array([[norms[name].percentile(p) for p in (5, 25, 50, 75, 95)] for name in names])
    values[values <= 0] = np.nan  # a logarithm has no place for zero
    figure, axes = _figure(0.9 + 0.22 * len(names) if by_name else 3.2)
    places = np.arange(len(names))
    if by_name:
        for k in places:
            axes.plot(values[k, [0, 4]], [k, k], color=ACCENT, alpha=0.35, linewidth=2.2, solid_capstyle="round")
            axes.plot(values[k, [1, 3]], [k, k], color=ACCENT, linewidth=5.5, solid_capstyle="butt", alpha=0.75)
            axes.plot(values[k, 2], k, "o", color=INK, markersize=3.6)
        axes.set_yticks(places, [_text(short(name)) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("norm of a row")
        _logarithmic(axes, "x", values)
    else:
        axes.fill_between(places, values[:, 0], values[:, 4], color=ACCENT, alpha=0.2, linewidth=0)
        axes.fill_between(places, values[:, 1], values[:, 3], color=ACCENT, alpha=0.4, linewidth=0)
        axes.plot(places, values[:, 2], color=INK, linewidth=1.4)
        axes.set_xlabel(f"point, 0 to {len(names) - 1} in the order of the dataset")
        axes.set_ylabel("norm of a row")
        _logarithmic(axes, "y", values)
    return _svg(figure)


def distributions(norms: Mapping[str, Norms]) -> str:
    """How many rows have which norm, at some points."""
    names = [name for name in some(list(norms), LINES) if norms[name].counts.any()]
    figure, axes = _figure(3.4)
    used = np.flatnonzero(sum(norms[name].counts for name in names)) if names else np.array([0])
    first, last = int(used[0]), int(used[-1]) + 1
    step = max(1, (last - first) // 90)
    edges = np.arange(first, last + step, step)
    for name, color in zip(names, _colors(len(names)), strict=True):
        counts = norms[name].counts
        shares = np.add.reduceat(np.append(counts, 0), edges.clip(0, len(counts)))[:-1] / counts.sum()
        middles = 10.0 ** (LOWEST + (edges[:-1] + step / 2) / PER_DECADE)
        axes.fill_between(middles, shares * 100, color=color, alpha=0.10, linewidth=0)
        axes.plot(middles, shares * 100, color=color, linewidth=1.5, label=_text(short(name)))
    axes.set_xlabel("norm of a row")
    axes.set_ylabel("% of the rows")
    axes.set_ylim(0)
    _logarithmic(axes, "x", 10.0 ** (LOWEST + np.array([first, last]) / PER_DECADE))
    _legend(axes, len(names))
    return _svg(figure)


def positions(means: Mapping[str, np.ndarray[Any, Any]]) -> str:
    """Mean norm at each position."""
    figure, axes = _figure(3.4)
    for (name, mean), color in zip(means.items(), _colors(len(means)), strict=True):
        shown = np.where(mean > 0, mean, np.nan)
        axes.plot(np.arange(len(mean)), shown, color=color, linewidth=1.5, label=_text(short(name)))
    axes.set_xlabel("position")
    axes.set_ylabel("mean norm")
    _logarithmic(axes, "y", np.concatenate([mean[mean > 0] for mean in means.values()]))
    _legend(axes, len(means))
    return _svg(figure)


def throughput(line: Timeline) -> str:
    """Rows per second over the time of work; pauses are dashed lines."""
    scale, unit = next((s, u) for s, u in ((3600, "h"), (60, "min"), (1, "s")) if line.work_s >= 2 * s or s == 1)
    figure, axes = _figure(2.8)
    axes.stairs(line.rows_per_s, line.edges_s / scale, fill=True, color=ACCENT, alpha=0.30)
    axes.stairs(line.rows_per_s, line.edges_s / scale, color=ACCENT, linewidth=1.3)
    for at, _ in line.pauses:
        axes.axvline(at / scale, color=WARN, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_xlim(0, line.work_s / scale)
    axes.set_ylim(0)
    axes.set_xlabel(f"time of work, {unit}")
    axes.set_ylabel("rows per second")
    return _svg(figure)


def _figure(height_in: float) -> tuple[Any, Any]:
    matplotlib = extra("matplotlib", "tlfast report", "plot")
    figure_module = extra("matplotlib.figure", "tlfast report", "plot")
    with matplotlib.rc_context(_STYLE):
        figure = figure_module.Figure((WIDTH_IN, height_in), layout="constrained")
        axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


_STYLE = {
    "font.size": 9.5, "font.family": "sans-serif", "axes.edgecolor": GRID, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.major.size": 0, "ytick.major.size": 0, "text.color": INK,
    "svg.fonttype": "path",  # letters as outlines: the same picture everywhere, no text of a dataset in the markup
}  # fmt: skip


def _logarithmic(axes: Any, name: str, values: Any) -> None:
    ticker = extra("matplotlib.ticker", "tlfast report", "plot")
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite) & (finite > 0)]
    axis = getattr(axes, f"{name}axis")
    getattr(axes, f"set_{name}scale")("log")
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (1.0, 10.0)
    # Less than two decades have hardly a power of ten in them: 2 and 5 are named too.
    subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=9))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    getattr(axes, f"set_{name}lim")(low / 1.15, high * 1.15)


def _colors(n: int) -> list[Any]:
    colormap = extra("matplotlib", "tlfast report", "plot").colormaps["viridis"]
    return [colormap(x) for x in np.linspace(0.0, 0.82, n)]


def _legend(axes: Any, n: int) -> None:
    if n:
        columns = 1 if n < 4 else 2
        axes.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0)
        )


def _text(name: str) -> str:
    # A pair of $ would be set as mathematics, and a label that begins with _ left out.
    return name.replace("$", r"\$") if not name.startswith("_") else " " + name.replace("$", r"\$")


def _svg(figure: Any) -> str:
    matplotlib = extra("matplotlib", "tlfast report", "plot")
    out = io.StringIO()
    with warnings.catch_warnings(), matplotlib.rc_context(_STYLE | {"svg.hashsalt": "tlfast"}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name may be in any script
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for pattern in ("<metadata>.*?</metadata>", "<!--.*?-->"):  # of links, and of the letters of names
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return re.sub(r'^(<svg[^>]*?) height="[^"]*"([^>]*?) width="[^"]*"', r"\1\2", text.replace("\n", " ", 3), count=1)
