"""Datasets that an earlier version began are resumed for ever, with the bytes that it would have given them."""

from __future__ import annotations

import hashlib
import shutil

import half_finished
import pytest
from checkout import TESTS

from tlfast.dataset import DatasetError, open_dataset

GOLDEN = TESTS / "collecting" / "golden"
# Of the unit files when the version that began them finished them.
WHOLE = {
    "plain": "b50c56c6e63f4baafb2eeebaad6be066178d26d24682d271dca5c14a96349b42",
    "changed": "11f31e036824de9dccee61628d8878f806f2cabe1bd5e2b8272d070886c5e02e",
}
pytestmark = pytest.mark.filterwarnings(half_finished.OTHER_CPU)


@pytest.fixture(params=WHOLE)
def name(request):
    return request.param


@pytest.fixture
def begun(name, tmp_path):
    """A copy of a golden dataset, which lacks units."""
    return shutil.copytree(GOLDEN / name, tmp_path / name)


def test_it_is_resumed_to_the_byte(name, begun):
    report = half_finished.collect(name, begun, resume="must")
    assert report.n_rows_before == len(open_dataset(GOLDEN / name, partial=True)) > 0
    assert report.n_rows == len(half_finished.EXAMPLES) - report.n_rows_before > 0
    assert half_finished.digest(begun) == WHOLE[name]
    assert open_dataset(begun).verify().ok


@pytest.mark.parametrize(
    "change",
    [
        {"reduce": "last"}, {"over": -1}, {"dtype": "float32"}, {"batch_tokens": 7}, {"padding_side": "left"},
        {"pad_id": 1}, {"grad_scale": 2.0}, {"calls": "last"}, {"missing": "nan"}, {"rows_per_unit": 3},
        {"loss": half_finished.weighted_sum}, {"header": {"of": "another"}}, {"skipped": [("a", 0, "odd")]},
        {"output": 0}, {"points": "1"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_is_another_dataset_stays_one(tmp_path, change):
    begun = shutil.copytree(GOLDEN / "plain", tmp_path / "plain")
    with pytest.raises(DatasetError):
        half_finished.collect("plain", begun, **change)


@pytest.mark.parametrize(
    "change",
    [
        {"attach": "tensor"}, {"backend": "python"}, {"embedding": "0"}, {"cuda_graph": "off"}, {"seq_len": 9},
        {"units": "0:1"}, {"share": (1, 2)}, {"extend": True}, {"bad_examples": "stop"}, {"non_finite": "keep"},
        {"disk_wait_s": 0.0}, {"deterministic": "warn"}, {"config": "other: text"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_makes_no_other_rows_may_change(tmp_path, change):
    begun = shutil.copytree(GOLDEN / "plain", tmp_path / "plain")
    half_finished.collect("plain", begun, **change)
    half_finished.collect("plain", begun)
    assert half_finished.digest(begun) == WHOLE["plain"]


def test_nobody_has_touched_them():
    digest = hashlib.sha256()
    for path in sorted(GOLDEN.rglob("*")):
        if path.is_file() and path.name != ".lock":
            digest.update(path.relative_to(GOLDEN).as_posix().encode() + path.read_bytes())
    assert digest.hexdigest() == "88a69583d0581a91168c506853d50bb325863a029528e54182cd159367fb90e2"
