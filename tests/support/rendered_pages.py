"""What goes wrong in a page of Markdown, found in what markdown-it-py renders of it, as GitHub would."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])  # what GitHub adds, as far as it matters here
# What only stands in rendered text if the syntax around it was wrong.
RAW = {"|": "a raw pipe", "](": "a raw link", "**": "raw asterisks", "```": "a raw fence"}
PLACES = {"a": ("href",), "img": ("src", "srcset"), "source": ("srcset",)}


class Html(HTMLParser):
    """Links, pictures and anchors in the HTML of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Note where a tag leads, and what leads to it."""
        found = {name: value for name, value in attributes if value}
        self.links += [found[name].split()[0] for name in PLACES.get(tag, ()) if name in found]
        self.anchors |= {found[name] for name in ("id", "name") if name in found}


def tokens_of(text: str) -> Iterator[Token]:
    """All tokens of a page, those inside of a line too."""
    for token in MARKDOWN.parse(text):
        yield token
        yield from token.children or []


def shown(inline: Token) -> str:
    """What a reader sees of a line, but for code."""
    return "".join(child.content for child in inline.children or [] if child.type == "text")


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """All that a link with # can lead to in a page."""
    tokens, found, html = MARKDOWN.parse(text), set(), Html()
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            words = "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline"))
            name = slug(words)
            same = [anchor for anchor in found if re.fullmatch(rf"{re.escape(name)}(-\d+)?", anchor)]
            found.add(f"{name}-{len(same)}" if same else name)
    html.feed("".join(token.content for token in tokens_of(text) if token.type in ("html_block", "html_inline")))
    return found | html.anchors


def links(text: str) -> list[str]:
    """Where the links and pictures of a page lead, those in HTML too."""
    found, html = [], Html()
    for token in tokens_of(text):
        if token.type in ("html_block", "html_inline"):
            html.feed(token.content)
        found += [str(token.attrs[name]) for name in ("href", "src") if name in token.attrs]
    return found + html.links


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links and pictures without a file, and anchors without a heading."""
    broken = []
    page = page.resolve()
    for link in links(text):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        if target != page and not target.exists():
            broken.append(f"no file for the link {link}")
        elif parts.fragment:
            there = text if target == page else target.read_text(encoding="utf-8") if target.suffix == ".md" else ""
            if unquote(parts.fragment) not in anchors(there):
                broken.append(f"no heading for the link {link}")
    return broken


def unclosed_fences(text: str) -> list[str]:
    """Fences that only the end of the page, or of the list around them, closes."""
    lines = text.splitlines()
    found = []
    for token in tokens_of(text):
        if token.type == "fence" and token.map is not None:
            first, last = token.map[0], token.map[1] - 1
            closing = lines[last].lstrip(" \t>") if first < last < len(lines) else ""
            if not re.fullmatch(rf"{re.escape(token.markup)}{re.escape(token.markup[0])}*[ \t]*", closing):
                found.append(f"line {first + 1}: an unclosed fence")
    return found


def raw_syntax(text: str) -> list[str]:
    """Lines whose Markdown is shown in place of what it should make; the most usual is a table that a line cuts."""
    found = []
    for token in MARKDOWN.parse(text):
        if token.type == "inline" and token.map is not None:
            found += [f"line {token.map[0] + 1}: {what}: {shown(token)[:60]}" for raw, what in RAW.items()
                      if raw in shown(token)]  # fmt: skip
    return found


def problems(page: Path, text: str) -> list[str]:
    """All that is wrong with a page."""
    return raw_syntax(text) + unclosed_fences(text) + broken_links(page, text)
