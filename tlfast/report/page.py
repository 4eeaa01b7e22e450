"""The page of a report: one HTML file, everything in it, every text of the dataset escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from ..dataset.errors import extra

# What the browser is told: load nothing, run nothing. The charts are markup within the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def _visible(value: Any) -> Any:
    """Show characters that act on what is around them (of control, of direction) as a replacement; but not markup."""
    if not isinstance(value, str) or hasattr(value, "__html__") or value.isprintable():
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in value)


def render(**values: Any) -> str:
    """Return the page; texts among ``values`` are escaped, but for the charts' own SVG."""
    jinja2 = extra("jinja2", "tlfast report", "plot")
    # Autoescape: a name or a text of a dataset is shown and never acts.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, finalize=_visible
    )
    template = environment.from_string(files("tlfast.report").joinpath("page.html").read_text(encoding="utf-8"))
    return str(template.render(policy=_POLICY, **values)).lstrip()
