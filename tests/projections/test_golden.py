"""Every bit stays: committed numbers, the numpy of docs/projections.md, bergson's own function."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from checkout import ROOT
from page_examples import code_blocks

from tlfast import Projection
from tlfast.projections import apply
from tlfast.projections import projection as projection_file

NAME = "model.layers.0.mlp"
USE, *DEFINITIONS = [code for _, code in code_blocks((ROOT / "docs" / "projections.md").read_text("utf-8"), "python")]

# Of rows 0 to 10 (11 in the count sketch, 15 in the larger Hadamard sketch) and columns 0 to 299: row 3 from column 120
# on, and the SHA-256 of all as little-endian float32. Made by the numpy of the page.
OURS = {
    Projection(11): (
        "left", [-1, 1, -1, -1, -1, 1],
        "dd9ca9cd76c27120636d27a9a01d630c6eb09dc67c8ed712f4c868af66f86095",
    ),
    Projection(11, seed=7): (
        "right", [1, -1, -1, -1, -1, -1],
        "20fb74e4e255d76a926cf17ecf27525ab80263df77165af4d9ed074844c01997",
    ),
    Projection(11, seed=-1, form="one-sided"): (
        "single", [-1, 1, -1, 1, -1, 1],
        "8b4bc6d4db4f83d2d98dbb24473c392ac278b61131ed7aca16735b02a711e74b",
    ),
    Projection(11, "normal", seed=7): (
        "left",
        [-2.7753281593322754, 0.4452918469905853, 1.3340528011322021, 0.11953248083591461, 0.0751044824719429,
         -0.9084691405296326],
        "06b0a43b7da302b69c8307ba4a2ab4d5ce59b0299a3732f25d7a99d68607ef53",
    ),
    Projection(12, "count-sketch", seed=7, nonzeros=3): (
        "left", [0, 1, 0, 0, 0, 0],
        "d60479ca362cdbae5557e83a61a357994b8add42a70d7d7a3e18b0c05096f3ab",
    ),
    Projection(16, "hadamard", seed=7): (
        "left", [1, 1, 1, -1, -1, -1],
        "a026486718bb3899456f4869e243e70dfa5b662ea606a33477400e805c184eda",
    ),
    Projection(11, "hadamard", form="one-sided"): (
        "single", [1, -1, -1, 1, 1, -1],
        "54a510c7b724d47d0a537142d4e38b6aaf7dbe83893ce6e56c087e935f79fd72",
    ),
}  # fmt: skip
# The same, made by bergson 2.5.1's random_matrix. The single one has the last 200 columns of its first block.
BLOCK = 2**27 // 11
BERGSON = {
    Projection(11, scheme="bergson-2"): (
        "left", 0, [1, -1, -1, -1, -1, 1],
        "538b1a50092c75c3b9e5846bd91631f29d990fa2f1bc745c1973fe0517e2cbba",
    ),
    Projection(11, seed=7, scheme="bergson-2"): (
        "right", 0, [1, 1, -1, -1, 1, 1],
        "192be186d21a24f3cc6ad2340c1454f35fcab38d680d58d81ad384f616ce50ba",
    ),
    Projection(11, seed=7, scheme="bergson-2", form="one-sided"): (
        "single", BLOCK - 200, [1, 1, 1, 1, -1, -1],
        "1d0f10c5edcd1b9099f7b7af2e3e256b9dd086f3320dc3a813dcad06e14ad4ba",
    ),
}  # fmt: skip
BERGSON_NORMAL = [  # row 3 from column 120 on, and row 10 from column 292 on
    [-0.6817789673805237, 0.6620692610740662, 0.2623387277126312, -1.334162712097168,
     -0.8170474767684937, 1.2925087213516235, 2.7220144271850586, -0.5646738409996033],
    [0.3933224081993103, -0.820626437664032, 1.3961963653564453, 0.0671142190694809,
     -0.5099820494651794, -1.9768415689468384, -0.6574717164039612, 1.1491363048553467],
]  # fmt: skip


def digest(made):
    return hashlib.sha256(np.ascontiguousarray(made, "<f4").tobytes()).hexdigest()


@pytest.mark.parametrize("projection", OURS, ids=str)
def test_bits_stay(projection):
    role, some, whole = OURS[projection]
    made = projection.matrix(NAME, role, 300).numpy()
    assert made[3, 120:126].tolist() == some
    assert digest(made) == whole


@pytest.mark.parametrize("projection", BERGSON, ids=str)
def test_bits_of_bergson_stay(projection):
    role, start, some, whole = BERGSON[projection]
    made = projection.matrix(NAME, role, 300, start).numpy()
    assert made[3, 120:126].tolist() == some
    assert digest(made) == whole


def test_normal_numbers_of_bergson_stay():
    made = Projection(11, "normal", seed=7, scheme="bergson-2").matrix(NAME, "left", 300)
    wanted = torch.tensor(BERGSON_NORMAL)
    torch.testing.assert_close(torch.stack((made[3, 120:128], made[10, 292:])), wanted, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def page():
    """What the page defines, in its own namespace."""
    defined = {}
    for code in DEFINITIONS:
        exec(compile(code, "docs/projections.md", "exec"), defined)
    return defined


def by_page(page, projection, role, columns):
    """The matrix as the page's numpy makes it."""
    key = page["key"](f"tlfast-1/{projection.seed or 0}/{role}/{NAME}")
    if projection.kind == "count-sketch":
        return page["count_sketch"](key, projection.dim, projection.nonzeros, columns)
    kinds = {"rademacher": "signs", "normal": "normals", "hadamard": "hadamard_sketch"}
    return page[kinds[projection.kind]](key, projection.dim, columns)


@pytest.mark.parametrize("projection", OURS, ids=str)
def test_the_numpy_of_the_page_makes_the_same(page, projection):
    role, _, whole = OURS[projection]
    assert digest(by_page(page, projection, role, 300)) == whole
    assert np.array_equal(page["L"], Projection(16).matrix("h.0.mlp.c_fc", "left", 3072) / 4)


def test_the_page_says_how_to_use_it():
    exec(compile(USE, "docs/projections.md", "exec"), {})
    for code in DEFINITIONS:
        assert len(code.splitlines()) <= 25


def test_a_wrong_definition_is_found(page):
    projection = Projection(11, seed=7)
    role, _, whole = OURS[projection]
    assert digest(by_page(page, Projection(11, seed=8), role, 300)) != whole


@pytest.mark.peers("bergson.collector.projection_matrix")
def test_bergson_makes_the_same():
    from bergson.collector import projection_matrix as theirs

    for seed, role, shape in ((None, "left", (16, 700)), (3, "right", (5, 131)), (0, "right", (64, 1))):
        identifier = f"{NAME}/{role}" + ("" if seed is None else f"/seed{seed}")
        for kind, off in (("rademacher", 0), ("normal", 1e-6 * 6.8)):
            wanted = theirs.random_matrix(identifier, *shape, "cpu", kind)
            made = Projection(shape[0], kind, seed, "bergson-2").matrix(NAME, role, shape[1])
            torch.testing.assert_close(made, wanted, rtol=0, atol=off)


@pytest.mark.peers("bergson.collector.collector")
def test_bergson_projects_whole_gradients_to_the_same(monkeypatch):
    from bergson.collector import collector as theirs

    monkeypatch.setattr(theirs, "CHUNKED_PROJECTION_INSTANTIATION_NUMEL", 16 * 100)
    monkeypatch.setattr(projection_file, "BERGSON_BLOCK", 16 * 100)
    x = torch.randn(5, 777, generator=torch.Generator().manual_seed(0))
    for kind in ("rademacher", "normal"):
        made = apply(Projection(16, kind, 3, "bergson-2", "one-sided"), NAME, "single", x)
        wanted = theirs.project_global(f"{NAME}/single/seed3", x, 16, kind)
        torch.testing.assert_close(made, wanted, rtol=0, atol=1e-6 * float(x.norm(dim=1).max()))
