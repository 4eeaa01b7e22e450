"""Fields that row tables keep: written with their types, read again, refused where they are not so."""

from __future__ import annotations

import json

import datasets
import google_crc32c
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tlfast.cli import main
from tlfast.dataset import (
    DatasetError,
    DatasetWriter,
    Example,
    FieldExample,
    Plan,
    RowDataset,
    ShuffledBatches,
    concat_datasets,
    export_dataset,
    merge_datasets,
    open_dataset,
)
from tlfast.dataset.format.kept_fields import TYPES, check_kept
from tlfast.dataset.format.strict_json import checksum_of, sha256_of

FIELDS = {"label": "int64", "weight": "float64", "ok": "bool", "name": "string", "spans": "list<int64>"}
PLAN = Plan(5, 2)
COLUMNS = {"h": (torch.float32, (2,))}


def kept_of(i):
    return {"label": i - 1, "weight": i / 2, "ok": i % 2 == 0, "name": "x" * i, "spans": list(range(i))}


def write(out, fields=FIELDS, kept=kept_of, plan=PLAN):
    with DatasetWriter(out, header={}, columns=COLUMNS, plan=plan, fields=fields) as writer:
        for unit in plan.units:
            numbers = range(unit.start, unit.stop)
            examples = [FieldExample(i, [1, 2], "a", i, 2, kept(i)) for i in numbers]
            writer.write_unit(unit, {"h": torch.ones(len(unit), 2)}, examples)
    return out


def test_they_come_back_with_their_types(tmp_path):
    dataset = open_dataset(write(tmp_path / "d"))
    for i in range(5):
        row = dataset.examples[i]
        assert {name: row[name] for name in FIELDS} == kept_of(i)
    assert dataset.fields[-5:] == list(FIELDS)
    assert dataset.verify().ok
    assert len(dataset.filter("weight >= 1 and name != 'xx'")) == 2
    table = pq.read_table(tmp_path / "d" / "rows" / "u000000.parquet")
    assert table.schema.field("label").type == pa.int64()
    assert not table.schema.field("spans").nullable


def test_a_dataset_that_keeps_some_is_of_version_3_and_others_are_as_before(tmp_path):
    said = json.loads((write(tmp_path / "kept") / "dataset.json").read_text())
    assert (said["version"], said["fields"][0]) == (3, {"name": "label", "type": "int64"})
    plain = json.loads((write(tmp_path / "plain", fields=None) / "dataset.json").read_text())
    assert plain["version"] == 1
    assert "fields" not in plain


def test_other_fields_are_another_dataset(tmp_path):
    write(tmp_path / "d")
    with pytest.raises(DatasetError, match=r"fields\[0\]\.type: 'int64' there, 'float64' here"):
        DatasetWriter(tmp_path / "d", header={}, columns=COLUMNS, plan=Plan(5, 2), fields=FIELDS | {"label": "float64"})


def test_an_extension_keeps_the_same(tmp_path):
    write(tmp_path / "d")
    with DatasetWriter(tmp_path / "d", header={}, columns=COLUMNS, plan=Plan(5, 2), fields=FIELDS) as writer:
        writer.extend(1, {})
        unit = writer.plan.unit(3)
        writer.write_unit(unit, {"h": torch.ones(1, 2)}, [FieldExample(5, [1], "b", 0, 1, kept_of(5))])
    assert open_dataset(tmp_path / "d").examples[5]["name"] == "xxxxx"


@pytest.mark.parametrize(
    "kept, text",
    [
        ({"label": 1}, "field 'weight' must be float64 in each example, got none in an example"),
        (kept_of(1) | {"label": None}, "field 'label' must be int64 in each example, got none"),
        (kept_of(1) | {"label": "a"}, "field 'label' must be int64"),
        (kept_of(1) | {"label": 2**63}, "field 'label' must be int64"),
        (kept_of(1) | {"spans": [1, None]}, "nulls|hold ints"),
    ],
)
def test_examples_without_them_are_refused(tmp_path, kept, text):
    with pytest.raises(DatasetError, match=text):
        write(tmp_path / "d", kept=lambda i: kept)
    assert not list((tmp_path / "d" / "commits").iterdir())


def test_an_example_of_tokens_alone_has_none(tmp_path):
    writer = DatasetWriter(tmp_path / "d", header={}, columns=COLUMNS, plan=Plan(1, 1), fields={"label": "int64"})
    with pytest.raises(DatasetError, match=r"got none in an example\. Give FieldExamples"):
        writer.write_unit(writer.plan.unit(0), {"h": torch.ones(1, 2)}, [Example(0, [1], "a", 0, 1)])


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"label": "int8"}, f"fields must map names to {', '.join(TYPES)}, got 'label': 'int8'"),
        ({"": "int64"}, "fields must map names"),
        ({"id": "int64"}, "fields must have other names than id, input_ids, .*, got 'id'. Give it another"),
        ({"norm:h": "int64"}, "fields must have other names"),
        ({"missing": "int64"}, "fields must have other names"),
        (["label"], "fields must be a mapping, got list"),
    ],
)
def test_names_and_types_that_no_row_table_has_are_refused(fields, text):
    with pytest.raises(DatasetError, match=text):
        check_kept("DatasetWriter", fields)


def change(path, edit):
    """Edit a dataset.json so that its hashes are right."""
    said = json.loads(path.read_text())
    del said["checksum"], said["config_hash"]
    edit(said)
    identity = {key: said[key] for key in ("format", "version", "header", "columns", "plan", "fields") if key in said}
    said["config_hash"] = sha256_of(identity)
    said["checksum"] = checksum_of(said)
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    "edit, text",
    [
        (lambda d: d.update(fields=[]), "list fields with name and type"),
        (lambda d: d.update(fields=[{"name": "a"}]), "list fields with name and type"),
        (lambda d: d.update(fields=[{"name": "a", "type": "int64"}] * 2), "list fields with name and type"),
        (lambda d: d.update(fields=[{"name": "a", "type": "int9"}]), "map names to"),
        (lambda d: d.update(fields=3), "list fields with name and type"),
    ],
)
def test_a_description_that_lists_none_or_others_is_refused(tmp_path, edit, text):
    change(write(tmp_path / "d") / "dataset.json", edit)
    with pytest.raises(DatasetError, match=text):
        open_dataset(tmp_path / "d")


def lie(folder, edit):
    """Write another row table of the first unit, and let its commit say so: only what it holds is wrong."""
    path, commit = folder / "rows" / "u000000.parquet", folder / "commits" / "u000000.json"
    pq.write_table(edit(pq.read_table(path)), path, compression="zstd")
    said = json.loads(commit.read_text())
    said["files"][1]["bytes"] = path.stat().st_size
    said["files"][1]["crc32c"] = f"{google_crc32c.value(path.read_bytes()):08x}"
    commit.write_text(json.dumps(said))


def replaced(name, values, kind, nullable=False):
    def edit(table):
        return table.set_column(table.schema.names.index(name), pa.field(name, kind, nullable), pa.array(values, kind))

    return edit


def renamed(table):
    return table.rename_columns([{"label": "lable"}.get(name, name) for name in table.column_names])


def swapped(table):
    names = table.column_names
    at = names.index("label")
    return table.select([*names[:at], names[at + 1], names[at], *names[at + 2 :]])


LIES = {
    "another type": (replaced("label", [1.0, 2.0], pa.float64()), "rows of"),
    "a narrower type": (replaced("label", [1, 2], pa.int32()), "rows of"),
    "a text for a number": (replaced("label", ["1", "2"], pa.string()), "rows of"),
    "a number for a text": (replaced("name", [1, 2], pa.int64()), "rows of"),
    "nulls": (replaced("label", [1, None], pa.int64(), True), "nulls"),
    "no text": (replaced("name", ["a", None], pa.string(), True), "nulls"),
    "lists with nulls": (replaced("spans", [[1, None], []], pa.list_(pa.int64()), True), "rows of"),
    "no list": (replaced("spans", [1, 2], pa.int64()), "rows of"),
    "texts that are none": (replaced("name", [b"\xff\xfe", b"a"], pa.binary()), "rows of"),
    "left out": (lambda table: table.drop_columns(["label"]), "rows of"),
    "one more": (lambda table: table.append_column("extra", pa.array([1, 2])), "rows of"),
    "another name": (renamed, "rows of"),
    "another order": (swapped, "rows of"),
    "a row too few": (lambda table: table.slice(0, 1), "1 rows of"),
}


@pytest.mark.parametrize("edit, text", LIES.values(), ids=LIES)
def test_a_row_table_that_lies_about_them_is_refused(tmp_path, edit, text):
    lie(write(tmp_path / "d"), edit)
    dataset = open_dataset(tmp_path / "d")
    rule = "must hold examples 0..1 and the norms of 1 points and 5 fields, got"
    for read in (lambda: dataset.examples[0], lambda: dataset.filter("label > 0"), dataset.to_pandas):
        with pytest.raises(DatasetError, match=f"(?s){rule}.*{text}"):
            read()
    assert [problem.unit for problem in dataset.verify().problems] == ["u000000"]
    assert open_dataset(tmp_path / "d").examples[2]["label"] == 1  # the other units are as they were


def test_a_true_one_that_is_written_again_is_taken(tmp_path):
    lie(write(tmp_path / "d"), lambda table: table)
    assert open_dataset(tmp_path / "d").examples[1]["label"] == 0
    assert open_dataset(tmp_path / "d").verify().ok


@pytest.mark.long
def test_a_text_that_would_unpack_to_gigabytes_is_refused(tmp_path):
    dataset, n = write(tmp_path / "d", fields={"name": "string"}, plan=Plan(2000, 2000)), 2000
    huge = pa.repeat("x" * (1 << 20), n)
    lie(dataset, lambda table: table.set_column(len(table.schema) - 1, table.schema.field("name"), huge))
    with pytest.raises(DatasetError, match=r"unpacks to \d+ bytes"):
        open_dataset(dataset).examples[0]


# Views, and what is made of them.


def test_conditions_columns_and_batches_have_them(tmp_path, capsys):
    dataset = open_dataset(write(tmp_path / "d"))
    assert dataset.kept == FIELDS
    assert dataset.info()["kept"] == FIELDS
    assert main(["info", str(tmp_path / "d")]) == 0
    assert (
        "\nkept          label int64, weight float64, ok bool, name string, spans list<int64>\n"
        in capsys.readouterr().out
    )
    assert dataset.filter("label >= 1 and ok").ids.tolist() == [2, 4]
    assert dataset.filter("'xxx' in name or weight < 0.5").ids.tolist() == [0, 3, 4]
    assert dataset.filter(lambda row: len(row["spans"]) == 3).ids.tolist() == [3]
    with pytest.raises(ValueError, match=r"a number and text can't be compared"):
        dataset.filter("name > 3")
    frame = dataset.select([4, 1]).to_pandas()
    assert frame["label"].tolist() == [3, 0]
    assert frame["spans"].map(list).tolist() == [[0, 1, 2, 3], [0]]
    found = dataset.to_hf()
    assert found.features["weight"].dtype == "float64"
    assert found[3]["name"] == "xxx"
    view = dataset.with_fields("h", *FIELDS)
    (batch,) = ShuffledBatches(view, 5, shuffle=False)
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [-1, 0, 1, 2, 3]
    assert batch["ok"].dtype == torch.bool
    assert batch["name"] == ["x" * i for i in range(5)]
    assert [part.tolist() for part in batch["spans"]] == [list(range(i)) for i in range(5)]
    assert RowDataset(view)[2]["weight"] == 1.0


def test_datasets_that_keep_others_are_read_together_by_what_they_share(tmp_path):
    kept, plain = open_dataset(write(tmp_path / "a")), open_dataset(write(tmp_path / "c", fields=None))
    both = concat_datasets([kept, open_dataset(write(tmp_path / "b"))])
    assert both.examples[7]["name"] == "xx"
    assert both.filter("label == 3").examples[1]["label"] == 3
    fewer = open_dataset(write(tmp_path / "e", fields={"label": "int64", "ok": "bool"}))
    mixed = concat_datasets([kept, fewer])
    assert mixed.fields[-2:] == ["label", "ok"]
    assert mixed.to_pandas()["label"].tolist() == [-1, 0, 1, 2, 3] * 2
    assert set(mixed.examples[8]) & set(FIELDS) == {"label", "ok"}
    with pytest.raises(ValueError, match=r"name values that rows have, got name\. There are flags, id, "):
        mixed.filter("name == 'x'")
    assert not set(concat_datasets([kept, plain]).fields) & set(FIELDS)


def test_a_field_of_two_types_is_no_field_of_both(tmp_path):
    one = open_dataset(write(tmp_path / "a", fields={"label": "int64"}))
    other = open_dataset(write(tmp_path / "b", fields={"label": "float64"}, kept=lambda i: {"label": i / 2}))
    text = r"field 'label' must be of one type in all datasets, got int64 in dataset 1 and float64 in dataset 2\. They"
    with pytest.raises(DatasetError, match=f"concat_datasets: {text}"):
        concat_datasets([one, other.select([1])])
    with pytest.raises(DatasetError, match=f"merge_datasets: {text}"):
        merge_datasets(tmp_path / "m", [one, other])
    assert not (tmp_path / "m").exists()


def test_merged_datasets_keep_the_same(tmp_path):
    merged = merge_datasets(
        tmp_path / "m", [write(tmp_path / "a"), write(tmp_path / "b", kept=lambda i: kept_of(i + 5))]
    )
    assert [row["label"] for row in merged.examples] == list(range(-1, 9))
    assert open_dataset(tmp_path / "m").filter("label > 6").ids.tolist() == [8, 9]
    write(tmp_path / "c", fields={name: kind for name, kind in FIELDS.items() if name != "ok"})
    text = r"field 'ok' must be kept by all datasets, got in dataset 1 alone of datasets 1 and 2\. A merged dataset has"
    with pytest.raises(DatasetError, match=text):
        merge_datasets(tmp_path / "n", [tmp_path / "a", tmp_path / "c"])
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("form", ["parquet", "arrow", "hf"])
def test_an_export_has_them(tmp_path, form):
    out = export_dataset(open_dataset(write(tmp_path / "d")).select([4, 0, 2]), tmp_path / "e", to=form)
    if form == "hf":
        table = datasets.load_from_disk(str(out)).with_format("arrow")[:]
    else:
        table = pq.read_table(out) if form == "parquet" else pa.ipc.open_file(str(out)).read_all()
    for name in FIELDS:
        assert table.column(name).to_pylist() == [kept_of(i)[name] for i in (4, 0, 2)], name
