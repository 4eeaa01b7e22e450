"""Text becomes examples that say where they came from; what is no text is refused."""

from __future__ import annotations

import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_models import collect_words, complaint_of, save_model, save_text, unit_bytes

from tlfast.cli import main
from tlfast.collecting.text import check_plain, cut_texts, find_text_files


def encode(text):
    return list(text.encode())


def test_files_come_sorted_and_without_what_is_hidden(tmp_path):
    for name in ("b.txt", "a.py", ".hidden.txt", "sub/c.txt", ".git/d.txt", "sub/.e.txt"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    sources = [file.source for file in find_text_files([tmp_path / "corpus"])]
    assert sources == ["corpus/a.py", "corpus/b.txt", "corpus/sub/c.txt"]
    assert [file.source for file in find_text_files([tmp_path / "corpus"], "*.py")] == ["corpus/a.py"]


def test_sources_differ_and_do_not_name_the_machine(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "data.txt").write_text("text")
    files = find_text_files([tmp_path / "two" / "data.txt", tmp_path / "one" / "data.txt"])
    assert [file.source for file in files] == ["two/data.txt", "one/data.txt"]


def test_a_file_given_twice_counts_once(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    assert len(find_text_files([tmp_path, tmp_path / "a.txt"])) == 1


def test_examples_put_together_are_the_text(tmp_path):
    text = "Call me Ishmael. Some years ago\u2014never mind how long precisely."
    (tmp_path / "moby.txt").write_text(text, encoding="utf-8")
    examples = cut_texts(find_text_files([tmp_path / "moby.txt"]), encode, 10)
    assert bytes(token for example in examples for token in example.input_ids).decode() == text
    assert [example.start for example in examples] == [10 * k for k in range(len(examples))]
    assert [example.id for example in examples] == list(range(len(examples)))
    assert {example.source for example in examples} == {"moby.txt"}
    assert all(example.length == len(example.input_ids) for example in examples)


def test_no_example_spans_two_files_and_a_single_token_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 21)
    (tmp_path / "b.txt").write_text("y" * 12)
    examples = cut_texts(find_text_files([tmp_path]), encode, 10)
    cut = [(example.source.rpartition("/")[2], example.start, example.length) for example in examples]
    assert cut == [("a.txt", 0, 10), ("a.txt", 10, 10), ("b.txt", 0, 10), ("b.txt", 10, 2)]


def test_tokens_before_each_example_are_counted_but_start_is_the_texts(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    examples = cut_texts(find_text_files([tmp_path]), encode, 5, first=[0])
    assert [(list(e.input_ids), e.start) for e in examples] == [([0, *b"abcd"], 0), ([0, *b"efgh"], 4)]


def test_max_examples_stops_early(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 100)
    (tmp_path / "b.txt").write_text("b" * 100)
    read = []

    def counting(text):
        read.append(text[0])
        return encode(text)

    assert len(cut_texts(find_text_files([tmp_path]), counting, 10, max_examples=7)) == 7
    assert read == ["a"]


def test_a_folder_may_hold_what_is_no_text(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x00\x01\x02\x03")
    (tmp_path / "b.bin").write_bytes(b"\xff\xfe\xfd\xfc")
    (tmp_path / "c.txt").write_text("text")
    assert [list(e.input_ids) for e in cut_texts(find_text_files([tmp_path]), encode, 10)] == [list(b"text")]


@pytest.mark.parametrize("content", [b"\x00\x01\x02", b"\xff\xfe\xfd"])
def test_a_named_file_must_be_text(tmp_path, content):
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"collect: text must be UTF-8 text, got '.*a\.bin'"):
        cut_texts(find_text_files([tmp_path / "a.bin"]), encode, 10)


def test_what_cannot_be_found_is_refused(tmp_path):
    with pytest.raises(ValueError, match="text must name a file or a folder, got nothing"):
        find_text_files([])
    with pytest.raises(ValueError, match=r"text must be an existing file or folder, got '.*nowhere'"):
        find_text_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"text must hold files like '\*\.py'"):
        find_text_files([tmp_path], "*.py")


def test_text_without_two_tokens_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"text must hold text, got 2 files .*a.txt at 0: 0 tokens, less than 2"):
        cut_texts(find_text_files([tmp_path]), encode, 10)


def test_a_length_without_room_for_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="seq_len must hold 2 tokens of text or more, got 2 with 1 tokens"):
        cut_texts([], encode, 2, first=[0])


RECORDS = [{"text": "one", "n": 1}, {"text": "two", "n": 2}]
LINES = "\n".join(map(json.dumps, RECORDS))
# What lies in a file, and what it looks like.
NO_TEXT = {
    "a.jsonl": (LINES, "JSON lines"),
    "one.ndjson": (LINES.splitlines()[0], "JSON lines"),
    "lines.json": (LINES, "JSON lines"),
    "list.json": (json.dumps(RECORDS, indent=1), "JSON with a list of records"),
    "squad.json": (json.dumps({"version": "2", "data": RECORDS}), "JSON with a list of records"),
    "b.csv": ("text,n\none,1\n", "a table"),
    "c.TSV": ("text\tn\none\t1\n", "a table"),
}
TEXT = {
    "a.py": 'x = {"text": [1]}\n', "b.md": "# Title\n\n[1] a {b}", "c.txt": "{text}\n[1]\n", "d.html": "<p>a, b</p>",
    "e.tex": "{\\bf a}\n[b]", "f.ini": "[section]\na = 1", "g.csv": "no columns at all", "h.json": "",
    "i": "plain text", "j.js": "[1, 2]\n", "k.ipynb": json.dumps({"cells": RECORDS}),
    "package.json": json.dumps({"name": "a", "scripts": {"b": "c"}, "files": ["d"]}, indent=1),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in-a-folder"])
def test_what_holds_text_among_other_things_is_refused_unless_the_pattern_names_it(tmp_path, name, named):
    content, looks = NO_TEXT[name]
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_text(content)
    files = find_text_files([tmp_path / name if named else tmp_path])
    suffix = (tmp_path / name).suffix.lower()
    with pytest.raises(
        ValueError, match=rf"collect: text must be plain text, got '.*{name}', which looks like {looks}\."
    ) as e:
        check_plain(files)
    assert str(e.value).endswith(f"; --pattern '*{suffix}' takes it as it is.")
    for pattern in ("*.*", "*a*", "*.txt"):
        with pytest.raises(ValueError, match=looks):
            check_plain(files, pattern)
    check_plain(files, f"*{suffix}")
    assert check_plain(find_text_files([tmp_path / name], f"*{suffix}"), f"*{suffix}") is None


def test_source_code_and_plain_text_stay_text(tmp_path):
    for name, content in TEXT.items():
        (tmp_path / name).write_text(content)
    check_plain(find_text_files([tmp_path]))
    check_plain(find_text_files([tmp_path / name for name in TEXT if name not in ("j.js", "k.ipynb", "package.json")]))


def test_json_is_text_beside_text_alone(tmp_path):
    (tmp_path / "package.json").write_text(TEXT["package.json"])
    (tmp_path / "model.bin").write_bytes(b"\0\1")
    (tmp_path / "empty.txt").write_text("")
    files = find_text_files([tmp_path])
    with pytest.raises(ValueError, match=r"got '.*package\.json', which looks like JSON\. Write the texts into files"):
        check_plain(files)
    check_plain(files, "*.json")
    (tmp_path / "a.py").write_text("a = 1")
    check_plain(find_text_files([tmp_path]))
    with pytest.raises(ValueError, match="looks like JSON"):
        check_plain(find_text_files([tmp_path / "package.json"]))  # given by name
    (tmp_path / "notes.txt").write_text(json.dumps({"a": 1}, indent=1))
    with pytest.raises(ValueError, match=r"notes\.txt', which looks like JSON"):
        check_plain(find_text_files([tmp_path / "notes.txt"]))


def test_binary_tables_are_named_for_what_they_are(tmp_path):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("A dataset.")
    with pytest.raises(
        ValueError, match=r"a\.parquet', which looks like Parquet\. .* pass their tokens to tlfast\.collect\.$"
    ):
        check_plain(find_text_files([tmp_path]))
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int8())])):
        pass
    with pytest.raises(ValueError, match=r"b\.arrow', which looks like Arrow"):
        check_plain(find_text_files([tmp_path / "b.arrow"]))


def test_a_folder_of_save_to_disk_is_named_for_what_it_is(tmp_path):
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "data")
    (tmp_path / "data" / "notes.md").write_text("A dataset.")
    with pytest.raises(
        ValueError, match=r"data-00000-of-00001\.arrow', part of what save_to_disk wrote\. Write the texts"
    ):
        check_plain(find_text_files([tmp_path / "data"]))
    (tmp_path / "data" / "data-00000-of-00001.arrow").unlink()
    (tmp_path / "data" / "notes.md").unlink()
    with pytest.raises(ValueError, match=r"dataset_info\.json', part of what save_to_disk wrote"):
        check_plain(find_text_files([tmp_path / "data"]))


def test_the_command_line_refuses_it_and_takes_it_by_a_pattern(tmp_path, capsys):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text", 3)
    (tmp_path / "text" / "a.jsonl").write_text(LINES)
    words = collect_words(tmp_path)
    assert "a.jsonl', which looks like JSON lines" in complaint_of(capsys, ["collect", *words])
    assert not (tmp_path / "out").exists()
    assert main(["collect", *words, "--pattern", "*.jsonl"]) == 0
    table = pq.read_table(tmp_path / "out" / "rows" / "u000000.parquet")
    assert set(table["source"].to_pylist()) == {"text/a.jsonl"}


def test_what_was_begun_with_such_files_goes_on(tmp_path, capsys, monkeypatch):
    """As with a dataset that was begun before such files were refused."""
    save_model(tmp_path / "model")
    save_text(tmp_path / "text", 3)
    (tmp_path / "text" / "a.jsonl").write_text(LINES)
    words = collect_words(tmp_path, rows_per_unit="4")
    monkeypatch.setattr("tlfast.collecting.from_text.check_plain", lambda files, pattern: None)
    assert main(["collect", *words]) == 0
    monkeypatch.undo()
    before = unit_bytes(tmp_path / "out")
    (tmp_path / "out" / "commits" / "u000001.json").unlink()
    assert main(["collect", *words]) == 0
    assert unit_bytes(tmp_path / "out") == before
    assert "JSON lines" in complaint_of(capsys, ["collect", *words, "--overwrite"])
    shutil.rmtree(tmp_path / "out")
    assert "JSON lines" in complaint_of(capsys, ["collect", *words])
