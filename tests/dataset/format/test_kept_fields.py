"""Fields that row tables keep: written with their types, read again, refused where they are not so."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tlfast.dataset import (
    DatasetError,
    DatasetWriter,
    Example,
    FieldExample,
    Plan,
    concat_datasets,
    export_dataset,
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


def test_a_text_that_would_unpack_to_gigabytes_is_refused(tmp_path):
    dataset = write(tmp_path / "d", fields={"name": "string"}, plan=Plan(2000, 2000))
    path = tmp_path / "d" / "rows" / "u000000.parquet"
    table = pq.read_table(path)
    huge = pa.array(["x" * (1 << 20)] * 2000, pa.string())
    at = table.schema.get_field_index("name")
    pq.write_table(table.set_column(at, table.schema.field(at), huge), path, compression="zstd")
    commit = tmp_path / "d" / "commits" / "u000000.json"
    said = json.loads(commit.read_text())
    said["files"][1]["bytes"] = path.stat().st_size
    said.pop("checksum", None)
    commit.write_text(json.dumps(said))
    with pytest.raises(DatasetError, match=r"unpacks to \d+ bytes"):
        open_dataset(dataset).examples[0]


def test_datasets_that_keep_others_are_read_together_by_what_they_share(tmp_path):
    both = concat_datasets([open_dataset(write(tmp_path / "a")), open_dataset(write(tmp_path / "b"))])
    assert both.examples[7]["name"] == "xx"
    kept, plain = open_dataset(tmp_path / "a"), open_dataset(write(tmp_path / "c", fields=None))
    mixed = concat_datasets([kept, plain])
    assert len(mixed) == 10
    assert "name" not in mixed.fields


def test_an_export_has_them(tmp_path):
    dataset = open_dataset(write(tmp_path / "d"))
    export_dataset(dataset, tmp_path / "e.parquet", to="parquet")
    parts = list((tmp_path / "e.parquet").rglob("*.parquet")) if (tmp_path / "e.parquet").is_dir() else None
    table = pq.read_table(parts[0] if parts else tmp_path / "e.parquet")
    assert table.column("name").to_pylist() == ["x" * i for i in range(5)]
