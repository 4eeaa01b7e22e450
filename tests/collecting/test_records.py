"""Records of files: what is read, skipped with its reason, or refused; damaged files, drawn at random."""

from __future__ import annotations

import json
import random
import re

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_files import FLAT, KINDS, RECORDS, N, save_records

from tlfast.collecting.records import read_records
from tlfast.collecting.skipped import BadExamples


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_records(tmp_path_factory.mktemp("records") / "data")


def read(place, policy="stop", **settings):
    bad = BadExamples(policy)
    return list(read_records(str(place), bad, **settings)), bad.skipped


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_values(folder, kind):
    found, skipped = read(folder / kind, texts=("text", "prompt", "answer"))
    assert not skipped
    wanted = FLAT if kind.endswith((".csv", ".tsv")) else RECORDS
    assert [{name: record.values[name] for name in wanted[0]} for record in found] == wanted
    places = [(record.source, record.start) for record in found]
    assert len(set(places)) == N


def test_lines_are_examples_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo \r\n\xff\nthree")
    found, skipped = read(tmp_path / "a.txt", "skip")
    assert [(record.values["text"], record.start) for record in found] == [("one", 0), ("two ", 2), ("three", 4)]
    assert skipped == [["a.txt", 3, "no UTF-8 text"]]


def test_lines_that_are_no_objects_are_skipped_with_the_reason(tmp_path):
    lines = ['{"a": 1}', "[1]", '{"a": ', "3", '{"a": 2}', "\x00", '"a"', "null"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found, skipped = read(tmp_path / "a.jsonl", "skip")
    assert [record.values["a"] for record in found] == [1, 2]
    assert [start for _, start, _ in skipped] == [1, 2, 3, 5, 6, 7]
    assert skipped[0][2] == "a list, no JSON object"
    assert skipped[1][2].startswith("no JSON (Expecting value")
    text = (
        r"^collect: dataset must hold a JSON object in each line, got a list, no JSON object, in line 2 of '.*a\.jsonl'"
    )
    with pytest.raises(ValueError, match=text):
        read(tmp_path / "a.jsonl")


def test_rows_of_a_table_that_have_other_cells_are_skipped(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\none,1\n"two\nlines",2\nthree,3,4\nfour,5\n')
    found, skipped = read(tmp_path / "a.csv", "skip", texts=("text",))
    assert [tuple(record.values.values()) for record in found] == [("one", 1), ("two\nlines", 2), ("four", 5)]
    assert [reason for _, _, reason in skipped] == ["3 cells, not 2"]
    with pytest.raises(ValueError, match="dataset must have a cell for each column, got 3 cells, not 2, in row "):
        read(tmp_path / "a.csv")


def test_a_column_of_texts_stays_one_where_a_table_holds_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\n007,1\n1e3,2\n")
    assert [record.values["text"] for record in read(tmp_path / "a.csv", texts=("text",))[0]] == ["007", "1e3"]


def split_folder(folder):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"name": name}) + "\n")
    (folder / "README.md").write_text("no data")
    (folder / ".hidden.jsonl").write_text("{")
    return folder


def test_files_of_a_split_are_told_by_their_names(tmp_path):
    found, _ = read(split_folder(tmp_path), split="train")
    assert [record.values["name"][:11] for record in found] == ["train-00000", "train-00001"]
    with pytest.raises(ValueError, match=r"split must be one of test, train, got none\. Say --split, or name one file"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"split must be one of test, train, got 'dev'\. Or leave it out"):
        read(tmp_path, split="dev")


def test_folders_of_a_split_are_told_by_theirs(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jsonl").write_text(json.dumps({"name": name}) + "\n")
    (record,) = read(tmp_path, split="validation")[0]
    assert (record.values["name"], record.source) == ("validation", "validation/0.jsonl")


def test_splits_that_were_saved_are_named(tmp_path):
    both = datasets.DatasetDict({name: datasets.Dataset.from_list([{"name": name}]) for name in ("train", "held")})
    both.save_to_disk(str(tmp_path / "d"))
    assert read(tmp_path / "d", split="held")[0][0].values == {"name": "held"}
    with pytest.raises(ValueError, match="split must be one of train, held, got none"):
        read(tmp_path / "d")
    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="split must be left out for a data set of one, got 'train'"):
        read(tmp_path / "one", split="train")


REFUSED = {
    "a.xlsx": (b"PK", "dataset must end in .jsonl, .*, got '.*a.xlsx'. Name the file as what it is"),
    "a.json": (b"3", "dataset must hold one list of JSON objects, got other JSON in '.*a.json'. JSON lines end in"),
    "b.json": (b"{", "dataset must be a readable json file, got '.*b.json': .*Write it anew, or leave it out"),
    "c.json": (b'{"a": [{"b": 1}], "c": [{"b": 1}]}', "dataset must hold one list of JSON objects"),
    "d.json": (b'[{"a": ' + b"[" * 100_000, "dataset must be a readable json file"),
    "a.parquet": (b"PAR1", "dataset must be a readable parquet file"),
    "a.arrow": (b"ARROW1\0\0", "dataset must be a readable arrow file"),
    "b.arrow": (b"", "dataset must be a readable arrow file"),
    "a.csv": (b"", "dataset must be a readable csv file"),
    "b.csv": (b"a\n\xff\n", "dataset must be a readable csv file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_none_of_its_kind_is_refused(tmp_path, name):
    content, text = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^collect: {text}"):
        read(tmp_path / name, texts=("a",))


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataset must hold files like \.jsonl, .*, got '"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["r.jsonl", "r.json", "r.csv", "r.parquet", "r.arrow", "r.feather"])
def test_damaged_files_are_an_error_or_a_recorded_skip(folder, tmp_path, kind):
    whole, draw = (folder / kind).read_bytes(), random.Random(kind)
    outcomes, said = set(), []
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(data))
            match draw.randrange(3):
                case 0:
                    data[at] = draw.randrange(256)
                case 1:
                    del data[at : at + draw.randrange(1, 200)]
                case _:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
        (tmp_path / kind).write_bytes(data)
        try:
            found, skipped = read(tmp_path / kind, "skip", texts=("text",))
        except ValueError as error:
            outcomes.add("refused")
            said.append(str(error))
        else:
            outcomes.add("skipped" if skipped else "read")
            assert all(isinstance(record.values, dict) for record in found)
    assert "refused" in outcomes or "skipped" in outcomes
    assert all(re.fullmatch("collect: dataset must [^\n]*", text) for text in said), said


def test_a_table_is_read_in_parts(tmp_path):
    """Not all of it lies in memory as Python's values."""
    pq.write_table(pa.table({"n": list(range(5000))}), tmp_path / "a.parquet")
    records = read_records(str(tmp_path / "a.parquet"), BadExamples())
    assert [next(records).start for _ in range(3)] == [0, 1, 2]
    assert [record.values["n"] for record in records] == list(range(3, 5000))
