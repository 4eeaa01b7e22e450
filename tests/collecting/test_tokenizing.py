"""Examples out of records: tokens, labels, conversations, and the reasons why a record is none."""

from __future__ import annotations

import pytest
from record_files import TEMPLATE
from tiny_models import byte_tokenizer
from transformers import PreTrainedTokenizerFast

from tlfast.collecting import tokenizing
from tlfast.collecting.chat import chat_tokens, check_template
from tlfast.collecting.examples import ExampleReader
from tlfast.collecting.records import Record
from tlfast.collecting.skipped import BadExamples
from tlfast.collecting.tasks import CLASSIFIER, SEQ2SEQ
from tlfast.collecting.tokenizing import Columns, Tokenizing, is_plain
from tlfast.dataset import Example

TOKENIZER = byte_tokenizer()
CHAT = byte_tokenizer()
CHAT.chat_template = TEMPLATE


def encode(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def made(columns, values, task=None, policy="skip", tokenizer=TOKENIZER, most=None, **settings):
    bad = BadExamples(policy)
    records = [Record(one, "a.jsonl", k) for k, one in enumerate(values)]
    found = list(Tokenizing(columns, tokenizer, task, bad, **settings).examples(records, most))
    return found, [reason for _, _, reason in bad.skipped]


def test_tokens_alone_are_plain_examples():
    found, _ = made(Columns("text"), [{"text": "ab"}, {"text": "cde"}], first=[7], last=[9])
    assert found == [
        Example(0, found[0].input_ids, "a.jsonl", 0, 4), Example(1, found[1].input_ids, "a.jsonl", 1, 5),
    ]  # fmt: skip
    assert list(found[1].input_ids) == [7, *encode("cde"), 9]


def test_a_prompt_has_no_labels_and_a_response_has():
    values = [{"q": "ab", "a": "cd", "n": 3}]
    (example,), _ = made(Columns(prompt="q", response="a", keep=("n",)), values, first=[7], last=[9])
    assert list(example["input_ids"]) == [7, *encode("ab"), *encode("cd"), 9]
    assert example["labels"].tolist() == [-100, -100, -100, *encode("cd"), 9]
    assert (example["source"], example["start"], example["n"]) == ("a.jsonl", 0, 3)


def test_tokens_that_are_given_get_none_put_to_them():
    (example,), _ = made(Columns("ids", label="labels"), [{"ids": [1, 2], "labels": [-100, 2]}], first=[7], last=[9])
    assert list(example["input_ids"]) == [1, 2]
    assert example["labels"].tolist() == [-100, 2]


def test_a_decoder_has_labels_of_its_own():
    (example,), _ = made(Columns(prompt="q", response="a"), [{"q": "abc", "a": "d"}], SEQ2SEQ, last=[9])
    assert (list(example["input_ids"]), example["labels"].tolist()) == (encode("abc"), encode("d"))


REASONS = {
    "no text": (Columns("t"), [{"t": 3}], {}, "t is a int, no text"),
    "none": (Columns("t"), [{"t": None}], {}, "t is empty, no text"),
    "absent": (Columns("t"), [{"u": 3}], {}, "t is empty, no text"),
    "negative tokens": (Columns("t"), [{"t": [-1]}], {}, "t is a list, no text"),
    "too long": (Columns("t"), [{"t": "abc"}], {"longest": 2}, "3 tokens, more than 2"),
    "labels of another length": (Columns("t", label="l"), [{"t": "ab", "l": [1]}], {}, "1 labels for 2 tokens"),
    "no label": (Columns("t", label="l"), [{"t": "ab", "l": None}], {}, "no label in l"),
    "a label of no name": (Columns("t", label="l"), [{"t": "ab", "l": "x"}], {"task": CLASSIFIER}, "label 'x' is none"),
    "labels of nothing": (Columns("t", label="l"), [{"t": "ab", "l": [-100, -100]}], {}, "no label among its 2 tokens"),
    "an answer that is cut": (
        Columns(prompt="q", response="a"), [{"q": "abc", "a": "d"}], {"longest": 3, "truncate": True},
        "no label among its 3 tokens",
    ),
    "a filter that fails": (Columns("t"), [{"t": "ab", "n": None}], {"condition": "n > 3"}, "the filter fails: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_a_record_that_is_no_example_is_skipped_with_the_reason(case):
    columns, values, settings, reason = REASONS[case]
    good = {"t": "ab", "q": "a", "a": "b", "l": 1 if "task" in settings else [1, 2], "n": 4}
    found, reasons = made(columns, [good, *values, good], **settings)
    assert len(found) == 2
    assert len(reasons) == 1
    assert reasons[0].startswith(reason)
    with pytest.raises(
        ValueError, match=r"^collect: a record must be an example, got .*, in record 1 of a\.jsonl\. Corr"
    ):
        made(columns, [good, *values, good], policy="stop", **settings)


def test_a_column_that_the_first_record_lacks_is_named():
    text = r"^collect: the columns must name columns of the data \(u\), got 't'\. Correct the name\.$"
    with pytest.raises(ValueError, match=text):
        made(Columns("t"), [{"u": "ab"}])


def test_length_is_that_of_the_tokens():
    values = [{"t": "a" * n} for n in range(1, 9)]
    assert [len(e.input_ids) for e in made(Columns("t"), values, condition="3 < length <= 6")[0]] == [4, 5, 6]
    with pytest.raises(ValueError, match="filter must mean the tokens by length, got a column of that name"):
        made(Columns("t"), [{"t": "a", "length": 3}], condition="length > 3")
    with pytest.raises(ValueError, match=r"dataset must hold examples, got 8 records without\. Look at the columns"):
        made(Columns("t"), values, condition="length > 99")


def test_no_more_are_read_than_are_asked_for():
    read = []

    def records():
        for k in range(5000):
            read.append(k)
            yield Record({"t": "ab"}, "a", k)

    found = list(Tokenizing(Columns("t"), TOKENIZER, None, BadExamples()).examples(records(), 700))
    assert [example.id for example in found] == list(range(700))
    assert len(read) == 1024


class Lowered(PreTrainedTokenizerFast):
    """One whose class does something to a text first."""

    def __call__(self, text, **settings):
        return super().__call__([one.lower() for one in text], **settings)


def test_many_texts_are_encoded_as_one_alone():
    values = [{"t": f"Number {k} \u00e9\u4e2d" * (k % 5 + 1)} for k in range(1100)]
    for task in (None, CLASSIFIER):
        special = byte_tokenizer(bos_token="<", cls_token="(", sep_token=")")
        found, _ = made(Columns("t"), values, task, tokenizer=special)
        wanted = [special(one["t"], add_special_tokens=task is not None)["input_ids"] for one in values]
        assert [list(example.input_ids) for example in found] == wanted
    lowered = Lowered(tokenizer_object=TOKENIZER.backend_tokenizer)
    assert (is_plain(TOKENIZER), is_plain(lowered)) == (True, False)
    found, _ = made(Columns("t"), values, tokenizer=lowered)
    assert [list(example.input_ids) for example in found] == [encode(one["t"].lower()) for one in values]


# Conversations.


def turns(*roles):
    return [{"role": role, "content": f"{role[0]}{k}"} for k, role in enumerate(roles)]


def test_labels_are_the_assistants_turns_to_their_ends():
    ids, labels = chat_tokens(CHAT, turns("system", "user", "assistant", "user", "assistant"))
    assert TOKENIZER.decode(ids) == "<system>s0</><user>u1</><assistant>a2</><user>u3</><assistant>a4</>"
    assert TOKENIZER.decode([label for label in labels if label != -100]) == "a2</>a4</>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "messages are no list, or an empty one"),
        ("hello", "messages are no list, or an empty one"),
        ([{"from": "human", "value": "x"}], "a message without role and content"),
        (["hello"], "a message without role and content"),
        (turns("user"), "no turn of the assistant"),
    ],
)
def test_what_is_no_conversation(messages, reason):
    with pytest.raises(ValueError, match=f"^{reason}$"):
        chat_tokens(CHAT, messages)
    found, reasons = made(Columns(messages="m"), [{"m": turns("user", "assistant")}, {"m": messages}], tokenizer=CHAT)
    assert (len(found), reasons) == (1, [reason])


def test_a_template_that_writes_turns_otherwise_later_says_what_it_needs():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content if loop.last else 'cut' }};{% endfor %}"
    with pytest.raises(
        ValueError, match=r"^the chat template writes a turn otherwise where others follow, and has no \{%"
    ):
        chat_tokens(tokenizer, turns("user", "assistant", "user", "assistant"))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"^the chat template refuses it: roles must alternate$"):
        chat_tokens(tokenizer, turns("user", "assistant"))


def test_a_tokenizer_without_a_template_is_refused():
    with pytest.raises(
        ValueError, match=r"tokenizer must have a chat template, got .* without one. Take a chat model's"
    ):
        check_template(TOKENIZER)
    check_template(CHAT)


def test_what_is_bad_is_told_in_the_order_of_reading(monkeypatch):
    """Whatever is read ahead; an error of reading comes behind the examples before it."""
    monkeypatch.setattr(tokenizing, "_AT_ONCE", 2)
    bad = BadExamples("skip")

    def records():
        for k in range(7):
            if k in (1, 4, 6):
                bad.leave_out("a", k, "no record")
            else:
                yield Record({"t": None if k in (2, 5) else "abc"}, "a", k)
        raise OSError("the disk")

    found = []
    with pytest.raises(OSError, match="the disk"):
        found += [example.start for example in Tokenizing(Columns("t"), TOKENIZER, None, bad).examples(records())]
    assert [start for _, start, _ in bad.skipped] == [1, 2, 4, 5, 6]
    found = Tokenizing(Columns("t"), TOKENIZER, None, BadExamples("skip", bad)).examples(records())
    assert [next(found).start for _ in range(2)] == [0, 3]


def parts_of(reader):
    """All that a reader knows of its examples, and the bytes that it spooled."""
    said, numbers, spools = reader.examples.to_parts()
    if reader.source is not None:
        spools["fields"] = reader.source.spool
    bytes_of = {name: (list(spool.ends), b"".join(spool.blocks())) for name, spool in spools.items()}
    return said, {name: list(values) for name, values in numbers.items()}, bytes_of, reader.rules.to_json()


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bcd"}] * 2
LINES = [
    {"t": "abcdef"[: k % 7], "q": "xyz"[: k % 3 + 1], "a": "uvw"[: k % 4], "m": TURNS[: 1 + k % 5]} for k in range(40)
]


@pytest.mark.parametrize("longest, least", [(None, 1), (4, 2), (2, 2)])
@pytest.mark.parametrize(
    "columns, task",
    [
        (Columns("t"), None), (Columns(prompt="q", response="a"), None), (Columns(prompt="q", response="a"), SEQ2SEQ),
        (Columns(messages="m"), None), (Columns("t", keep=("q",)), None), (Columns("t", label="a"), CLASSIFIER),
    ],
)  # fmt: skip
def test_many_at_once_are_what_they_are_one_by_one(columns, task, longest, least, monkeypatch):
    monkeypatch.setattr(tokenizing, "_AT_ONCE", 6)
    records = [Record(one, f"{k // 15}.jsonl", k) for k, one in enumerate(LINES)]
    found, taken = [], []
    if longest is not None and columns.messages:
        longest = len(chat_tokens(CHAT, TURNS[:longest])[0])

    def noted(self, texts):
        taken.append(take(self, texts))
        return taken[-1]

    take = ExampleReader._take_together
    monkeypatch.setattr(ExampleReader, "_take_together", noted)
    for way in ("examples", "together"):
        bad, apart = BadExamples("skip"), frozenset({"labels"} if task == SEQ2SEQ else ())
        made = Tokenizing(columns, CHAT, task, bad, label_ids={"u": 0, "uv": 1})
        reader = ExampleReader(BadExamples("skip", bad), least, longest, keep=columns.keep, apart=apart)
        reader.read(getattr(made, way)(records))
        assert bool(taken) == (way == "together" and not columns.keep and not columns.label)
        found.append((*parts_of(reader), reader.bad.skipped))
    assert found[0] == found[1]
    if taken and longest is None:
        assert any(taken)
