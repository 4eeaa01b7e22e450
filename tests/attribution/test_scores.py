"""Scores of stored rows against a plain reference in float64: all methods, columns and kinds of queries."""

import kinds_cases
import numpy as np
import pytest
import torch
from dataset_cases import HEADER, make_dataset, make_writer, truth, write_units
from dataset_cases import examples as examples_of

import tlfast
from tlfast.attribution import Scores, pieces, sums
from tlfast.dataset import Column, Plan, concat_datasets, merge_datasets, open_dataset
from tlfast.dataset.read import search as searching

N = 203
PLAIN = ("dot", "cosine", "trackstar")  # what needs nothing beside the rows
PLAN = Plan(N, 37)
COLUMNS = {
    "bf16": (torch.bfloat16, (24,)), "f32": (torch.float32, (4, 6)), "f16": (torch.float16, (5,)),
    "one": (torch.float32, ()), "q": Column(torch.float32, (70,), encoding="int8:64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("scores") / "d", columns=COLUMNS, plan=PLAN)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """A dataset of the same columns and one more, whose rows are the queries."""
    columns = {"more": (torch.float32, (2,)), **COLUMNS}
    plan = Plan(7, 4)
    writer = make_writer(tmp_path_factory.mktemp("queries") / "d", columns=columns, plan=plan)
    write_units(writer, truth(columns, plan, seed=5))
    return open_dataset(writer.out)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Many blocks, many parts of queries."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 3000)
    monkeypatch.setattr(sums, "_CACHED_BYTES", 900)
    monkeypatch.setattr(searching, "_SCORE_BYTES", 1 << 10)


def joined(rows, points=tuple(COLUMNS)):
    """Rows of several columns behind each other, in float64."""
    return torch.cat([rows[point][:].double().reshape(len(rows[point][:]), -1) for point in points], 1)


def whitened(rows, queries, widths, moments=None, damping=0.1, mix=0.0):
    """Rows and queries by the inverse root, by way of eigenvalues."""
    out = []
    for part, asked, given in zip(rows.split(widths, 1), queries.split(widths, 1), moments or widths, strict=True):
        own = part.T @ part / len(part) if moments is None else given
        m = (1 - mix) * own + mix * asked.T @ asked / len(asked)
        values, vectors = torch.linalg.eigh(m)
        root = vectors @ torch.diag((values.clamp(min=0) + damping * values.mean()) ** -0.5) @ vectors.T
        out.append((part @ root, asked @ root))
    return (torch.cat(parts, 1) for parts in zip(*out, strict=True))


def reference(rows, queries, method, widths, **more):
    """All scores in float64, [Q, rows], and how far float32 may be from each."""
    condition = 1.0
    if method == "trackstar":
        rows, queries = whitened(rows, queries, widths, **more)
        condition = 1 / more.get("damping", 0.1) * max(widths)  # of damped moments, whose factor multiplies in float32
    if method != "dot":
        rows, queries = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (rows, queries))
    # Each product and sum rounds once; a query is rounded to float32, and the norm and the division round too.
    eps, n = torch.finfo(torch.float32).eps, rows.shape[1]
    return queries @ rows.T, (2 * n + 8) * eps * condition**0.5 * (queries.abs() @ rows.abs().T)


def check(found, scores, bound):
    """Fail unless these are the best rows, in their order, as far as rounding lets one tell."""
    k = found.indices.shape[1]
    for indices, got, right, off in zip(found.indices, found.scores.double(), scores, bound, strict=True):
        assert len(set(indices.tolist())) == k
        assert bool(((got - right[indices]).abs() <= off[indices]).all())
        assert bool((got.diff() <= 0).all())
        left = torch.ones(len(right), dtype=torch.bool)
        left[indices] = False
        assert not bool(left.any()) or bool((right[left] - off[left] <= got[-1] + off[indices[-1]]).all())


WIDTHS = [24, 24, 5, 1, 70]


@pytest.mark.parametrize("n_queries", [1, 3, 7])
@pytest.mark.parametrize("method", PLAIN)
def test_against_float64(ds, others, method, n_queries):
    queries = others.select(range(n_queries))
    right, bound = reference(joined(ds), joined(others)[:n_queries], method, WIDTHS)
    found = tlfast.score(ds, queries, method, k=5)
    assert isinstance(found, Scores)
    assert found.points == list(COLUMNS)
    assert found.indices.shape == (n_queries, 5)
    check(found, right, bound)
    every = tlfast.score(ds, queries, method, k=None)
    assert bool(((every.scores.double() - right).abs() <= bound).all())
    assert torch.equal(every.best(5).indices, found.indices)
    assert torch.equal(every.best(5).scores, found.scores)
    tensors = {point: queries[point][:].float() for point in COLUMNS}
    assert torch.equal(tlfast.score(ds, tensors, method, k=5).scores, found.scores)


def test_the_check_can_fail(ds, others):
    right, bound = reference(joined(ds), joined(others), "cosine", WIDTHS)
    for wrong in (
        reference(joined(ds), joined(others), "dot", WIDTHS)[0],
        right.roll(1, 1),
        right.roll(1, 0),
        sum(reference(joined(ds, [p]), joined(others, [p]), "cosine", [0])[0] for p in COLUMNS),  # column by column
    ):
        with pytest.raises(AssertionError):
            check(tlfast.score(ds, others, "cosine", k=5), wrong, bound)


@pytest.mark.parametrize("method", PLAIN)
def test_symmetric(ds, others, method):
    moments = tlfast.RunningSums("moment2_full")
    moments.add({point: ds[point][:] for point in COLUMNS})
    more = {"moments": moments} if method == "trackstar" else {}
    there = tlfast.score(ds, others, method, k=None, **more)
    back = tlfast.score(others, ds, method, k=None, **more)
    bound = reference(joined(ds), joined(others), method, WIDTHS)[1]
    assert bool(((there.scores - back.scores.T).abs() <= 2 * bound).all())


def test_moments_that_are_given_and_mixed(ds, others, tmp_path):
    moments = tlfast.RunningSums("moment2_full")
    moments.add({point: others[point][:].float() for point in COLUMNS})
    moments.save(tmp_path / "moments.npz")
    of_others = [part.T @ part / len(part) for part in joined(others).split(WIDTHS, 1)]
    for changes, more in (
        ({"moments": tmp_path / "moments.npz", "damping": 0.5}, {"moments": of_others, "damping": 0.5}),
        ({"mix": 0.25}, {"mix": 0.25}),
    ):
        right, bound = reference(joined(ds), joined(others), "trackstar", WIDTHS, **more)
        check(tlfast.score(ds, others, "trackstar", k=4, **changes), right, bound)
    plain, mixed = (tlfast.score(ds, others, "trackstar", k=4, mix=mix).scores for mix in (0.0, 0.25))
    assert not torch.allclose(plain, mixed)


def test_blocks_change_scores_by_rounding_alone(ds, others, monkeypatch):
    for method in PLAIN:
        found = []
        for piece_bytes, sums_bytes in ((400, 200), (3000, 1000), (1 << 20, 1 << 20)):
            monkeypatch.setattr(pieces, "PIECE_BYTES", piece_bytes)
            monkeypatch.setattr(sums, "SUMS_BYTES", sums_bytes)
            found.append(tlfast.score(ds, others, method, k=None).scores)
        bound = reference(joined(ds), joined(others), method, WIDTHS)[1]
        assert all(bool(((scores - found[0]).abs() <= 2 * bound).all()) for scores in found)
        parts = [tlfast.score(ds, others.select([row]), method, k=None).scores for row in range(len(others))]
        assert bool(((torch.cat(parts) - found[0]).abs() <= 2 * bound).all())


def test_copies_are_found_first_among_ten_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(sums, "_CACHED_BYTES", 1 << 14)
    plan, columns = Plan(10_000, 5_000), {"a": (torch.bfloat16, (8,)), "b": (torch.bfloat16, (4,))}
    rows = truth(columns, plan)
    places = [3, 4_999, 5_000, 9_999]
    for name in rows:
        rows[name][places] = 2 * rows[name][17]  # the same direction, which bfloat16 doubles exactly
    writer = make_writer(tmp_path / "d", columns=columns, plan=plan)
    for unit in plan.units:
        examples = [examples_of(Plan(1, 1).unit(0))[0]] * len(unit)
        numbered = [type(e)(i, e.input_ids, e.source, i, e.length) for i, e in enumerate(examples, unit.start)]
        writer.write_unit(unit, {n: r[unit.start : unit.stop] for n, r in rows.items()}, numbered)
    planted = open_dataset(tmp_path / "d")
    for method in PLAIN:
        found = tlfast.score(planted, planted.select([17]), method, k=5)
        assert set(places) <= set(found.indices[0].tolist())
        first = places if method == "dot" else [3, 17, *places[1:]]
        assert sorted(found.indices[0, : len(first)].tolist()) == first


@pytest.fixture
def odd(tmp_path):
    """Rows that aren't finite, zeros, and very small and large ones, in two columns."""
    nan, inf, big = torch.nan, torch.inf, 3e38
    rows = [[nan, 1], [inf, 0], [-inf, 1], [0, 0], [1e-30, 1e-30], [big, big], [1e-42, 0], [1, 1], [big, -big]]
    plan, columns = Plan(9, 4), {"x": (torch.float32, (2,)), "y": (torch.float32, (1,))}
    writer = make_writer(tmp_path / "odd", plan=plan, columns=columns)
    for unit in plan.units:
        part = torch.tensor(rows[unit.start : unit.stop])
        writer.write_unit(unit, {"x": part, "y": 0 * part[:, :1].nan_to_num(0, 0, 0)}, examples_of(unit))
    return open_dataset(tmp_path / "odd")


def test_rows_that_are_not_finite_are_counted_and_left_out(odd):
    query = {"x": torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 1.0]]), "y": torch.tensor([[1.0]] * 3)}
    found = tlfast.score(odd, query, k=9)
    assert found.n_skipped == 3
    # What overflows float32 is inf; what would be inf - inf on the way is not NaN.
    assert found.indices[0].tolist() == [5, 7, 4, 6, 3, 8, -1, -1, -1]
    assert found.scores[0, [0, 5]].tolist() == [torch.inf, 0.0]
    assert found.indices[1, :6].tolist() == [3, 4, 5, 6, 7, 8]
    assert found.scores[2, 1] == pytest.approx(3e38)
    assert "3 rows left out, which aren't finite" in repr(found)
    every = tlfast.score(odd, query, k=None)
    assert every.scores[:, :3].isnan().all()
    assert not every.scores[:, 3:].isnan().any()
    for method in PLAIN:
        with pytest.raises(FloatingPointError, match=r"score: rows must be finite, got NaN or infinity in row 0. non_"):
            tlfast.score(odd, {"x": query["x"][:1]}, method, non_finite="stop")


@pytest.mark.parametrize("method", ["cosine", "trackstar"])
def test_cosines_of_zeros_and_of_very_small_and_large_rows(odd, method):
    moments = tlfast.RunningSums("moment2_full")
    moments.add({"x": torch.tensor([[2.0, 0.0], [0.0, 2.0]])})
    more = {"moments": moments} if method == "trackstar" else {}
    found = tlfast.score(odd, {"x": torch.tensor([[1.0, 1.0], [1e30, 0.0]])}, method, k=None, **more)
    assert found.n_skipped == 3
    right = torch.tensor([[0, 1, 1, 0.5**0.5, 1, 0], [0, 0.5**0.5, 0.5**0.5, 1, 0.5**0.5, 0.5**0.5]])
    assert torch.allclose(found.scores[:, 3:], right, rtol=0, atol=4 * torch.finfo(torch.float32).eps)


def test_merged_and_filtered_datasets_and_kept_order(ds, others, tmp_path):
    make_dataset(tmp_path / "a", columns=COLUMNS, plan=PLAN)
    writer = make_writer(tmp_path / "b", columns=COLUMNS, plan=Plan(50, 20))
    write_units(writer, truth(COLUMNS, Plan(50, 20), seed=8))
    merge_datasets(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    merged = tlfast.score(tmp_path / "merged", others, "cosine", k=7)
    rows = torch.cat([joined(ds), joined(open_dataset(tmp_path / "b"))])
    check(
        merged,
        *reference(rows, joined(others), "cosine", WIDTHS),
    )
    assert int(merged.ids.max()) >= N
    condition = "length > 3 and id >= 20"
    view = ds.filter(condition)
    for method in PLAIN:
        found = tlfast.score(ds, others, method, k=4, where=condition)
        check(found, *reference(joined(view), joined(others), method, WIDTHS))
        assert [hit["length"] > 3 for hit in found[0]] == [True] * 4
    both = concat_datasets([view, ds.select([5, 5])])
    check(tlfast.score(both, others, k=4), *reference(joined(both), joined(others), "dot", WIDTHS))
    assert found.dataset.ids.tolist() == view.ids.tolist()
    for k in (3, None):
        assert tlfast.score(ds, others, k=k, where="length > 99").scores.shape == (7, 0)
    some = tlfast.score(ds, others, points=["f*", "one"], k=3)
    assert some.points == ["f32", "f16", "one"]
    check(some, *reference(joined(ds, some.points), joined(others, some.points), "dot", [24, 5, 1]))


def test_float64_columns_are_scored_in_float64(tmp_path):
    columns = {"w": (torch.float64, (6,)), "n": (torch.float32, (3,))}
    wide = make_dataset(tmp_path / "w", columns=columns, plan=Plan(30, 9))
    rows = joined(wide, list(columns))
    found = tlfast.score(wide, wide.select([3, 4]), "cosine", k=3)
    assert found.scores.dtype == torch.float64
    right = reference(rows, rows[3:5], "cosine", [6, 3])[0]
    assert torch.allclose(found.scores, right.topk(3).values, rtol=1e-13)
    assert found.indices[:, 0].tolist() == [3, 4]


def test_what_a_user_allows_his_model_changes_no_score(ds, others):
    right = tlfast.score(ds, others, k=None).scores
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        bound = reference(joined(ds), joined(others), "dot", WIDTHS)[1]
        with torch.autocast("cpu", torch.bfloat16):
            found = tlfast.score(ds, others, k=None).scores
        assert found.dtype == torch.float32
        assert bool(((found - right).abs() <= bound).all())
    finally:
        torch.set_float32_matmul_precision(before)


def test_all_scores_go_to_a_file(ds, others, tmp_path, monkeypatch):
    out, seen = tmp_path / "scores.npy", []
    both = tlfast.score(ds, others, k=2, out=out, progress=seen.append)
    assert sum(seen) == N
    every = tlfast.score(ds, others, k=None)
    array = np.load(out)
    assert (array.dtype, array.shape) == (np.float32, (7, N))
    assert array.tobytes() == every.scores.numpy().tobytes()
    assert torch.equal(every.best(2).scores, both.scores)
    mapped = tlfast.score(ds, others, k=None, out=tmp_path / "more.npy")
    assert torch.equal(mapped.scores, every.scores)
    assert repr(mapped) == repr(every)
    with pytest.raises(
        ValueError, match=r"score: out must be a new name, got .*scores.npy, which exists. Choose anoth"
    ):
        tlfast.score(ds, others, out=out)

    def broken(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("tlfast.attribution.sums.Sums.scores", broken)
    with pytest.raises(KeyboardInterrupt):
        tlfast.score(ds, others, out=tmp_path / "none.npy")
    monkeypatch.setattr("tlfast.attribution.every_score.MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"score: k must be a number where all scores fill the memory, got None with"):
        tlfast.score(ds, others, k=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["more.npy", "scores.npy"]


def test_what_was_found_is_told_as_tables(ds, others, tmp_path):
    found = tlfast.score(ds, others.select([1, 2]), "cosine", k=2)
    assert found.queries.ids.tolist() == [1, 2]
    columns = found.to_dict(texts=True)
    assert list(columns) == ["query", "rank", "score", "row", "id", "source", "start", "length", "text"]
    assert (columns["query"], columns["rank"]) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert columns["row"] == found.indices.flatten().tolist()
    assert columns["source"] == [ds.examples[row]["source"] for row in columns["row"]]
    assert columns["text"] == [text for texts in found.texts() for text in texts]
    assert found.to_pandas()["score"].tolist() == found.scores.flatten().tolist()
    found.to_parquet(tmp_path / "found.parquet")
    table = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "found.parquet")
    assert table.to_pydict() == columns
    with pytest.raises(ValueError, match="score: out must be a new name"):
        found.to_parquet(tmp_path / "found.parquet")
    assert "cosine with bf16, f32, f16, ...; 2 of 2 queries, 2 of 2 rows each" in repr(found)
    assert "<table>" in found._repr_html_()


def kinds(tmp_path):
    kinds_cases.write_units(kinds_cases.make_writer(tmp_path / "kinds"))
    return open_dataset(tmp_path / "kinds")


ONE = {"bf16": torch.ones(1, 24)}
WRONG = [
    (lambda ds, q: tlfast.score(ds, q, "l2"), "score: method must be one of dot, cosine, trackstar, ekfac, got 'l2'."),
    (lambda ds, q: tlfast.score(ds, q, k=0), "score: k must be an int of at least 1, or None, got 0. None gives all"),
    (lambda ds, q: tlfast.score(ds, q, non_finite="keep"), "score: non_finite must be one of skip, stop, got 'keep'."),
    (lambda ds, q: tlfast.score(ds, q, damping=0.2), "score: damping must be left out but with trackstar, ekfac, go"),
    (lambda ds, q: tlfast.score(ds, q, "trackstar", damping=0), "score: damping must be a number above 0, got 0. 0.1"),
    (lambda ds, q: tlfast.score(ds, q, "trackstar", mix=2), "score: mix must be a number from 0 to 1, got 2. 0 takes"),
    (lambda ds, q: tlfast.score(ds, q, "trackstar", moments=3), "score: moments must be RunningSums or their file, go"),
    (lambda ds, q: tlfast.score(ds, q, "trackstar", moments=tlfast.RunningSums()),
     "score: moments must have rows of each point, got none of 'bf16'. Name by points= those that they have"),
    (lambda ds, q: tlfast.score(3, q), "score: dataset must be a dataset, got int. Give the path of one, or open it."),
    (lambda ds, q: tlfast.score(ds, [1]), "score: queries must be a dataset, got list. Give the path of one, or open"),
    (lambda ds, q: tlfast.score(ds, {}), "score: queries must name a column at least, got an empty dict. Give"),
    (lambda ds, q: tlfast.score(ds, {"nope": torch.ones(1)}), "GradientDataset: point must be one of .*, got 'nope'"),
    (lambda ds, q: tlfast.score(ds, ONE, points="f32"), "score: points must name what the queries are of, got queries"),
    (lambda ds, q: tlfast.score(ds, ONE, points=["bf16", "f32"]), "points must name .* got no queries at 'f32'. Leave"),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.ones(2, 23)}), r"queries must have the shape \['?Q'?, 24\], got"),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.ones(0, 24)}), "score: queries must hold a row at least, got none."),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.full((1, 24), torch.nan)}), "queries must be finite, got NaN or i"),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.zeros(2, 24)}, "cosine"), "queries must have a direction, got zero"),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.zeros(1, 24)}, "trackstar"), "in query 0. Leave"),
    (lambda ds, q: tlfast.score(ds, {"bf16": torch.full((1, 24), 1e99, dtype=torch.float64)}), "queries must be withi"),
    (lambda ds, q: tlfast.score(ds, ONE | {"one": torch.ones(2)}), "queries must be equally many for all points, got"),
    (lambda ds, q: tlfast.score(ds, q, points="nope"), "score: points must match a module, got 'nope'"),
    (lambda ds, q: tlfast.score(ds, q.select([])), "score: queries must hold a row at least, got none. Select some"),
    (lambda ds, q: tlfast.score(ds, q.with_fields("more")), "score: queries must share a column with the dataset, got"),
    (lambda ds, q: tlfast.score(q, ds, points="more"), "score: points must be of the queries too, got 'more'. Name"),
    (lambda ds, q: tlfast.score(ds, q, where="length >"), "filter: condition must compare values of a row, got"),
    (lambda ds, q: tlfast.score(ds, q, out="x.csv"), "score: out must end in .npy, got 'x.csv'. All scores go"),
    (lambda ds, q: tlfast.score(ds, q, out="/nowhere/x.npy"), "score: out must lie in a folder that exists, got /now"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_questions_are_refused_before_anything_is_read(ds, others, call, message, monkeypatch):
    def read(*given):
        raise AssertionError("rows were read")

    monkeypatch.setattr("tlfast.attribution.sums.read_pieces", read)
    monkeypatch.setattr("tlfast.attribution.moments.read_pieces", read)
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        call(ds, others)


def test_columns_that_can_not_be_scored_together(ds, others, tmp_path, monkeypatch):
    several = kinds(tmp_path)
    with pytest.raises(
        ValueError, match=r"score: points must have a row for each example, got '\w+', per token. Leave"
    ):
        tlfast.score(several, several)
    acts = {"h": (torch.float32, (2,)), "h:act": Column(torch.float32, (2,), of="act")}
    both = make_dataset(tmp_path / "acts", columns=acts, plan=Plan(4, 4))
    with pytest.raises(
        ValueError, match="score: points must be named where columns are of several kinds, got none wit"
    ):
        tlfast.score(both, both)
    assert tlfast.score(both, both, points=["h", "h:act"], k=1).indices.shape == (4, 1)
    wider = make_dataset(tmp_path / "wide", columns={"bf16": (torch.bfloat16, (25,))}, plan=Plan(4, 4))
    message = r"score: queries must have rows of shape \[24\] at 'bf16', as the dataset, got \[25\]. Name other points"
    with pytest.raises(ValueError, match=message):
        tlfast.score(ds, wider)
    monkeypatch.setattr("tlfast.attribution.moments.MOST_VALUES", 23)
    with pytest.raises(
        ValueError, match="score: points must have at most 23 values a row for their second moments, got"
    ):
        tlfast.score(ds, others, "trackstar")


def test_columns_of_one_name_that_were_made_in_other_ways(tmp_path):
    def weights(name, seed, **more):
        mean = {"points": ["h"], "reduce": "mean", "over": [1]}
        weight = {"points": ["h"], "reduce": "none", "over": [], "of": "weight", "project": {"dim": 2, "seed": seed}}
        columns = {"h": (torch.float32, (2,)), "h:weight": Column(torch.float32, (2, 2), of="weight")} | more
        specs = [mean, weight, {"points": ["h"], "reduce": "norm", "over": [], "of": "weight"}][: len(columns)]
        return make_dataset(tmp_path / name, columns=columns, plan=Plan(3, 3), header={"specs": specs})

    one, two = weights("one", 1), weights("two", 2)  # the seed makes other matrices
    assert len(tlfast.score(one, two, points="h", k=1)) == 3
    with pytest.raises(
        ValueError, match="queries must be made as the dataset's rows at 'h:weight', got another project"
    ):
        tlfast.score(one, two, points=["h", "h:weight"])
    assert len(tlfast.score(one, one, points=["h:weight"], k=1)) == 3
    norm = {"h:weight:norm": Column(torch.float32, (), of="weight")}
    three = weights("three", 1, **norm).with_fields("h:weight", "h:weight:norm")
    text = "points must be named where columns are of several kinds, got none with weight, norm of weight"
    with pytest.raises(ValueError, match=text):
        tlfast.score(three, three)


def test_moments_that_can_not_be_used(ds, tmp_path):
    for stats, rows, message in (
        ("moment2", torch.ones(2, 24), "score: moments must have moment2_full, got moment2. Make them with stats="),
        ("moment2_full", torch.ones(2, 3), r"score: moments must be of rows of 24 values at 'bf16', got \[3\]. They"),
        ("moment2_full", torch.zeros(2, 24), "score: points must have a second moment that isn't zero, got 'bf16'."),
    ):
        moments = tlfast.RunningSums(stats)
        moments.add({"bf16": rows})
        with pytest.raises(ValueError, match=message):
            tlfast.score(ds, ONE, "trackstar", moments=moments)
    moments = tlfast.RunningSums("moment2_full")
    moments.add({"bf16": torch.eye(24)[:1]})
    with pytest.raises(
        ValueError, match=r"score: damping must make the second moments at 'bf16' invertible, got 1e-300."
    ):
        tlfast.score(ds, ONE, "trackstar", moments=moments, damping=1e-300)


def test_queries_of_another_model_are_refused(ds, tmp_path):
    model, specs = {"class": "M", "fingerprint": "a" * 64}, [{"points": "*", "reduce": "mean", "dtype": "bfloat16"}]
    columns, plan = {"bf16": (torch.bfloat16, (24,))}, Plan(3, 3)

    def made(name, **changes):
        header = HEADER | {"model": model, "specs": specs} | changes
        return make_dataset(tmp_path / name, columns=columns, plan=plan, header=header)

    base = made("base")
    stored = [specs[0] | {"dtype": "float32", "points": ["bf16"]}]
    assert len(tlfast.score(base, made("same", specs=stored), k=1)) == 3
    assert len(tlfast.score(base, ds, k=1)) == N  # which doesn't say
    for name, changes, message in (
        ("weights", {"model": model | {"fingerprint": "b" * 64}}, "be of the model of the dataset, got another. Coll"),
        ("reduce", {"specs": [specs[0] | {"reduce": "sum"}]}, "be of the specs of the dataset, got others. Collect th"),
    ):
        other = made(name, **changes)
        with pytest.raises(ValueError, match=f"score: queries must {message}"):
            tlfast.score(base, other)
        assert len(tlfast.score(base, {"bf16": other["bf16"][:]}, k=1)) == 3
