"""Texts and times in a report: decoded where a tokenizer is at hand, and the rate that the commits tell."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from report_cases import PLAN, make, page_of
from tiny_models import byte_tokenizer

from tlfast.dataset import DatasetWriter, open_dataset
from tlfast.dataset.read.decoding import tokenizer_fingerprint
from tlfast.report.texts import decoder
from tlfast.report.timeline import commit_times, extension_times, timeline


def test_the_tokenizer_of_the_model_in_the_config(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    fingerprint = tokenizer_fingerprint(byte_tokenizer())
    folder = make(tmp_path / "ds", header={"tokenizer": {"fingerprint": fingerprint}})
    (folder / "config.yaml").write_text(f"model: {tmp_path / 'model'}\n")
    decode, note = decoder(open_dataset(folder))
    assert (decode(byte_tokenizer()("a\tb").input_ids), note) == ("a\tb", "")


def test_tokens_where_there_is_no_tokenizer(tmp_path):
    decode, note = decoder(open_dataset(make(tmp_path / "ds")))
    assert note.startswith("No tokenizer at hand")
    assert decode([5, 6]) == "5 6"


def test_another_tokenizer_is_not_believed(tmp_path):
    folder = make(tmp_path / "ds", header={"tokenizer": {"fingerprint": "0" * 64}})
    decode, note = decoder(open_dataset(folder), byte_tokenizer())
    assert (decode([5]), note) == ("5", "The tokenizer at hand is another than the dataset's: these are token numbers.")


def test_a_tokenizer_that_was_named_must_be_there(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must be loadable as AutoTokenizer"):
        decoder(open_dataset(make(tmp_path / "ds")), str(tmp_path / "empty"))


def test_long_texts_are_cut(tmp_path):
    decode, _ = decoder(open_dataset(make(tmp_path / "ds")))
    assert len(decode([123456] * 5000)) == 601


def test_rates():
    line = timeline([(100.0 + k, 10) for k in range(9)])
    assert (line.work_s, line.n_rows, line.pauses) == (8.0, 80, [])
    assert np.allclose(line.rows_per_s, 10)
    assert timeline([(100.0, 10)]) is None
    assert timeline([(100.0, 10)] * 50) is None, "a copy"


def test_the_beginning_counts_where_it_is_known():
    commits = [(1000.0 + 10 * k, 10) for k in range(1, 5)]
    line = timeline(commits, "1970-01-01T00:16:40+00:00")
    assert (line.work_s, line.n_rows) == (40.0, 40)
    for wrong in ("yesterday", None, 7, "2099-01-01T00:00:00+00:00"):
        assert timeline(commits, wrong).work_s == 30.0


def test_a_night_between_two_runs_is_a_pause():
    commits = [(10.0 * k, 10) for k in range(10)] + [(40_000.0 + 10 * k, 10) for k in range(10)]
    line = timeline(commits)
    assert line.work_s == 190.0
    assert line.pauses == [(90.0, 39910.0)]
    assert np.allclose(line.rows_per_s, 1.0)


def test_time_between_two_short_runs_is_left_out():
    line = timeline([(0.0, 4), (1.0, 4), (90_000.0, 4)])
    assert (line.work_s, line.n_rows, line.pauses) == (2.0, 8, [(1.0, 89_999.0)])
    line = timeline([(0.0, 4), (90_000.0, 4), (90_001.0, 4), (90_002.0, 4)])
    assert (line.work_s, line.pauses) == (3.0, [(0.0, 90_000.0)])
    line = timeline([(1.0 * k, 10) for k in range(4)] + [(23.0 + k, 10) for k in range(4)])
    assert (line.work_s, line.pauses) == (7.0, [(3.0, 20.0)])


def test_large_and_slow_units_are_no_pauses():
    line = timeline([(0.0, 1), (1.0, 1), (2.0, 1), (102.0, 100), (122.0, 4)])
    assert (line.work_s, line.pauses) == (122.0, [])


def test_the_time_before_an_extension_is_left_out_however_short():
    commits = [(10.0, 10), (20.0, 10), (27.0, 10), (37.0, 10)]
    line = timeline(commits, begun=[17.0, 25.0, 99.0])
    assert (line.work_s, line.pauses) == (15.0, [(0.0, 7.0), (3.0, 5.0)])


def test_an_extension_tells_when_its_run_began(tmp_path):
    folder = make(tmp_path / "ds", header={"examples": {"tokens": 20}})
    assert extension_times(open_dataset(folder)) == []
    columns = dict.fromkeys(("h.0", "h.1"), (torch.float32, (3,)))
    writer = DatasetWriter(folder, header={"examples": {"tokens": 20}}, columns=columns, plan=PLAN)
    writer.extend(2, {"tokens": 7})
    os.utime(folder / "plan" / "x000001.json", (0, 1234))
    dataset = open_dataset(folder, partial=True)
    assert extension_times(dataset) == [1234.0]
    assert dataset.info()["examples"]["tokens"] == 27
    assert "tokens 27" in page_of(folder).text


def test_times_of_commits(tmp_path):
    folder = make(tmp_path / "ds")
    for k in range(3):
        os.utime(folder / "commits" / f"u{k:06d}.json", (0, 1000 - k))
    assert commit_times(open_dataset(folder)) == [(998.0, 2), (999.0, 4), (1000.0, 4)]
