"""`tlfast verify --repair` and `tlfast export`: what they print, leave and return."""

from __future__ import annotations

import io
import os
import re
import shutil

import pytest
import torch
from tiny_models import collect_words, complaint_of, save_model, save_text, unit_bytes

import tlfast
from tlfast.cli import main
from tlfast.commands import bar
from tlfast.dataset import Column, DatasetWriter, Example, Plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, text, and a dataset of them."""
    folder = tmp_path_factory.mktemp("handing")
    save_model(folder / "model")
    save_text(folder / "text")
    assert main(["collect", *collect_words(folder)]) == 0
    return folder


def test_repair_and_the_command_that_it_prints(folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    data = out / "data" / "u000002.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert main(["verify", str(out)]) == 1
    capsys.readouterr()
    assert main(["verify", "--repair", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == "dropped u000002: the next run of the same collection makes them again"
    assert lines[-1] == f"to make them again: tlfast collect {out}/config.yaml"
    assert main(lines[-1].split()[-2:]) == 0
    assert unit_bytes(out) == unit_bytes(folder / "out")
    capsys.readouterr()
    assert main(["verify", str(out), "--repair"]) == 0
    assert capsys.readouterr().out.startswith("ok: 24 rows in 3 units")


@pytest.mark.parametrize("config", ["", {"seed": 3}, "just: [words"])
def test_what_another_program_wrote_is_not_collected_again(tmp_path, capsys, config):
    out, plan = tmp_path / "d", Plan(2, 1)
    with DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan, config=config) as writer:
        for unit in plan.units:
            writer.write_unit(unit, {"h": torch.ones(1, 2)}, [Example(unit.start, [1], "a", 0, 1)])
    data = out / "data" / "u000001.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    assert main(["verify", "--repair", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "to make them again: run the program that wrote it again"
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "incomplete    1 units are missing; the program that wrote it, run again, makes them\n" in shown


def test_repair_refuses_a_damaged_description(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "dataset.json").write_text("{}")
    text = complaint_of(capsys, ["verify", "--repair", str(tmp_path / "out")])
    assert text.startswith(f"repair_dataset: {tmp_path}/out/dataset.json must say")


def test_export_lies_beside_the_dataset_or_where_it_is_told(folder, tmp_path, capsys):
    import pyarrow.parquet as parquet

    shutil.copytree(folder / "out", tmp_path / "ds")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "ds"), "--to", "parquet", "--points", "transformer.h.1"]) == 0
    assert capsys.readouterr().out == f"24 rows: {tmp_path}/ds.parquet\n"
    assert parquet.read_table(tmp_path / "ds.parquet").column_names[-1] == "grad:transformer.h.1"
    assert main(["export", str(tmp_path / "ds"), "--to=npy", "--out", str(tmp_path / "arrays")]) == 0
    assert sorted(os.listdir(tmp_path / "arrays")) == [
        "ids.npy", "points.json", "transformer.h.0.npy", "transformer.h.1.npy",
    ]  # fmt: skip


def test_export_names_the_points_that_it_can_export(tmp_path, capsys):
    plan, columns = Plan(1, 1), {name: Column(torch.float32, (2,), per="token") for name in ("t", "u")}
    columns |= {name: Column(torch.float32, (2,)) for name in ("h.0", "h 1")}
    with DatasetWriter(tmp_path / "d", header={}, columns=columns, plan=plan) as writer:
        writer.write_unit(plan.unit(0), {name: torch.ones(1, 2) for name in columns}, [Example(0, [1], "a", 0, 1)])
    words = ["export", str(tmp_path / "d"), "--to", "npy"]
    text = complaint_of(capsys, words)
    assert text == (
        "export_dataset: points must have rows of one kind, got 't', 'u' per token and 'h.0', 'h 1' per example. "
        "Name those of one kind, and then the others."
    )
    assert main([*words, "--points", "h.0", "h 1"]) == 0
    capsys.readouterr()
    assert main([*words, "--points", "t", "--out", str(tmp_path / "t")]) == 0
    assert capsys.readouterr().out == f"1 examples: {tmp_path}/t\n"


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            ["export", "DS"],
            "the argument must be a dataset folder and --to FORMAT, got .*required: --to",
        ),
        (["export", "DS", "--to", "csv"], "export_dataset: to must be one of parquet, .*, got 'csv'"),
        (["export", "DS", "--to", "npy", "--points", "h"], "tlfast export: points must match a module, got 'h'"),
        (["export", "/nowhere", "--to", "npy"], r"got /nowhere, no such folder"),
        (["verify", "DS", "--fix"], "tlfast verify: the argument must be one dataset folder, got .* --fix"),
    ],
)
def test_wrong_arguments_are_refused(folder, capsys, arguments, text):
    words = [word.replace("DS", str(folder / "out")) for word in arguments]
    complaint = complaint_of(capsys, words)
    assert pytest.raises(AssertionError, match=text).matches(AssertionError(complaint)), complaint
    assert sorted(os.listdir(folder)) == ["model", "out", "text"]


def test_the_bar_is_a_line_every_30_seconds_where_there_is_no_terminal(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bar.time, "monotonic", lambda: now[0])
    with bar.bar("export", 100, "rows") as done:
        for _ in range(4):
            now[0] += 20
            done(10)
    assert capsys.readouterr().err == "export: 20/100 rows, 160 s left\nexport: 40/100 rows, 120 s left\n"


def test_the_bar_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    with bar.bar("export", 100, "rows") as done:
        done(100)
    assert "100/100" in bar.sys.stderr.getvalue()


def test_info_says_how_complete_each_part_is_and_what_was_skipped(tmp_path, capsys):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    examples = [[1, 2, 3]] * 5 + [[1]]
    settings = {"points": "0", "rows_per_unit": 2, "progress": False}
    tlfast.collect(model, examples, tmp_path / "ds", **settings)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "ds")]) == 0
    shown = capsys.readouterr().out
    assert "first plan" not in shown
    assert re.search(r"^skipped       1 \S", shown, re.MULTILINE)
    tlfast.collect(model, examples + [[4, 5]] * 3 + [[], []], tmp_path / "ds", extend=True, **settings)
    for name in ("u000001", "u000004"):
        (tmp_path / "ds" / "commits" / f"{name}.json").unlink()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "ds")]) == 0
    shown = capsys.readouterr().out
    assert "first plan    3 of 5 rows in 2 of 3 units\n" in shown
    assert "extension 1   2 of 3 rows in 1 of 2 units\n" in shown
    assert re.search(r"^skipped       2 .*, 1 ", shown, re.MULTILINE)
    assert main(["report", str(tmp_path / "ds")]) == 0
    page = (tmp_path / "ds-report.html").read_text()
    assert "The first plan: 3 of 5 examples, 2 of 3 units" in page
    assert "Extension 1: 2 of 3 examples, 1 of 2 units" in page
    assert "Not there: u000001, u000004" in page


def test_info_shows_what_a_dataset_says_and_does_not_send_it_to_the_terminal(tmp_path, capsys):
    header = {"model": {"name": "\x1b]0;title\x07", "\x1b[31m": "\u202e"}}
    columns = {"\x1b[2J": (torch.float32, (2,))}
    DatasetWriter(tmp_path / "ds", header=header, columns=columns, plan=Plan(1, 1))
    capsys.readouterr()
    assert main(["info", str(tmp_path / "ds")]) == 0
    shown = capsys.readouterr().out
    assert "name ?]0;title?, ?[31m ?" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
