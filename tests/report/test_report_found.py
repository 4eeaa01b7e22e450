"""The nearest examples on a report: of a result, of its file, with the text of queries; never those of other data."""

from __future__ import annotations

import pytest
import torch
from report_cases import Page, make, page_of

import tlfast
from tlfast.cli import main
from tlfast.dataset import DatasetError, open_dataset
from tlfast.report.nearest import nearest_examples

HOSTILE = "</pre><script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("found") / "ds", source=HOSTILE)


def shown(page):
    """What the page says of what was found."""
    text = " ".join(page.text.split())
    assert "script" not in page.tags
    return text.partition("The nearest examples ")[2].partition(" The largest rows")[0]


def test_a_result_and_its_file_and_the_command(folder, tmp_path, capsys):
    ds = open_dataset(folder)
    found = tlfast.score(ds, ds.select([2, 0]), k=2)  # rows are 1, 2, ... 10: the last has the largest product
    text = shown(page_of(folder, found=found))
    assert text.startswith("By dot over h.0, h.1, at most 10 a query. No tokenizer at hand")
    score = 3 * 10 * 3 * 5  # over three values, at both points
    assert f"Query 0 : 2 3 score example text source {score} 9 9 10 {HOSTILE} from 90, 2 tokens" in text.replace(
        "0:", "0 :"
    )
    assert "Query 1: 0 1" in text
    found.to_parquet(tmp_path / "found.parquet")
    words = ["report", str(folder), "--out", str(tmp_path / "p.html"), "--found", str(tmp_path / "found.parquet")]
    assert main(words) == 0
    assert shown(Page((tmp_path / "p.html").read_text(encoding="utf-8"))) == text


def test_a_search_and_nothing_found(folder):
    ds = open_dataset(folder)
    text = shown(Page(ds.report(found=ds.search(torch.ones(1, 3), k=1, point="h.1")).html))
    assert "By dot over h.1" in text
    assert "Query 0 score example text source 60 9 9 10" in text

    def said(found):
        return nearest_examples(ds, found, str, str)["queries"]

    every = said(tlfast.score(ds, ds.select([2, 0]), k=None))
    assert [len(query["rows"]) for query in every] == [10, 10]
    assert [row["id"] for row in every[0]["rows"][:2]] == [9, 8]
    view = tlfast.score(ds, {"h.0": torch.ones(1, 3)}, "cosine", where="id < 3", k=1)
    assert [row["text"] for row in said(view)[0]["rows"]] == ["[0, 1]"]
    none = tlfast.score(ds, {"h.0": torch.ones(1, 3)}, where="id > 99")
    assert [query["rows"] for query in said(none)] == [[]]


def test_what_was_found_elsewhere_is_refused(folder, tmp_path):
    other = open_dataset(make(tmp_path / "other", source="b.txt"))
    found = tlfast.score(other, {"h.0": torch.ones(1, 3)}, k=1)
    with pytest.raises(DatasetError, match=r"write_report: found must be of this dataset, got example 9 of b.txt, whi"):
        page_of(folder, found=found)
    with pytest.raises(DatasetError, match=r"write_report: found must be the result of a search, got list."):
        page_of(folder, found=[3])
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(
        DatasetError, match=r"write_report: found must be the Parquet file of a search, got .*x.parquet"
    ):
        page_of(folder, found=tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError):
        page_of(folder, found=tmp_path / "absent.parquet")
