"""The command line: what it prints, what it refuses in one line with exit code 2, and that it can be replayed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from tiny_models import save_model, save_text, unit_bytes

import tlfast
from tlfast import huggingface
from tlfast.cli import main
from tlfast.settings import load_settings

N_EXAMPLES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, text, and a dataset of them."""
    folder = tmp_path_factory.mktemp("cli")
    save_model(folder / "model")
    save_text(folder / "text")
    assert main(["collect", *words(folder)]) == 0
    return folder


def words(folder, **changes):
    settings = {
        "model": str(folder / "model"), "text": str(folder / "text"), "points": "transformer.h.*", "reduce": "mean",
        "dtype": "bfloat16", "out": str(folder / "out"), "seq_len": "32", "max_examples": str(N_EXAMPLES),
        "rows_per_unit": "10",
    } | changes  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", *value.split("\n"))]


def complaint_of(capsys, arguments, code=2):
    """The one line on stderr with which a command ended."""
    capsys.readouterr()
    assert main(arguments) == code
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 1, shown.err
    if arguments[0] == "collect":
        assert shown.out == f"{tlfast.backend()}\n"
    return lines[0]


def test_collect_makes_a_dataset(folder, tmp_path, capsys):
    assert main(["collect", *words(folder, out=str(tmp_path / "out"))]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[0] == tlfast.backend()
    assert shown.out.splitlines()[-1].startswith(f"{N_EXAMPLES} rows in 3 units, ")
    assert shown.err == ""
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert len(dataset) == N_EXAMPLES
    assert dataset.points == ["transformer.h.0", "transformer.h.1"]
    assert dataset["transformer.h.0"].dtype == torch.bfloat16
    example = dataset.examples[5]
    text = (folder / example["source"]).read_bytes()
    tokenizer = huggingface.load_tokenizer(str(folder / "model"))
    assert tokenizer.decode(example["input_ids"]).encode() == text[example["start"] : example["start"] + 32]


def test_the_module_is_the_command(folder, tmp_path):
    """In a process of its own, from another folder, with relative paths."""
    command = [sys.executable, "-m", "tlfast", "collect", *words(folder, model="model", text="text", out="again")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == tlfast.backend()
    assert unit_bytes(folder / "again") == unit_bytes(folder / "out")


def test_the_function_makes_the_same_bytes(folder, tmp_path):
    model = huggingface.load_model(str(folder / "model"), None, torch.device("cpu"))
    examples = [dict(example) for example in tlfast.open_dataset(folder / "out").examples]
    settings = {"points": ["transformer.h.*"], "reduce": "mean", "dtype": torch.bfloat16, "rows_per_unit": 10}
    tlfast.collect(model, examples, tmp_path / "out", seq_len=32, progress=False, **settings)
    assert unit_bytes(tmp_path / "out") == unit_bytes(folder / "out")


def test_a_config_can_be_replayed_and_changed(folder, tmp_path, capsys):
    config = folder / "out" / "config.yaml"
    assert config.read_text().startswith(f"# tlfast {tlfast.__version__}, {tlfast.backend()}, cpu\n")
    assert main(["collect", str(config)]) == 0  # nothing is left to do
    assert f"0 rows beside {N_EXAMPLES} that were there" in capsys.readouterr().out
    assert main(["collect", str(config), "--out", str(tmp_path / "copy")]) == 0
    assert unit_bytes(tmp_path / "copy") == unit_bytes(folder / "out")
    assert main(["collect", str(config), "--out", str(tmp_path / "norm"), "--reduce", "norm", "--over", "-1"]) == 0
    assert tlfast.open_dataset(tmp_path / "norm")["transformer.h.0"].shape == (N_EXAMPLES, 32)
    assert load_settings(tmp_path / "norm" / "config.yaml").dims == [-1]


def test_overwrite_replaces_a_dataset(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    changed = words(folder, out=str(tmp_path / "out"), reduce="sum")
    text = complaint_of(capsys, ["collect", *changed])
    assert "out must be the same dataset to continue it" in text
    assert "'mean' there, 'sum' here" in text
    assert main(["collect", *changed, "--overwrite"]) == 0
    assert tlfast.open_dataset(tmp_path / "out").header["specs"][0]["reduce"] == "sum"


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"model": "/nowhere/model"},
            "collect: model must be a folder or a name on the hub, got '/nowhere/model', no such",
        ),
        (
            {"model": "FOLDER/modle"},
            "collect: model must be a folder or a name on the hub, got .*modle', no such folder",
        ),
        (
            {"model": "FOLDER/text"},
            "collect: model must be a folder with a Hugging Face model, got .* without config.json",
        ),
        ({"text": "/nowhere/text"}, "collect: text must be an existing file or folder, got '/nowhere/text'"),
        ({"text": ""}, "collect: text must be an existing file or folder, got ''"),
        ({"text": "FOLDER/empty.txt"}, "collect: text must hold text, got 1 empty file"),
        ({"text": "FOLDER/short.txt"}, "collect: text must hold text, got 1 file with less than 2 tokens"),
        ({"text": "FOLDER/none"}, r"collect: text must hold files like '\*', got .*none"),
        ({"text": "FOLDER/model/model.safetensors"}, "collect: text must be UTF-8 text"),
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
    complaint = complaint_of(capsys, ["collect", *words(folder, **changes)])
    assert pytest.raises(AssertionError, match=text).matches(AssertionError(complaint)), complaint
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_found_before_the_run(folder, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    complaint = complaint_of(capsys, ["collect", *words(folder, out=str(tmp_path / "out"))])
    assert "out must have 0.000 GB free for this dataset, got 0.000 GB at" in complaint
    assert not (tmp_path / "out").exists()


def test_a_model_without_gradients_is_found_before_the_run(folder, tmp_path, capsys, monkeypatch):
    def without_gradients(name, dtype, device):
        model = huggingface.load_model(name, dtype, device)
        model.forward = torch.no_grad()(model.forward)
        return model

    monkeypatch.setattr("tlfast.collect_text.load_model", without_gradients)
    complaint = complaint_of(capsys, ["collect", *words(folder, out=str(tmp_path / "out"))])
    assert complaint.startswith("collect: model must give a gradient at every point")
    assert not (tmp_path / "out").exists()


def test_a_model_that_cannot_be_read_is_refused(folder, tmp_path, capsys):
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    complaint = complaint_of(
        capsys, ["collect", *words(folder, model=str(tmp_path / "model"), out=str(tmp_path / "o"))]
    )
    assert complaint.startswith("collect: model must be loadable as Auto")


@pytest.mark.parametrize(
    "content, text",
    [
        ("model: a\ntext: b\npoints: c\nrows: 3\n", "config must hold model, .*, got unknown rows in"),
        ("model: a\n", "config must hold model, text, points and other settings .*, got only model in"),
        ("- model\n", "config must be a mapping, got list in"),
        ("model: [\n", "config must be a readable YAML file"),
        ("model: a\ntext: b\npoints: 3\n", "points must be a list of text, got 3 in"),
        ("model: a\ntext: b\npoints: c\nseq_len: x\n", "seq_len must be int, got 'x' in"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, capsys, content, text):
    (tmp_path / "config.yaml").write_text(content)
    complaint = complaint_of(capsys, ["collect", str(tmp_path / "config.yaml")])
    assert pytest.raises(AssertionError, match=text).matches(AssertionError(complaint)), complaint


def test_a_missing_config_is_refused(tmp_path, capsys):
    assert "config must be a readable YAML file" in complaint_of(capsys, ["collect", str(tmp_path / "config.yaml")])


def test_a_wrong_flag_is_exit_code_2(folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(["collect", *words(folder), "--sequence-length", "3"])
    assert end.value.code == 2


def test_info_says_what_is_inside(folder, capsys):
    capsys.readouterr()
    assert main(["info", str(folder / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"{N_EXAMPLES} of {N_EXAMPLES} rows in 3 units" in shown
    assert "name model" in shown
    assert "transformer.h.1  BF16 [24, 16]" in shown


def test_info_and_verify_of_an_incomplete_dataset(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "commits" / "u000001.json").unlink()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "1 units are missing" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 1


def test_verify_finds_a_flipped_bit(folder, tmp_path, capsys):
    assert main(["verify", str(folder / "out")]) == 0
    assert f"ok: {N_EXAMPLES} rows in 3 units" in capsys.readouterr().out
    shutil.copytree(folder / "out", tmp_path / "out")
    data = tmp_path / "out" / "data" / "u000002.safetensors"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert "u000002" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train"], "tlfast: command must be one of collect, info, verify, doctor, got 'train'"),
        (["info"], "tlfast info: the argument must be one dataset folder, got nothing"),
        (["verify", "a", "b"], "tlfast verify: the argument must be one dataset folder, got a b"),
        (["info", "/nowhere"], "/nowhere/dataset.json"),
    ],
)
def test_wrong_commands_are_refused(capsys, arguments, text):
    assert text in complaint_of(capsys, arguments)


def test_doctor_names_the_backend_and_the_versions(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert tlfast.backend() in shown
    assert torch.__version__ in shown


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    def absent(library):
        if library in ("pyarrow", "tqdm"):
            raise doctor.importlib.metadata.PackageNotFoundError(library)
        return "1"

    from tlfast import doctor

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    assert main(["doctor"]) == 0
    assert "missing       pyarrow, tqdm: pip install 'tlfast[collect]'" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"tlfast {tlfast.__version__}"
    with pytest.raises(SystemExit) as end:
        main(["collect", "--help"])
    assert end.value.code == 0


def test_the_token_that_begins_a_text():
    class Tokenizer:
        bos_token_id = 1

        def __init__(self, adds):
            self.adds = adds

        def __call__(self, text):
            return {"input_ids": [1, 5] if self.adds else [5]}

    assert [huggingface.beginning_of_text(Tokenizer(adds), "auto") for adds in (True, False)] == [[1], []]
    assert huggingface.beginning_of_text(Tokenizer(False), "always") == [1]
    assert huggingface.beginning_of_text(Tokenizer(True), "never") == []
