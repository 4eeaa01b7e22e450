"""Datasets and views as arrays, data frames, Hugging Face datasets and FAISS indexes: every value, or a refusal."""

import sys

import faiss
import kinds_cases
import numpy as np
import pytest
import torch
from dataset_cases import COLUMNS, make_dataset, make_writer, truth
from dataset_cases import examples as examples_of

from tlfast.dataset import DatasetError, Plan, open_dataset
from tlfast.dataset.read import arrow_rows, converting

ROWS = [9, 1, 1, 10]


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("converting") / "d")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    for module in (arrow_rows, converting):
        monkeypatch.setattr(module, "PART_BYTES", 3 * 70)


def expected(point, rows=slice(None)):
    rows = truth()[point][rows]
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()


@pytest.mark.parametrize("rows", [None, ROWS, []], ids=str)
def test_arrays(ds, rows):
    chosen = ds if rows is None else ds.select(rows)
    for points in (None, ["loss"], "double"):
        found = chosen.to_numpy(points)
        assert list(found) == (list(COLUMNS) if points is None else [points] if points == "double" else points)
        for point, array in found.items():
            right = expected(point, slice(None) if rows is None else rows)
            assert (array.dtype, array.shape, array.tobytes()) == (right.dtype, right.shape, right.tobytes())


def test_a_data_frame(ds):
    frame = ds.select(ROWS).to_pandas()
    assert list(frame.columns) == [*ds.fields, *(f"norm:{point}" for point in COLUMNS)]
    assert frame["id"].tolist() == ROWS
    assert [list(tokens) for tokens in frame["input_ids"]] == [ds.examples[row]["input_ids"] for row in ROWS]
    frame = ds.to_pandas(["double", "loss"])
    assert list(frame.columns[-2:]) == ["grad:double", "grad:loss"]
    assert np.array_equal(np.stack(frame["grad:double"]), expected("double"))


def test_a_hugging_face_dataset(ds):
    made = ds.select(ROWS).to_hf(["double", "blocks.1.attn"])
    assert made["id"][:] == ROWS
    assert np.array_equal(np.array(made["grad:double"][:]), expected("double", ROWS))
    assert np.array_equal(np.array(made["grad:blocks.1.attn"][:], "f4"), expected("blocks.1.attn", ROWS).reshape(4, -1))
    assert made[0]["input_ids"] == ds.examples[9]["input_ids"]
    assert len(ds.to_hf()) == 11


def test_what_can_not_be_converted(tmp_path):
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path))
    kinds = open_dataset(tmp_path)
    for call in ("to_numpy", "to_pandas"):
        with pytest.raises(
            DatasetError, match=f"{call}: point 't' must have a row for each example, got one per token."
        ):
            getattr(kinds, call)(["t"])
        with pytest.raises(KeyError, match=r"GradientDataset: point must be one of h, .*, got 'nope'"):
            getattr(kinds, call)(["nope"])
    assert np.array_equal(kinds.to_numpy("q")["q"], kinds["q"][:].numpy())


def test_views_without_rows(ds, vectors, tmp_path):
    none = ds.select([])
    assert len(none.to_hf()) == len(none.to_pandas(["loss"])) == len(none.sample()) == 0
    assert none.to_hf().column_names == ds.to_hf(["loss"]).column_names[:-1] + [f"grad:{point}" for point in COLUMNS]
    assert vectors.select([]).to_faiss().ntotal == 0
    found = vectors.select([]).search(torch.ones(2, 8))
    assert (found.indices.shape, len(found[0])) == ((2, 0), 0)
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path))
    tokens = open_dataset(tmp_path).select([1, 5])  # examples without any
    assert tokens.search(torch.ones(1, 5), point="t").indices.shape == (1, 0)
    assert [list(rows.shape) for rows in tokens["tq"][:]] == [[0, 2, 3]] * 2


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """bfloat16 rows for FAISS."""
    writer = make_writer(tmp_path_factory.mktemp("v"), columns={"h": (torch.bfloat16, (8,))}, plan=Plan(50, 11))
    rows = truth(writer.columns, writer.plan)["h"]
    for unit in writer.plan.units:
        writer.write_unit(unit, {"h": rows[unit.start : unit.stop]}, examples_of(unit))
    return open_dataset(writer.out)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
def test_an_index_finds_what_a_search_finds(vectors, metric):
    queries = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    directions = queries / queries.norm(dim=1, keepdim=True)
    scores, rows = vectors.to_faiss(metric=metric).search((queries if metric == "dot" else directions).numpy(), 5)
    found = vectors.search(queries, 5, metric=metric)
    assert rows.tolist() == found.indices.tolist()
    assert np.allclose(scores, found.scores.numpy(), rtol=0, atol=1e-5)
    own = faiss.IndexFlatL2(8)
    assert vectors.select(ROWS).to_faiss(own, point="h") is own
    assert np.array_equal(own.reconstruct_n(0, 4), vectors["h"][ROWS].float().numpy())


def test_indexes_that_can_not_be_used(vectors, ds, tmp_path):
    full = faiss.IndexFlatIP(8)
    full.add(np.ones((2, 8), np.float32))
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatL2(8), 8, 2)
    for index, message in (
        (faiss.IndexFlatIP(7), r"to_faiss: index must be of 8 values a row, got 7. Make one of that size."),
        (full, r"to_faiss: index must be empty: number i in it is row i, got one with 2 rows. Give a new one."),
        (ivf, r"to_faiss: index must be trained, got one that isn't. Train it on some rows: index.train"),
        (7, r"to_faiss: index must be a FAISS index, got int. Leave it out."),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            vectors.to_faiss(index)
    with pytest.raises(
        ValueError, match=r"to_faiss: point must be one of 'blocks.0.hook_resid_post', .*, got none. Say"
    ):
        ds.to_faiss()
    with pytest.raises(ValueError, match=r"to_faiss: metric must be one of dot, cosine, got 'l2'. Choose one."):
        vectors.to_faiss(metric="l2")
    writer = make_writer(tmp_path, columns={"h": (torch.float32, (2,))}, plan=Plan(2, 2))
    writer.write_unit(
        Plan(2, 2).unit(0), {"h": torch.tensor([[1.0, 2.0], [torch.nan, 0]])}, examples_of(Plan(2, 2).unit(0))
    )
    odd = open_dataset(tmp_path)
    message = (
        r"to_faiss: point 'h' must hold finite float32 values, got NaN or infinity in row 1, .* ds.filter\(\"not non_f"
    )
    with pytest.raises(ValueError, match=message):
        odd.to_faiss()
    assert odd.filter("not non_finite").to_faiss().ntotal == 1


@pytest.mark.parametrize("library, call, name", [
    ("faiss", "to_faiss", "faiss"), ("pandas", "to_pandas", "hub"), ("datasets", "to_hf", "hub"),
])  # fmt: skip
def test_a_library_that_is_missing(vectors, library, call, name, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ImportError, match=rf"{call}: {library} must be installed, got .* Run: pip install 'tlfast\[{name}\]'"
    ):
        getattr(vectors, call)()
