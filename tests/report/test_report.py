"""The report of a dataset: right figures, one file that loads nothing, and no text of the data that acts."""

from __future__ import annotations

import os
import re

import kinds_cases
import numpy as np
import pytest
import torch
from report_cases import Page, make, page_of

from tlfast.cli import main
from tlfast.dataset import Column, DatasetError, DatasetWriter, Example, Plan, open_dataset
from tlfast.report import write_report
from tlfast.report.summary import Norms, summarize

HOSTILE = "</pre></title><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\x00"


def check_is_alone(page):
    """Fail unless the page runs nothing and loads nothing."""
    assert page.tags.isdisjoint(
        {"script", "img", "iframe", "object", "embed", "link", "base", "form", "audio", "video"}
    )
    assert not [name for name in page.attributes if name.startswith("on") or name in ("src", "srcset", "action")]
    links = page.attributes.get("href", set()) | page.attributes.get("xlink:href", set())
    assert all(link.startswith("#") for link in links)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.attributes["content"]


def test_the_check_can_fail():
    head = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    check_is_alone(Page(head))
    for bad in ("<script>", "<b onclick=x>", "<svg><use xlink:href='http://x'>", "<video src=x>"):
        with pytest.raises(AssertionError):
            check_is_alone(Page(head + bad))
    with pytest.raises(KeyError):
        check_is_alone(Page("<p>no policy</p>"))


def test_the_figures(tmp_path):
    header = {"model": {"name": "tiny", "parameters": 1234}, "examples": {"skipped": [["b.txt", 7, "empty"]]}}
    page = page_of(make(tmp_path / "ds", header=header))
    check_is_alone(page)
    text = " ".join(page.text.split())
    assert "tiny (1,234 parameters)" in text
    assert "10 rows 20 tokens 2 points" in text
    assert "0 rows not finite 1 rows saturated" in text
    assert "The plan: 10 of 10 examples, 3 of 3 units" in text
    assert "1 example was skipped: reason examples the first empty 1 b.txt from 7" in text
    norm = 3**0.5 * 10
    assert f"{norm * 5**0.5:.3g} example 9, a.txt from 90, 2 tokens; largest at h.1 9 10" in text
    assert re.search(rf"h\.1 F32 \[3\] [\d.]+ [\d.]+ [\d.]+ {2 * norm:.3g} 0 0", text)
    assert page.text.count("largest at") == 10
    assert "svg" in page.tags


def test_an_incomplete_dataset_with_odd_rows(tmp_path):
    def spoil(unit, tensors):
        if unit.start == 4:
            tensors["h.0"][1, 0], tensors["h.1"][3] = float("nan"), 0

    page = page_of(make(tmp_path / "ds", units=(1,), spoil=spoil))
    text = " ".join(page.text.split())
    assert "4 of 10 examples, 1 of 3 units Not there: u000000, u000002" in text
    assert "1 rows not finite" in text
    assert "The first 1, and the points whose norm is not finite. example source tokens points 5 a.txt 2 h.0" in text
    assert "example 5, a.txt" not in text, "a row that is not finite is not among the largest"
    assert re.search(r"h\.1 F32 \[3\] 0 [\d.]+ [\d.]+ [\d.]+ 1 0", text)


def test_nothing_of_the_data_acts(tmp_path):
    header = {"model": {"name": HOSTILE}, HOSTILE: HOSTILE, "examples": {"skipped": [[HOSTILE, 0, HOSTILE]]}}

    class Tokenizer:
        def decode(self, tokens):
            return HOSTILE

    folder = make(
        tmp_path / "<b>&", points=(HOSTILE, "_$x$_", "\u70b9"), header=header, source=HOSTILE.replace("\0", "")
    )
    page = page_of(folder, tokenizer=Tokenizer())
    check_is_alone(page)
    assert "</pre></title><script>alert(1)</script>" in page.text
    assert "\x00" not in page.text
    assert "\u202e" not in page.text


def test_columns_of_other_kinds(tmp_path):
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "ds"))
    text = " ".join(page_of(tmp_path / "ds").text.split())
    assert "h BF16 [3]" in text
    assert "F32 [2, 3], act, per token, as int8" in text
    assert "F32 [70], as int8:64" in text
    assert "7 rows 15 tokens 5 points" in text


def test_rows_are_ranked_by_gradients_where_other_things_lie_beside_them(tmp_path):
    columns = {"h:act": Column(torch.float32, (2,), of="act"), "h": (torch.float32, (2,))}
    writer = DatasetWriter(tmp_path / "ds", header={}, columns=columns, plan=Plan(3, 3))
    rows = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0]])
    acts = torch.tensor([[900.0, 0.0], [100.0, 0.0], [torch.nan, 0.0]])
    writer.write_unit(writer.plan.unit(0), {"h": rows, "h:act": acts}, [Example(i, [i], "a", i, 1) for i in range(3)])
    summary = summarize(open_dataset(tmp_path / "ds"))
    assert [(row.example["id"], row.norm, row.point) for row in summary.largest] == [(1, 3.0, "h"), (0, 1.0, "h")]
    assert [row["points"] for row in summary.bad] == [["h:act"]]
    text = " ".join(page_of(tmp_path / "ds").text.split())
    assert "By their norm over the 1 of 2 points that are gradients together." in text


def test_positions_of_tokens(tmp_path):
    from tlfast.report.positions import norms_by_position, points_with_positions

    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "ds"))
    ds, truth = open_dataset(tmp_path / "ds"), kinds_cases.truth()
    assert points_with_positions(ds) == ["t", "tq"]
    rows = np.array([0, 1, 4, 6])
    found = norms_by_position(ds, ["t"], rows, np.array([2, 0, 4, 5]))["t"]
    norms = [truth["t"][row].double().norm(dim=1) for row in rows]
    right = [torch.stack([of[k] for of in norms if len(of) > k]).mean() for k in range(5)]
    assert np.allclose(found, right)
    text = " ".join(page_of(tmp_path / "ds").text.split())
    assert "Positions count the real tokens of each, from 0." in text
    assert "gradient; a row for each real token" in text
    assert "stored as int8 with a scale for each 64 values, off by at most 1/254 of the largest magnitude" in text


def test_tokens_of_which_there_are_none_or_none_finite(tmp_path):
    columns = {"t": Column(torch.float32, (), per="token")}
    for name, rows, lengths in (("none", torch.empty(0), [0, 0]), ("odd", torch.full((3,), torch.nan), [0, 3])):
        writer = DatasetWriter(tmp_path / name, header={}, columns=columns, plan=Plan(2, 2))
        examples = [Example(i, [0] * n, "a", i, n) for i, n in enumerate(lengths)]
        writer.write_unit(writer.plan.unit(0), {"t": rows}, examples)
        assert "2 rows" in " ".join(page_of(tmp_path / name).text.split())


@pytest.mark.parametrize("n", [1, 8, 9, 28, 29, 300])
def test_any_number_of_points(tmp_path, n):
    page = page_of(make(tmp_path / "ds", points=[f"layer.{k}" for k in range(n)]))
    assert page.text.count("F32 [3]") == min(n, 200)
    assert ("The 200 of 300 points that are evenly chosen" in page.text) == (n == 300)


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions(tmp_path, side):
    header = {
        "batching": {"width": 4, "padding_side": side},
        "specs": [
            {"points": "kept.*", "reduce": "none", "over": []},
            {"points": ["mean"], "reduce": "mean", "over": [1]},
            {"points": ["last"], "reduce": "none", "over": [], "at": -1},
        ],
    }
    folder = make(tmp_path / "ds", points=("kept.0", "mean", "last"), header=header, row_shape=(4, 2))
    from tlfast.report.positions import norms_by_position, points_with_positions

    ds = open_dataset(folder)
    assert points_with_positions(ds) == ["kept.0"]
    rows = np.array([0, 3, 9])
    found = norms_by_position(ds, ["kept.0"], rows, np.array([2, 2, 3]))["kept.0"]
    size = 2**0.5 * np.array([1, 4, 10])
    expected = np.array([size.mean(), size.mean(), size[2], np.nan])  # as of tokens, on whichever side is padding
    assert np.allclose(found, expected, equal_nan=True)
    assert "Mean over 10 rows, evenly chosen. Positions count the real tokens" in page_of(folder).text


def test_percentiles_are_right_to_six_percent():
    norms, values = Norms(), np.exp(np.random.default_rng(0).normal(size=20_000) * 3).astype(np.float32)
    for part in np.array_split(values, 7):
        norms.add(part)
    for percent in (5, 50, 95):
        assert norms.percentile(percent) == pytest.approx(np.percentile(values, percent), rel=0.06)
    assert norms.percentile(100) == pytest.approx(values.max(), rel=0.06)
    tiny = Norms()
    tiny.add(np.array([0.0, 1e-45, 3e38, np.inf, np.nan], np.float32))
    assert (tiny.n_zero, tiny.n_non_finite, int(tiny.counts.sum())) == (1, 2, 2)
    assert np.isnan(Norms().percentile(50))


def test_the_largest_rows_across_units(tmp_path):
    summary = summarize(open_dataset(make(tmp_path / "ds")))
    assert [row.example["id"] for row in summary.largest] == list(range(9, -1, -1))
    assert summary.sample.tolist() == list(range(10))
    assert summary.sample_lengths.tolist() == [2] * 10


def test_the_command(tmp_path, capsys):
    folder = make(tmp_path / "ds")
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"10 rows: {folder}-report.html\n"
    assert sorted(os.listdir(tmp_path)) == ["ds", "ds-report.html"]
    assert main(["report", str(folder), "--out", str(tmp_path / "ds-report.html")]) == 0


def test_what_is_refused(tmp_path):
    folder = make(tmp_path / "ds", units=())
    with pytest.raises(DatasetError, match="write_report: path must hold at least one unit"):
        write_report(folder)
    with pytest.raises(DatasetError, match=r"write_report: out must be a file, got .*, a folder"):
        write_report(make(tmp_path / "more"), tmp_path)


@pytest.mark.parametrize("library", ["matplotlib.figure", "jinja2"])
def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(ImportError, match=r"pip install 'tlfast\[plot\]'"):
        write_report(make(tmp_path / "ds"))


def test_a_report_within_a_notebook(tmp_path):
    ds = open_dataset(make(tmp_path / "ds"))
    page = ds.report()
    assert page.html == write_report(tmp_path / "ds").read_text(encoding="utf-8")
    assert page.title == f"Report of {tmp_path / 'ds'}"
    assert page._repr_html_().startswith('<iframe sandbox=""')
    empty = open_dataset(make(tmp_path / "empty", units=()), partial=True)
    with pytest.raises(DatasetError, match=r"write_report: path must hold at least one unit, got .*empty without any"):
        empty.report()
