"""Rows in bergson's own settings: those that bergson 2.5.1 has built of the same model, kept here, and built now."""

from __future__ import annotations

import numpy as np
import pytest
from bergson_builds import BUILDS, FEW, GOLDEN, KEPT, assert_same, build, collected, index_rows, modules_of, our_rows
from bergson_cases import MODULES
from checkout import TESTS

BOTH = ("adam, global", "per token")  # what the backend in Python is tried in, too


@pytest.fixture(scope="module")
def golden():
    """By setting and module what bergson 2.5.1 has built, by tests/support/bergson_builds.py."""
    made = {}
    with np.load(TESTS / "dataset" / "export" / GOLDEN) as file:
        for key in file:
            setting, _, name = key.partition("/")
            made.setdefault(setting, {})[name] = file[key]
    return made


@pytest.mark.parametrize("setting", KEPT)
def test_what_bergson_has_built_is_collected(tmp_path, setting, golden):
    modules = modules_of(setting, FEW)
    for backend in ("auto", "python") if setting in BOTH else ("auto",):
        folder = collected(tmp_path / backend, setting, modules, backend)
        assert_same(our_rows(folder, setting), golden[setting])


@pytest.mark.peers("bergson")
@pytest.mark.filterwarnings("default")  # theirs
@pytest.mark.parametrize("setting", BUILDS)
def test_what_bergson_builds_now_is_collected(tmp_path, setting):
    import bergson

    modules = modules_of(setting, MODULES)
    theirs = build(tmp_path / "index", setting, modules=modules)
    folder = collected(tmp_path / "ds", setting, modules)
    rows = our_rows(folder, setting)
    assert_same(rows, index_rows(theirs))
    if "normalizer" in BUILDS[setting][1]:
        return
    ours = tmp_path / "ds-bergson"
    assert (ours / "processor_config.yaml").read_bytes() == (theirs / "processor_config.yaml").read_bytes()
    found, true = (bergson.data.load_module_gradients(path) for path in (ours, theirs))
    assert list(found) == list(true)
    if "per" in BUILDS[setting][1]:
        assert np.array_equal(np.load(ours / "offsets.npy"), np.load(theirs / "offsets.npy"))
