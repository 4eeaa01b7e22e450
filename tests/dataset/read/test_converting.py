"""Datasets and views as arrays, data frames, Hugging Face datasets and FAISS indexes: every value, or a refusal."""

import sys

import faiss
import kinds_cases
import numpy as np
import pytest
import torch
from dataset_cases import COLUMNS, make_dataset, make_writer, truth
from dataset_cases import examples as examples_of

import tlfast
from tlfast.dataset import Column, DatasetError, Plan, concat_datasets, export_dataset, open_dataset
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


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    kinds_cases.write_units(kinds_cases.make_writer(folder))
    return open_dataset(folder)


def test_what_can_not_be_converted(kinds, tmp_path):
    mixed = "points must have rows of one kind, got 't' per token and 'h' per example. Name those of one kind, and"
    for call in ("to_numpy", "to_pandas", "to_hf", "to_faiss"):
        wanted = {"point": ["t", "h"]} if call == "to_faiss" else {"points": ["t", "h"]}
        with pytest.raises(DatasetError, match=f"{call}: {mixed}"):
            getattr(kinds, call)(**wanted)
        with pytest.raises(KeyError, match=r"GradientDataset: point must be one of h, .*, got 'nope'"):
            getattr(kinds, call)(**{name: ["nope"] for name in wanted})
    assert np.array_equal(kinds.to_numpy("q")["q"], kinds["q"][:].numpy())
    for name in ("id", "position"):
        writer = kinds_cases.make_writer(tmp_path / name, columns={name: kinds_cases.COLUMNS["t"]})
        kinds_cases.write_units(writer)
        message = f"to_numpy: points must not include the name of another array, got '{name}'. Leave it out, and read"
        with pytest.raises(DatasetError, match=message):
            open_dataset(tmp_path / name).to_numpy()
        assert len(open_dataset(tmp_path / name).to_pandas([name])) == 15


TOKENS_OF = {
    "all": (lambda ds: ds, range(7)),
    "some": (lambda ds: ds.select([6, 1, 0]), [6, 1, 0]),
    "several": (lambda ds: concat_datasets([ds, ds.select([4])]), [*range(7), 4]),
    "none": (lambda ds: ds.select([1]), [1]),
}


@pytest.mark.parametrize("view", TOKENS_OF)
def test_rows_per_token(kinds, view):
    """Each real token has a row of its own, which says whose it is."""
    made, examples = TOKENS_OF[view]
    view, lengths = made(kinds), kinds_cases.LENGTHS
    ids, positions = [i for i in examples for _ in range(lengths[i])], [k for i in examples for k in range(lengths[i])]
    right = {point: torch.cat([kinds[point][i] for i in examples]).numpy() for point in ("t", "tq")}
    arrays = view.to_numpy(["tq", "t"])
    assert list(arrays) == ["id", "position", "tq", "t"]
    frame = view.to_pandas(["tq", "t"])
    assert list(frame.columns) == ["id", "position", "source", "start", "length", "flags", "grad:tq", "grad:t"]
    hf = view.to_hf(["tq", "t"])
    assert hf.column_names == list(frame.columns)
    for found in (arrays, frame, hf):
        assert list(found["id"][:]) == ids
        assert list(found["position"][:]) == positions
    assert frame["start"].tolist() == hf["start"][:] == [10 * i for i in ids]
    for point in ("tq", "t"):
        assert (arrays[point].dtype, arrays[point].shape) == (right[point].dtype, right[point].shape)
        for values in (arrays[point], list(frame[f"grad:{point}"]), hf[f"grad:{point}"][:]):
            values = np.asarray(values, right[point].dtype).reshape(right[point].shape)
            assert values.tobytes() == right[point].tobytes()
    assert frame.attrs["tlfast"] == {point: kinds.holds(point) for point in ("tq", "t")}


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("view", TOKENS_OF)
def test_an_index_of_tokens_finds_what_a_search_finds(kinds, view, metric):
    view = TOKENS_OF[view][0](kinds)
    queries = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    index = view.to_faiss(point="tq", metric=metric)
    assert index.ntotal == len(view["tq"].flat)
    directions = queries / queries.norm(dim=1, keepdim=True)
    scores, numbers = index.search((queries if metric == "dot" else directions).numpy(), 40)
    found, right = view.from_faiss(scores, numbers, point="tq"), view.search(queries, 40, point="tq", metric=metric)
    n = right.indices.shape[1]
    assert n == index.ntotal < 40
    torch.testing.assert_close(found.scores[:, :n], right.scores, rtol=0, atol=1e-5)
    if len(set(view.ids.tolist())) == len(view):  # else several rows have equal scores
        assert torch.equal(found.indices[:, :n], right.indices)
        assert torch.equal(found.positions[:, :n], right.positions)
    for query in range(3):
        assert len(found[query]) == n
        for hit in found[query]:
            row = view["tq"][hit["row"]][hit["position"]].flatten()
            score = row @ queries[query] / (1 if metric == "dot" else row.norm() * queries[query].norm())
            assert abs(float(score) - hit["score"]) < 1e-5
            assert hit["length"] == kinds_cases.LENGTHS[hit["id"]] > hit["position"]
    assert (found.indices[:, n:] == -1).all()
    assert found.scores[:, n:].isnan().all()
    assert "token" in repr(found) or not n


def test_what_an_index_can_not_have_found(kinds):
    scores, numbers = np.zeros((1, 2), np.float32), np.array([[0, 15]])
    message = "from_faiss: numbers must be -1, for none, or of the 15 rows, got 15. Ask an index that ds.to_faiss has"
    with pytest.raises(IndexError, match=message):
        kinds.from_faiss(scores, numbers, point="t")
    with pytest.raises(IndexError, match="got -2"):
        kinds.from_faiss(scores, np.array([[-2, 1]]), point="t")
    message = r"from_faiss: scores must be floats .*, got torch.float32 \[1, 2\] beside torch.int64 \[2\]. Give both"
    with pytest.raises(ValueError, match=message):
        kinds.from_faiss(scores, numbers[0], point="t")
    with pytest.raises(ValueError, match=r"from_faiss: point must be one of 'h', .*, got none. Say whose rows"):
        kinds.from_faiss(scores, numbers)
    found = kinds.from_faiss(np.ones((1, 2), np.float32), np.array([[6, -1]]), point="h")
    assert (found.indices.tolist(), found.positions, found[0][0]["id"]) == ([[6, -1]], None, 6)


def test_a_token_that_is_not_finite(tmp_path):
    columns = {"t": Column(torch.float32, (2,), per="token")}
    writer = kinds_cases.make_writer(tmp_path, columns=columns)
    values = {"t": [torch.ones(n, 2) for n in kinds_cases.LENGTHS]}
    values["t"][4][2, 1] = torch.nan
    kinds_cases.write_units(writer, values)
    ds = open_dataset(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinity in token 2 of row 4, after"):
        ds.to_faiss()
    assert ds.filter("not non_finite").to_faiss().ntotal == 11


def test_two_factors_of_a_token_are_no_vector(tmp_path):
    """Their dot product is g g' + a a', where that of the gradients is g g' times a a'."""
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5)), torch.randn(2, 4, 3)
    specs = [
        tlfast.Spec("*", of="weight", per="token", name="whole"),
        tlfast.Spec("*", of="weight", per="token", project=2, name="small"),
        tlfast.Spec("0", "norm", of="weight", per="token"),
    ]
    with (
        tlfast.capture(model, specs, rows=2) as cap,
        cap.into(tmp_path / "ds", plan=Plan(2, 2)) as out,
        cap.batch(ids=[0, 1]),
    ):
        model(x).square().sum().backward()
    assert out is not None
    ds = open_dataset(tmp_path / "ds")
    sizes = {"0:whole": (5, 3), "0:small": (2, 2), "1:whole": None, "1:small": None, "0:weight:norm": None}
    for view in (ds, ds.select([1]), concat_datasets([ds, ds])):
        assert {point: view.factor_sizes(point) for point in sizes} == sizes
        for point, size in sizes.items():
            queries = view[point].flat[:1]
            if size is None:
                assert view.search(queries, 9, point=point).indices.shape == (1, min(9, len(view[point].flat)))
                assert view.to_faiss(point=point).ntotal == len(view[point].flat)
                continue
            message = f"point '{point}' must have rows whose dot products are those of gradients, got the two factors"
            with pytest.raises(ValueError, match=f"search: {message}"):
                view.search(queries, 1, point=point)
            with pytest.raises(ValueError, match=f"to_faiss: {message}"):
                view.to_faiss(point=point)
    g, a = ds["0:whole"][1].split(sizes["0:whole"], 1)
    hidden = model[0](x[1]).detach().requires_grad_()
    (right,) = torch.autograd.grad(model[1](hidden).square().sum(), hidden)
    torch.testing.assert_close(g, right)
    torch.testing.assert_close(a, x[1])
    assert "two factors" in ds.holds("0:small")
    assert "two factors" not in ds.holds("1:small") + ds.holds("1:whole")


def test_factors_of_other_sizes_in_a_view(tmp_path):
    """Rows as long as each other, of layers that aren't: nobody takes the second ones apart as the first."""
    for name, (n_outputs, n_inputs) in {"wide": (5, 3), "slim": (3, 5)}.items():
        model = torch.nn.Sequential(torch.nn.Linear(n_inputs, n_outputs))
        with (
            tlfast.capture(model, [tlfast.Spec("*", of="weight", per="token")], rows=2) as cap,
            cap.into(tmp_path / name, plan=Plan(2, 2)),
            cap.batch(ids=[0, 1]),
        ):
            x = torch.cat([torch.randn(2, 3, n_inputs), torch.zeros(2, 1, n_inputs)], 1)
            (model(x) * x.abs().sum(-1, keepdim=True)).square().sum().backward()
    both = concat_datasets([open_dataset(tmp_path / name) for name in ("wide", "slim")])
    message = (
        r"point '0:weight' must have factors of the same sizes in all datasets, got \[5, 3\] in dataset 1 and "
        r"\[3, 5\] in dataset 2\. Read each of view\.sources by itself\."
    )
    for view in (both, both.select([0])):
        with pytest.raises(DatasetError, match=message):
            view.factor_sizes("0:weight")
    with pytest.raises(DatasetError, match=message):
        both.search(torch.ones(1, 8))
    with pytest.raises(DatasetError, match=message):
        export_dataset(both, tmp_path / "index", to="bergson")
    assert not (tmp_path / "index").exists()


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
