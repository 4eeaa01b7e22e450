"""Merged datasets: one dataset out of several by reference, read, verified and told as one; what must not be merged."""

import json
import shutil
from itertools import chain

import pytest
import torch
from dataset_cases import COLUMNS, HEADER, PLAN, content, examples, make_dataset, make_writer, rows_of, same_bits, truth
from kinds_cases import make_writer as kinds_writer
from kinds_cases import write_units as write_kinds

from tlfast.cli import main
from tlfast.dataset import (
    Column,
    DatasetError,
    DatasetWriter,
    Example,
    Plan,
    ShuffledBatches,
    join_datasets,
    merge_datasets,
    open_dataset,
    repair_dataset,
    verify_dataset,
)
from tlfast.dataset.format.strict_json import to_file
from tlfast.report import write_report


@pytest.fixture
def two(tmp_path):
    """Two runs of the same columns and other rows, in folders a and b."""
    for name, seed in (("a", 0), ("b", 1)):
        writer, tensors = make_writer(tmp_path / name), truth(seed=seed)
        for unit in PLAN.units:
            writer.write_unit(unit, rows_of(unit, tensors), examples(unit))
    return tmp_path


@pytest.fixture
def merged(two):
    return merge_datasets(two / "m", [two / "a", two / "b"])


def test_rows_of_both_behind_each_other(merged, two):
    before = {name: content(two / name) for name in "ab"}
    for ds in (merged, open_dataset(two / "m"), open_dataset(two / "m", access="pread")):
        assert type(ds).__name__ == "MergedDataset"
        assert ds.ids.tolist() == list(range(22))
        assert ds.rows_of([21, 0]).tolist() == [21, 0]
        assert [row["id"] for row in ds.examples] == list(range(22))
        for point in COLUMNS:
            assert same_bits(ds[point][:], torch.cat([truth(seed=seed)[point] for seed in (0, 1)]))
        assert ds.examples[12]["source"] == open_dataset(two / "b").examples[1]["source"]
        assert ds.filter("id > 12").ids.tolist() == list(range(13, 22))
        assert ds.filter("id > 12").examples[0]["id"] == 13
    assert sorted(path.name for path in (two / "m").iterdir()) == ["merged.json"]
    assert {name: content(two / name) for name in "ab"} == before


def test_it_is_told_and_verified(merged, two, capsys):
    info = merged.info()
    parts = [open_dataset(two / name).info() for name in "ab"]
    for key in ("rows", "planned_rows", "units", "planned_units", "bytes", "non_finite_rows"):
        assert info[key] == sum(part[key] for part in parts)
    assert info["header"] == HEADER == merged.header
    assert merged.skipped == []
    assert repr(merged).startswith(f"MergedDataset('{two}/m'): 22 rows of 2 datasets")
    assert merged.verify().ok
    assert str(merged.verify()) == str(verify_dataset(two / "m"))
    assert merged.verify().n_units == 6
    assert main(["info", str(two / "m")]) == 0
    shown = capsys.readouterr().out
    assert f"{two}/m: 22 of 22 rows in 6 units" in shown
    assert f"{two}/b: 11 of 11 rows in 3 units" in shown
    assert main(["info", "--json", str(two / "m")]) == 0
    assert len(json.loads(capsys.readouterr().out)["parts"]) == 2
    assert main(["verify", str(two / "m")]) == 0
    assert "ok: 22 rows in 6 units" in capsys.readouterr().out
    assert main(["export", str(two / "m"), "--to", "parquet"]) == 0
    assert (two / "m.parquet").is_file()


def test_damage_is_found_where_it_is(merged, two, capsys):
    path = two / "b" / "data" / "u000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (problem,) = merged.verify().problems
    assert problem.unit == "../b/u000001"
    assert problem.damaged
    assert main(["verify", str(two / "m")]) == 1
    assert "../b/u000001: verify: " in capsys.readouterr().out
    repair = repair_dataset(two / "m")
    assert repair.ok
    assert repair.dropped == ["../b/u000001"]
    assert [unit.name for unit in open_dataset(two / "b", partial=True).units] == ["u000000", "u000002"]
    assert len(open_dataset(two / "a").units) == 3
    shutil.rmtree(two / "b")
    (problem,) = verify_dataset(two / "m").problems
    assert problem.unit == "../b"
    assert repair_dataset(two / "m").left == [problem]
    with pytest.raises(
        DatasetError, match=r"open_dataset: path must be the folder of a dataset, got .*b, no such folder"
    ):
        open_dataset(two / "m")


def test_batches_go_on_and_merged_datasets_join(merged, two):
    first = ShuffledBatches(merged, 4, seed=2, points=["loss"])
    iterator = iter(first)
    begun = [next(iterator)["id"].tolist() for _ in range(2)]
    rest = ShuffledBatches(open_dataset(two / "m"), 4, seed=2, points=["loss"])
    rest.load_state_dict(first.state_dict())
    assert sorted(chain(*begun, *(batch["id"].tolist() for batch in rest))) == list(range(22))
    queries = torch.randn(3, 6)
    found = merged.search(queries, 4, point="blocks.0.hook_resid_post")
    assert torch.equal(found.ids, found.indices)
    with pytest.raises(AttributeError, match="DatasetView: plan must be asked of a dataset, got a view of 2"):
        merged.plan  # noqa: B018 (it raises)
    with pytest.raises(DatasetError, match="write_report: path must be one dataset, got several that were merged in"):
        write_report(two / "m", two / "page.html")
    joined = join_datasets(merged, merged.filter("id % 2 == 1"))
    assert joined.ids.tolist() == list(range(1, 22, 2))
    assert same_bits(joined.left["loss"][:], joined.right["loss"][:])
    assert repr(joined).splitlines()[1] == f"  {two}/a, {two}/b"


def test_what_is_for_one_dataset_names_the_parts(merged, two, capsys):
    assert main(["push", str(two / "m"), "me/m"]) == 2
    assert "push: DIR must be the folder of one dataset, got 2 that were merged in" in capsys.readouterr().err
    with pytest.raises(AttributeError, match=r"Ask one of view\.sources: view\.sources\[0\]\.report\."):
        merged.report()


def test_all_of_it_is_moved(merged, two):
    (two / "elsewhere").mkdir()
    for name in ("a", "b", "m"):
        shutil.move(two / name, two / "elsewhere" / name)
    assert len(open_dataset(two / "elsewhere" / "m")) == 22


def test_merged_datasets_are_merged_by_their_parts(merged, two):
    make_dataset(two / "c")
    again = merge_datasets(two / "sub" / "m2", [merged, two / "c"])
    assert len(again) == 33
    paths = [part["path"] for part in json.loads((two / "sub" / "m2" / "merged.json").read_text())["parts"]]
    assert paths == ["../../a", "../../b", "../../c"]
    assert merge_datasets(two / "one", [str(two / "a")]).ids.tolist() == list(range(11))


def test_a_part_that_was_extended_since(merged, two):
    from dataclasses import replace

    from tlfast.dataset.format.description import read_description
    from tlfast.dataset.places.write_store import as_write_store
    from tlfast.dataset.write.folder import publish_extension

    old = read_description(two / "a", "test")
    publish_extension(as_write_store(two / "a"), old.extended(2, {}), "", ("", ""))
    assert replace(old) == old
    message = (
        r"open_dataset: .*a must hold the 11 examples that were merged, got another dataset, or one that was extende"
    )
    with pytest.raises(DatasetError, match=message):
        open_dataset(two / "m", partial=True)
    assert any(problem.unit == "../a" for problem in verify_dataset(two / "m").problems)


def test_incomplete_parts(two):
    writer = make_writer(two / "c")
    for unit in PLAN.units[1:]:
        writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    with pytest.raises(DatasetError, match="c without 1 "):
        merge_datasets(two / "m", [two / "c", two / "b"])
    opened = open_dataset(two / "c", partial=True)
    with pytest.raises(
        DatasetError, match=r"datasets must be complete, got .*c with 2 of 3 units. Complete it first, or m"
    ):
        merge_datasets(two / "m", [opened, two / "b"])
    assert not (two / "m").exists()
    merged = merge_datasets(two / "m", [opened, two / "b"], partial=True)
    assert merged.ids.tolist() == [*range(4, 11), *range(11, 22)]
    assert merged.rows_of([11]).tolist() == [7]
    with pytest.raises(DatasetError, match="must hold all 3 units"):
        open_dataset(two / "m")
    assert open_dataset(two / "m", partial=True).info()["units"] == 5
    assert not verify_dataset(two / "m").ok
    assert verify_dataset(two / "m", partial=True).ok


def test_tokens_and_codes(tmp_path):
    for name in "ab":
        write_kinds(kinds_writer(tmp_path / name))
    merged, one = merge_datasets(tmp_path / "m", [tmp_path / "a", tmp_path / "b"]), open_dataset(tmp_path / "a")
    assert merged.info()["tokens"] == 2 * one.info()["tokens"]
    assert same_bits(merged["tq"][7 + 6], one["tq"][6])
    assert torch.equal(merged.raw("q")[8].codes, one.raw("q")[1].codes)
    assert main(["info", str(tmp_path / "m")]) == 0


def small(folder, **changes):
    settings = {"header": {"model": "m"}, "columns": {"h": (torch.float32, (2,))}, "plan": Plan(1, 1)} | changes
    writer = DatasetWriter(folder, **settings)
    dtype, shape, *_ = writer.columns["h"]
    writer.write_unit(writer.plan.unit(0), {"h": torch.ones((1, *shape), dtype=dtype)}, [Example(0, [1], "a", 0, 1)])
    return folder


@pytest.mark.parametrize("change, message", [
    ({"header": {"model": "n"}}, r"header\['model'\] must be the same in all datasets, got 'm' in dataset 1 and 'n'"),
    ({"header": {"model": "m", "seed": 1}}, r"header\['seed'\] must be the same in all datasets, got None"),
    ({"columns": {"h": (torch.float16, (2,))}}, r"point 'h' must be the same in all datasets, got F32"),
    ({"columns": {"h": (torch.float32, (3,))}}, r"got F32 \[2\] in dataset 1 and F32 \[3\] in dataset 2. They"),
    ({"columns": {"h": Column(torch.float32, (2,), encoding="int8")}}, r"and F32 \[2\], .*int8 in dataset 2"),
    ({"columns": {"h": Column(torch.float32, (2,), of="act")}}, r"and F32 \[2\], act in dataset 2"),
])  # fmt: skip
def test_what_does_not_belong_together(tmp_path, change, message):
    with pytest.raises(DatasetError, match=f"merge_datasets: .*{message}"):
        merge_datasets(tmp_path / "m", [small(tmp_path / "a"), small(tmp_path / "b", **change)])
    assert not (tmp_path / "m").exists()


def test_headers_that_may_differ(tmp_path):
    parts = [small(tmp_path / name, header={"model": "m", "seed": name, "text": name}) for name in "ab"]
    with pytest.raises(DatasetError, match=r"if these do: may_differ=\['seed'\]\."):
        merge_datasets(tmp_path / "m", parts)
    merged = merge_datasets(tmp_path / "m", parts, may_differ=["seed"])
    assert merged.header == {"model": "m"}


def test_wrong_arguments(two):
    with pytest.raises(
        DatasetError, match=r"merge_datasets: datasets must be different ones, got ../a twice. Name each"
    ):
        merge_datasets(two / "m", [two / "a", two / "b", two / "a"])
    with pytest.raises(DatasetError, match=r"merge_datasets: datasets must be 1 to 10000, got 0. Name the folders."):
        merge_datasets(two / "m", [])
    message = r"datasets must be paths or open datasets, got DatasetView. A view has no folder: see concat_datasets"
    with pytest.raises(DatasetError, match=message):
        merge_datasets(two / "m", [open_dataset(two / "a").select([1])])
    with pytest.raises(DatasetError, match="merge_datasets: out must be a new or empty folder"):
        merge_datasets(two / "a", [two / "b"])
    with pytest.raises(DatasetError, match="merge_datasets: out must be a folder of this machine, got memory://x"):
        merge_datasets("memory://x", [two / "b"])
    (two / "full").mkdir()
    (two / "full" / "x").touch()
    with pytest.raises(DatasetError, match="merge_datasets: out must be a new or empty folder"):
        merge_datasets(two / "full", [two / "b"])
    assert not (two / "m").exists()
    merge_datasets(two / "m", [two / "a"])
    with pytest.raises(DatasetError, match="out must be a new or empty folder"):
        merge_datasets(two / "m", [two / "b"])
    with pytest.raises(DatasetError, match="out must be a new or empty folder, or a tlfast dataset"):
        make_writer(two / "m")


PART = {"path": "../a", "identity": "0" * 64, "n_examples": 11}
HOSTILE = {
    "no JSON": (b"{", "must be JSON|JSON"),
    "another format": (to_file({"format": "x", "version": 1, "parts": [PART]}), 'must say "format": "tlfast-merged"'),
    "a later version": (
        to_file({"format": "tlfast-merged", "version": 2, "parts": [PART]}),
        "must be of format version 1",
    ),
    "changed": (
        to_file({"format": "tlfast-merged", "version": 1, "parts": [PART]}).replace(b"../a", b"../b"),
        "must match its own checksum",
    ),
    "no parts": (
        to_file({"format": "tlfast-merged", "version": 1, "parts": []}),
        "must list parts with path, identity",
    ),
    "another key": (to_file({"format": "tlfast-merged", "version": 1, "parts": [PART | {"x": 1}]}), "must list parts"),
    "no number": (
        to_file({"format": "tlfast-merged", "version": 1, "parts": [PART | {"n_examples": "1"}]}),
        "list parts",
    ),
    "itself": (
        to_file({"format": "tlfast-merged", "version": 1, "parts": [PART | {"path": "."}]}),
        "must be the folder of a dataset",
    ),
    "another dataset": (
        to_file({"format": "tlfast-merged", "version": 1, "parts": [PART]}),
        "must hold the 11 examples that were merged|another dataset, or one that was extended",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_wrong(two, name):
    data, message = HOSTILE[name]
    (two / "m").mkdir()
    (two / "m" / "merged.json").write_bytes(data)
    with pytest.raises(DatasetError, match=message):
        open_dataset(two / "m")
    report = verify_dataset(two / "m")
    assert not report.ok
    assert any(part in str(report) for part in message.replace("\\", "").split("|"))
