"""Examples beside the units that are missing: a run that continues takes them, and never those of other data."""

from __future__ import annotations

import json
import os
import shutil

import datasets
import pytest
import torch
from record_files import RECORDS, save_chat_model, save_records
from tiny_models import save_text, unit_bytes

from tlfast.cli import main
from tlfast.collecting import from_text, records
from tlfast.collecting.data_files import DataFiles
from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.fields import packed
from tlfast.collecting.resume import is_same_reason
from tlfast.collecting.skipped import BadExamples
from tlfast.collecting.stored_examples import MadeAnew, Origin, stored_in
from tlfast.dataset import open_dataset
from tlfast.dataset.places.write_store import as_write_store
from tlfast.dataset.write.folder import our_files

NAME = ".examples"
BAD = {"prompt": 3, "answer": "x", "topic": "t", "score": 0.5}
KINDS = {
    "answers": "--prompt-column prompt --response-column answer --keep-fields topic score",
    "texts": "--column text --keep-fields label",
    "tokens": "--column text --filter length>20",
    "packs": "--column text --pack --seq-len 64",
    "text files": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    torch.set_num_threads(1)
    save_chat_model(folder / "model")
    save_records(folder / "data", "r.jsonl")
    with open(folder / "data" / "r.jsonl", "a") as file:
        file.write(json.dumps(RECORDS[0] | BAD) + "\n[]\n")
    save_text(folder / "text", n_files=3)
    return folder


def words(folder, out, kind="answers", *more):
    data = f"--text {folder / 'text'} --seq-len 32" if kind == "text files" else f"--dataset {folder / 'data'}"
    settings = f"{data} {KINDS[kind]} --model {folder / 'model'} --out {out} --rows-per-unit 4 --points transformer.h.0"
    return ["collect", *settings.split(), *more]


@pytest.fixture
def unread(monkeypatch):
    """No data may be read as long as this is on."""

    def refuse(*args, **more):
        raise AssertionError("the data are read")

    def forbid():
        for name in ("read_records", "texts"):
            monkeypatch.setattr(from_text, name, refuse)

    return forbid


def said_of(out):
    header = open_dataset(out).header
    return header["examples"], [list(open_dataset(out).examples)[k] for k in (0, -1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_continues_reads_no_data(folder, tmp_path, capsys, unread, kind):
    assert main(words(folder, tmp_path / "whole", kind)) == 0
    assert not (tmp_path / "whole" / NAME).exists()
    assert main(words(folder, tmp_path / "out", kind, "--units", "0:1")) == 0
    assert (tmp_path / "out" / NAME).exists()
    notes = [line for line in capsys.readouterr().err.splitlines() if "not used" in line or "bad example" in line]
    if kind != "packs":  # of which the first is tried each time
        unread()
    assert main(words(folder, tmp_path / "out", kind)) == 0
    again = [line for line in capsys.readouterr().err.splitlines() if "not used" in line or "bad example" in line]
    assert again == notes[len(notes) // 2 :], "what is said of the data is said again"
    assert unit_bytes(tmp_path / "out") == unit_bytes(tmp_path / "whole")
    assert said_of(tmp_path / "out") == said_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))
    assert open_dataset(tmp_path / "out").verify().ok


@pytest.fixture
def begun(folder, tmp_path):
    """A dataset that lacks units, and data of its own."""
    for name in ("data", "model"):
        shutil.copytree(folder / name, tmp_path / name)
    assert main(words(tmp_path, tmp_path / "out", "answers", "--units", "0:1")) == 0
    return tmp_path


def test_data_of_other_bytes_are_read_whatever_their_times_say(begun, capsys):
    path = begun / "data" / "r.jsonl"
    before, then = path.read_bytes(), path.stat()
    path.write_bytes(before.replace(b"it is 4", b"it is 5"))
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert path.stat().st_size == then.st_size
    capsys.readouterr()
    assert main(words(begun, begun / "out")) == 2
    assert "header.examples.sha256" in capsys.readouterr().err
    path.write_bytes(before)
    assert main(words(begun, begun / "out")) == 0


def test_other_settings_read_the_data_again(begun, capsys):
    for more in (["--max-examples", "9"], ["--filter", "score < 2"], ["--eos", "never"]):
        assert main(words(begun, begun / "out", "answers", *more)) == 2
        assert "header" in capsys.readouterr().err
    assert main(words(begun, begun / "out", "answers", "--bad-examples", "stop")) == 2
    assert "no JSON object, in line 26 of" in capsys.readouterr().err


NUMBERS = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
FIELDS = [
    {"labels": [5, 6], "x": NUMBERS, "told": {"a": "\ud800", "b": ("c", "d")}, "n": k, "none": [], "s": True}
    for k in range(6)
]


class Given:
    """Examples that were read of a file, and the place where they may lie."""

    def __init__(self, folder, how=1, examples=FIELDS):
        (folder / "data").write_bytes(b"all of them")
        self.reader, self.bad = ExampleReader(BadExamples("skip"), keep=("n",)), BadExamples("skip")
        origin = Origin(DataFiles([("data", folder / "data")]), {"how": how}, self.bad, ["a column"])
        self.data = MadeAnew(
            lambda: iter({"input_ids": [7, 8], "source": "a", "start": 3, **one} for one in examples), origin
        )
        self.stored = stored_in(str(folder), self.data, self.reader, BadExamples("skip", self.bad))
        self.notes = origin.notes

    def write(self):
        self.reader.read(self.data)
        self.stored.write()
        return self

    def taken(self):
        self.notes.clear()
        return self.stored.restore()


def test_all_is_as_it_was(tmp_path):
    first = Given(tmp_path)
    first.bad.leave_out("b", 1, "odd")
    first.write()
    again = Given(tmp_path)
    assert again.taken()
    assert again.notes == ["a column"]
    assert list(again.reader.examples) == list(first.reader.examples)
    assert again.reader.examples.sha256() == first.reader.examples.sha256()
    assert again.stored._bad.skipped == [["b", 1, "odd"]]
    for one, other in zip(*(given.reader.source.fetch([4, 0]) for given in (first, again)), strict=True):
        assert packed(one) == packed(other)
        assert list(one) == list(other)
        assert one["told"] == {"a": "\ud800", "b": ("c", "d")}
        assert one["x"].equal(NUMBERS)
        assert (other["x"].dtype, other["none"].shape, other["s"].dtype) == (torch.bfloat16, (0,), torch.bool)
    batches = [
        given.reader.source.rules.collated(given.reader.source.fetch([0, 1]), 2, "left") for given in (first, again)
    ]
    assert packed({k: v for k, v in batches[0].items() if k != "told"}) == packed(
        {k: v for k, v in batches[1].items() if k != "told"}
    )
    assert not Given(tmp_path, how=2).taken()


def test_a_damaged_file_is_not_taken(tmp_path):
    """Whatever byte of it is another one, or missing."""
    Given(tmp_path).write()
    path = tmp_path / NAME
    whole = path.read_bytes()
    for at in (*range(0, len(whole), len(whole) // 60), *range(-42, 0)):
        damaged = bytearray(whole)
        damaged[at] ^= 4
        path.write_bytes(damaged)
        assert not Given(tmp_path).taken(), at
    for n in (0, 3, 40, len(whole) - 1):
        path.write_bytes(whole[:n])
        assert not Given(tmp_path).taken(), n
    (tmp_path / "elsewhere").write_bytes(whole)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    assert not Given(tmp_path).taken()
    path.unlink()
    assert Given(tmp_path).write().stored._path.read_bytes() == whole


def test_data_that_change_as_they_are_read_are_not_stored(tmp_path):
    given = Given(tmp_path)
    given.reader.read(given.data)
    (tmp_path / "data").write_bytes(b"others then")
    given.stored.write()
    assert sorted(os.listdir(tmp_path)) == ["data"]


def test_overwriting_removes_it(begun):
    (begun / "out" / NAME).write_bytes(b"remains")
    assert NAME in our_files(as_write_store(begun / "out"), "test")
    assert main(words(begun, begun / "out", "answers", "--overwrite")) == 0
    assert not (begun / "out" / NAME).exists()


@pytest.mark.parametrize("rest", ["Format not recognised.", "Supported file format but file is malformed."])
def test_a_reason_that_was_cut_with_an_address_is_that_of_today(rest):
    ours, begun = (f"Error opening{where}: {rest}"[:80] for where in ("", " <_io.BytesIO object at 0x7fb5d5a5a700>"))
    assert is_same_reason(f"audio is no sound ({ours})", f"audio is no sound ({begun})")
    assert not is_same_reason(f"audio is no sound ({ours})", "audio is no sound (Error opening: Format)")
    assert not is_same_reason("image is no image (none)", f"audio is no sound ({begun})")
    gone = ", no file that can be read"
    assert is_same_reason(f"image names 'a.png'{gone}", f"image names '/elsewhere/a.png'{gone}")
    assert not is_same_reason(f"image names 'a.png'{gone}", f"file names '/elsewhere/a.png'{gone}")


def test_a_data_set_of_the_hub_is_read_once_too(folder, tmp_path, monkeypatch, capsys):
    """Its files in the client's cache are hashed: other ones by the same name are read, and refused."""
    for k, rows in enumerate((RECORDS, [*RECORDS[:-1], RECORDS[-1] | {"text": "another text"}])):
        saved = tmp_path / f"saved{k}"
        datasets.Dataset.from_list([{"text": one["text"], "label": one["label"]} for one in rows]).save_to_disk(saved)
    asked = []

    def found(name, configuration, split):
        asked.append(name)
        return datasets.load_from_disk(str(tmp_path / f"saved{len(asked) == 3:d}")), "train"

    monkeypatch.setattr(records, "hub_data", found)
    given = words(folder, tmp_path / "out", "texts")
    given[given.index("--dataset") + 1] = "mine/records"
    assert main([*given, "--units", "0:1"]) == 0
    assert len(asked) == 1
    assert (tmp_path / "out" / NAME).exists()
    with monkeypatch.context() as patches:
        patches.setattr(from_text, "read_records", None)
        assert main([*given, "--units", "0:2"]) == 0
    capsys.readouterr()
    assert main(given) == 2
    assert "header.examples.sha256" in capsys.readouterr().err
    assert main(given) == 0
    assert {row["source"] for row in open_dataset(tmp_path / "out").examples} == {"mine/records/train"}
