"""Search against a plain reference in float64: scores as far as rounding goes, ties, NaN, all kinds of points."""

import kinds_cases
import pytest
import torch
from dataset_cases import examples as examples_of
from dataset_cases import make_dataset, make_writer

from tlfast.dataset import FLAG_MISSING, Column, Example, Plan, concat_datasets, open_dataset
from tlfast.dataset.read import search as searching
from tlfast.dataset.read.search import Best, Block, directions

N = 203
PLAN = Plan(N, 37)
COLUMNS = {
    "bf16": (torch.bfloat16, (24,)), "f32": (torch.float32, (4, 6)), "f16": (torch.float16, (5,)),
    "f64": (torch.float64, (7,)), "one": (torch.float32, ()), "q": Column(torch.float32, (70,), encoding="int8:64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ds(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("search") / "d", columns=COLUMNS, plan=PLAN)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Many blocks, many parts of queries, long examples cut."""
    monkeypatch.setattr(searching, "BLOCK_BYTES", 700)
    monkeypatch.setattr(searching, "_SCORE_BYTES", 200)
    monkeypatch.setattr(searching, "_EXAMPLES", 2)


def queries_of(ds, point, n=5, seed=3):
    """Queries of a point."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *ds.column(point).row_shape), generator=generator, dtype=torch.float64)


def reference(rows, queries, metric="dot"):
    """All scores in float64, [Q, rows], and how far float32 (float64) may be from each."""
    wide, queries = rows.double().reshape(len(rows), -1), queries.double().flatten(1)
    if metric == "cosine":
        wide = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-300)
        queries = queries / queries.norm(dim=1, keepdim=True)
    eps = torch.finfo(torch.float64 if rows.dtype == torch.float64 else torch.float32).eps
    # Each product and sum rounds once; a query is rounded to float32, a direction by its norm and a division too.
    n = wide.shape[1]
    return queries @ wide.T, (2 * n + 8) * eps * (queries.abs() @ wide.abs().T)


def check(found, truth, bound, k):
    """Fail unless these are k best rows, in their order, as far as rounding lets one tell."""
    assert found.indices.shape == found.scores.shape == (len(truth), min(k, truth.shape[1]))
    for indices, scores, right, off in zip(found.indices, found.scores.double(), truth, bound, strict=True):
        assert len(set(indices.tolist())) == len(indices)
        assert bool(((scores - right[indices]).abs() <= off[indices]).all())
        assert bool((scores.diff() <= 0).all())
        others = torch.ones(len(right), dtype=torch.bool)
        others[indices] = False
        if bool(others.any()):
            assert bool((right[others] - off[others] <= scores[-1] + off[indices[-1]]).all())


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("point", COLUMNS)
def test_against_float64(ds, point, metric):
    if point == "one":
        queries = queries_of(ds, point)[:, None]
    else:
        queries = queries_of(ds, point)
    rows = ds[point][:]
    for k in (1, 3, 60, N, N + 9):
        found = ds.search(queries.to(rows.dtype), k, point=point, metric=metric)
        check(found, *reference(rows, queries.to(rows.dtype), metric), k)
        assert found.scores.dtype == (torch.float64 if point == "f64" else torch.float32)
        assert torch.equal(found.ids, found.indices)
        assert found.positions is None


def test_the_check_can_fail(ds):
    queries = queries_of(ds, "f16")
    truth, bound = reference(ds["f16"][:], queries)
    for change in ("scores", "indices"):
        found = ds.search(queries, 5, point="f16")
        check(found, truth, bound, 5)
        if change == "scores":
            found.scores[2, 3] += 1e-3
        else:
            found.indices[1] = found.indices[1].flip(0)
        with pytest.raises(AssertionError):
            check(found, truth, bound, 5)
    second = ds.search(queries, 6, point="f16")
    second.indices, second.scores = second.indices[:, 1:], second.scores[:, 1:]  # without the best
    with pytest.raises(AssertionError):
        check(second, truth, bound, 5)


def test_several_points(ds):
    queries = {point: queries_of(ds, point) for point in ("f32", "bf16", "q")}
    for metric in ("dot", "cosine"):
        parts = [reference(ds[point][:], q, metric) for point, q in queries.items()]
        truth, bound = sum(t for t, _ in parts), sum(b for _, b in parts)
        check(ds.search(queries, 7, metric=metric), truth, bound + 4e-7 * sum(t.abs() for t, _ in parts), 7)


def test_rows_and_queries_flat_or_in_shape(ds):
    queries = queries_of(ds, "f32")
    shaped, flat = (ds.search(q, 4, point="f32") for q in (queries, queries.flatten(1)))
    assert torch.equal(shaped.scores, flat.scores)
    assert torch.equal(shaped.indices, flat.indices)


@pytest.fixture(scope="module")
def ties(tmp_path_factory):
    """Rows of few small numbers, whose scores are exact and often equal."""
    plan, columns = Plan(97, 10), {"x": (torch.float32, (3,))}
    rows = torch.randint(-1, 2, (97, 3), generator=torch.Generator().manual_seed(1)).float()
    writer = make_writer(tmp_path_factory.mktemp("ties"), plan=plan, columns=columns)
    for unit in plan.units:
        writer.write_unit(unit, {"x": rows[unit.start : unit.stop]}, examples_of(unit))
    return open_dataset(writer.out)


@pytest.mark.parametrize("block_bytes", [12, 60, 700, 1 << 20])
@pytest.mark.parametrize("k", [1, 2, 10, 97])
def test_of_equal_scores_the_first_row(ties, k, block_bytes, monkeypatch):
    monkeypatch.setattr(searching, "BLOCK_BYTES", block_bytes)
    queries = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-1.0, 2.0, 0.0]])
    found = ties.search(queries, k)
    for query, indices, scores in zip(queries, found.indices, found.scores, strict=True):
        truth = (ties["x"][:] @ query).tolist()
        order = sorted(range(97), key=lambda row, truth=truth: (-truth[row], row))[:k]
        assert indices.tolist() == order
        assert scores.tolist() == [truth[row] for row in order]


@pytest.fixture
def odd(tmp_path):
    """Rows that aren't finite, zeros, and very small and large ones."""
    nan, inf = torch.nan, torch.inf
    rows = [[nan, 1], [inf, 0], [-inf, 1], [0, 0], [1e-30, 1e-30], [3e30, 4e30], [1e-42, 0], [1, 1], [nan, nan]]
    plan, columns = Plan(9, 4), {"x": (torch.float32, (2,))}
    writer = make_writer(tmp_path, plan=plan, columns=columns)
    for unit in plan.units:
        flags = [FLAG_MISSING if i == 8 else 0 for i in range(unit.start, unit.stop)]
        writer.write_unit(unit, {"x": torch.tensor(rows[unit.start : unit.stop])}, examples_of(unit), flags)
    return open_dataset(tmp_path)


def test_rows_without_a_score_are_in_no_result(odd):
    found = odd.search(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), 9)
    # inf * 0 is NaN; an infinite score is one
    assert found.indices.tolist() == [[1, 5, 7, 4, 6, 3, 2, -1, -1], [1, 5, 7, 4, 6, 3, 2, -1, -1]]
    assert found.scores[0, -2:].isnan().all()
    assert found.scores[0, [0, 6]].tolist() == [torch.inf, -torch.inf]
    assert found.ids[0].tolist() == found.indices[0].tolist()
    assert [hit["row"] for hit in found[0]] == [1, 5, 7, 4, 6, 3, 2]
    zero = odd.search(torch.tensor([[0.0, 1.0]]), 9)
    assert zero.indices.tolist() == [[5, 7, 4, 3, 6, -1, -1, -1, -1]]


def test_directions_of_very_small_and_large_rows(odd):
    found = odd.search(torch.tensor([[1.0, 1.0]]), 9, metric="cosine")
    assert found.indices.tolist() == [[4, 7, 5, 6, 3, -1, -1, -1, -1]]
    truth = torch.tensor([1.0, 1.0, 7 / 5 / 2**0.5, 1 / 2**0.5, 0.0])
    assert torch.allclose(found.scores[0, :5], truth, rtol=0, atol=4 * torch.finfo(torch.float32).eps)
    rows = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [3.0, 4.0]])
    made = directions(rows)
    assert torch.equal(made[[0, 2]], torch.tensor([[0.0, 0.0], [0.6, 0.8]]))
    assert made[1].isnan().all()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    kinds_cases.write_units(kinds_cases.make_writer(folder))
    return open_dataset(folder)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("point", ["t", "tq"])
def test_tokens_are_rows_of_their_own(kinds, point, several):
    searched = concat_datasets([kinds, kinds.select([4, 0])]) if several else kinds
    column = searched[point]
    parts, lengths = column[:], column.lengths().tolist()
    queries, flat = queries_of(kinds, point, 3), torch.cat(parts)
    truth, bound = reference(flat, queries)
    places = [(row, at) for row, length in enumerate(lengths) for at in range(length)]
    for k in (1, 4, 100):
        found = searched.search(queries, k, point=point)
        rows = zip(found.indices.tolist(), found.positions.tolist(), strict=True)
        numbers = torch.tensor([[places.index(place) for place in zip(*both, strict=True)] for both in rows])
        found.indices = numbers
        check(found, truth, bound, k)
    found = searched.search(queries, 2, point=point)
    hit = found[0][0]
    assert (hit["row"], hit["position"]) == (int(found.indices[0, 0]), int(found.positions[0, 0]))
    assert hit["id"] == searched.examples[hit["row"]]["id"]
    assert "token" in repr(found).splitlines()[0].split()


def test_views_and_partial_datasets(ds, tmp_path):
    rows = [200, 3, 3, 77, 5]
    view = concat_datasets([ds.select(rows), ds.filter("id < 10")])
    queries = queries_of(ds, "bf16")
    check(view.search(queries, 6, point="bf16"), *reference(view["bf16"][:], queries), 6)
    writer = make_writer(tmp_path, columns={"x": (torch.float32, (2,))}, plan=Plan(6, 2))
    assert open_dataset(tmp_path, partial=True).search(torch.ones(2, 2)).indices.shape == (2, 0)
    unit = writer.plan.unit(1)
    writer.write_unit(unit, {"x": torch.tensor([[1.0, 0.0], [2.0, 0.0]])}, examples_of(unit))
    found = open_dataset(tmp_path, partial=True).search(torch.ones(1, 2), 5)
    assert (found.indices.tolist(), found.ids.tolist()) == ([[1, 0]], [[3, 2]])
    assert ds.filter("length > 100").search(queries, 3, point="bf16").indices.shape == (5, 0)
    assert ds.search(queries[:0], 3, point="bf16").scores.shape == (0, 3)


def test_what_was_found_is_told(tmp_path):
    writer = make_writer(tmp_path, columns={"<i>": (torch.float32, (1,))}, plan=Plan(3, 3))
    examples = [Example(i, [i], "<script>", 0, 1) for i in range(3)]
    writer.write_unit(writer.plan.unit(0), {"<i>": torch.tensor([[1.0], [3.0], [2.0]])}, examples)
    found = open_dataset(tmp_path).search(torch.tensor([[1.0]]), 2)
    assert repr(found).splitlines() == [
        "query  score  row  id  source    text",
        "0      3      1    1   <script>  1",
        "0      2      2    2   <script>  2",
        "dot with <i>; 1 of 1 queries, 2 of 2 rows each",
    ]
    html = found._repr_html_()
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<i>" not in html
    assert len(found) == 1
    assert [hit["score"] for hit in found[0]] == [3.0, 2.0]
    assert found[:] == [found[0]]
    assert found.texts() == [["1", "2"]]


def test_progress_and_reused_memory(ds, monkeypatch):
    seen, memory = [], set()
    add = Best.add

    def watched(self, which, scores, block):
        memory.add(block.values["f32"].untyped_storage().data_ptr())
        add(self, which, scores, block)

    monkeypatch.setattr(Best, "add", watched)
    ds.search(queries_of(ds, "f32"), 3, point="f32", progress=seen.append)
    assert sum(seen) == N
    assert len(seen) > 20
    assert len(memory) <= 5  # two are being read, one is waiting, one is scored; one more while they change places


def test_many_candidates_at_once_are_cut():
    best = Best(1, 2, torch.empty(0))
    scores = torch.arange(100.0)[None]
    best.add(slice(0, 1), scores, Block({}, torch.arange(100), None, 100))
    best.add(slice(0, 1), scores, Block({}, torch.arange(100, 200), None, 100))
    assert best.rows.tolist() == [[99, 199]]
    assert best.scores.tolist() == [[99.0, 99.0]]


WRONG = [
    (lambda ds: ds.search(torch.ones(2, 23), point="bf16"),
     r"search: queries must have the shape \[Q, 24\], got \[2, 23\]. A row of 'bf16' has the shape \[24\]; give"),
    (lambda ds: ds.search(torch.ones(24), point="bf16"), r"queries must have the shape \[Q, 24\], got \[24\]"),
    (lambda ds: ds.search(torch.ones(24, 1), point="f32"), r"must have the shape \[Q, 4, 6\] or \[Q, 24\], got \[24"),
    (lambda ds: ds.search(torch.ones(2, 24)), "search: point must be one of 'bf16', .*, got none. Say whose rows the"),
    (lambda ds: ds.search(torch.ones(2, 24), point="nope"), "GradientDataset: point must be one of bf16, .*got 'nope'"),
    (lambda ds: ds.search({"nope": torch.ones(2, 24)}), "GradientDataset: point must be one of bf16, .*got 'nope'"),
    (lambda ds: ds.search({}), "search: queries must say it once, got an empty dict. Give a dict of tensors by point"),
    (lambda ds: ds.search({"bf16": torch.ones(1, 24)}, point="bf16"), "search: point must say it once, got 'bf16'"),
    (lambda ds: ds.search({"bf16": torch.ones(1, 24), "f32": torch.ones(2, 24)}),
     "search: queries must be equally many for all points, got {'bf16': 1, 'f32': 2}. Give one row each."),
    (lambda ds: ds.search(torch.ones(2, 24).long(), point="bf16"), "queries must be a tensor of floats, got torch"),
    (lambda ds: ds.search([[1.0] * 24], point="bf16"), "search: queries must be a tensor of floats, got list. Convert"),
    (lambda ds: ds.search(torch.full((2, 24), torch.nan), point="bf16"), "queries must be finite, got NaN .* query 0"),
    (lambda ds: ds.search(torch.zeros(2, 24), point="bf16", metric="cosine"), "must have a direction, got zeros"),
    (lambda ds: ds.search(torch.full((1, 24), 1e300, dtype=torch.float64), point="bf16"), "within the range of fl"),
    (lambda ds: ds.search(torch.ones(2, 24), 0, point="bf16"), "search: k must be an int of at least 1, got 0. Say"),
    (lambda ds: ds.search(torch.ones(2, 24), 2.0, point="bf16"), "search: k must be an int of at least 1, got 2.0"),
    (lambda ds: ds.search(torch.ones(2, 24), point="bf16", metric="l2"), "metric must be one of dot, cosine, got 'l2'"),
]  # fmt: skip


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_questions(ds, call, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        call(ds)


def test_tokens_beside_examples_are_refused(kinds):
    for queries in ({"t": torch.ones(1, 5), "h": torch.ones(1, 3)}, {"t": torch.ones(1, 5), "tq": torch.ones(1, 6)}):
        with pytest.raises(
            ValueError, match=r"search: points must have a row for each example, got 't', '\w+', per tok"
        ):
            kinds.search(queries)


def test_what_ends_a_search_ends_its_threads(ds, monkeypatch):
    def broken(self, which, scores, block):
        raise KeyboardInterrupt

    monkeypatch.setattr(Best, "add", broken)
    with pytest.raises(KeyboardInterrupt):
        ds.search(queries_of(ds, "f16"), 3, point="f16")
