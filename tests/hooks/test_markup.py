"""What a notebook shows: every text escaped, nothing loaded, and a bar where there is a notebook."""

import io
import re
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dataset_cases import make_dataset

import tlfast
from tlfast.collecting.progress import NonFinite, Progress, Report
from tlfast.dataset import verify_dataset
from tlfast.markup import Page, in_notebook, shortened, table

MARKUP = "<script>alert(1)</script>"


def test_a_table_escapes_what_it_is_given():
    html = table([MARKUP], [[MARKUP, "a & b"]], MARKUP)
    assert "<script" not in html
    assert html.count("&lt;script&gt;") == 3
    assert "<td>a &amp; b</td>" in html
    assert table([], [["x"]]) == "<table><tbody><tr><td>x</td></tr></tbody></table>"
    assert shortened("a\nb" + "c" * 9, 5) == "a bc\u2026"


def test_a_page_stands_in_a_frame_that_runs_nothing():
    page = Page('<p title="x">' + MARKUP, 'a "title"')
    html = page._repr_html_()
    assert re.findall(r"<\w+", html) == ["<iframe"]
    assert 'sandbox=""' in html
    (inside,) = re.findall(r'srcdoc="([^"]*)"', html)
    assert unescape(inside) == page.html
    assert repr(page).startswith('a "title": ')


def test_a_row_and_a_verification(tmp_path):
    ds = make_dataset(tmp_path)
    html = ds.examples[3]._repr_html_()
    assert "<td>source</td><td>file_0.py</td>" in html
    assert "<td>|loss|</td>" in html
    assert ds.examples[3] == dict(ds.examples[3])
    assert "<td>length</td><td>5</td>" in ds.sample(11)[3]._repr_html_()
    assert "ok: 11 rows in 3 units" in ds.verify()._repr_html_()
    (tmp_path / "data" / "u000001.safetensors").unlink()
    html = verify_dataset(tmp_path)._repr_html_()
    assert "<td>u000001</td>" in html
    assert "1 problems" in html


def test_a_report_of_a_collection():
    odd = (NonFinite("u000000", 3, MARKUP),)
    html = Report(Path("out"), 7, 0, 1, 70, 1000, 1, 0, 2.0, 0.0, 0, 0, odd)._repr_html_()
    assert "<td>n_rows</td><td>7</td>" in html
    assert "<td>time_s</td><td>2.0</td>" in html
    assert "example 3 of u000000 at &lt;script&gt;" in html
    assert "<script" not in html


def test_a_capture():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    with tlfast.capture(model, "0", rows=4) as cap:
        assert "<td>no gradient yet</td>" in cap._repr_html_()
        model(torch.ones(2, 4)).sum().backward()
        html = cap._repr_html_()
    assert "<td>float32</td><td>[3]</td>" in html
    assert "<p>2 of 4 rows, " in html


@pytest.mark.parametrize("shell, shown", [(None, False), (SimpleNamespace(), False), (SimpleNamespace(kernel=1), True)])
def test_a_bar_in_a_notebook(shell, shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert in_notebook() is shown
    file = io.StringIO()
    with Progress(10, file=file) as progress:
        progress.step(10, 100)
    assert ("10/10" in file.getvalue()) is shown
    monkeypatch.delitem(sys.modules, "IPython")
    assert not in_notebook()
