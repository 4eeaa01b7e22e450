"""Random matrices: known answers, the same bits for any cut, and the settings that make none."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

import tlfast
from tlfast import Projection
from tlfast.projections import entries, projection
from tlfast.projections.entries import logarithm, normals, on_the_circle, signs
from tlfast.projections.philox import philox

DENSE = [Projection(7), Projection(7, "normal", seed=3)]
DENSE += [Projection(7, p.kind, p.seed, "bergson-2") for p in DENSE]
name = "model.layers.0.é"


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(
    "counter, key, wanted",
    [  # those of the authors' own library
        ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_known_answers(counter, key, wanted):
    made = philox(tuple(words(key)), [np.uint32([word]) for word in words(counter)])
    assert made.dtype == np.uint32
    assert made.tolist() == [words(wanted)]


@pytest.mark.parametrize("projection", DENSE, ids=str)
def test_any_rows_and_columns_are_those_of_the_whole_matrix(projection, monkeypatch):
    whole = projection.matrix(name, "left", 700)
    assert whole.shape == (7, 700)
    assert whole.dtype == torch.float32
    fewer = Projection(3, projection.kind, projection.seed, projection.scheme)
    assert torch.equal(fewer.matrix(name, "left", 300), whole[:3, :300])
    monkeypatch.setattr(entries, "PIECE", 2)
    for start, stop in ((0, 1), (1, 130), (127, 129), (128, 384), (3, 6), (699, 700), (5, 5)):
        assert torch.equal(projection.matrix(name, "left", stop - start, start), whole[:, start:stop])


def test_module_side_seed_and_scheme_tell_matrices_apart():
    made = [Projection(4, seed=seed, scheme=scheme).matrix(module, role, 64)
            for seed in (None, 1, -1) for scheme in ("tlfast-1", "bergson-2")
            for module in ("a", "b", "a/left", "a/seed1") for role in ("left", "right")]  # fmt: skip
    made += [Projection(4, form="one-sided").matrix("a", "single", 64)]
    assert len({matrix.numpy().tobytes() for matrix in made}) == len(made)
    for kind in ("rademacher", "normal"):
        none, zero = (Projection(4, kind, seed=seed) for seed in (None, 0))
        assert torch.equal(none.matrix("a", "left", 64), zero.matrix("a", "left", 64))
        assert none.describe() == zero.describe()


def test_bergson_blocks_of_a_single_matrix_count_from_zero(monkeypatch):
    monkeypatch.setattr(projection, "BERGSON_BLOCK", 7 * 40)
    made = Projection(7, scheme="bergson-2", form="one-sided", seed=5)
    whole = made.matrix("a", "single", 100)
    for start in (0, 40, 80):
        key = projection.key_of(f"a/single/seed5/{start}", "md5")
        width = min(40, 100 - start)
        assert np.array_equal(whole[:, start : start + width], signs(key, 7, 0, width))
    assert torch.equal(made.matrix("a", "single", 50, 35), whole[:, 35:85])


@pytest.mark.parametrize("scheme", ["tlfast-1", "bergson-2"])
def test_normal_numbers_are_normal(scheme):
    made = Projection(64, "normal", scheme=scheme).matrix("a", "left", 4000).double()
    n = made.numel()
    # The k-th moment, and its standard deviation over n numbers; five of these are seen once in a million seeds.
    for k, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(made.pow(k).mean() - moment) < 5 * (variance / n) ** 0.5
    assert 4 < made.abs().max() < 6.8
    even, odd = made[:, 0::2], made[:, 1::2]
    assert abs((even * odd).mean()) < 5 / (n / 2) ** 0.5


def test_logarithms_and_circles_are_right_to_float64():
    generator = np.random.default_rng(0)
    u = np.concatenate([generator.random(20_000), 2.0 ** -np.arange(1, 34), [1.0, 1 - 2.0**-33, 0.5**0.5]])
    assert np.abs(logarithm(u) - np.log(u)).max() <= 8 * 2.0**-53 * 23
    assert np.abs(logarithm(u[:20_000]) / np.log(u[:20_000]) - 1).max() < 8 * 2.0**-53
    turns = np.concatenate([u, np.arange(9) / 8])
    for made, true in zip(on_the_circle(turns), (np.cos, np.sin), strict=True):
        assert np.abs(made - true(2 * np.pi * turns)).max() < 16 * 2.0**-53


def test_half_of_the_signs_are_positive():
    made = Projection(64).matrix("a", "left", 4000)
    assert set(made.unique().tolist()) == {-1.0, 1.0}
    assert abs(made.double().mean()) < 5 / made.numel() ** 0.5
    products = made.double() @ made.double().T / 4000  # of rows: zero but for the diagonal
    assert (products - torch.eye(64)).abs().max() < 6 / 4000**0.5


def test_scales_are_those_of_a_side_and_of_a_row():
    assert (Projection(16).scale, Projection(16).row_scale) == (0.25, 1 / 16)
    assert (Projection(16, form="one-sided").row_scale, Projection(5).row_scale) == (0.25, 1 / 5)


@pytest.mark.parametrize(
    "made, described",
    [
        (Projection(16), {"dim": 16}),
        (Projection(8, seed=0), {"dim": 8}),
        (Projection(8, "normal", 2), {"dim": 8, "kind": "normal", "seed": 2}),
        (Projection(8, seed=0, scheme="bergson-2"), {"dim": 8, "seed": 0, "scheme": "bergson-2"}),
        (Projection(8, form="one-sided"), {"dim": 8, "form": "one-sided"}),
    ],
)
def test_what_is_described_makes_the_same_matrices(made, described):
    assert made.describe() == described
    again = Projection.from_json(json.loads(json.dumps(described)))
    assert again.describe() == described
    assert torch.equal(again.matrix("a", made.roles[0], 9), made.matrix("a", made.roles[0], 9))


def matrix(*given, **settings):
    return lambda: Projection(4, **settings).matrix(*given)


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: Projection(0), "Projection: dim must be a whole number from 1 to 2147483647, got 0. "),
        (lambda: Projection(2.5), "Projection: dim must be a whole number from 1 to 2147483647, got 2.5. "),
        (lambda: Projection(True), "Projection: dim must be a whole number from 1 to 2147483647, got True. "),
        (
            lambda: Projection(4, "gauss"),
            "Projection: kind must be one of rademacher, normal, count-sketch, hadamard, got 'gauss'. ",
        ),
        (lambda: Projection(4, seed="1"), "Projection: seed must be a whole number, got '1'. Pass an int."),
        (lambda: Projection(4, scheme="bergson"), "Projection: scheme must be one of tlfast-1, bergson-2, got "),
        (lambda: Projection(4, form="global"), "Projection: form must be one of two-sided, one-sided, got 'global'. "),
        (matrix("a", "single", 3), "Projection.matrix: role must be left or right of a two-sided projection, got "),
        (matrix("a", "left", 3, form="one-sided"), "Projection.matrix: role must be single of a one-sided projection"),
        (matrix(torch.nn.Linear(1, 1), "left", 3), "Projection.matrix: module must be a module's name, got Linear. "),
        (matrix("a", "left", -1), "Projection.matrix: columns must be a whole number from 0 to 4294967296, got -1."),
        (matrix("a", "left", 1, -1), "Projection.matrix: start must be a whole number from 0 to 4294967296, got -1."),
        (matrix("a", "left", 2, 2**32 - 1), "Projection.matrix: columns must be a whole number from 0 to 1, got 2. "),
        (lambda: Projection.from_json({"kind": "normal"}), "Projection.from_json: described must say dim, got {'kind"),
        (lambda: Projection.from_json({"dim": 4, "rows": 2}), "Projection.from_json: a setting must be among dim, "),
        (lambda: projection.as_projection("Spec", "16"), "Spec: project must be a Projection, or a whole number from "),
    ],
)
def test_what_makes_no_matrix_is_an_error(call, text):
    with pytest.raises((ValueError, TypeError), match="^" + re.escape(text)):
        call()


def test_a_number_means_a_projection():
    assert projection.as_projection("Spec", 16) == tlfast.Projection(16)
    assert projection.as_projection("Spec", DENSE[1]) is DENSE[1]


def test_normal_numbers_of_bergson_have_float32_steps():
    key = (1, 2)
    plain, rounded = normals(key, 3, 0, 40), normals(key, 3, 0, 40, True)
    assert 0 < np.abs(plain - rounded).max() < 1e-4
