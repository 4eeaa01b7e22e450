"""Exports: each format is read by its own library and holds every row, or nothing is made."""

from __future__ import annotations

import json
import os
import shutil
from types import SimpleNamespace

import kinds_cases
import numpy as np
import pytest
import torch
from dataset_cases import COLUMNS, PLAN, make_dataset, make_writer, rows_of, truth
from dataset_cases import examples as examples_of

from tlfast.dataset import Column, DatasetError, Plan, export_dataset, open_dataset
from tlfast.dataset.read import arrow_rows

POINTS = list(COLUMNS)
FORMATS = ["parquet", "arrow", "npy", "hf", "lance", "bergson"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset of three units, and room beside it."""
    folder = tmp_path_factory.mktemp("export")
    make_dataset(folder / "ds")
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts smaller than a unit: 3 rows of these columns."""
    monkeypatch.setattr(arrow_rows, "PART_BYTES", 3 * 70)


def expected():
    """Every point as its export has it: bfloat16 as float32."""
    return {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in truth().items()}


def check_table(table, columns=POINTS):
    """Fail unless an Arrow table holds the examples, the norms and the gradients of ``columns``."""
    examples = [e for unit in PLAN.units for e in examples_of(unit)]
    for key in ("id", "input_ids", "source", "start", "length"):
        assert table.column(key).to_pylist() == [getattr(e, key) for e in examples], key
    for point, array in expected().items():
        norms = np.linalg.norm(array.reshape(len(array), -1).astype(np.float64), axis=1)
        np.testing.assert_allclose(table.column(f"norm:{point}").to_numpy(), norms, rtol=1e-6)
    assert [name for name in table.column_names if name.startswith("grad:")] == [f"grad:{p}" for p in columns]
    for point in columns:
        found, array = table.column(f"grad:{point}").combine_chunks(), expected()[point]
        values = found.flatten() if array.ndim > 1 else found
        assert (values.to_numpy().dtype, values.to_numpy().tobytes()) == (array.dtype, array.tobytes()), point


def test_the_check_can_fail(folder, tmp_path):
    import pyarrow.parquet as parquet

    table = parquet.read_table(export_dataset(folder / "ds", tmp_path / "t.parquet", to="parquet"))
    check_table(table)
    with pytest.raises(AssertionError):
        check_table(table.take([1, 0, *range(2, 11)]))
    changed = table.column("grad:loss").to_numpy().copy()
    changed[3] += 1
    with pytest.raises(AssertionError):
        check_table(table.set_column(table.column_names.index("grad:loss"), "grad:loss", [changed]))


def test_parquet_and_arrow(folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    made = export_dataset(folder / "ds", tmp_path / "t.parquet", to="parquet")
    table = parquet.read_table(made)
    check_table(table)
    with pa.memory_map(str(export_dataset(folder / "ds", tmp_path / "t.arrow", to="arrow"))) as file:
        check_table(pa.ipc.open_file(file).read_all())
    said = json.loads(table.schema.metadata[b"tlfast"])
    assert said["points"]["blocks.0.hook_resid_post"] == {"dtype": "BF16", "shape": [6]}
    assert said["header"] == {"model": {"name": "tiny", "sha": "abc"}, "reduce": "mean"}
    assert table.field("grad:blocks.1.attn").metadata[b"shape"] == b"[2, 3]"
    assert sorted(os.listdir(tmp_path)) == ["t.arrow", "t.parquet"]


def test_encoded_rows_are_exported_decoded(tmp_path):
    import pyarrow.parquet as parquet

    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "ds"))
    ds, points = open_dataset(tmp_path / "ds"), ["q", "h:act"]
    npy = export_dataset(tmp_path / "ds", tmp_path / "npy", to="npy", points=points)
    np.testing.assert_array_equal(np.load(npy / "q.npy"), ds["q"][:].numpy())
    table = parquet.read_table(export_dataset(tmp_path / "ds", tmp_path / "t.parquet", to="parquet", points=points))
    np.testing.assert_array_equal(table.column("grad:q").combine_chunks().flatten(), ds["q"][:].flatten().numpy())
    assert table.field("grad:q").metadata[b"stored"] == b"F32, as int8:64"
    assert json.loads(table.schema.metadata[b"tlfast"])["points"]["q"]["encoding"] == "int8:64"


def token_columns(made, to):
    """What the export of the points per token holds: "id", "position" and the rows of each point."""
    import datasets
    import lance
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if to == "npy":
        assert sorted(os.listdir(made)) == ["ids.npy", "points.json", "positions.npy", "t.npy", "tq.npy"]
        names = {"id": "ids", "position": "positions", "t": "t", "tq": "tq"}
        return {name: np.load(made / f"{file}.npy") for name, file in names.items()}
    if to == "parquet":
        table = parquet.read_table(made)
    elif to == "arrow":
        table = pa.ipc.open_file(pa.memory_map(str(made))).read_all()
    else:
        table = datasets.load_from_disk(str(made)).data.table if to == "hf" else lance.dataset(str(made)).to_table()
    assert table.column_names == ["id", "position", "source", "start", "length", "flags", "grad:t", "grad:tq"]
    assert table.column("start").to_pylist() == [10 * i for i in table.column("id").to_pylist()]
    found = {name: table.column(name).to_numpy() for name in ("id", "position")}
    values = {name: table.column(f"grad:{name}").combine_chunks().flatten().to_numpy() for name in ("t", "tq")}
    return found | {"t": values["t"].reshape(-1, 5), "tq": values["tq"].reshape(-1, 2, 3)}


def test_what_stands_beside_tokens_is_made_for_few_at_a_time(tmp_path, monkeypatch):
    """A norm of a token is 4 bytes, beside a copy of its example's texts: parts of so many bytes have many tokens."""
    from tlfast.dataset import Example

    columns, plan = {"t": Column(torch.float32, (), per="token")}, Plan(3, 3)
    with kinds_cases.make_writer(tmp_path / "ds", columns=columns, plan=plan) as writer:
        examples = [Example(i, list(range(4)), "long" * 25, 0, 4) for i in range(3)]
        writer.write_unit(plan.unit(0), {"t": torch.arange(12.0)}, examples)
    monkeypatch.setattr(arrow_rows, "PART_BYTES", 400)
    rows = arrow_rows.Rows(open_dataset(tmp_path / "ds"), ["t"], who="here", tokens="all")
    batches = list(rows.batches(rows.schema()))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 2, 2]
    assert [value for batch in batches for value in batch.column("grad:t").to_pylist()] == list(range(12))
    assert [value for batch in batches for value in batch.column("position").to_pylist()] == [0, 1, 2, 3] * 3
    monkeypatch.setattr(arrow_rows, "PART_BYTES", 1 << 20)
    assert [len(part.arrays["t"]) for part in rows.parts()] == [12]
    monkeypatch.setattr(arrow_rows, "PART_ROWS", 9)
    assert [len(part.arrays["t"]) for part in rows.parts()] == [8, 4]


@pytest.mark.parametrize("to", [name for name in FORMATS if name != "bergson"])
def test_rows_per_token_are_records_of_their_own(tmp_path, to):
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "ds"))
    ds = open_dataset(tmp_path / "ds")
    for name, view, rows in (("all", ds, range(7)), ("some", ds.select([6, 1, 0]), [6, 1, 0])):
        seen = []
        made = export_dataset(view, tmp_path / name, to=to, points=["t", "tq"], progress=seen.append)
        found = token_columns(made, to)
        assert sum(seen) == len(view)
        assert found["id"].tolist() == [i for i in rows for _ in range(kinds_cases.LENGTHS[i])]
        assert found["position"].tolist() == [t for i in rows for t in range(kinds_cases.LENGTHS[i])]
        for point in ("t", "tq"):
            whole = torch.cat([ds[point][i] for i in rows]).numpy()
            assert (found[point].dtype, found[point].tobytes()) == (whole.dtype, whole.tobytes())
    if to == "hf":
        loaded = ds.to_hf(["t", "tq"])
        assert len(loaded) == 15
        assert loaded["position"][:4] == [0, 1, 0, 1]


SPECS = [
    {"points": ["h.0"], "reduce": "mean", "over": [1]},
    {"points": ["h.0"], "reduce": "sum", "over": [1, 2], "of": "grad*act"},
    {"points": ["h.0"], "reduce": "none", "over": [], "of": "weight", "project": {"dim": 2, "seed": 5}},
]
HOLDS = {
    "h.0": "gradient at the output; mean over positions",
    "h.0:grad*act": "gradient times activation, element by element, at the output; sum over positions and dimension 2",
    "h.0:weight": "weight gradient of each example; projected to 2 a side, L G R^T; rademacher, seed 5, tlfast-1",
}
FORMS = {
    "h.0": (torch.float32, (3,)), "h.0:grad*act": Column(torch.float32, (), of="grad*act"),
    "h.0:weight": Column(torch.float32, (2, 2), of="weight"),
}  # fmt: skip


def test_exports_say_what_their_columns_hold(tmp_path):
    import datasets
    import lance
    import pyarrow.parquet as parquet

    make_dataset(tmp_path / "ds", columns=FORMS, header={"specs": SPECS, "examples": ["of", "a", "user"]})
    ds = open_dataset(tmp_path / "ds")
    table = parquet.read_table(export_dataset(ds, tmp_path / "t.parquet", to="parquet"))
    assert json.loads(table.schema.metadata[b"tlfast"])["holds"] == HOLDS
    assert {name: table.field(f"grad:{name}").metadata[b"holds"].decode() for name in FORMS} == HOLDS
    npy = export_dataset(ds, tmp_path / "npy", to="npy")
    said = json.loads((npy / "points.json").read_text())
    assert {name: said["holds"][name] for name in said["files"].values()} == HOLDS
    folders = [
        export_dataset(ds, tmp_path / f"hf{k}", to="hf", points=points) for k, points in enumerate((None, ["h.0"]))
    ]
    loaded = [datasets.load_from_disk(str(folder)) for folder in folders]
    assert json.loads(loaded[0].info.description)["holds"] == HOLDS
    assert loaded[0]._fingerprint != loaded[1]._fingerprint  # what is computed of one is never taken for the other's
    assert json.loads(ds.to_hf(["h.0"]).info.description)["holds"] == {"h.0": HOLDS["h.0"]}
    assert ds.to_pandas(["h.0:weight"]).attrs["tlfast"] == {"h.0:weight": HOLDS["h.0:weight"]}
    made = lance.dataset(str(export_dataset(ds, tmp_path / "l.lance", to="lance")))
    rows = made.to_table()
    assert rows.column("grad:h_0:grad*act").to_pylist() == ds["h.0:grad*act"][:].tolist()
    assert made.schema.field("grad:h_0:grad*act").metadata[b"holds"].decode() == HOLDS["h.0:grad*act"]


def test_a_view_needs_the_room_of_its_own_rows(tmp_path, monkeypatch):
    plan, header = Plan(8, 4), {"examples": {"tokens": 8_000_000}}  # a million tokens each
    make_dataset(tmp_path / "ds", plan=plan, header=header, columns={"h": (torch.float32, ())})
    ds = open_dataset(tmp_path / "ds")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10_000_000))
    made = export_dataset(ds.select([3, 1]), tmp_path / "npy", to="npy")
    assert np.array_equal(np.load(made / "h.npy"), ds["h"][[3, 1]].numpy())
    with pytest.raises(DatasetError, match=r"out must have 0.032 GB free for this dataset, got 0.010 GB"):
        export_dataset(ds, tmp_path / "all", to="npy")


def test_npy(folder, tmp_path):
    made = export_dataset(folder / "ds", tmp_path / "out", to="npy")
    for point, array in expected().items():
        found = np.load(made / f"{point}.npy", mmap_mode="r")
        assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert np.load(made / "ids.npy").tolist() == list(range(11))
    assert json.loads((made / "points.json").read_text())["files"]["loss.npy"] == "loss"


def test_names_that_are_no_file_names(tmp_path):
    names = ["", "../up", "a/b", ".hidden", "IDS", "ids", "x" * 300, "\u00e9"]
    made_from = tmp_path / "ds"
    tensors = {name: torch.full((2, 1), float(k)) for k, name in enumerate(names)}
    writer = make_writer(made_from, columns=dict.fromkeys(names, (torch.float32, (1,))), plan=Plan(2, 2))
    writer.write_unit(writer.plan.unit(0), tensors, examples_of(writer.plan.unit(0)))
    made = export_dataset(made_from, tmp_path / "out", to="npy")
    files = json.loads((made / "points.json").read_text())["files"]
    assert sorted(os.listdir(made)) == sorted([*files, "ids.npy", "points.json"])
    assert list(files.values()) == names
    for file, point in files.items():
        assert np.load(made / file).tolist() == [[float(names.index(point))]] * 2
    assert list(files)[:6] == ["point-0.npy", "point-1.npy", "a%2Fb.npy", "point-3.npy", "point-4.npy", "point-5.npy"]


def test_hugging_face(folder, tmp_path):
    import datasets

    made = export_dataset(folder / "ds", tmp_path / "out", to="hf")
    loaded = datasets.load_from_disk(str(made))
    check_table(loaded.data.table)
    assert loaded.features["grad:blocks.1.attn"] == datasets.List(datasets.Value("float32"), length=6)
    row = loaded.with_format("torch")[7]
    assert torch.equal(row["grad:blocks.0.hook_resid_post"], truth()["blocks.0.hook_resid_post"][7].float())


def test_lance(folder, tmp_path):
    import lance

    made = export_dataset(folder / "ds", tmp_path / "out.lance", to="lance")
    table = lance.dataset(str(made)).to_table()
    assert "grad:blocks_0_hook_resid_post" in table.column_names
    renamed = [f"norm:{point}" for point in POINTS] + [f"grad:{point}" for point in POINTS]
    check_table(table.rename_columns(table.column_names[: -len(renamed)] + renamed))
    assert [field.metadata[b"point"].decode() for field in table.schema if field.name.startswith("grad:")] == POINTS


def test_names_that_lance_takes_for_one(tmp_path):
    import lance

    columns = {"a.b": (torch.float32, ()), "a_b": (torch.float32, ())}
    make_dataset(tmp_path / "ds", columns=columns)
    table = lance.dataset(str(export_dataset(tmp_path / "ds", to="lance"))).to_table()
    assert table.column_names[-2:] == ["grad:a_b", "grad:a_b_9"]
    for name, point in zip(table.column_names[-2:], columns, strict=True):
        assert table.column(name).to_numpy().tobytes() == truth(columns)[point].numpy().tobytes()


def test_bergson(folder, tmp_path):
    """Read by its rules: a memmap of the dtype and the sizes that info.json says; before version 2 a structured one."""
    made = export_dataset(folder / "ds", tmp_path / "out", to="bergson")
    info = json.loads((made / "info.json").read_text())
    assert (info["num_grads"], info["grad_sizes"]) == (11, {POINTS[0]: 6, POINTS[1]: 6, "loss": 1, "double": 2})
    shape = (info["num_grads"], sum(info["grad_sizes"].values()))
    flat = np.memmap(made / "gradients.bin", dtype=np.dtype(info["base_dtype"]), mode="r", shape=shape)
    structured = np.memmap(made / "gradients.bin", dtype=np.dtype(info["dtype"]), mode="r", shape=11)
    at = 0
    for point, size in info["grad_sizes"].items():
        array = expected()[point].reshape(11, -1).astype(np.float64)
        assert np.array_equal(flat[:, at : at + size], array)
        assert np.array_equal(structured[point], array)
        at += size
    import datasets

    check_table(datasets.load_from_disk(str(made / "data.hf")).data.table, columns=[])
    for name in ("normalizers", "hessians", "hessians_eigen"):
        assert torch.load(made / f"{name}.pth", weights_only=True) == {}


def test_bergson_keeps_float16_and_makes_float32_of_bfloat16(folder, tmp_path):
    for point, dtype in (("loss", "float16"), ("blocks.0.hook_resid_post", "float32"), ("blocks.1.attn", "float32")):
        made = export_dataset(folder / "ds", tmp_path / point, to="bergson", points=[point])
        assert json.loads((made / "info.json").read_text())["base_dtype"] == dtype


@pytest.mark.parametrize("to", FORMATS)
def test_some_points_of_some_units(folder, tmp_path, to):
    writer = make_writer(tmp_path / "part")
    unit = PLAN.unit(1)
    writer.write_unit(unit, rows_of(unit, truth()), examples_of(unit))
    with pytest.raises(DatasetError, match="must hold all 3 units of its plan"):
        export_dataset(tmp_path / "part", to=to)
    counted = []
    options = {"points": ["loss", "double"], "partial": True, "progress": counted.append}
    made = export_dataset(tmp_path / "part", to=to, **options)
    assert made.name.startswith("part")
    assert sum(counted) == 4
    assert sorted(os.listdir(tmp_path)) == sorted(["part", made.name])
    if to == "npy":
        assert np.load(made / "ids.npy").tolist() == [4, 5, 6, 7]
        assert sorted(os.listdir(made)) == ["double.npy", "ids.npy", "loss.npy", "points.json"]
