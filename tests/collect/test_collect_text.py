"""Text becomes examples that say where they came from; what is no text is refused."""

from __future__ import annotations

import pytest

from tlfast.text import cut_texts, find_text_files


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
