"""What a notebook shows: tables as HTML, every text escaped and nothing from outside; whether there is a notebook."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from html import escape
from typing import Any

makers: dict[str, Callable[..., Any]] = {}  # what rooms above make of an object of a room below: "report" of a dataset


def table(head: Iterable[str], rows: Iterable[Iterable[str]], note: str = "") -> str:
    """Return an HTML table; every text is escaped, so that a text that was collected is never taken for markup."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<table><thead><tr>{titles}</tr></thead><tbody>" if titles else "<table><tbody>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return "".join([*lines, "</tbody></table>", f"<p>{escape(note)}</p>" if note else ""])


def shortened(text: str, width: int) -> str:
    """Return a text on one line, of at most ``width`` characters."""
    plain = "".join(c if c.isprintable() else " " for c in text[: width + 1])
    return plain if len(plain) <= width else plain[: width - 1] + "\u2026"


class Page:
    """An HTML page within a notebook: in a frame of its own, which runs nothing and loads nothing.

    Attributes:
        html: the page.
        title: what it is called where no HTML is shown.
    """

    def __init__(self, html: str, title: str, height: int = 900) -> None:
        self.html, self.title, self._height = html, title, height

    def __repr__(self) -> str:
        return f"{self.title}: {len(self.html)} characters of HTML; a notebook shows it"

    def _repr_html_(self) -> str:
        frame = f'style="width:100%;height:{self._height}px;border:0" title="{escape(self.title)}"'
        return f'<iframe sandbox="" {frame} srcdoc="{escape(self.html)}"></iframe>'


def in_notebook() -> bool:
    """Whether this process runs the cells of a notebook, whose output is no terminal and shows a bar all the same."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")
