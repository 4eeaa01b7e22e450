"""The demo, as small as it gets: it trains, collects, verifies and draws."""

from __future__ import annotations

import math
import os
import re
import sys

import matplotlib.image
import pytest
from checkout import ROOT
from tiny_models import collect, sequences, tiny_model
from transformers import AutoTokenizer

import tlfast

sys.path.insert(0, str(ROOT / "demo"))
import run
import train


def test_every_byte_is_a_token(tmp_path):
    train.byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n\treturn x ** 2  # \u00fcber\n"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 256
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_nothing_that_is_collected_was_trained_on():
    files = [path.relative_to(train.STDLIB).parts for path in train.training_files()]
    assert len(files) > 100
    assert not {part for parts in files for part in parts} & {*train.HELD_OUT, "site-packages", "test"}
    assert all((train.STDLIB / name).is_dir() for name in train.HELD_OUT)


@pytest.mark.long
def test_the_demo_runs_over_what_an_earlier_one_left(tmp_path, capfd, monkeypatch):
    collect(tiny_model(), tmp_path / "gradients", sequences(4))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"old")
    monkeypatch.setattr(run, "QUICK", (0.1, 40, 16))
    monkeypatch.setattr(train, "BATCH", 4)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run.main(["--quick", "--into", str(tmp_path)])
    shown = capfd.readouterr().out
    assert "40 rows in 3 units" in shown
    assert "ok: 40 rows" in shown
    first, last = map(float, re.search(r"loss +(\S+) -> (\S+) nats per byte", shown).groups())
    assert first == pytest.approx(math.log(256), abs=0.3)  # it knows nothing yet
    assert last < first - 0.3
    dataset = tlfast.open_dataset(tmp_path / "gradients")
    assert dataset.points == [f"transformer.h.{layer}" for layer in range(6)]
    assert {example["source"].split("/")[0] for example in dataset.examples} <= set(train.HELD_OUT)
    picture = matplotlib.image.imread(tmp_path / "gradient_norms.png")
    assert picture.shape[0] > 400
    assert picture.std() > 0.05, "an empty picture"
