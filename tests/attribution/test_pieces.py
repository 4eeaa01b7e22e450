"""What is read at once: every row of every column once, in the order of the disk, in memory that doesn't grow."""

import pytest
import torch
from dataset_cases import make_dataset, same_bits, truth

from tlfast.attribution import pieces
from tlfast.attribution.pieces import read_pieces
from tlfast.dataset import Column, Plan, concat_datasets

COLUMNS = {
    "a": (torch.bfloat16, (8,)), "b": (torch.float32, ()), "c": (torch.float16, (2, 5)),
    "q": Column(torch.float32, (12,), encoding="int8"), "e": (torch.float64, (3,)),
}  # fmt: skip
ROW_BYTES = 16 + 4 + 20 + 16 + 24


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pieces") / "d", columns=COLUMNS, plan=Plan(101, 20))


@pytest.mark.parametrize("most_rows", [1, 7, 1000])
@pytest.mark.parametrize("piece_bytes", [1, 16 * 20, ROW_BYTES * 45, 1 << 20])
def test_every_row_of_every_column_once(ds, piece_bytes, most_rows, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
    read, at, memory = {point: [] for point in COLUMNS}, 0, set()
    for piece, rows in read_pieces(ds, list(COLUMNS), most_rows):
        assert piece.first <= piece.start < piece.stop <= piece.end <= piece.first + most_rows
        assert list(rows) == piece.names
        assert piece.first == at
        for name, values in rows.items():
            read[name].append((piece.start, values.clone()))
            memory.add(values.untyped_storage().data_ptr()) if name != "q" else None
        n_bytes = sum(ds.column(name).row_bytes for name in piece.names)
        assert n_bytes * (piece.stop - piece.start) <= piece_bytes or piece.stop - piece.start == 1
        at = piece.end if piece.is_last else at
    assert at == len(ds)
    # Two are being read, one is waiting, one is used; one more while they change places. A larger one takes its place.
    assert len(memory) <= 5 or piece_bytes == 1
    for name, parts in read.items():
        starts = [start for start, _ in parts]
        assert starts == sorted(starts)
        found = torch.cat([values for _, values in parts]).reshape(ds[name].shape)
        assert torch.equal(found, ds[name][:])
        assert name == "q" or same_bits(found, truth(COLUMNS, Plan(101, 20))[name])


def test_units_are_read_column_by_column_and_small_ones_together(ds, monkeypatch):
    def said(searched, piece_bytes):
        monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        return [(p.names, p.start, p.stop, p.is_last) for p in pieces.pieces(searched, ["a", "b", "c"], 1000)]

    assert said(ds, 40 * 40)[:2] == [(["a", "b", "c"], 0, 40, True), (["a", "b", "c"], 40, 80, True)]
    assert said(ds, 20 * 20)[:2] == [(["a", "b"], 0, 20, False), (["c"], 0, 20, True)]
    assert said(ds, 160)[:5] == [
        (["a"], 0, 10, False), (["a"], 10, 20, False), (["b"], 0, 20, False), (["c"], 0, 8, False),
        (["c"], 8, 16, False),
    ]  # fmt: skip
    view = concat_datasets([ds.select([5, 3]), ds])
    assert said(view, 1 << 20) == [(["a", "b", "c"], 0, 103, True)]
    assert said(ds.select([]), 1 << 20) == []
    ((_, rows),) = read_pieces(view.select([0, 1]), ["a"], 9)
    assert torch.equal(rows["a"], ds["a"][[5, 3]])
