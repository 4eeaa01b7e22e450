"""What goes wrong in a collection, with images and with a batch that is a dict: whole units stay, and it goes on.

Kills are in test_killed.py.
"""

from __future__ import annotations

from itertools import islice

import collect_fields
import pytest
import torch
from tiny_models import unit_bytes

import tlfast
from tlfast.dataset import DatasetError, DatasetWriter

N, ROWS = 20, 4


def begin(kind, out, change=lambda model: model, examples=lambda given: given, **settings):
    """The first 20 examples of a kind into a folder."""
    model, given, own = collect_fields.KINDS[kind]()
    given = list(islice((one for one in given if one.get("name") != "none"), N))
    own = own | {"dtype": "bfloat16", "rows_per_unit": ROWS, "progress": False} | settings
    return tlfast.collect(change(model), examples(given), out, **own)


@pytest.fixture(scope="module", params=collect_fields.KINDS)
def kind(request, tmp_path_factory):
    """A kind, and the bytes of a run from beginning to end."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    begin(request.param, out)
    return request.param, unit_bytes(out)


def check_it_goes_on(kind, out, n_units, **settings):
    """Some whole units are there; the same call makes the others."""
    kept = tlfast.open_dataset(out, partial=True)
    assert len(kept) == n_units * ROWS
    assert kept.verify().ok
    assert begin(kind[0], out, **settings).n_rows_before == n_units * ROWS
    assert unit_bytes(out) == kind[1]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")], ids=str)
def test_a_disk_that_is_full_or_fails(kind, tmp_path, monkeypatch, error):
    write_unit = DatasetWriter.write_unit

    def failing(self, unit, *rest):
        if unit.name == "u000002":
            raise error
        return write_unit(self, unit, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(DatasetWriter, "write_unit", failing)
        with pytest.raises(OSError, match=error.strerror):
            begin(kind[0], tmp_path, disk_wait_s=0)
    check_it_goes_on(kind, tmp_path, 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError], ids=lambda kind: kind.__name__)
def test_a_forward_that_ends_in_the_third_unit(kind, tmp_path, error):
    def stopping(model):
        def stop(module, args, kwargs):
            if len(list(tmp_path.glob("commits/*"))) == 2:
                raise error

        model.register_forward_pre_hook(stop, with_kwargs=True)
        return model

    with pytest.raises(error):
        begin(kind[0], tmp_path, change=stopping)
    check_it_goes_on(kind, tmp_path, len(list(tmp_path.glob("commits/*"))))


def test_parts_of_it_by_two_processes(kind, tmp_path):
    assert begin(kind[0], tmp_path, units="1:3").n_rows == 2 * ROWS
    assert begin(kind[0], tmp_path, share=(1, 2)).n_rows == N - 2 * ROWS
    assert unit_bytes(tmp_path) == kind[1]


def test_more_examples_are_appended(kind, tmp_path):
    begin(kind[0], tmp_path, examples=lambda given: given[: 3 * ROWS])
    with pytest.raises(DatasetError, match="the same first 12, 8 more"):
        begin(kind[0], tmp_path)
    begin(kind[0], tmp_path, extend=True)
    assert unit_bytes(tmp_path) == kind[1]


def test_another_example_is_another_dataset(kind, tmp_path):
    def changed(given):
        name = "x" if "x" in given[7] else "weight"
        return [*given[:7], given[7] | {name: given[7][name] + 1}, *given[8:]]

    begin(kind[0], tmp_path, units="0:1")
    with pytest.raises(DatasetError, match=r"header\.examples\.sha256"):
        begin(kind[0], tmp_path, examples=changed)
    check_it_goes_on(kind, tmp_path, 1)


def test_a_row_that_is_not_finite(kind, tmp_path):
    def poisoned(given):
        name = "x" if "x" in given[9] else "weight"
        return [*given[:9], given[9] | {name: given[9][name] * float("inf")}, *given[10:]]

    with pytest.raises(FloatingPointError, match=r"example 9 of u000002 at"):
        begin(kind[0], tmp_path, examples=poisoned, non_finite="stop")
    assert len(tlfast.open_dataset(tmp_path, partial=True)) == 2 * ROWS
    assert begin(kind[0], tmp_path, examples=poisoned).n_nonfinite_rows == 1
    assert [example["flags"] for example in tlfast.open_dataset(tmp_path).examples] == [0] * 9 + [1] + [0] * 10
