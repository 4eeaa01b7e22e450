"""README and docs/numbers.md show what the results say; figures that don't go together are refused."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

sys.path.append(str(ROOT))

from bench import measure, numbers, quoted


def quoted_files() -> dict[str, Path]:
    """The files that docs/numbers.md names, by bench."""
    _, shown, _ = numbers.between(numbers.PAGE.read_text(encoding="utf-8"))
    links = re.findall(r"\[([\w.-]+)\]\((\.\./bench/results/[^)]+)\)", shown)
    return {name: (numbers.PAGE.parent / link).resolve() for name, link in links}


FILES = quoted_files()
RESULTS = numbers.load(FILES)


def fresh(commit="0123456789abcdef"):
    """The results as they would be from one machine and one commit."""
    results = copy.deepcopy(RESULTS)
    for result in results.values():
        result["machine"] |= {"cpu": "some", "cores": 2, "simd": "AVX2", "commit": commit}
    return results


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """A repository with both pages, empty of numbers, and the results of a machine."""
    monkeypatch.setattr(numbers, "ROOT", tmp_path)
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    found = tmp_path / "README.md", tmp_path / "numbers.md"
    for name, page in zip(("README", "PAGE"), found, strict=True):
        monkeypatch.setattr(numbers, name, page)
        page.write_text(f"before\n{numbers.BEGIN}\nold\n{numbers.END}\nafter\n", encoding="utf-8")
    return found


def table_of(text):
    """The cells of the lines of a table, but for its head."""
    return [tuple(line.split(" | ")) for line in text.splitlines() if line.startswith("| ")][2:]


def keep(results, folder, machine="some"):
    for name, result in results.items():
        (folder / f"{name}-{machine}.json").write_text(json.dumps(result), encoding="utf-8")


def test_the_pages_show_what_their_results_say():
    assert list(FILES) == list(quoted.QUOTED)
    for page, shown in numbers.tables(RESULTS, FILES).items():
        assert numbers.between(page.read_text(encoding="utf-8"))[1] == shown, f"{page.name}: python -m bench.numbers"


def test_the_figures_are_of_one_machine_and_one_commit():
    numbers.check(RESULTS)


def test_readme_shows_six_lines_of_the_page():
    few, every = (table_of(shown) for shown in numbers.tables(RESULTS, FILES).values())
    assert len(few) == 6
    assert {cells[-2:] for cells in few} < {cells[-2:] for cells in every}


def test_both_pages_are_written_between_their_marks(pages, tmp_path):
    keep(fresh(), tmp_path)
    numbers.main(["some"])
    for page, n_lines in zip(pages, (6, len(quoted.lines(RESULTS))), strict=True):
        before, shown, after = numbers.between(page.read_text(encoding="utf-8"))
        assert before.startswith("before\n")
        assert after.endswith("after\n")
        assert len(table_of(shown)) == n_lines
        assert "All of these are from one machine and one commit: some, 2 cores" in shown
        assert "commit 0123456789ab." in shown
        assert "more than one" not in shown


@pytest.mark.parametrize(
    "bench, fact, value",
    [("step", "cpu", "other"), ("dataset", "commit", "fedcba"), ("hooks", "torch", "2.11.0"),
     ("lens-2.18.0", "simd", "AVX512"), ("collect", "commit", None)],
)  # fmt: skip
def test_mixed_results_are_refused(pages, tmp_path, capsys, bench, fact, value):
    results = fresh()
    results[bench]["machine"][fact] = value
    keep(results, tmp_path)
    with pytest.raises(SystemExit) as end:
        numbers.main(["some"])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("bench.numbers: results must come from one machine and one commit, got ")
    assert f"; {bench}: " in said or f"got {bench}: " in said
    assert all("\nold\n" in page.read_text(encoding="utf-8") for page in pages)
    assert "more than one machine" in next(iter(numbers.tables(results, FILES).values()))


@pytest.mark.parametrize("commit", [None, "0123" + measure.CHANGED])
def test_results_of_no_commit_are_refused(commit):
    numbers.check(fresh())
    with pytest.raises(quoted.Unquotable, match="one machine and one commit"):
        numbers.check(fresh(commit))


def test_a_missing_result_is_named(pages, tmp_path, capsys):
    keep(fresh(), tmp_path)
    (tmp_path / "step-some.json").unlink()
    with pytest.raises(SystemExit):
        numbers.main(["some"])
    assert "got none called step-some.json" in capsys.readouterr().err


def leaves(value, path=()):
    """Every number in a result, with where it stands."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    elif isinstance(value, float):
        yield path


def test_every_figure_of_the_page_follows_the_results():
    before = [(line.beside, line.tlfast) for line in quoted.lines(RESULTS)]
    results = copy.deepcopy(RESULTS)
    for path in leaves(results):
        *above, last = path
        inner = results
        for key in above:
            inner = inner[key]
        inner[last] = inner[last] * 3 + 1
    for (beside, ours), line in zip(before, quoted.lines(results), strict=True):
        for old, new in ((beside, line.beside), (ours, line.tlfast)):
            figures = [re.findall(r"-?\d+\.?\d*", text) for text in (old, new)]
            assert len(figures[0]) == len(figures[1])
            assert all(a != b for a, b in zip(*figures, strict=True)), line


def test_a_figure_that_is_not_there_or_there_twice_is_an_error():
    table = {"title": "a", "rows": [{"variant": "x", "ms": 1.0, "none": None}]}
    assert quoted.figure({"bench": "b", "tables": [table]}, "^a", "x", "ms") == 1.0
    for tables, variant, column in [
        ([table, table], "x", "ms"),
        ([table], "y", "ms"),
        ([table], "x", "none"),
        ([], "x", "ms"),
    ]:
        with pytest.raises(quoted.Unquotable, match="results of b must have one"):
            quoted.figure({"bench": "b", "tables": tables}, "^a", variant, column)


@pytest.mark.parametrize("text", ["", numbers.BEGIN, f"{numbers.END}\n{numbers.BEGIN}\n",
                                  f"{numbers.BEGIN}\na\n{numbers.END}\n{numbers.BEGIN}\n"])  # fmt: skip
def test_a_page_without_its_marks_is_an_error(text):
    with pytest.raises(quoted.Unquotable, match="a page must have its numbers between one"):
        numbers.between(text)


def test_a_commit_with_changed_code_is_told_apart(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True,
                       capture_output=True)  # fmt: skip

    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert measure.commit() is None
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for file in (tmp_path / "a.py", tmp_path / "README.md", results / "step.json"):
        file.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    head = measure.commit()
    assert re.fullmatch("[0-9a-f]{40}", head)
    (results / "step.json").write_text("2\n", encoding="utf-8")
    (tmp_path / "README.md").write_text("2\n", encoding="utf-8")
    assert measure.commit() == head
    (tmp_path / "a.py").write_text("2\n", encoding="utf-8")
    assert measure.commit() == head + measure.CHANGED


def test_the_page_lists_what_was_missed():
    results = fresh()
    for result in results.values():
        result["claims"] = [claim | {"met": True} for claim in result["claims"]]
    assert numbers.tables(results, FILES)[numbers.PAGE].endswith("No target was missed.")
    results["step"]["claims"] = [
        {"what": "cost", "sense": "at most", "target": 2.0, "figure": 2.5123, "unit": " %", "met": False}
    ]
    assert numbers.tables(results, FILES)[numbers.PAGE].endswith("\n- `step`: cost: 2.512 %, target at most 2 %")
