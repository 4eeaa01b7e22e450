"""What a notebook shows: the dataset as a table, and a sample with text beside norms."""

import pytest
import torch
from dataset_cases import COLUMNS, HEADER, Plan, make_dataset, make_writer
from tiny_models import byte_tokenizer

from tlfast.dataset import DatasetError, DatasetWriter, Example, open_dataset
from tlfast.dataset.places.store import LocalStore
from tlfast.dataset.read import decoding
from tlfast.dataset.read.decoding import recorded_tokenizer, tokenizer_fingerprint


class Letters:
    """A tokenizer by which token k is the k-th letter of the alphabet."""

    def decode(self, tokens):
        return "".join(chr(97 + token) for token in tokens)

    def get_vocab(self):
        return {chr(97 + k): k for k in range(26)}


@pytest.fixture
def hostile(tmp_path):
    """A dataset whose texts and names look like markup."""
    plan, columns = Plan(3, 3), {f"<b>{k}</b>": (torch.float32, (2,)) for k in range(8)}
    writer = DatasetWriter(tmp_path, header=HEADER, columns=columns, plan=plan)
    examples = [Example(i, [0, 1, 2 + i], "<script>a.py\n" + "x" * 40, 0, 3) for i in range(3)]
    writer.write_unit(plan.unit(0), {name: torch.full((3, 2), 3.0) for name in columns}, examples)
    return open_dataset(tmp_path)


def test_a_sample_has_text_beside_norms(hostile):
    sample = hostile.sample(2, seed=1, tokenizer=Letters())
    assert len(sample) == 2
    assert [row["text"] for row in sample] == ["ab" + chr(99 + row["id"]) for row in sample]
    assert sample[0]["norms"]["<b>0</b>"] == pytest.approx(18**0.5)
    head, *lines, note = repr(sample).splitlines()
    assert head.split()[:5] == ["id", "source", "tokens", "|<b>0</b>|", "|<b>1</b>|"]
    assert [line.split()[0] for line in lines] == [str(row["id"]) for row in sample]
    assert all("<script>a.py xxxxxxxxxx\u2026" in line for line in lines)
    assert [line.split()[-1] for line in lines] == [row["text"] for row in sample]
    assert note == "2 more points: see sample[0]['norms']"


def test_what_was_collected_is_never_markup(hostile):
    for html in (hostile._repr_html_(), hostile.sample(tokenizer=Letters())._repr_html_()):
        assert "<table>" in html
        assert "&lt;b&gt;0" in html
        assert "<b>" not in html
        assert "<script" not in html


def test_the_same_seed_takes_the_same_examples(tmp_path):
    ds = make_dataset(tmp_path)

    def ids(*arguments, **options):
        return [row["id"] for row in ds.sample(*arguments, **options)]

    assert ids() == ids(seed=0)
    assert len({tuple(ids(seed=seed)) for seed in range(8)}) > 1
    assert ids(100) == list(range(11))
    assert ids(0) == []
    assert list(ds.sample(1, points=["loss"])._points) == ["loss"]
    with pytest.raises(KeyError, match="point must be one of"):
        ds.sample(points=["nope"])


def test_without_a_tokenizer_the_tokens_are_shown(tmp_path):
    row = make_dataset(tmp_path).sample(11)[3]
    assert row["text"] == "3 0 1 2 2147483647"
    assert len(open_dataset(tmp_path).sample(0)) == 0
    assert len(open_dataset(make_writer(tmp_path / "empty").out, partial=True).sample()) == 0


def test_a_bad_tokenizer(tmp_path):
    with pytest.raises(DatasetError, match=r"tokenizer must have a method decode, got 7\. Give a tokenizer"):
        make_dataset(tmp_path).sample(tokenizer=7)


def test_the_recorded_tokenizer_must_be_the_same(tmp_path, monkeypatch):
    asked = []

    class Transformers:
        class AutoTokenizer:
            @staticmethod
            def from_pretrained(name, **options):
                asked.append((name, options))
                if name == "gone":
                    raise OSError("no such model")
                return Letters()

    monkeypatch.setattr(decoding, "import_module", lambda name: Transformers)
    right = tokenizer_fingerprint(Letters())

    def found(name, fingerprint):
        header = {"model": {"name": name}, "tokenizer": {"class": "L", "fingerprint": fingerprint}}
        return recorded_tokenizer(LocalStore(tmp_path), header)

    assert isinstance(found("letters", right), Letters)
    assert asked == [("letters", {"local_files_only": True, "trust_remote_code": False})]
    assert found("letters", "0" * 64) is None
    assert found("gone", right) is None
    assert found(7, right) is None
    for header in ({}, {"model": "letters", "tokenizer": []}, {"model": {"name": "letters"}}):
        assert recorded_tokenizer(LocalStore(tmp_path), header) is None


def test_the_tokenizer_in_the_folder_of_the_model(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    header = {"tokenizer": {"fingerprint": tokenizer_fingerprint(byte_tokenizer())}, "model": {"name": "model"}}
    ds = open_dataset(make_writer(tmp_path / "ds", header=header).out, partial=True)
    for config in ("", "model: [\n", "model: model\n", f"model: {tmp_path}\n"):
        (tmp_path / "ds" / "config.yaml").write_text(config)
        assert ds.tokenizer() is None
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "model", "~/model"):
        (tmp_path / "ds" / "config.yaml").write_text(f"model: {place}\n")
        assert ds.tokenizer().decode(byte_tokenizer()("a\tb").input_ids) == "a\tb"


def test_a_name_is_loaded(tmp_path, monkeypatch):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert decoding.given_tokenizer("~/model").decode(byte_tokenizer()("a\tb").input_ids) == "a\tb"
    with pytest.raises(ValueError, match=r"^GradientDataset: tokenizer must be loadable as AutoTokenizer, got '/no"):
        decoding.given_tokenizer("/nowhere")


def test_the_points_as_a_table(tmp_path):
    html = make_dataset(tmp_path)._repr_html_()
    assert "11 rows, 3 of 3 units" in html
    assert all(f"<td>{name}</td>" in html for name in COLUMNS)
