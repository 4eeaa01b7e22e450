"""The command line: what it makes and prints, and that it can be replayed."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_models import collect_words, complaint_of, save_model, save_text, unit_bytes

import tlfast
from tlfast.cli import COMMANDS, main
from tlfast.collecting import huggingface
from tlfast.collecting.settings import load_settings
from tlfast.dataset.write import native as native_writer

N_EXAMPLES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, text, and a dataset of them."""
    folder = tmp_path_factory.mktemp("cli")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text")
    assert main(["collect", *collect_words(folder)]) == 0
    return folder


def test_collect_makes_a_dataset(folder, tmp_path, capsys):
    assert main(["collect", *collect_words(folder, out=str(tmp_path / "out"))]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{N_EXAMPLES} rows in 3 units, ")
    assert shown.out.endswith(f": {tmp_path / 'out'}\n")
    assert shown.out.count("\n") == 1
    assert shown.err == f"{tlfast.backend()}\n"
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert len(dataset) == N_EXAMPLES
    assert dataset.points == ["transformer.h.0", "transformer.h.1"]
    assert dataset["transformer.h.0"].dtype == torch.bfloat16
    example = dataset.examples[5]
    text = (folder / example["source"]).read_bytes()
    tokenizer = huggingface.load_tokenizer(str(folder / "model"))
    assert tokenizer.decode(example["input_ids"]).encode() == text[example["start"] : example["start"] + 32]


def test_ranks_write_whole_lines(folder, tmp_path, monkeypatch):
    """They share outputs without a buffer: what is not in one write may have another rank's line in its middle."""
    written = []

    class Unbuffered(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Unbuffered())
    monkeypatch.setattr("tlfast.collecting.progress._LINE_EVERY_S", 0.0)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["collect", *collect_words(folder, out=str(tmp_path / "out"))]) == 0
    assert main(["collect", *collect_words(folder, out=str(tmp_path / "out"), model=str(tmp_path))]) == 2
    assert len([text for text in written if text.startswith("rank 0 of 2: ")]) == 4
    assert any(text.startswith("collect: ") for text in written)
    assert [text for text in written if text.count("\n") != 1 or not text.endswith("\n")] == []


@pytest.mark.long
def test_the_module_is_the_command(folder, tmp_path):
    """In a process of its own, from another folder, with relative paths."""
    command = [
        sys.executable,
        "-m",
        "tlfast",
        "collect",
        *collect_words(folder, model="model", text="text", out="again"),
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, f"{tlfast.backend()}\n")
    assert done.stdout.startswith(f"{N_EXAMPLES} rows in 3 units, ")
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
    changed = collect_words(folder, out=str(tmp_path / "out"), reduce="sum")
    text = complaint_of(capsys, ["collect", *changed])
    assert "out must be the same dataset to continue it" in text
    assert "'mean' there, 'sum' here" in text
    assert main(["collect", *changed, "--overwrite"]) == 0
    assert tlfast.open_dataset(tmp_path / "out").header["specs"][0]["reduce"] == "sum"


def test_info_says_what_is_inside(folder, capsys):
    capsys.readouterr()
    assert main(["info", str(folder / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"{N_EXAMPLES} of {N_EXAMPLES} rows in 3 units" in shown
    assert "name model" in shown
    assert "transformer.h.1  BF16 [24, 16]" in shown


def test_what_a_model_prints_is_not_the_answer(folder, tmp_path, capsys, monkeypatch):
    def load_model(*arguments):
        print("loading")
        return huggingface.load_model(*arguments)

    monkeypatch.setattr("tlfast.collecting.from_text.load_model", load_model)
    assert main(["collect", *collect_words(folder, out=str(tmp_path / "out"))]) == 0
    shown = capsys.readouterr()
    assert shown.err == f"{tlfast.backend()}\nloading\n"
    assert shown.out.startswith(f"{N_EXAMPLES} rows in 3 units, ")


def test_info_as_json(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "commits" / "u000001.json").unlink()
    capsys.readouterr()
    assert main(["info", "--json", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    info = json.loads(shown.out)
    dataset = tlfast.open_dataset(tmp_path / "out", partial=True)
    assert (info["path"], info["rows"], info["planned_rows"], info["units"]) == (str(tmp_path / "out"), 14, 24, 2)
    assert info["points"]["transformer.h.0"] == {"dtype": "BF16", "shape": [16]}
    assert info["header"]["model"] == dataset.header["model"]
    assert info["examples"] == dataset.header["examples"] | {"skipped": 0} == info["header"]["examples"]
    assert info["skipped"] == {}
    part = {"number": 0, "n_examples": 14, "planned_examples": 24, "n_units": 2, "planned_units": 3}
    assert info["parts"] == [part]


def test_tokens_are_counted_over_extensions(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["collect", *collect_words(folder, out=out, max_examples="10")]) == 0
    assert main(["collect", *collect_words(folder, out=out), "--extend"]) == 0
    dataset = tlfast.open_dataset(out)
    n_tokens = sum(example["length"] for example in dataset.examples)
    assert dataset.info()["examples"]["tokens"] == n_tokens > dataset.header["examples"]["tokens"]
    assert dataset.info()["examples"]["sha256"] == list(dataset.examples_fingerprint)
    capsys.readouterr()
    assert main(["info", out]) == 0
    first, second = (found[:12] for found in dataset.examples_fingerprint)
    assert f"examples      tokens {n_tokens}, sha256 {first} {second}, skipped 0\n" in capsys.readouterr().out


def test_info_and_verify_of_an_incomplete_dataset(folder, tmp_path, capsys):
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "commits" / "u000001.json").unlink()
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    config = tmp_path / "out" / "config.yaml"
    assert f"1 units are missing; `tlfast collect {config}` makes them\n" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "out")]) == 1
    config.write_text("")  # as of a dataset that the function made
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert "1 units are missing; the program that wrote it, run again, makes them\n" in capsys.readouterr().out


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


def test_doctor_names_the_backend_and_the_versions(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"backend       {tlfast.backend()}" in shown
    assert f"writer        {native_writer.writer()}" in shown
    assert torch.__version__ in shown


def test_doctor_says_whether_full_backward_hooks_are_native(capsys, monkeypatch):
    from tlfast.commands import doctor

    for native_code, said in (
        (object(), "can be native (tlfast.install_hooks); PyTorch's own are used in torch.func, "),
        (None, "are PyTorch's own; native ones need the native code\n"),
    ):
        monkeypatch.setattr(doctor, "loaded", lambda native_code=native_code: native_code)
        monkeypatch.setattr(doctor.cuda_status, "diagnose", lambda _: [])
        assert main(["doctor"]) == 0
        assert f"\nhooks         full backward hooks {said}" in capsys.readouterr().out


def test_doctor_says_how_to_get_what_is_missing(capsys, monkeypatch):
    def absent(library):
        if library in ("pyarrow", "tqdm"):
            raise doctor.importlib.metadata.PackageNotFoundError(library)
        return "1"

    from tlfast.commands import doctor

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    assert main(["doctor"]) == 0
    assert "missing       pyarrow, tqdm: pip install 'tlfast[collect]'" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert main([]) == 2
    assert capsys.readouterr() == ("", usage)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tlfast {tlfast.__version__}\n"
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        shown = capsys.readouterr()
        assert (end.value.code, shown.err) == (0, "")
        assert shown.out.startswith(f"usage: tlfast {command}")


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
