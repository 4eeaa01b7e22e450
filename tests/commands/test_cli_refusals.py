"""What the command line refuses: one line that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import torch
from tiny_models import collect_words, complaint_of, save_model, save_text

from tlfast.collecting import huggingface
from tlfast.collecting.settings import load_settings

COMMAND = (
    "tlfast: command must be one of collect, points, info, verify, export, import-bergson, report, score, search, "
    "factors, push, pull, doctor, got"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and text."""
    folder = tmp_path_factory.mktemp("refusals")
    save_model(folder / "model")
    save_text(folder / "text")
    return folder


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"model": "/nowhere/model"},
            "collect: model must be a folder or a name on the hub, got '/nowhere/model', no such",
        ),
        (
            {"ray_workers": "2"},
            "collect: ray_workers must be left out without Ray, got 2 with engine 'local'. Or --engine ray.",
        ),
        (
            {"staging": "FOLDER/staging"},
            "collect: staging must be left out unless out is a URL, got .*staging'. A folder needs none.",
        ),
        (
            {"model": "FOLDER/modle"},
            "collect: model must be a folder or a name on the hub, got .*modle', no such folder",
        ),
        (
            {"model": "FOLDER/text"},
            "collect: model must be a folder with a Hugging Face model, got .* without config.json",
        ),
        ({"cuda_graph": "yes"}, "collect: cuda_graph must be one of auto, on, off, got 'yes'"),
        ({"cuda_graph": "on"}, 'collect: cuda_graph must be "auto" or "off" unless .*, got "on" with a model on cpu'),
        ({"text": "/nowhere/text"}, "collect: text must be an existing file or folder, got '/nowhere/text'"),
        ({"text": ""}, "collect: text must be an existing file or folder, got ''"),
        ({"text": "FOLDER/empty.txt"}, "collect: text must hold text, got 1 empty file"),
        ({"text": "FOLDER/short.txt"}, "collect: text must hold text, got 1 file without; .*1 token, less than 2"),
        ({"text": "FOLDER/none"}, r"collect: text must hold files like '\*', got .*none"),
        (
            {"text": "FOLDER/model/model.safetensors"},
            "collect: text must hold text, got 1 file without; .*no UTF-8 text",
        ),
        (
            {"text": "FOLDER/model/model.safetensors", "bad_examples": "stop"},
            "collect: text must be UTF-8 text, got .*safetensors'. Leave this file out",
        ),
        ({"bad_examples": "keep"}, "collect: bad_examples must be one of skip, stop, got 'keep'"),
        ({"non_finite": "drop"}, "collect: non_finite must be one of keep, flag, stop, got 'drop'"),
        ({"deterministic": "no"}, "collect: deterministic must be one of strict, warn, got 'no'"),
        ({"resume": "must"}, 'collect: out must be a dataset with resume="must", got none at'),
        ({"disk_wait_s": "-1"}, r"collect: disk_wait_s must be at least 0, got -1\.0"),
        (
            {"points": "transfromer.h.*"},
            "collect: points must match a module, got 'transfromer.*Nearest: transformer.h",
        ),
        ({"reduce": "meen"}, "collect: reduce must be one of none, sum, mean, last, norm, absmax, got 'meen'"),
        ({"over": "positions"}, 'over must be "batch", "pos" or dimension numbers, got \'positions\''),
        ({"over": "batch,pos"}, "over must keep the batch: a row is an example, got 'batch,pos'"),
        ({"dtype": "int8"}, "collect: dtype must be one of float32, bfloat16, float16, float64, auto, got 'int8'"),
        ({"model_dtype": "fp32"}, "collect: model_dtype must be one of"),
        ({"device": "gpu"}, "collect: device must be usable, got 'gpu'"),
        ({"out": "FOLDER/text"}, "collect: out must be a new or empty folder, or a tlfast dataset, got .*text"),
        ({"out": "FOLDER/short.txt"}, "collect: out must be a new or empty folder, or a tlfast dataset, got .*a file"),
        ({"seq_len": "65"}, "collect: seq_len must be at most 64, the positions of the model, got 65"),
        ({"seq_len": "1"}, "collect: seq_len must be at least 2, got 1"),
        ({"rows_per_unit": "-1"}, "collect: rows_per_unit must be at least 0, got -1"),
        ({"bos": "always"}, "collect: bos must be auto or never for this tokenizer, got 'always'"),
        ({"backend": "rust"}, "collect: backend must be one of auto, native, python, got 'rust'"),
        ({"points": "transformer.h.*.attn", "output": "3"}, "collect: model must give a gradient at every point"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, tmp_path, capsys, change, text):
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("x")
    (folder / "none").mkdir(exist_ok=True)
    changes = {"out": str(tmp_path / "out")} | {k: v.replace("FOLDER", str(folder)) for k, v in change.items()}
    complaint = complaint_of(capsys, ["collect", *collect_words(folder, **changes)])
    assert pytest.raises(AssertionError, match=text).matches(AssertionError(complaint)), complaint
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_the_run(folder, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    complaint = complaint_of(capsys, ["collect", *collect_words(folder, out=str(tmp_path / "out"))])
    assert "out must have 0.000 GB free for this dataset, got 0.000 GB at" in complaint
    assert not (tmp_path / "out").exists()


def test_a_model_without_gradients_is_found_before_the_run(folder, tmp_path, capsys, monkeypatch):
    def without_gradients(*arguments):
        model = huggingface.load_model(*arguments)
        model.forward = torch.no_grad()(model.forward)
        return model

    monkeypatch.setattr("tlfast.collecting.from_text.load_model", without_gradients)
    complaint = complaint_of(capsys, ["collect", *collect_words(folder, out=str(tmp_path / "out"))])
    assert complaint.startswith("collect: loss must be made of the model's output, got a tensor without a graph. ")
    assert complaint.endswith("If the model doesn't start at its embedding, name the module: embedding= (--embedding).")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_read_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    complaint = complaint_of(
        capsys, ["collect", *collect_words(folder, model=str(tmp_path / "model"), out=str(tmp_path / "o"))]
    )
    assert complaint.startswith("collect: model must be loadable as Auto")


@pytest.mark.parametrize(
    "content, text",
    [
        ("model: a\ntext: b\npoints: c\nrows: 3\n", "config must hold model, .*, got unknown rows in"),
        ("model: a\n", "config must hold model, text, points and other settings .*, got only model in"),
        ("- model\n", "config must be a mapping, got list in"),
        ("", "config must hold the settings of a run of the command, got an empty file"),
        ("model: a\ntext: b\npoints: c\ncuda_graph: 1.5\n", r"cuda_graph must be str, got 1\.5 in"),
        ("model: [\n", "config must be a readable YAML file"),
        ("model: a\ntext: b\npoints: 3\n", "points must be a list of text, got 3 in"),
        ("model: a\ntext: b\npoints: c\nseq_len: x\n", "seq_len must be int, got 'x' in"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, capsys, content, text):
    (tmp_path / "config.yaml").write_text(content)
    complaint = complaint_of(capsys, ["collect", str(tmp_path / "config.yaml")])
    assert pytest.raises(AssertionError, match=text).matches(AssertionError(complaint)), complaint


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_yaml_takes_on_and_off_for_truth_values(tmp_path, word):
    (tmp_path / "config.yaml").write_text(f"model: a\ntext: b\npoints: c\ncuda_graph: {word}\n")
    assert load_settings(tmp_path / "config.yaml").cuda_graph == word


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert "config must be a readable YAML file" in complaint_of(capsys, ["collect", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train"], f"{COMMAND} 'train'"),
        (["info"], "tlfast info: the argument must be one dataset folder, got nothing"),
        (["verify", "a", "b"], "tlfast verify: the argument must be one dataset folder, got a b"),
        (["info", "/nowhere"], "got /nowhere, no such folder. Check the path."),
    ],
)
def test_wrong_commands_are_refused(capsys, arguments, text):
    assert text in complaint_of(capsys, arguments)


ALL = ["--model", "m", "--text", "t", "--points", "p", "--out", "o"]
WORDS = {
    "a command": (
        ["collet"],
        f"{COMMAND} 'collet'. Nearest: collect.",
    ),
    "a command as a flag": (
        ["--verison"],
        f"{COMMAND} '--verison'. Nearest: --version.",
    ),
    "no command": (
        ["frobnicate"],
        f"{COMMAND} 'frobnicate'. See tlfast --help.",
    ),
    "--modle": (
        ["collect", "--modle", "m"],
        "tlfast collect: the flag must be one of tlfast collect, got --modle. Nearest: --model.",
    ),
    "--batch-size": (
        ["collect", *ALL, "--batch-size=8"],
        "tlfast collect: the flag must be one of tlfast collect, got --batch-size. Nearest: --batch-tokens.",
    ),
    "--batch_tokesn": (
        ["collect", *ALL, "--batch_tokesn", "8"],
        "tlfast collect: the flag must be one of tlfast collect, got --batch_tokesn. Nearest: --batch-tokens.",
    ),
    "-m": (
        ["collect", "-m", "m"],
        "tlfast collect: the flag must be one of tlfast collect, got -m. See tlfast collect --help.",
    ),
    "no flags": (
        ["collect"],
        "tlfast collect: the flags must hold --model, --text, --points, --out, got none. See tlfast collect --help.",
    ),
    "few flags": (
        ["collect", "--model", "m", "--points", "a"],
        "tlfast collect: the flags must hold --text, --out, got others. See tlfast collect --help.",
    ),
    "a stray word": (
        ["collect", "gpt2", *ALL],
        "tlfast collect: the first word must be a flag, got 'gpt2'. Begin with a flag, or with DIR/config.yaml.",
    ),
    "two values": (
        ["collect", *ALL, "--device", "cuda", "cpu"],
        "tlfast collect: --device must have one value, got cuda cpu. Quote one that has spaces.",
    ),
    "no value": (
        ["collect", *ALL, "--device"],
        "tlfast collect: --device must have one value, got nothing. Put it behind the flag.",
    ),
    "no values": (
        ["collect", "--text", "--model", "m"],
        "tlfast collect: --text must have values, got nothing. Put them behind it.",
    ),
    "a switch with a value": (
        ["collect", *ALL, "--lens", "yes"],
        "tlfast collect: --lens must stand alone, got yes. Leave the value out; without the flag it is off.",
    ),
    "a flag twice": (
        ["collect", *ALL, "--points", "q"],
        "tlfast collect: --points must be given once, got it twice. Put all its values behind one.",
    ),
    "no whole number": (
        ["collect", *ALL, "--seq-len", "12.5"],
        "tlfast collect: --seq-len must be a whole number, got '12.5'. Correct it.",
    ),
    "no number": (
        ["collect", *ALL, "--disk-wait-s", "long"],
        "tlfast collect: --disk-wait-s must be a number, got 'long'. Correct it.",
    ),
    "info /nope": (
        ["info", "/nope"],
        "open_dataset: path must be the folder of a dataset, got /nope, no such folder. Check the path.",
    ),
    "verify /nope": (
        ["verify", "/nope"],
        "tlfast verify: path must be the folder of a dataset, got /nope, no such folder. Check the path.",
    ),
    "--jsno": (
        ["info", "/nope", "--jsno"],
        "tlfast info: the argument must be one dataset folder, got /nope --jsno. Nearest: --json.",
    ),
    "--repiar": (
        ["verify", "--repiar", "/nope"],
        "tlfast verify: the argument must be one dataset folder, got --repiar /nope. Nearest: --repair.",
    ),
    "--to twice": (
        ["export", "/nope", "--to", "npy", "--to=arrow"],
        "tlfast export: --to must be given once, got it twice. Leave one out.",
    ),
    "--points of export twice": (
        ["export", "/nope", "--to", "npy", "--points", "a", "--points", "b"],
        "tlfast export: --points must be given once, got it twice. Put all its values behind one.",
    ),
    "--out of report twice": (
        ["report", "--out", "a", "/nope", "--out", "b"],
        "tlfast report: --out must be given once, got it twice. Leave one out.",
    ),
    "--revision twice": (
        ["push", "/nope", "me/it", "--revision", "a", "--revision", "b"],
        "tlfast push: --revision must be given once, got it twice. Leave one out.",
    ),
    "a switch twice": (
        ["verify", "/nope", "--repair", "--repair"],
        "tlfast verify: --repair must be given once, got it twice. Leave one out.",
    ),
    "behind two dashes": (
        ["info", "--json", "--", "--json"],
        "open_dataset: path must be the folder of a dataset, got --json, no such folder. Check the path.",
    ),
    "doctor with a word": (
        ["doctor", "me"],
        "tlfast doctor: the argument must be left out, got me. Unrecognized arguments: me.",
    ),
}


@pytest.mark.parametrize("words, text", WORDS.values(), ids=WORDS)
def test_wrong_words_are_one_line_that_names_the_nearest(capsys, words, text):
    assert complaint_of(capsys, words) == text


def test_all_flags_that_the_help_shows_are_taken(folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("model: a\ntext: b\npoints: c\n")
    flags = ["--over", "-1", "--seq_len=16", "--disk-wait-s", "-2.5", "--lens", "--points", "x", "y"]
    assert "disk_wait_s must be at least 0, got -2.5" in complaint_of(capsys, ["collect", str(config), *flags])
