"""Projections applied: the matrix in float64 is the oracle; the same bits from native code, for every cut and order."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from backends import usable

from tlfast import Projection
from tlfast.backends import choice
from tlfast.projections import apply, applying, projector

NAME = "h.0"
SKETCHES = [
    Projection(8, "count-sketch"),
    Projection(12, "count-sketch", nonzeros=3, seed=5),
    Projection(16, "hadamard"),
    Projection(11, "hadamard", form="one-sided"),
    Projection(1, "hadamard"),
    Projection(1, "count-sketch"),
]
DENSE = [Projection(16), Projection(5, "normal", scheme="bergson-2"), Projection(4, form="one-sided")]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
TINY = {torch.float16: 2.0**-24}  # where it gets no smaller


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(projection, made, x):
    """``made`` is the projection of x but for rounding."""
    dtype, role = x.dtype, projection.roles[0]
    matrix = projection.matrix(NAME, role, x.shape[-1]).double() * projection.scale
    true, size = x.double() @ matrix.T, x.double().abs() @ matrix.T.abs()
    if projection.is_sketch:  # log2(columns) additions or so, the scale, one rounding
        adds = EPS[torch.float64 if dtype == torch.float64 else torch.float32] * (x.shape[-1].bit_length() + 12)
    else:  # a sum of any order, in the dtype or in float32, of entries that are rounded to the dtype
        adds = EPS[torch.float64 if dtype == torch.float64 else torch.float32] * (x.shape[-1] + 2) + EPS[dtype]
    assert made.dtype == dtype
    assert made.shape == (*x.shape[:-1], projection.dim)
    off = (made.double() - true).abs()
    assert (off <= size * adds + 1.01 * EPS[dtype] * true.abs() + TINY.get(dtype, 2.0**-149)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection", SKETCHES, ids=str)
def test_a_sketch_is_its_matrix_in_float64(projection, dtype, backend):
    for columns in (0, 1, 7, 16, 33, 100, 250):
        x = drawn(2, 3, columns, dtype=dtype)
        check(projection, projector(projection, NAME, projection.roles[0], columns, dtype, backend=backend)(x), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection", DENSE, ids=str)
def test_a_dense_kind_is_its_matrix_in_float64(projection, dtype):
    for columns in (0, 1, 33, 250):
        x = drawn(2, 3, columns, dtype=dtype)
        check(projection, apply(projection, NAME, projection.roles[0], x), x)


def test_a_check_that_can_fail():
    x = drawn(4, 100)
    right = apply(SKETCHES[0], NAME, "left", x)
    check(SKETCHES[0], right, x)
    for wrong in (right * (1 + 1e-5), right.roll(1, -1), apply(SKETCHES[0], "h.1", "left", x)):
        with pytest.raises(AssertionError):
            check(SKETCHES[0], wrong, x)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "projection", [*SKETCHES, *(Projection(1 << k, "hadamard") for k in (1, 2, 3, 5, 6, 7, 8))], ids=str
)
def test_native_code_makes_the_bits_of_its_twin(projection, dtype):
    usable("native")
    role = projection.roles[0]
    for columns in (0, 1, 16, 17, 64, 99, 500, 1027):
        x = drawn(3, columns, dtype=dtype)
        if columns:
            x[0, columns // 2] = -0.0
            x[1] = 0.0
        made, twin = (projector(projection, NAME, role, columns, dtype, backend=b)(x) for b in ("native", "python"))
        # Of integers, so that -0 isn't 0.
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        assert torch.equal(made.view(kind), twin.view(kind))


@pytest.mark.parametrize("projection", SKETCHES, ids=str)
def test_a_batch_changes_no_bits(projection, backend, monkeypatch):
    x, role = drawn(70, 333), projection.roles[0]
    made = projector(projection, NAME, role, 333, backend=backend)
    whole = made(x)
    monkeypatch.setattr(applying, "PIECE", 1000)  # three rows at a time
    assert torch.equal(made(x), whole)
    assert torch.equal(torch.stack([made(row) for row in x]), whole)
    assert torch.equal(made(x.flip(0)).flip(0), whole)
    spread = torch.full((70, 2, 340), torch.nan)
    spread[:, 1, 5:338] = x
    assert torch.equal(made(spread[:, 1, 5:338]), whole)
    assert torch.equal(made(x.T.contiguous().T), whole)
    assert torch.equal(made(x[:1].expand(4, 333)), whole[:1].expand(4, -1))
    assert made(x[:0]).shape == (0, projection.dim)


@pytest.mark.sanitize
def test_threads_change_no_bits():
    usable("native")
    before, x = torch.get_num_threads(), drawn(200, 1000)
    made = [projector(projection, NAME, projection.roles[0], 1000) for projection in SKETCHES]
    try:
        torch.set_num_threads(1)
        alone = [one(x) for one in made]
        torch.set_num_threads(3)
        assert all(torch.equal(one(x), wanted) for one, wanted in zip(made, alone, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("projection", SKETCHES, ids=str)
def test_any_columns_of_a_sketch_are_those_of_the_whole_matrix(projection):
    role = projection.roles[0]
    whole = projection.matrix(NAME, role, 150)
    assert set(whole.unique().tolist()) <= {-1.0, 0.0, 1.0}
    for start, stop in ((0, 1), (5, 90), (16, 33), (149, 150), (20, 20)):
        assert torch.equal(projection.matrix(NAME, role, stop - start, start), whole[:, start:stop])


def test_a_column_of_a_count_sketch_is_in_each_part_once():
    made = Projection(24, "count-sketch", nonzeros=4).matrix(NAME, "left", 2_000)
    assert torch.equal(made.view(4, 6, -1).abs().sum(1), torch.ones(4, 2_000))
    # As often in one row as in another, of all columns and of each place of a block: 5 standard deviations.
    assert (made.abs().sum(1) - 2_000 / 6).abs().max() < 5 * (2_000 / 6) ** 0.5


@pytest.mark.parametrize("kind", ["hadamard", "count-sketch"])
def test_one_block_is_turned_and_not_shortened(kind):
    matrix = Projection(32, kind).matrix(NAME, "right", 32).double() * Projection(32, kind).scale
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(32, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["rademacher", "normal", "count-sketch", "count-sketch 3", "hadamard", "hadamard 20"])
def test_lengths_and_products_are_kept_on_average(kind):
    """Johnson and Lindenstrauss: over many modules the mean is right, and the spread at most what the page says."""
    kind, _, number = kind.partition(" ")
    dim, n, most = 20 if number == "20" else 24, 300, 2 / (20 if number == "20" else 24)
    projection = Projection(dim, kind, nonzeros=3 if number == "3" else 1)
    few = torch.zeros(192).index_fill(0, torch.tensor([3, 70, 71, 150]), 1.0)
    x = torch.stack((torch.ones(192), few, drawn(192, seed=3))).double()
    x /= x.norm(dim=1, keepdim=True)
    y = drawn(192, seed=4).double()
    y = y - (x @ y)[:, None] * x  # at right angles to each
    y /= y.norm(dim=1, keepdim=True)
    matrices = [projection.matrix(f"h.{k}", "left", 192).double() for k in range(n)]
    x, y = (torch.stack([v @ m.T for m in matrices]) * projection.scale for v in (x, y))
    # 5 standard deviations of a mean; that of a variance is taken for twice a normal distribution's.
    for made, mean in ((x.square().sum(-1), 1), ((x * y).sum(-1), 0)):
        assert ((made.mean(0) - mean).abs() < 5 * (most / n) ** 0.5).all()
        assert (made.var(0) < most * (1 + 5 * 2 * (2 / n) ** 0.5)).all()


def test_a_large_matrix_is_made_in_blocks(monkeypatch):
    projection, x = Projection(8, form="one-sided"), drawn(3, 1_000)
    whole = apply(projection, NAME, "single", x)
    monkeypatch.setattr(applying, "MOST_KEPT", 100)
    monkeypatch.setattr(applying, "PIECE", 8 * 300)
    made = projector(projection, NAME, "single", 1_000)
    assert made.kept is None
    torch.testing.assert_close(made(x), whole)
    half = x.bfloat16()  # rounded once, not at each block
    exact = half.double() @ projection.matrix(NAME, "single", 1_000).double().T * projection.scale
    off = (apply(projection, NAME, "single", half).double() - exact).abs()
    assert (off < EPS[half.dtype] * exact.abs() + 1e-4).all()


def test_rows_of_modules_add_up_to_one_projection():
    projection = Projection(16, "hadamard", form="one-sided")
    a, b = drawn(2, 40), drawn(2, 60, seed=1)
    both = apply(projection, "a", "single", a) + apply(projection, "b", "single", b)
    matrix = torch.cat([projection.matrix(*part) for part in (("a", "single", 40), ("b", "single", 60))], 1)
    torch.testing.assert_close(both, torch.cat((a, b), 1) @ matrix.T / 4)


def test_two_sides_of_a_gradient():
    projection, g, a = Projection(4), drawn(5, 6), drawn(5, 7, seed=1)
    row = apply(projection, NAME, "left", g).T @ apply(projection, NAME, "right", a)
    left, right = (projection.matrix(NAME, role, n) for role, n in (("left", 6), ("right", 7)))
    torch.testing.assert_close(row, left @ (g.T @ a) @ right.T * projection.row_scale)


def test_no_projection_leaves_a_tensor_as_it_is():
    x = drawn(2, 3)
    assert apply(None, NAME, "left", x) is x


@pytest.mark.parametrize("projection", [DENSE[0], *SKETCHES[:3]], ids=str)
def test_autocast_changes_nothing_and_gradients_flow(projection):
    x = drawn(6, 50).requires_grad_()
    plain = apply(projection, NAME, "left", x.detach())
    with torch.autocast("cpu"):
        assert torch.equal(apply(projection, NAME, "left", x.detach()), plain)
    made = apply(projection, NAME, "left", x)
    torch.testing.assert_close(made, plain)
    made.sum().backward()
    matrix = projection.matrix(NAME, "left", 50) * projection.scale
    torch.testing.assert_close(x.grad, matrix.sum(0).expand(6, 50))


def test_what_native_code_cannot_read_goes_another_way():
    x = drawn(4, 40)
    for projection in SKETCHES[:4]:
        made = projector(projection, NAME, projection.roles[0], 40)
        assert torch.equal(made(-x._neg_view()), made(x))
        assert torch.equal(made(x._neg_view()), -made(x))
        each = torch.func.vmap(made)(x)
        assert torch.equal(each, made(x))


@pytest.mark.long
def test_compiled_code_projects_without_a_break():
    x = drawn(4, 40)
    for projection in (DENSE[0], SKETCHES[0], SKETCHES[3]):
        made = projector(projection, NAME, projection.roles[0], 40)
        torch._dynamo.reset()
        compiled = torch.compile(lambda x, made=made: made(x) + 1, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), made(x) + 1)


def test_not_a_number_spreads():
    x = drawn(2, 40)
    x[0, 3] = torch.nan
    for projection in SKETCHES[:3]:
        made = apply(projection, NAME, "left", x)
        assert made[0].isnan().any()
        assert not made[1].isnan().any()


def test_without_native_code_torch_does_it(monkeypatch):
    monkeypatch.delenv("TLFAST_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(choice, "_load", lambda: (None, "it was not built"))
    choice.native.cache_clear()
    choice.tell.cache_clear()
    x = drawn(2, 40)
    with pytest.warns(UserWarning, match="tlfast runs in pure Python"):
        made = apply(SKETCHES[0], NAME, "left", x)
    choice.native.cache_clear()
    choice.tell.cache_clear()
    check(SKETCHES[0], made, x)
    with pytest.raises(RuntimeError, match=r"^projector: backend must be usable, got native: it was not built\. Pass"):
        projector(SKETCHES[0], NAME, "left", 40, backend="native")


ERRORS = {
    "role": (
        lambda: apply(Projection(4), NAME, "single", drawn(2, 3)),
        "projector: role must be left or right of a two-sided projection, got 'single'. Pass one of these, or make ",
    ),
    "integers": (
        lambda: apply(Projection(4), NAME, "left", torch.ones(2, 3).long()),
        "apply: x must be floats, [..., columns], got [2, 3] of torch.int64. Cast or reshape it.",
    ),
    "a number": (
        lambda: apply(Projection(4), NAME, "left", torch.ones(())),
        "apply: x must be floats, [..., columns], got [] of torch.float32. Cast or reshape it.",
    ),
    "dtype": (
        lambda: projector(Projection(4), NAME, "left", 3, torch.int64),
        "projector: dtype must be that of floats, got torch.int64. Cast the tensor.",
    ),
    "columns": (
        lambda: projector(Projection(4), NAME, "left", 3)(torch.ones(2, 4)),
        "projector: x must be [..., 3] of torch.float32 on cpu, got [2, 4] of torch.float32 on cpu. Make another ",
    ),
    "negative columns": (
        lambda: projector(Projection(4, "hadamard"), NAME, "left", -3),
        "projector: columns must be a whole number from 0 to 4294967296, got -3. Pass a number in this range.",
    ),
    "another dtype": (
        lambda: projector(Projection(4, "hadamard"), NAME, "left", 3)(torch.ones(2, 3).half()),
        "projector: x must be [..., 3] of torch.float32 on cpu, got [2, 3] of torch.float16 on cpu. Make another ",
    ),
    "backend": (
        lambda: projector(Projection(4), NAME, "left", 3, backend="numpy"),
        "projector: backend must be one of auto, native, python, got 'numpy'. Check the spelling.",
    ),
    "native elsewhere": (
        lambda: projector(Projection(4, "hadamard"), NAME, "left", 3, device="meta", backend="native"),
        'projector: backend must be auto or python on meta, got native. Pass backend="auto".',
    ),
    "native product": (
        lambda: projector(Projection(4), NAME, "left", 3, backend="native"),
        'projector: backend must be auto or python of a dense kind, got native. Pass backend="auto".',
    ),
    "bergson's sketch": (
        lambda: Projection(4, "hadamard", scheme="bergson-2"),
        "Projection: kind must be rademacher or normal with scheme=\"bergson-2\", got 'hadamard'. Leave scheme= out",
    ),
    "nonzeros": (
        lambda: Projection(4, nonzeros=2),
        'Projection: nonzeros must be left out unless kind="count-sketch", got 2. Leave it out',
    ),
    "no divisor": (
        lambda: Projection(4, "count-sketch", nonzeros=3),
        "Projection: nonzeros must divide dim=4, got 3. Pass a divisor: each part has as many rows.",
    ),
    "a wide sketch": (
        lambda: Projection(2**20 + 1, "hadamard"),
        "Projection: dim must be at most 1048576 in a sketch, got 1048577. Take fewer, or a dense kind.",
    ),
}


@pytest.mark.parametrize("call, text", ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_projected_is_an_error(call, text):
    with pytest.raises((ValueError, TypeError, RuntimeError), match="^" + re.escape(text)):
        call()


def test_shifts_and_samples_are_numbers_of_a_block():
    for dim in (1, 3, 8, 11):
        made = Projection(dim, "hadamard").sketch(NAME, "left", 100)
        assert len(set(made.samples.tolist())) == dim
        assert 0 <= made.samples.min() <= made.samples.max() < made.width
        shifts = Projection(dim, "count-sketch").sketch(NAME, "left", 100).shifts
        assert set(np.unique(shifts)) <= set(range(dim))
