"""Files that are damaged, or hold what nobody expects: an error that names the file, or a skip that is counted."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_files import TEMPLATE
from tiny_models import byte_tokenizer

from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.records import read_records
from tlfast.collecting.skipped import BadExamples
from tlfast.collecting.tokenizing import Columns, Tokenizing
from tlfast.dataset.format.row_table import encode_rows

TOKENIZER = byte_tokenizer(eos_token="~", pad_token="|")
TOKENIZER.chat_template = TEMPLATE
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {
    "text": "hello there", "prompt": "ab", "answer": "cd", "messages": [{"role": "user", "content": "q"}, ANSWER],
    "label": 1, "score": 0.5,
}  # fmt: skip
COLUMNS = {
    "text": Columns("text"), "label": Columns("text", label="label"), "score": Columns("text", keep=("score",)),
    "prompt": Columns(prompt="prompt", response="answer"), "answer": Columns(prompt="prompt", response="answer"),
    "messages": Columns(messages="messages"),
}  # fmt: skip
ODD = [
    None, 3, 1.5, True, [], {}, [1, 2], ["a"], [None], {"a": 1}, "", " ", "\x00", "\ud800", "é", 2**70, -1, [2**40],
    [-5, 3], [1.5], [True], float("nan"), [[1]], [{"role": "user"}], [ANSWER | {"content": None}], [{"role": None}],
    [ANSWER | {"content": 3}], [ANSWER | {"content": ["x"]}], [ANSWER | {"content": "\ud800"}], [[1], [2]], ["a", 1],
    [ANSWER | {"content": ""}], "a" * 1000, [3] * 500,
]  # fmt: skip


def read(path, columns, policy="skip"):
    """(what a row is made of, by the number of its record; the numbers of those that were skipped), or the error."""
    bad = BadExamples(policy)
    tokenizing = Tokenizing(columns, TOKENIZER, None, bad, last=[1], longest=64, place=str(path))
    reader = ExampleReader(BadExamples(policy, bad), keep=columns.keep)
    records = read_records(str(path), bad, texts=columns.texts, wanted=tokenizing.wanted)
    try:
        examples = list(reader.read(tokenizing.examples(records)))
        kept = {name: reader.rules.kept_type(name) for name in columns.keep}
        encode_rows(examples, [0] * len(examples), {}, kept)  # what can't be written is no row
    except ValueError as error:
        text = str(error)
        assert text.startswith("collect: "), text
        assert "\n" not in text
        assert path.name in text or "the columns must name" in text, text
        return text
    skipped = [start for _, start, _ in reader.bad.skipped]
    labels = {e.id: reader.source.fetch([e.id])[0].get("labels") for e in examples} if reader.source else {}
    made = {e.start: (list(e.input_ids), str(labels.get(e.id)), str(getattr(e, "kept", ""))) for e in examples}
    return made, skipped


def lines(*records):
    return "".join(json.dumps(one) + "\n" for one in records)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", COLUMNS)
def test_an_odd_value_moves_no_other_record(tmp_path, name, first):
    """The odd one is a row of its own, or skipped; the good ones are what they are without it."""
    (tmp_path / "good.jsonl").write_text(lines(GOOD))
    alone = read(tmp_path / "good.jsonl", COLUMNS[name])[0][0]
    path = tmp_path / "odd.jsonl"
    n_skipped = 0
    for value in ODD:
        odd, at = GOOD | {name: value}, 0 if first else 1
        path.write_text(lines(odd, GOOD, GOOD) if first else lines(GOOD, odd, GOOD))
        found = read(path, COLUMNS[name])
        if isinstance(found, str):  # of the first record alone: what kind of thing the field is
            assert first, found
            continue
        made, skipped = found
        assert sorted([*made, *skipped]) == [0, 1, 2], value
        good = {0, 1, 2} - {at}
        if at in made and first and name in ("label", "score"):
            good &= set(made)  # they may be of another kind than the first
        assert {k: row for k, row in made.items() if k in good} == dict.fromkeys(good, alone), value
        n_skipped += len(skipped)
        if skipped:
            assert path.name in read(path, COLUMNS[name], "stop")
    assert n_skipped > 10


WHOLE = json.dumps(GOOD)
FILES = {  # a file, and of which records there are rows, and which are skipped; or what is said
    "cut.jsonl": (f"{WHOLE}\n{WHOLE}"[:-9], ([0], [1])),
    "empty.jsonl": ("", "no records in"),
    "blank.jsonl": ("\n \n", "no records in"),
    "latin.jsonl": (f"{WHOLE}\n".encode() + b'{"text": "\xff"}\n' + f"{WHOLE}\n".encode(), ([0, 2], [1])),
    "mark.jsonl": (f"\ufeff{WHOLE}", ([0], [])),
    "wide.jsonl": (WHOLE.encode("utf-16"), "1 bad example skipped"),
    "zero.jsonl": (f"{WHOLE}\n\0\0\n", ([0], [1])),
    "deep.jsonl": (f"{WHOLE}\n{'[' * 100_000}\n", ([0], [1])),
    "digits.jsonl": (f'{WHOLE}\n{{"text": {"9" * 5000}}}\n', ([0], [1])),
    "twice.jsonl": (f'{WHOLE}\n{{"text": "one", "text": "two"}}\n{{"text": "one", "text": "one"}}', ([0, 2], [1])),
    "inner.jsonl": (f'{WHOLE}\n{{"text": "one", "more": {{"a": 1, "a": 2}}}}', ([0], [1])),
    "lacking.jsonl": (f'{WHOLE}\n{{"label": 1}}\n{{}}\n', ([0], [1, 2])),
    "list.jsonl": ('["a"]\n', "a list, no JSON object"),
    "return.jsonl": (f"{WHOLE}\r{WHOLE}", "1 bad example skipped"),
    "cut.json": (json.dumps([GOOD] * 3)[:-9], "be a readable json file"),
    "empty.json": ("", "be a readable json file"),
    "none.json": ("[]", "hold one list of JSON objects"),
    "mixed.json": (json.dumps([GOOD, 3]), "hold one list of JSON objects"),
    "comma.json": (f"[{WHOLE} {WHOLE}]", "be a readable json file"),
    "open.json": (f"[{WHOLE}, ", "be a readable json file"),
    "tail.json": (f"[{WHOLE}]]", "Extra data"),
    "spaced.json": (f"\n [ {WHOLE} ,\n{WHOLE}\t]\n", ([0, 1], [])),
    "twice.json": ('[{"text": "one", "text": "two"}, {"text": "one"}]', ([1], [0])),
    "among.json": (f'{{"n": [1, 2.5], "of": {{"a": [{WHOLE}]}}, "data": [{WHOLE}, {WHOLE}], "end": 1}}', ([0, 1], [])),
    "two.json": (f'{{"a": [{WHOLE}], "b": [{WHOLE}]}}', "hold one list of JSON objects"),
    "again.json": (f'{{"a": [{WHOLE}], "a": [{WHOLE}, {WHOLE}]}}', ([0, 1], [])),
    "cut_object.json": (f'{{"a": [{WHOLE}, {WHOLE}]', "be a readable json file"),
    "one.json": ('{"text": "abc"}', "hold one list of JSON objects"),
    "header.csv": ("text,label\n", "no records in"),
    "empty.csv": ("", "be a readable csv file"),
    "cells.csv": ("text,n\nabc,1\nabc\nabd,1,2\nabe,3\n", ([0, 1], [3, 4])),  # of rows of the file, the first being 1
    "open.csv": ('text,n\nabc,1\n"abd,2\nabe,3\n', "close each quote, got one that is open to the end, from row 3 on"),
    "twice.csv": ("text,text,n\nabc,abd,1\n", "'text' twice"),
    "other.csv": ("text,n,n\nabc,1,2\n", ([0], [])),
    "nul.csv": ("text,n\na\0c,1\n", ([0], [])),
    "return.csv": ("text,n\r\nabc,1\r\nabd,2\r\n", ([0, 1], [])),
    "latin.csv": (b"text,n\nabc,1\n\xff\xfe,2\n", "be a readable csv file"),
    "wide.csv": ("text,n\nabc,1\n".encode("utf-16"), "be a readable csv file"),
    "long.csv": (f"text,n\n{'a b ' * 600_000},1\nabc,2\n", ([1], [0])),
    "latin.txt": (b"abc\n\xff\n", ([0], [1])),
    "empty.txt": ("", "no records in"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n == "long.csv" else n for n in FILES])
def test_a_hostile_file(tmp_path, name):
    content, wanted = FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read(path, COLUMNS["text"])
    if isinstance(wanted, str):
        assert wanted in found
    else:
        assert (sorted(found[0]), sorted(found[1])) == wanted
        if found[1]:
            assert name in read(path, COLUMNS["text"], "stop")


def test_whole_numbers_are_not_rounded(tmp_path):
    """A column of a table that pyarrow takes for floats."""
    path = tmp_path / "a.csv"
    columns = Columns("text", keep=("score",))
    for cells in (["1234567890123456789012", "1"], ["0.5", "9007199254740993"], ["9007199254740993", "0.5"]):
        path.write_text("text,score\n" + "".join(f"abc,{cell}\n" for cell in cells))
        assert "have whole numbers that a float64 holds, got " in read(path, columns)
    path.write_text("text,score\nabc,9007199254740993\nabc,9007199254740992\n")
    assert "9007199254740993" in read(path, columns)[0][0][2]
    path.write_text("text,score\nabc,9007199254740992\nabc,0.5\n")
    assert "9007199254740992.0" in read(path, columns)[0][0][2]


TABLES = {
    "decimals": ({"score": [Decimal("1.5")] * 2}, "score is a Decimal, not numbers or text"),
    "dates": ({"score": [datetime.date(2020, 1, 1)] * 2}, "score is a date, not numbers or text"),
    "bytes": ({"text": [b"abc", b"\xff"]}, "text is a bytes, no text"),
    "mappings": ({"text": [{"a": 1}] * 2}, "text is a dict, no text"),
    "nulls": ({"text": ["abc", None], "score": [1.0, 2.0]}, ([0], [1])),
    "first null": ({"score": [None, 1.0]}, ([1], [0])),
    "unsigned": ({"score": pa.array([2**63 + 5, 1], pa.uint64())}, ([1], [0])),
    "categories": ({"text": pa.array(["abc", "abd"]).dictionary_encode()}, ([0, 1], [])),
    "large": ({"text": pa.array(["abc", "abd"], pa.large_string())}, ([0, 1], [])),
    "empty": ({"text": pa.array([], pa.string()), "score": pa.array([], pa.float64())}, "no records in"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_of_odd_types(tmp_path, name):
    given, wanted = TABLES[name]
    pq.write_table(pa.table({"text": ["abc", "abd"], "score": [1.0, 2.0]} | given), tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", COLUMNS["score"])
    if isinstance(wanted, str):
        assert wanted in found
    else:
        assert (sorted(found[0]), sorted(found[1])) == wanted


def test_two_columns_of_one_name(tmp_path):
    table = pa.table([["abc"], ["abd"], [1.0]], names=["text", "text", "score"])
    pq.write_table(table, tmp_path / "a.parquet")
    text = "have one column of each name that is asked for, got 'text' twice in 'a.parquet'"
    assert text in read(tmp_path / "a.parquet", COLUMNS["text"])


def test_a_list_is_read_in_parts(tmp_path, monkeypatch):
    """Wherever a part of the file ends, the records are those of json."""
    values = [GOOD | {"text": f"{k}" * k, "more": ["]", "}", {"é": -k / 3}]} for k in range(9)]
    path, wrapped = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False))
    wrapped.write_text(json.dumps({"n": [1e-3, -2], "of": {"a": values}, "data": values, "end": 12}, indent=1))
    for n in (1, 2, 3, 7, 50, 4000):
        monkeypatch.setattr("tlfast.collecting.json_parts._CHARACTERS", n)
        assert [record.values for record in read_records(str(path), BadExamples())] == values
        assert [record.values for record in read_records(str(wrapped), BadExamples())] == values
    path.write_text(path.read_text()[:-30])
    records = read_records(str(path), BadExamples())
    assert next(records).values == values[0], "before the rest is looked at"
    with pytest.raises(ValueError, match="be a readable json file"):
        list(records)


def test_a_table_of_text_is_what_it_is_whole(tmp_path):
    """The types of its columns are those of pyarrow, which looks at all of it; whatever is asked for."""
    rows = [
        f'"a{k}\nb",{k},2020-01-01,{"true" if k % 2 else "false"},{k if k < 2500 else "x"},,{k / 4}'
        for k in range(3000)
    ]
    path = tmp_path / "a.csv"
    path.write_text("text,n,date,bool,late,null,float\n" + "\n".join([*rows[:9], "one,two", *rows[9:]]))
    records = list(read_records(str(path), bad := BadExamples("skip"), texts=("text",)))
    assert [k for _, k, _ in bad.skipped] == [11]
    truth = {
        "text": "a7\nb",
        "n": 7,
        "date": datetime.date(2020, 1, 1),
        "bool": True,
        "late": "7",
        "null": None,
        "float": 1.75,
    }
    assert (records[7].values, records[7].start, len(records)) == (truth, 7, 3000)
    some = list(read_records(str(path), BadExamples("skip"), texts=("text",), wanted={"text", "late"}))
    assert list(some[0].values) == list(truth), "of the first all names"
    assert [record.values for record in some[1:]] == [
        {"text": record.values["text"], "late": record.values["late"]} for record in records[1:]
    ]
