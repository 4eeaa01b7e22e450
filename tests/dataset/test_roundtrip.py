"""What is written is what is read: every dtype, the safetensors library as the oracle, indexing as torch does it."""

import json
import struct
from itertools import pairwise

import pytest
import torch
from dataset_cases import (
    COLUMNS,
    PLAN,
    check_rows,
    content,
    examples,
    make_dataset,
    make_writer,
    rows_of,
    same_bits,
    truth,
    write_units,
)
from safetensors import safe_open
from safetensors.torch import load_file

from tlfast.dataset import (
    FLAG_MISSING,
    FLAG_NON_FINITE,
    DatasetError,
    Example,
    Plan,
    open_dataset,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
ODD_NAMES = [
    "a/b",
    "../../up",
    "/etc/passwd",
    "",
    " ",
    "tab\t\n",
    'quote"\\',
    "é漢🙂",
    "nul\0",
    "norm:x",
    "id",
    "*.x",
    "{}",
]


def test_every_row_comes_back(tmp_path):
    ds = make_dataset(tmp_path / "d")
    check_rows(ds, truth())
    assert ds.verify().ok


def test_safetensors_reads_every_unit(tmp_path):
    make_dataset(tmp_path / "d")
    tensors = truth()
    for unit in PLAN.units:
        path = tmp_path / "d" / "data" / f"{unit.name}.safetensors"
        stored = load_file(path)
        assert set(stored) == set(COLUMNS)
        for name, tensor in stored.items():
            assert same_bits(tensor, tensors[name][unit.start : unit.stop])
        with safe_open(path, "pt") as file:
            assert file.metadata()["unit"] == unit.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_keep_their_bits(tmp_path, dtype):
    special = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 65504.0, torch.finfo(dtype).max]
    rows = torch.tensor([special] * 3, dtype=torch.float64).to(dtype)
    plan, columns = Plan(3, 3), {"x": (dtype, (8,))}
    writer = make_writer(tmp_path / "d", plan=plan, columns=columns)
    writer.write_unit(plan.unit(0), {"x": rows}, examples(plan.unit(0)))
    ds = open_dataset(tmp_path / "d")
    assert same_bits(ds["x"][:], rows)
    assert same_bits(ds["x"][1], rows[1])
    assert ds["x"].dtype == dtype
    assert ds.info()["non_finite_rows"] == 3


@pytest.mark.parametrize("unit", PLAN.units, ids=lambda unit: unit.name)
def test_payload_lies_where_the_plan_says(tmp_path, unit):
    make_dataset(tmp_path / "d")
    data = (tmp_path / "d" / "data" / f"{unit.name}.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert 8 + length == 4096
    header = json.loads(data[8:4096])
    header.pop("__metadata__")
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == len(data) - 4096
    assert all(a[1] == b[0] for a, b in pairwise(ends))
    for name, entry in header.items():
        assert entry["data_offsets"][0] % COLUMNS[name][0].itemsize == 0


def test_many_points_take_more_than_one_page_of_header(tmp_path):
    columns = {f"blocks.{i}.hook_resid_post_with_a_long_name": (torch.bfloat16, (2,)) for i in range(100)}
    make_dataset(tmp_path / "d", columns=columns)
    path = tmp_path / "d" / "data" / "u000000.safetensors"
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + length) % 4096 == 0
    assert 8 + length > 4096
    assert set(load_file(path)) == set(columns)
    check_rows(open_dataset(tmp_path / "d"), truth(columns))


def test_names_are_keys_and_never_paths(tmp_path):
    columns = dict.fromkeys(ODD_NAMES, (torch.float32, (2,)))
    ds = make_dataset(tmp_path / "d", columns=columns)
    check_rows(ds, truth(columns))
    assert set(load_file(tmp_path / "d" / "data" / "u000000.safetensors")) == set(ODD_NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    for name in ODD_NAMES:
        assert torch.equal(ds.norms(name), truth(columns)[name].double().norm(dim=1).float())


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (1,), (), (2, 3, 4)])
def test_row_shapes(tmp_path, shape):
    columns = {"x": (torch.float32, shape), "y": (torch.bfloat16, (3,))}
    check_rows(make_dataset(tmp_path / "d", columns=columns), truth(columns))
    assert load_file(tmp_path / "d" / "data" / "u000000.safetensors")["x"].shape == (4, *shape)


def test_rows_longer_than_a_chunk_and_many_chunks(tmp_path):
    columns = {"long": (torch.float32, (300_000,)), "many": (torch.bfloat16, (70_001,))}
    plan = Plan(17, 17)
    tensors = truth(columns, plan)
    writer = make_writer(tmp_path / "d", columns=columns, plan=plan)
    write_units(writer, tensors)
    check_rows(open_dataset(tmp_path / "d"), tensors)
    assert writer.bytes_written >= sum(tensor.nbytes for tensor in tensors.values())


def test_strided_and_graph_tensors_are_written_by_value(tmp_path):
    plan, columns = Plan(4, 4), {"t": (torch.float32, (3,)), "e": (torch.float32, (3,)), "g": (torch.float32, (3,))}
    transposed = torch.randn(3, 4).T
    expanded = torch.randn(1, 3).expand(4, 3)
    graph = torch.randn(4, 3, requires_grad=True) * 2
    writer = make_writer(tmp_path / "d", plan=plan, columns=columns)
    writer.write_unit(plan.unit(0), {"t": transposed, "e": expanded, "g": graph}, examples(plan.unit(0)))
    ds = open_dataset(tmp_path / "d")
    for name, tensor in (("t", transposed), ("e", expanded), ("g", graph.detach())):
        assert same_bits(ds[name][:], tensor)


def test_one_row_with_an_odd_stride(tmp_path):
    # torch calls one element contiguous whatever its stride, and then refuses to view it as bytes
    plan, columns = Plan(1, 1), {"x": (torch.float16, ()), "y": (torch.bfloat16, (1,))}
    x, y = torch.arange(9).half()[3::7], torch.arange(9).bfloat16().reshape(3, 3)[1::5, 2:]
    writer = make_writer(tmp_path / "d", plan=plan, columns=columns)
    writer.write_unit(plan.unit(0), {"x": x, "y": y}, examples(plan.unit(0)))
    ds = open_dataset(tmp_path / "d")
    assert same_bits(ds["x"][:], torch.tensor([3.0]).half())
    assert same_bits(ds["y"][:], torch.tensor([[5.0]]).bfloat16())


def test_bytes_depend_on_data_and_plan_alone(tmp_path):
    make_dataset(tmp_path / "a")
    backwards = make_writer(tmp_path / "b")
    for unit in reversed(PLAN.units):
        backwards.write_unit(unit, rows_of(unit, truth()), examples(unit))
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_flags(tmp_path):
    plan, columns = Plan(4, 4), {"x": (torch.float32, (2,)), "y": (torch.float64, ())}
    x, y = torch.ones(4, 2), torch.full((4,), 1e200, dtype=torch.float64)  # finite, though its square is not
    x[1, 0], y[2] = float("nan"), float("inf")
    writer = make_writer(tmp_path / "d", plan=plan, columns=columns)
    writer.write_unit(plan.unit(0), {"x": x, "y": y}, examples(plan.unit(0)), [0, 0, 0, FLAG_MISSING])
    ds = open_dataset(tmp_path / "d")
    assert [e["flags"] for e in ds.examples] == [0, FLAG_NON_FINITE, FLAG_NON_FINITE, FLAG_MISSING]
    assert ds.info()["non_finite_rows"] == 2


def test_norms_neither_overflow_nor_vanish(tmp_path):
    plan, columns = Plan(3, 3), {"x": (torch.float32, (4,))}
    x = torch.tensor([1e-30, 1e30, 3.0])[:, None].expand(3, 4)
    make_writer(tmp_path / "d", plan=plan, columns=columns).write_unit(plan.unit(0), {"x": x}, examples(plan.unit(0)))
    assert torch.equal(open_dataset(tmp_path / "d").norms("x"), 2 * x[:, 0])


def test_more_units_than_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.dataset.read.unit_files.most_open", lambda: 64)
    plan = Plan(150, 1)
    ds = make_dataset(tmp_path / "d", plan=plan)
    check_rows(ds, truth(plan=plan))
    assert len(ds._files._open.files) <= 64
    monkeypatch.setattr(type(ds.examples), "KEPT_BYTES", 3 * ds.examples.table(0).nbytes)
    ds = open_dataset(tmp_path / "d")
    assert [row["id"] for row in ds.examples] == list(range(150))
    assert 1 < len(ds.examples._tables) <= 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"examples": lambda e: e[:-1]}, "ids of examples must be 0..3, in this order"),
        ({"examples": lambda e: e[::-1]}, "ids of examples must be 0..3"),
        ({"tensors": lambda t: {**t, "extra": t["loss"]}}, r"tensors must have the columns' names, got .*extra"),
        ({"tensors": lambda t: {"loss": t["loss"]}}, "tensors must have the columns' names"),
        ({"tensors": lambda t: {**t, "loss": t["loss"].float()}}, r"tensors\['loss'\] must be torch.float16 \[4\]"),
        ({"tensors": lambda t: {**t, "loss": t["loss"][:3]}}, r"got torch.float16 \[3\]"),
        ({"flags": [0]}, "flags must have 4 values, got 1"),
        ({"unit": PLAN.unit(1)}, "must be torch"),
        ({"unit": Plan(99, 7).unit(0)}, "unit must be Unit"),
        ({"unit": Plan(99, 1).unit(50)}, "unit must be one of the plan's 3 units"),
        ({"examples": lambda e: [Example(x.id, [2**31], "s", 0, 1) for x in e]}, "examples must hold ints below"),
        ({"examples": lambda e: [Example(x.id, [1], None, 0, 1) for x in e]}, "examples must hold ints below"),
    ],
)
def test_what_does_not_belong_to_the_unit_is_refused(tmp_path, change, message):
    writer = make_writer(tmp_path / "d")
    unit = PLAN.unit(0)
    tensors = change.get("tensors", dict)(rows_of(unit, truth()))
    if change.get("unit") == PLAN.unit(1):
        tensors = {name: tensor[:2] for name, tensor in tensors.items()}
    with pytest.raises(DatasetError, match=message):
        writer.write_unit(
            change.get("unit", unit), tensors, change.get("examples", list)(examples(unit)), change.get("flags")
        )
    assert not writer.done
    assert [p.name for p in (tmp_path / "d").rglob("u0*")] == []
    assert [p.name for p in (tmp_path / "d").rglob("*.tmp")] == []
