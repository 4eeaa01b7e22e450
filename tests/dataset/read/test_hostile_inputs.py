"""The inputs of the fuzzers once more, without atheris: seeds, and changes of them that are the same in every run."""

import io
import os
import pickle
import random
import socket
import struct
from contextlib import suppress

import hostile_inputs
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hostile_dataset import WATCH, HostileDataset
from hostile_inputs import ROW_TABLE, TARGETS, UNIT_FILE, agreeing, check, seeds

from tlfast.dataset import open_dataset

N_CHANGED = 60  # of each target


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    """A dataset of which files are replaced for an instant."""
    torch.set_num_threads(1)  # as every test has it; this comes before
    return HostileDataset(tmp_path_factory.mktemp("hostile") / "d")


@pytest.mark.parametrize("target", TARGETS)
def test_seeds_and_changes_of_them(ds, target):
    draw = random.Random(target)
    inputs = seeds(ds, target)
    inputs = inputs[:20] + draw.sample(inputs[20:], 40)
    for _ in range(N_CHANGED):
        data = bytearray(draw.choice(inputs))
        for _ in range(draw.randrange(1, 4)):
            data[draw.randrange(len(data)) if data else 0 : 0] = draw.randbytes(draw.randrange(3))
        inputs.append(bytes(data))
    readable = [check(ds, target, data) for data in inputs]
    assert not all(readable)
    assert any(readable), "some inputs change nothing that matters; else this checks one error alone"


def test_other_rows_are_seen(ds):
    data = bytearray(ds.original[UNIT_FILE])
    data[-1] ^= 1
    with pytest.raises(AssertionError, match="other rows of"):
        ds.readable(agreeing(ds, UNIT_FILE, bytes(data)))


def test_a_foreign_exception_is_seen(ds, monkeypatch):
    monkeypatch.setattr(hostile_inputs.HostileDataset, "_read", lambda self, same, whole: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        check(ds, "commit", b"")


def test_much_memory_is_seen(ds, monkeypatch):
    monkeypatch.setattr(hostile_inputs.HostileDataset, "_read", lambda self, same, whole: b"x" * (400 << 20))
    with pytest.raises(AssertionError, match=r"reading a dataset took \d+ MB"):
        check(ds, "commit", b"")


@pytest.mark.parametrize(
    "work",
    [
        lambda: open(os.devnull).close(),
        lambda: os.listdir("/"),
        lambda: exec("1"),
        lambda: __import__("this_is_no_module"),
        lambda: socket.socket().close(),
        lambda: os.mkdir(os.devnull),
    ],
    ids=["open", "list", "exec", "import", "connect", "write"],
)
def test_what_reading_must_not_do_is_seen(ds, work):
    def quietly():
        with suppress(OSError, ImportError):
            work()

    with pytest.raises(AssertionError, match="reading a dataset did"):
        WATCH(ds.folder, quietly)


def table_of(ds, **columns):
    """The row table of the first unit with other columns."""
    table = pa.parquet.read_table(io.BytesIO(ds.original[ROW_TABLE]))
    for name, column in columns.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), column)
    sink = io.BytesIO()
    pa.parquet.write_table(table, sink, compression="zstd", store_schema=False)
    return sink.getvalue()


@pytest.mark.parametrize("column", ["source", "input_ids"])
def test_a_small_file_that_unpacks_to_much(ds, column):
    n_rows = 4
    if column == "source":
        made = pa.array(["x" * 20_000_000] * n_rows)
    else:
        made = pa.array([[7] * 3_000_000] * n_rows, pa.list_(pa.field("element", pa.int32(), nullable=False)))
    data = table_of(ds, **{column: made})
    assert len(data) < 30_000
    assert not ds.readable(agreeing(ds, ROW_TABLE, data))
    small = made.slice(0, 1).take(pa.array([0] * n_rows))
    assert ds.readable(agreeing(ds, ROW_TABLE, table_of(ds, source=pa.array(["x" * 1000] * len(small)))))


def test_text_that_is_not_utf8(ds):
    offsets, text = (pa.py_buffer(data) for data in (struct.pack("<5i", 0, 2, 2, 2, 2), b"\xff\xfe"))
    source = pa.Array.from_buffers(pa.string(), 4, [None, offsets, text])
    assert not ds.readable(agreeing(ds, ROW_TABLE, table_of(ds, source=source)))


def test_a_pickle_is_never_loaded(ds):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    evil = pickle.dumps(Evil())
    for name in ds.original:
        if name not in ("config.yaml", "README.md", ".lock"):
            assert not ds.readable({name: evil})
    assert open_dataset(ds.folder)["loss"][0].shape == ()
