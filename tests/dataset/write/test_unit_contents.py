"""Units of version 2: what a writer takes and refuses, and the bytes of both writers, from any memory."""

import json
import re
from dataclasses import replace

import pytest
import torch
from backends import usable
from kinds_cases import COLUMNS, LENGTHS, PLAN, example, make_writer, rows_of, truth, write_units

from tlfast.dataset import (
    BackgroundWriter,
    Column,
    DatasetError,
    DatasetWriter,
    Encoded,
    estimate_bytes,
    open_dataset,
    repair_dataset,
    verify_dataset,
)
from tlfast.dataset.format.encodings import encode
from tlfast.dataset.format.layout import PAGE_BYTES
from tlfast.dataset.write import payload

UNIT = PLAN.unit(0)
EXAMPLES = [example(i) for i in range(3)]


def given(**changes):
    """The rows of the first unit, some of them changed."""
    return rows_of(UNIT, truth()) | changes


def data_bytes(out):
    return [path.read_bytes() for path in sorted((out / "data").iterdir())]


@pytest.fixture
def writer(tmp_path, backend):
    return make_writer(tmp_path / "d", backend=backend)


def test_it_verifies_and_both_writers_write_the_same(tmp_path):
    usable("native")
    for backend in ("native", "python"):
        write_units(make_writer(tmp_path / backend, backend=backend))
        assert verify_dataset(tmp_path / backend).ok
    assert data_bytes(tmp_path / "native") == data_bytes(tmp_path / "python")
    ours, theirs = (open_dataset(tmp_path / backend) for backend in ("native", "python"))
    assert ours.examples[:] == theirs.examples[:]


def test_rows_in_other_memory_have_the_same_bytes(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "PIECE_BYTES", PAGE_BYTES)
    write_units(writer)
    strided = {
        name: [part.mT.contiguous().mT if part.dim() > 2 else part for part in parts] for name, parts in truth().items()
    }
    other = make_writer(tmp_path / "other")
    for unit in PLAN.units:
        rows = {name: torch.cat([part, part])[: len(part)] for name, part in rows_of(unit, strided).items()}
        wide = {name: torch.stack([part, part], -1)[..., 0] for name, part in rows.items()}
        assert other.write_unit(unit, wide, [example(i) for i in range(unit.start, unit.stop)])
    assert data_bytes(other.out) == data_bytes(writer.out)


def test_pieces_of_rows_that_lie_elsewhere_hold_whole_examples():
    flat = torch.zeros(sum(LENGTHS), payload.PIECE_BYTES // 8)  # two tokens a piece
    pieces = list(payload._pieces(flat, LENGTHS))
    assert [(rows.start, rows.stop) for rows, _ in pieces] == [(0, 2), (2, 5), (5, 6), (6, 10), (10, 10), (10, 15)]
    assert [i for _, examples in pieces for i in range(examples.start, examples.stop)] == list(range(len(LENGTHS)))


def test_rows_that_are_encoded_already(writer, tmp_path):
    write_units(writer)
    other = make_writer(tmp_path / "other")
    for unit in PLAN.units:
        rows = rows_of(unit, truth())
        rows |= {name: encode(rows[name], COLUMNS[name].encoding) for name in ("q", "tq")}
        other.write_unit(unit, rows, [example(i) for i in range(unit.start, unit.stop)])
    assert data_bytes(other.out) == data_bytes(writer.out)


def test_the_commit_counts_tokens_where_a_column_has_rows_for_them(tmp_path):
    write_units(make_writer(tmp_path / "d"))
    commits = [json.loads(path.read_text()) for path in sorted((tmp_path / "d" / "commits").iterdir())]
    assert [(commit["version"], commit["tokens"]) for commit in commits] == [(2, 5), (2, 5), (2, 5)]
    write_units(make_writer(tmp_path / "e", columns={name: COLUMNS[name] for name in ("h", "q")}))
    commit = json.loads((tmp_path / "e" / "commits" / "u000000.json").read_text())
    assert commit["version"] == 1
    assert "tokens" not in commit
    assert open_dataset(tmp_path / "e")["q"].shape == (7, 70)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"t": torch.zeros(4, 5, dtype=torch.float16)},
            "tensors['t'] must be torch.float16 [5, 5], got torch.float16 [4, 5]. Give a row for each token of each",
        ),
        ({"t": torch.zeros(5, 5)}, "tensors['t'] must be torch.float16 [5, 5], got torch.float32 [5, 5]."),
        ({"h": torch.zeros(5, 3).bfloat16()}, "tensors['h'] must be torch.bfloat16 [3, 3], got torch.bfloat16 [5, 3]."),
        ({"q": torch.zeros(3, 70).double()}, "tensors['q'] must be torch.float32 [3, 70], got torch.float64 [3, 70]."),
        (
            {"q": Encoded(torch.zeros(3, 70, dtype=torch.int8), torch.zeros(3))},
            "tensors['q:scales'] must be torch.float32 [3, 2], got torch.float32 [3]. Check the spec.",
        ),
        (
            {"q": Encoded(torch.zeros(3, 70), torch.zeros(3, 2))},
            "tensors['q:codes'] must be torch.int8 [3, 70], got torch.float32 [3, 70].",
        ),
        (
            {"h": Encoded(torch.zeros(3, 3, dtype=torch.int8), torch.zeros(3))},
            "tensors['h'] must be of an encoded column, got codes and scales. Say so in its Column",
        ),
    ],
)
def test_rows_that_do_not_fit(tmp_path, changes, message):
    writer = make_writer(tmp_path / "d")
    with pytest.raises(DatasetError, match=re.escape(f"DatasetWriter: {message}")):
        writer.write_unit(UNIT, given(**changes), EXAMPLES)
    assert not writer.done
    assert not data_bytes(writer.out)


def codes(name="q", *, code=0, scale=1.0, others=1.0):
    """Codes and scales of a column's rows in the first unit: one code and the scale of the last block, of one row."""
    made = encode(given()[name], COLUMNS[name].encoding)
    made.codes.zero_()
    made.codes[1].view(-1)[-1] = code
    made.scales.fill_(others)
    made.scales[1].view(-1)[-1] = scale
    return made


LARGEST = torch.finfo(torch.float32).max
NORMAL = 2.0**-126
SCALES = "have scales that are NaN, or finite and 2**-126 or more"


@pytest.mark.parametrize("name", ["q", "tq"])
@pytest.mark.parametrize(
    "values, broken",
    [
        ({"code": -128}, "have codes from -127 to 127, got -128."),
        ({"scale": -1.0}, f"{SCALES}, got -1.0."),
        ({"scale": 0.0}, f"{SCALES}, got 0.0."),
        ({"scale": torch.inf}, f"{SCALES}, got inf."),
        ({"scale": NORMAL / 2}, f"{SCALES}, got {NORMAL / 2}."),
        ({"code": 1, "scale": torch.nan}, "have codes of 0 where the scale is NaN, got another."),
        ({"code": -127, "scale": LARGEST / 100}, "decode to finite values, got one that overflows."),
    ],
)
def test_codes_and_scales_that_no_rows_have(tmp_path, name, values, broken):
    writer = make_writer(tmp_path / "d")
    remedy = "Give the rows themselves: they are encoded here."
    with pytest.raises(DatasetError, match=re.escape(f"DatasetWriter: tensors[{name!r}] must {broken} {remedy}")):
        writer.write_unit(UNIT, given(**{name: codes(name, **values)}), EXAMPLES)
    assert not data_bytes(writer.out)


@pytest.mark.parametrize(
    "values",
    [
        {"code": -127},
        {"code": 127, "scale": NORMAL},
        {"code": 0, "scale": torch.nan},
        {"code": 90, "scale": LARGEST / 100},
        {"code": 0, "scale": LARGEST},
        {"code": 5, "others": torch.nan},
    ],
)
def test_codes_and_scales_at_the_bounds_are_taken(tmp_path, values):
    writer = make_writer(tmp_path / "d")
    q = codes(**values)
    writer.write_unit(UNIT, given(q=q), EXAMPLES)
    ds = open_dataset(tmp_path / "d", partial=True)
    stored = ds.raw("q")[:]
    assert torch.equal(stored.codes, q.codes)
    assert torch.equal(stored.scales.nan_to_num(-1), q.scales.nan_to_num(-1))
    assert [bool(row["flags"] & 1) for row in ds.examples[:]] == ds["q"][:].isnan().any(1).tolist()


DENSE = "DatasetWriter: tensors['{}'] must be a dense torch.Tensor, got a {}. "


@pytest.mark.parametrize(
    "name, make, text",
    [
        ("h", lambda h: h.tolist(), DENSE.format("h", "list") + "Use torch.stack or torch.as_tensor."),
        ("h", tuple, DENSE.format("h", "tuple") + "Use torch.stack or torch.as_tensor."),
        ("h", lambda h: h.float().numpy(), DENSE.format("h", "ndarray") + "Use torch.stack or torch.as_tensor."),
        ("q", list, DENSE.format("q", "list") + "Use torch.stack or torch.as_tensor."),
        ("q", lambda q: Encoded([1], [2]), DENSE.format("q:codes", "list") + "Use torch.stack or torch.as_tensor."),
        ("h", torch.Tensor.to_sparse, DENSE.format("h", "tensor of layout torch.sparse_coo") + "Use .to_dense()."),
    ],
)
def test_what_is_no_dense_tensor(tmp_path, name, make, text):
    writer = make_writer(tmp_path / "d")
    with pytest.raises(DatasetError, match=re.escape(text)):
        writer.write_unit(UNIT, given(**{name: make(given()[name])}), EXAMPLES)
    assert not data_bytes(writer.out)


@pytest.mark.parametrize("length", [-1, 1.0, None])
def test_lengths_that_count_nothing(tmp_path, length):
    writer = make_writer(tmp_path / "d")
    message = f"DatasetWriter: length of example 1 must be the number of its tokens, got {length!r}. Count the rows"
    with pytest.raises(DatasetError, match=re.escape(message)):
        writer.write_unit(UNIT, given(), [EXAMPLES[0], replace(EXAMPLES[1], length=length), EXAMPLES[2]])


def test_it_is_resumed_and_extended_and_repaired(writer):
    unit = PLAN.unit(1)
    writer.write_unit(unit, rows_of(unit, truth()), [example(i) for i in range(3, 6)])
    again = make_writer(writer.out)
    assert again.done == {"u000001"}
    write_units(again)
    again.extend(1, {"tokens": 2})
    last = again.plan.unit(3)
    first = {name: parts[:1] for name, parts in truth().items()}
    again.write_unit(last, {name: torch.cat(parts) for name, parts in first.items()}, [replace(example(0), id=7)])
    assert torch.equal(open_dataset(writer.out)["t"][7], truth()["t"][0])

    path = writer.out / "data" / "u000001.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert repair_dataset(writer.out).dropped == ["u000001"]
    write_units(make_writer(writer.out))
    assert path.read_bytes() == before


def test_another_kind_of_column_is_another_dataset(tmp_path):
    write_units(make_writer(tmp_path / "d"))
    with pytest.raises(DatasetError, match=re.escape("columns[1].of: 'act' there, 'grad' here")):
        make_writer(tmp_path / "d", columns=COLUMNS | {"h:act": Column(torch.float32, (2, 2), per="token")})


def test_plain_columns_are_version_1(tmp_path):
    columns = {"h": Column(torch.float32, (2,), of="grad", per="example")}
    writer = DatasetWriter(tmp_path, header={}, columns=columns, plan=PLAN)
    assert json.loads((tmp_path / "dataset.json").read_text())["version"] == 1
    assert writer.columns == {"h": (torch.float32, (2,), "grad", "example", None)}


def test_a_background_writer_takes_them(tmp_path):
    writer = make_writer(tmp_path / "d")
    with BackgroundWriter(writer, 2) as background:
        for unit in PLAN.units:
            background.submit(unit, rows_of(unit, truth()), [example(i) for i in range(unit.start, unit.stop)])
    assert open_dataset(tmp_path / "d").verify().ok


def test_the_estimate_counts_tokens():
    columns = {"t": Column(torch.float32, (4,), per="token"), "q": Column(torch.float32, (70,), encoding="int8:64")}
    assert estimate_bytes(columns, 2, 10) - estimate_bytes(
        {"t": (torch.float32, (0,)), "q": (torch.float32, (0,))}, 2, 10
    ) == 2 * (160 + 78)
