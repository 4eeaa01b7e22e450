"""Examples that are appended to a dataset: on request, behind the same ones, in units of their own."""

from __future__ import annotations

import re

import pytest
from tiny_models import collect, collect_words, complaint_of, save_model, save_text, sequences, tiny_model, unit_bytes

import tlfast
from tlfast.cli import main
from tlfast.dataset import DatasetError, DatasetWriter

EXAMPLES = sequences(20)
SETTINGS = {"rows_per_unit": 6}


def test_new_examples_are_appended_on_request(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES[:10], **SETTINGS)
    old, description = unit_bytes(tmp_path), (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(
        DatasetError,
        match=r"examples must be those of the dataset, got the same first 10, 10 more and 0 more bad ones. extend=True",
    ):
        collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS)
    assert not (tmp_path / "plan").exists()
    report = collect(tiny_model(), tmp_path, EXAMPLES, extend=True, **SETTINGS)
    assert (report.n_rows, report.n_rows_before, report.n_units) == (10, 10, 2)
    assert old.items() < unit_bytes(tmp_path).items()
    assert (tmp_path / "dataset.json").read_bytes() == description
    ds = tlfast.open_dataset(tmp_path)
    assert [example["input_ids"] for example in ds.examples] == EXAMPLES
    assert [(unit.start, unit.stop) for unit in ds.units] == [(0, 6), (6, 10), (10, 16), (16, 20)]
    assert ds.verify().ok
    # It is a dataset like any other now: the same call goes on, with extend and without.
    (tmp_path / "commits" / "u000003.json").unlink()
    assert collect(tiny_model(), tmp_path, EXAMPLES, **SETTINGS).n_rows == 4
    assert collect(tiny_model(), tmp_path, EXAMPLES, extend=True, **SETTINGS).n_rows == 0


def test_extend_begins_a_dataset_and_extends_it_twice(tmp_path):
    for n in (5, 12, 20):
        assert collect(tiny_model(), tmp_path, EXAMPLES[:n], extend=True, **SETTINGS).n_rows_before in (0, 5, 12)
    ds = tlfast.open_dataset(tmp_path)
    assert [example["input_ids"] for example in ds.examples] == EXAMPLES
    assert ds.plan.extended_at == (5, 12)


def test_the_old_examples_alone_do_not_continue_it(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES[:10], **SETTINGS)
    collect(tiny_model(), tmp_path, EXAMPLES, extend=True, **SETTINGS)
    text = r"examples must be all 20 of the dataset, which was extended, got the first 10 of them\."
    for extend in (False, True):
        with pytest.raises(DatasetError, match=text):
            collect(tiny_model(), tmp_path, EXAMPLES[:10], extend=extend, **SETTINGS)
    with pytest.raises(DatasetError, match="of which extension 1 has 10, got others from example 10 on"):
        collect(tiny_model(), tmp_path, [*EXAMPLES[:19], [1, 2, 3]], extend=True, **SETTINGS)
    with pytest.raises(DatasetError, match=r"header\.examples\.sha256"):
        collect(tiny_model(), tmp_path, [[1, 2, 3], *EXAMPLES[1:]], extend=True, **SETTINGS)
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_killed_between_the_extension_and_its_units(tmp_path, monkeypatch):
    collect(tiny_model(), tmp_path / "undisturbed", EXAMPLES[:10], **SETTINGS)
    collect(tiny_model(), tmp_path / "undisturbed", EXAMPLES, extend=True, **SETTINGS)
    collect(tiny_model(), tmp_path / "killed", EXAMPLES[:10], **SETTINGS)
    extend = DatasetWriter.extend

    def killed(self, *arguments):
        extend(self, *arguments)
        raise SystemExit

    monkeypatch.setattr(DatasetWriter, "extend", killed)
    with pytest.raises(SystemExit):
        collect(tiny_model(), tmp_path / "killed", EXAMPLES, extend=True, **SETTINGS)
    monkeypatch.undo()
    with pytest.raises(DatasetError, match="must hold all 4 units of its plan"):
        tlfast.open_dataset(tmp_path / "killed")
    assert collect(tiny_model(), tmp_path / "killed", EXAMPLES, **SETTINGS).n_rows == 10
    assert unit_bytes(tmp_path / "killed") == unit_bytes(tmp_path / "undisturbed")


def test_bad_examples_of_both_parts_are_remembered(tmp_path):
    first, more = [[7], *EXAMPLES[:3]], [*EXAMPLES[3:6], [8], []]
    collect(tiny_model(), tmp_path, first)
    with pytest.raises(DatasetError, match="got the same first 3, 3 more and 2 more bad ones"):
        collect(tiny_model(), tmp_path, first + more)
    with pytest.raises(DatasetError, match="got the same first 3, 0 more and 1 more bad ones"):
        collect(tiny_model(), tmp_path, [*first, [8]])
    assert collect(tiny_model(), tmp_path, first + more, extend=True).n_skipped == 3
    assert tlfast.open_dataset(tmp_path).skipped == [
        ("#0", 0, "1 token, less than 2"), ("#7", 0, "1 token, less than 2"), ("#8", 0, "0 tokens, less than 2")
    ]  # fmt: skip
    assert collect(tiny_model(), tmp_path, first + more).n_rows == 0


def test_resume_says_what_may_be_there(tmp_path):
    with pytest.raises(DatasetError, match='out must be a dataset with resume="must", got none'):
        collect(tiny_model(), tmp_path / "out", EXAMPLES, resume="must")
    assert collect(tiny_model(), tmp_path / "out", EXAMPLES, resume="never").n_rows == 20
    text = 'out must be a new folder with resume="never", got a dataset at .*resume="auto" continues it'
    with pytest.raises(DatasetError, match=text):
        collect(tiny_model(), tmp_path / "out", EXAMPLES, resume="never")
    assert collect(tiny_model(), tmp_path / "out", EXAMPLES, resume="must").n_rows == 0
    assert collect(tiny_model(), tmp_path / "out", EXAMPLES, resume="never", overwrite=True).n_rows == 20


def test_on_the_command_line(tmp_path, capsys):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text")
    words = collect_words(tmp_path)
    more = collect_words(tmp_path, max_examples="30")
    assert main(["collect", *words]) == 0
    assert "got the same first 24, 6 more and 0 more bad ones. extend=True (--extend)" in complaint_of(
        capsys, ["collect", *more]
    )
    assert main(["collect", *more, "--extend"]) == 0
    assert "6 rows beside 24 that were there" in capsys.readouterr().out
    assert "all 30 of the dataset, which was extended, got the first 24" in complaint_of(capsys, ["collect", *words])
    config = tmp_path / "out" / "config.yaml"
    assert re.findall("max_examples: .*", config.read_text()) == ["max_examples: 30"]
    assert "extend" not in config.read_text()
    (tmp_path / "out" / "commits" / "u000003.json").unlink()
    assert main(["collect", str(config)]) == 0  # what is in the folder says how to go on
    assert "6 rows beside 24 that were there" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "30 of 30 rows in 4 units" in capsys.readouterr().out
    assert tlfast.open_dataset(tmp_path / "out").verify().ok
