"""Examples that can't be used are skipped and remembered with the reason, or end the run before it begins."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_models import collect, collect_words, save_model, sequences, tiny_model
from torch import nn

import tlfast
from tlfast.cli import main
from tlfast.collecting.skipped import BadExamples
from tlfast.collecting.text import cut_texts, find_text_files
from tlfast.dataset import DatasetError

GOOD = sequences(5)
BAD = [[], [3], list(range(70)), {"input_ids": [4], "source": "a.txt", "start": 9}]
MIXED = [GOOD[0], BAD[0], GOOD[1], BAD[1], BAD[2], *GOOD[2:], BAD[3]]
REMEMBERED = [
    ("#1", 0, "0 tokens, less than 2"), ("#3", 0, "1 token, less than 2"), ("#4", 0, "70 tokens, more than 64"),
    ("a.txt", 9, "1 token, less than 2"),
]  # fmt: skip


def test_they_are_skipped_and_remembered(tmp_path, capsys):
    report = collect(tiny_model(), tmp_path, MIXED, progress=True)
    assert (report.n_rows, report.n_skipped) == (5, 4)
    assert str(report).endswith(", 4 bad examples skipped")
    ds = tlfast.open_dataset(tmp_path)
    assert [example["input_ids"] for example in ds.examples] == GOOD
    assert [example["id"] for example in ds.examples] == list(range(5))
    assert ds.skipped == REMEMBERED
    assert ds.header["examples"]["skipped"] == [list(entry) for entry in REMEMBERED]
    assert capsys.readouterr().err == (
        "collect: 4 bad examples skipped (#1 at 0: 0 tokens, less than 2; #3 at 0: 1 token, less than 2;"
        " #4 at 0: 70 tokens, more than 64; and 1 more)\n"
    )


def test_they_are_part_of_what_the_data_are(tmp_path):
    collect(tiny_model(), tmp_path, MIXED)
    assert collect(tiny_model(), tmp_path, MIXED).n_rows == 0
    with pytest.raises(DatasetError, match=r"header\.examples\.skipped\[3\]\[0\]: 'a\.txt' there, nothing here"):
        collect(tiny_model(), tmp_path, MIXED[:-1])
    collect(tiny_model(), tmp_path / "before", GOOD, skipped=REMEMBERED)
    assert tlfast.open_dataset(tmp_path / "before").skipped == REMEMBERED


@pytest.mark.parametrize(
    "bad, text",
    [
        (BAD[0], "examples must have 2 tokens or more, got 0 in example 5"),
        (BAD[2], "examples must have 64 tokens at most, got 70 in example 5. Cut the examples, or give a larger seq"),
    ],
)
def test_or_stop_the_run(tmp_path, bad, text):
    with pytest.raises(ValueError, match=text):
        collect(tiny_model(), tmp_path / "out", [*GOOD, bad], bad_examples="stop")
    assert not (tmp_path / "out").exists()


def test_how_long_an_example_may_be(tmp_path):
    """At most seq_len; without it, as long as a model that knows its positions takes it."""
    lengths = [[1] * n for n in (10, 20, 40)]
    collect(tiny_model(), tmp_path / "some", lengths, seq_len=20)
    assert [reason for _, _, reason in tlfast.open_dataset(tmp_path / "some").skipped] == ["40 tokens, more than 20"]
    plain = nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256))
    collect(plain, tmp_path / "any", [[1] * 500], points="0")
    assert tlfast.open_dataset(tmp_path / "any").skipped == []


def test_nothing_but_bad_examples_is_an_error(tmp_path):
    text = r"batches must hold examples, got 1 bad example skipped \(#0 at 0: 1 token, less than 2\)\. Look at these"
    with pytest.raises(ValueError, match=text):
        collect(tiny_model(), tmp_path / "out", [[1]])


@pytest.mark.parametrize("item", [[1, -2], torch.tensor([0.5, 1.0]), [1, 2**31]])
def test_tokens_that_are_none_are_an_error_still(tmp_path, item):
    with pytest.raises(ValueError, match="tokens must be ints from 0 on"):
        collect(tiny_model(), tmp_path / "out", [[1, 2], item])


def test_too_many_are_a_mistake():
    bad = BadExamples("skip", [("a", 0, "x")], most=2)
    bad.leave_out("b", 1, "y", "an error")
    text = r"examples must have 2 bad ones at most, got one more: 'c' at 2, z\. bad_examples=\"stop\""
    with pytest.raises(ValueError, match=text):
        bad.leave_out("c", 2, "z")
    assert bad.skipped == [["a", 0, "x"], ["b", 1, "y"]]


def files(folder):
    """A good file, and one of each bad kind."""
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    (folder / "b.bin").write_bytes(b"\xff\xfe\x00")
    (folder / "c.txt").write_text("")
    (folder / "d.txt").write_text("d")
    return folder


def encode(text):
    return list(text.encode())


def test_files_that_are_no_text(tmp_path):
    bad = BadExamples("skip")
    folder = files(tmp_path / "f")
    assert len(cut_texts(find_text_files([folder]), encode, 16, bad=bad)) == 1
    expected = [
        ["f/b.bin", 0, "no UTF-8 text"], ["f/c.txt", 0, "0 tokens, less than 2"], ["f/d.txt", 0, "1 token, less than 2"]
    ]  # fmt: skip
    assert bad.skipped == expected
    named = BadExamples("skip")
    cut_texts(find_text_files([folder / "a.txt", folder / "b.bin"]), encode, 16, bad=named)
    assert named.skipped == [["b.bin", 0, "no UTF-8 text"]]
    with pytest.raises(ValueError, match=r"text must be UTF-8 text, got '.*b\.bin'"):
        cut_texts(find_text_files([folder / "a.txt", folder / "b.bin"]), encode, 16, bad=BadExamples("stop"))


def test_a_file_whose_name_is_no_text(tmp_path):
    folder = files(tmp_path / "f")
    try:
        (folder / os.fsdecode(b"\xff.txt")).write_text("more text")
    except OSError:
        pytest.skip("this filesystem takes no such name")
    bad = BadExamples("skip")
    assert len(cut_texts(find_text_files([folder]), encode, 16, bad=bad)) == 1
    assert ["f/\\udcff.txt", 0, "no UTF-8 text"] in bad.skipped


def test_on_the_command_line(tmp_path, capsys):
    save_model(tmp_path / "model")
    files(tmp_path / "text")
    assert main(["collect", *collect_words(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].partition(": ")[0].endswith("0 non-finite rows, 3 bad examples skipped")
    assert shown.err.splitlines()[1].startswith("collect: 3 bad examples skipped (text/b.bin at 0: no UTF-8 text; ")
    assert len(tlfast.open_dataset(tmp_path / "out").skipped) == 3
    assert main(["info", str(tmp_path / "out")]) == 0
    assert ", skipped 3\n" in capsys.readouterr().out


def test_tokens_that_the_model_does_not_know_are_told(tmp_path):
    text = (
        r"collect: input_ids must be tokens that GPT2LMHeadModel has, 0 to {}, got {}\. Take the model's own tokenizer,"
        r" or give the model more \(resize_token_embeddings\)\."
    )
    model = tiny_model()
    n = model.config.vocab_size
    with pytest.raises(ValueError, match=text.format(n - 1, n)) as told:
        collect(model, tmp_path, [*GOOD, [3, n, 4]])
    assert isinstance(told.value.__cause__, IndexError)
    with pytest.raises(ValueError, match="factors: input_ids must be tokens that"):
        tlfast.factors(model, [[3, n, 4]], "transformer.h.0.mlp.c_fc", kinds="kfac")

    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = tiny_model()

        def forward(self, ids, **more):
            raise IndexError("of its own")

    with pytest.raises(ValueError, match=r"got IndexError in forward, .*: of its own"):
        collect(Other(), tmp_path / "other", GOOD, points="lm.transformer.h.0")
