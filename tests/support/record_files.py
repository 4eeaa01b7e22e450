"""One table of records as files of every kind that the command reads, and tiny models of each task beside them."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from task_models import task_model
from tiny_models import byte_tokenizer, save_model
from transformers.utils import logging

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
N = 12


def record(k):
    """One record: a prompt, an answer, a conversation, a label, and what may be kept."""
    prompt, answer = f"what is {k}+1? ", f"it is {k + 1}, {'really ' * (k % 4)}"
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}] * (k % 2)
    return {
        "text": prompt + answer, "prompt": prompt, "answer": answer, "messages": messages, "label": k % 3,
        "mood": ["glad", "sad", "odd"][k % 3], "score": k / 4, "topic": f"t{k % 2}",
    }  # fmt: skip


RECORDS = [record(k) for k in range(N)]
FLAT = [{name: value for name, value in one.items() if name != "messages"} for one in RECORDS]


def _write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(FLAT[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(FLAT)


def _write_arrow(path, stream):
    table = pa.Table.from_pylist(RECORDS)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


def _as_folder(path):
    path.mkdir()
    (path / "a.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS[:5]))
    (path / "b.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS[5:]))


KINDS = {
    "r.jsonl": lambda path: path.write_text("".join(json.dumps(one) + "\n\n" for one in RECORDS)),
    "r.json": lambda path: path.write_text(json.dumps(RECORDS)),
    "nested.json": lambda path: path.write_text(json.dumps({"version": 1, "data": RECORDS})),
    "r.csv": _write_csv,
    "r.tsv": lambda path: _write_csv(path, "\t"),
    "r.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=5),
    "r.arrow": lambda path: _write_arrow(path, True),
    "r.feather": lambda path: _write_arrow(path, False),
    "files": _as_folder,
    "saved": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(str(path)),
    "splits": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(RECORDS)}).save_to_disk(str(path)),
}


def save_records(folder, *names):
    """The records in files of these names, of `KINDS`."""
    folder.mkdir(exist_ok=True)
    for name in names or KINDS:
        KINDS[name](folder / name)
    return folder


def save_task_model(folder, kind, head, **settings):
    """A tiny model of a task over bytes, with a tokenizer that has a chat template and an end of text."""
    logging.disable_progress_bar()
    model = task_model(kind, head, **settings)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder):
    tokenizer = byte_tokenizer(eos_token="~", pad_token="|")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def save_chat_model(folder):
    """The tiny GPT-2 over bytes, with that tokenizer."""
    save_model(folder)
    save_tokenizer(folder)
    return folder
