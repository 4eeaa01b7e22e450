"""`tlfast score` and `tlfast search`: what they find, print, write and refuse."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from record_files import save_chat_model, save_records
from tiny_models import POINTS, collect_words, complaint_of, save_model, save_text

import tlfast
from tlfast.attribution import text_query
from tlfast.cli import main
from tlfast.collecting import huggingface
from tlfast.collecting.identity import describe_spec
from tlfast.dataset import merge_datasets, open_dataset
from tlfast.projections.projection import Projection


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, text, a dataset of them, and one of some of the same examples."""
    folder = tmp_path_factory.mktemp("scores")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text")
    assert main(["collect", *collect_words(folder)]) == 0
    assert main(["collect", *collect_words(folder, out=str(folder / "queries"), max_examples="3")]) == 0
    return folder


def text_of(folder, row):
    """The text of an example."""
    tokenizer = huggingface.load_tokenizer(str(folder / "model"))
    return tokenizer.decode(open_dataset(folder / "out").examples[row]["input_ids"])


def test_scores_are_printed_and_written(folder, tmp_path, capsys):
    out = tmp_path / "found.parquet"
    words = ["score", str(folder / "out"), "--queries", str(folder / "queries"), "--method", "cosine", "--top", "2"]
    assert main([*words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    right = tlfast.score(folder / "out", folder / "queries", "cosine", k=2)
    assert right.indices[:, 0].tolist() == [0, 1, 2]
    tokenizer = huggingface.load_tokenizer(str(folder / "model"))
    example = right[0][0]
    text = tokenizer.decode(example["input_ids"])
    assert shown[0] == f"query 0: {text}"
    assert shown[1].split() == [f"{example['score']:.6g}", "example", "0", f"{example['source']}:0", *text.split()]
    assert [line.split()[2] for line in shown if line.startswith("  ")] == [
        str(r) for r in right.indices.flatten().tolist()
    ]
    assert shown[-2:] == ["cosine over 2 columns (transformer.h.0, transformer.h.1)", str(out)]
    assert parquet.read_table(out).to_pydict() == right.to_dict(texts=True)
    out = tmp_path / "all.npy"
    assert main([*words, "--out", str(out), "--points", "transformer.h.1", "--where", "length > 5"]) == 0
    every = tlfast.score(
        folder / "out", folder / "queries", "cosine", points="transformer.h.1", where="length > 5", k=None
    )
    assert np.load(out).tobytes() == every.scores.numpy().tobytes()
    assert "(transformer.h.1)" in capsys.readouterr().out


def test_preconditioned_scores(folder, tmp_path, capsys):
    sums = tlfast.RunningSums("moment2_full")
    ds = open_dataset(folder / "out")
    sums.add({point: ds[point][:] for point in ds.points})
    sums.save(tmp_path / "moments.npz")
    words = ["score", str(folder / "out"), "--queries", str(folder / "queries"), "--method", "trackstar", "--top", "3"]
    shown = []
    for more in ([], ["--moments", str(tmp_path / "moments.npz")], ["--damping", "10", "--mix", "0.5"]):
        assert main([*words, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


LAYERS = ["transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj"]


def test_texts_through_a_model(folder, tmp_path, capsys):
    """The first file's first texts find themselves; what is printed and written is what the function finds."""
    asked, out = tmp_path / "asked.txt", tmp_path / "found.parquet"
    asked.write_text(text_of(folder, 3), encoding="utf-8")
    words = ["score", str(folder / "model"), "--text", str(folder / "text"), "--queries", str(asked), "--top", "2"]
    words += ["--points", *LAYERS, "--seq-len", "32", "--max-examples", "24"]
    assert main([*words, "--method", "cosine", "--out", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"query 0: {text_of(folder, 3)}"
    assert shown[1].split()[:3] == ["1", "example", "3"]
    assert shown[-2:] == ["cosine over 2 columns (" + ", ".join(LAYERS) + ")", str(out)]
    model, tokenizer = (load(str(folder / "model"), *more) for load, more in (
        (huggingface.load_model, (None, torch.device("cpu"))), (huggingface.load_tokenizer, ()),
    ))  # fmt: skip
    examples = [example["input_ids"] for example in open_dataset(folder / "out").examples]
    right = tlfast.score(model, [examples[3]], "cosine", examples=examples, points=LAYERS, k=2, tokenizer=tokenizer)
    assert parquet.read_table(out).column("id").to_pylist() == right.indices[0].tolist()
    assert main([*words, "--per", "token"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[3] == "token"
    assert (
        main([*words, "--method", "trackstar", "--project", "3", "--mix", "0.1", "--out", str(tmp_path / "a.npy")]) == 0
    )
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["1", "example", "3"]
    assert np.load(tmp_path / "a.npy").shape == (1, len(examples))


@pytest.mark.parametrize("merged", [False, True])
def test_a_text_finds_itself(folder, tmp_path, capsys, merged):
    place = folder / "out"
    if merged:
        place = tmp_path / "merged"
        merge_datasets(place, [folder / "out"], may_differ=["examples"])
    text = text_of(folder, 7)
    capsys.readouterr()
    assert main(["search", str(place), text, "--top", "3"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"query 0: {text}"
    assert [line.split()[1:3] for line in shown[1:2]] == [["example", "7"]]
    assert float(shown[1].split()[0]) == pytest.approx(1, abs=0.01)  # of bfloat16 rows
    assert len(shown) == 5
    assert sorted(os.listdir(folder)) == ["model", "out", "queries", "text"]


def test_a_dataset_of_a_program_is_searched_with_the_model(folder, tmp_path, capsys):
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    examples = [example["input_ids"] for example in open_dataset(folder / "out").examples]
    spec = tlfast.Spec(POINTS["gpt2"], reduce="sum", dtype=torch.float32)
    tlfast.collect(model, examples, tmp_path / "out", points=[spec], progress=False)
    words = ["search", str(tmp_path / "out"), text_of(folder, 5)]
    text = complaint_of(capsys, words)
    assert text == (
        "tlfast search: the model must be known, got GPT2LMHeadModel alone in dataset.json. "
        "Give the model's folder or name by --model."
    )
    assert main([*words, "--model", str(folder / "model"), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["1", "example", "5"]
    save_model(tmp_path / "other", "llama")
    text = complaint_of(capsys, [*words, "--model", str(tmp_path / "other")])
    assert "points must match a module" in text or "score: queries must be of the model" in text


def test_specs_are_read_out_of_a_header(folder):
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    made = [
        tlfast.Spec("transformer.h.0", reduce="sum", over=[1, 2], dtype=torch.float16, output=0, name="x"),
        tlfast.Spec(["transformer.h.0.mlp"], reduce="none", at=[0, -1], side="input", of="act", encoding="int8"),
        tlfast.Spec("transformer.h.1", of="act", heads=(2, 8), per="token", reduce="none"),
        tlfast.Spec("transformer.h.*.mlp.c_fc", of="weight", project=Projection(4, kind="normal", seed=3), bias=True),
    ]
    described = [describe_spec(model, spec) for spec in made]
    read = text_query._specs({"specs": json.loads(json.dumps(described))})
    assert [describe_spec(model, spec) for spec in read] == described
    for wrong in ([{**described[0], "later": 1}], None):
        with pytest.raises(
            ValueError, match=r"tlfast search: the specs must be in dataset.json, as tlfast.collect says"
        ):
            text_query._specs({"specs": wrong})


def test_weight_gradients_find_their_text(folder, tmp_path, capsys):
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    examples = [example["input_ids"] for example in open_dataset(folder / "out").examples]
    settings = {"points": "**.mlp.*", "of": "weight", "project": 4, "dtype": torch.float32, "progress": False}
    tlfast.collect(model, examples, tmp_path / "out", **settings)
    for method in ("cosine", "trackstar"):
        words = ["--model", str(folder / "model"), "--top", "1", "--method", method]
        assert main(["search", str(tmp_path / "out"), text_of(folder, 5), *words]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert shown[1].split()[1:3] == ["example", "5"]
        assert float(shown[1].split()[0]) == pytest.approx(1, abs=1e-4)
        assert shown[2].startswith(f"{method} over 4 columns (transformer.h.0.mlp.c_fc:weight, ")


def test_a_model_that_lies_elsewhere(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    config = tmp_path / "out" / "config.yaml"
    config.write_text(config.read_text().replace(str(folder / "model"), str(tmp_path / "gone")))
    words = ["search", str(tmp_path / "out"), "a row"]
    text = complaint_of(capsys, words)
    assert text.startswith(f"tlfast search: the model must be where the dataset says, got '{tmp_path}/gone'")
    assert text.endswith("Give its place by --model.")
    assert main([*words, "--model", str(folder / "model")]) == 0


@pytest.mark.parametrize("kind", ["column", "response", "messages"])
def test_a_record_finds_itself(tmp_path, capsys, kind):
    save_records(tmp_path / "data")
    save_chat_model(tmp_path / "model")
    columns, asked = {
        "column": (["--column", "text"], ["what is 3+1? it is 4, really really really "]),
        "response": (["--prompt-column", "prompt", "--response-column", "answer", "--keep-fields", "topic"],
                     ["what is 2+1? ", "--response", "it is 3, really really "]),
        "messages": (["--messages-column", "messages"], ["what is 2+1? ", "--response", "it is 3, really really "]),
    }[kind]  # fmt: skip
    places = {"--model": "model", "--dataset": "data/r.jsonl", "--out": "out"}
    words = [word for flag, place in places.items() for word in (flag, str(tmp_path / place))]
    words += ["--points", "transformer.h.*", "--dtype", "float32", "--filter", "label > -1"]
    assert main(["collect", *words, *columns]) == 0
    capsys.readouterr()
    assert main(["search", str(tmp_path / "out"), *asked, "--top", "1"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert float(line.split()[0]) == pytest.approx(1, abs=1e-5)
    assert ("what is 3+1?" if kind == "column" else "what is 2+1?") in line
    text = complaint_of(
        capsys, ["search", str(tmp_path / "out"), asked[0], *([] if asked[1:] else ["--response", "x"])]
    )
    if kind == "column":
        assert text.startswith("tlfast search: --response must be left out: examples are single texts, got 'x'.")
    else:
        assert text.startswith("tlfast search: --response must be given: its loss is of responses, got none. See")


SCORE = ["score", "OUT", "--queries", "QUERIES"]
WRONG = [
    (
        ["score", "OUT"],
        "tlfast score: the argument must be a dataset folder, or a model with --text or --dataset, and --queries",
    ),
    ([*SCORE, "--out", "x.csv"], "score: out must end in .npy or .parquet, got 'x.csv'. All scores go to a file of"),
    ([*SCORE, "--top", "0"], "score: k must be an int of at least 1, or None, got 0. None gives all scores."),
    (
        [*SCORE, "--method", "l2"],
        "score: method must be one of dot, cosine, trackstar, ekfac, got 'l2'. Check the spelling.",
    ),
    ([*SCORE, "--points", "x"], "tlfast score: points must match a module, got 'x'. The model has 2 modules"),
    ([*SCORE[:3], "/nope"], "open_dataset: path must be the folder of a dataset, got /nope, no such folder."),
    ([*SCORE, "--project", "4"], "tlfast score: --project must be left out where a dataset is scored, got it. Leave"),
    ([*SCORE, "--seq-len", "4"], "tlfast score: --seq-len must be left out where a dataset is scored, got it. Leave"),
    (["score", "MODEL", "--queries", "QUERIES"], "tlfast score: data must be given where a model is scored, got none"),
    (
        ["score", "MODEL", "--text", "T", "--queries", "T"],
        "tlfast score: --points must name layers where a model is sc",
    ),
    (
        ["score", "MODEL", "--text", "nowhere", "--points", "**", "--queries", "T"],
        "tlfast score: text must be an existing file or folder, got 'nowhere'.",
    ),
    ([*SCORE, "--text", "T", "--where", "id > 3"], "tlfast score: --where must be left out where a model is scored"),
    (["search", "OUT", "a", "--method", "l2"], "score: method must be one of dot, cosine, trackstar, ekfac, got 'l2'."),
    (["search", "OUT", "a", "--mix", "0.5"], "score: mix must be left out but with trackstar, got it with cosine."),
    (["search", "OUT", "a row " * 20], "tlfast search: the text must make one example, got one that makes 4. Shorten"),
    (["search", "OUT", "a", "--response", "b"], "tlfast search: --response must be left out: examples are single"),
]


@pytest.mark.parametrize("words, text", WRONG)
def test_wrong_words_are_refused(folder, tmp_path, capsys, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    places = {"OUT": str(folder / "out"), "QUERIES": str(folder / "queries"), "MODEL": str(folder / "model")}
    complaint = complaint_of(capsys, [places.get(word, word) for word in words])
    assert complaint.replace(str(folder / "out"), "OUT").startswith(text)
    assert os.listdir(tmp_path) == []
