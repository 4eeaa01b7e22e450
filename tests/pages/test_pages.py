"""Every page of Markdown renders as it was meant: tables are tables, links and pictures lead somewhere."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from checkout import ROOT, tracked
from rendered_pages import anchors, links, problems, slug

PAGES = tracked("*.md")


def test_the_pages_are_found():
    names = {str(page) for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "docs/design.md"} <= names


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_renders(page):
    assert problems(ROOT / page, (ROOT / page).read_text(encoding="utf-8")) == []


def test_pictures_are_shown_small_and_whole():
    pictures = sorted((ROOT / "docs" / "images").iterdir())
    shown = {ROOT / link for link in links((ROOT / "README.md").read_text(encoding="utf-8")) if "/images/" in link}
    assert set(pictures) == shown
    for picture in pictures:
        assert picture.stat().st_size < 150_000, picture
        if picture.suffix == ".svg":  # a name for those who can't see it, and nothing from elsewhere
            root = ElementTree.parse(picture).getroot()
            assert root.findtext("{*}title"), picture
            assert not [
                element
                for element in root.iter()
                if {"href", "{http://www.w3.org/1999/xlink}href"} & set(element.attrib)
            ]


RIGHT = """\
# A page, and `more`

| a | b |
|---|---|
| `x \\| y` | **z** |

A [file](there.md), a [part](there.md#the-2nd-part), [this one](#a-page-and-more), <https://example.org/x#y>,
`a | b`, ![picture](there.png) and <img src="there.png" alt="again">.

- a list

  ```python
  x | y
  ```

````
```
````
"""
WRONG = {
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n| 3 | 4 |\n": "line 5: a raw pipe",
    "| a | b |\n|---|\n| 1 | 2 |\n": "line 1: a raw pipe",
    "text\n\n```python\nx = 1\n": "line 3: an unclosed fence",
    "- a\n\n  ```\n  x\n\nb\n": "line 3: an unclosed fence",
    "```\nx\n~~~\n": "line 1: an unclosed fence",
    "````\nx\n```\n": "line 1: an unclosed fence",
    "```": "line 1: an unclosed fence",
    "a [link](gone.md)": "no file for the link gone.md",
    "a ![picture](gone.png)": "no file for the link gone.png",
    '<picture><source srcset="gone.png 2x"><img src="there.png"></picture>': "no file for the link gone.png",
    'a <a href="gone.md">link</a>': "no file for the link gone.md",
    "[a](#nowhere)": "no heading for the link #nowhere",
    "[a](there.md#2nd-part)": "no heading for the link there.md#2nd-part",
    "[a](there.png#part)": "no heading for the link there.png#part",
    "[a] (there.md), [b](there .md)": "line 1: a raw link",
    "**bold **and on": "line 1: raw asterisks",
}


@pytest.fixture
def page(tmp_path):
    (tmp_path / "there.md").write_text("# There\n\n## The 2nd part!\n", encoding="utf-8")
    (tmp_path / "there.png").touch()
    return tmp_path / "page.md"


def test_a_right_page_has_no_problems(page):
    assert problems(page, RIGHT) == []


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_page_is_found(page, text):
    (problem,) = problems(page, RIGHT + "\n" + text)
    line = int(problem.split(":")[0].removeprefix("line ")) if problem.startswith("line ") else 0
    (alone,) = problems(page, text)
    assert alone.startswith(WRONG[text])
    assert line == 0 or problem.endswith(alone.partition(":")[2])


def test_anchors_are_those_of_github():
    assert slug("Two `calls=`, and _more_: A/B!") == "two-calls-and-_more_-ab"
    assert anchors("# a\n\n## a\n\n# a\n\n<a id='here'></a>\n") == {"a", "a-1", "a-2", "here"}
