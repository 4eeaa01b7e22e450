"""A folder that is there already: continued if it is the same dataset, refused or overwritten if it isn't."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from tiny_models import collect, sequences, tiny_model, unit_bytes
from torch import nn

import tlfast
from tlfast.collecting.loss import next_token_loss
from tlfast.dataset import DatasetError

EXAMPLES = sequences(20)


def test_the_same_call_again_does_nothing_and_a_missing_unit_is_made(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8)
    before = unit_bytes(tmp_path)
    assert collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8).n_rows == 0
    (tmp_path / "commits" / "u000001.json").unlink()
    (tmp_path / "data" / "u000001.safetensors").write_bytes(b"torn")
    report = collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8)
    assert (report.n_rows, report.n_rows_before, report.n_units) == (8, 12, 1)
    assert unit_bytes(tmp_path) == before


@pytest.mark.parametrize(
    "change, named",
    [
        ({"reduce": "sum"}, "header.specs"),
        ({"dtype": torch.float16}, "header.specs"),
        ({"batch_tokens": 64}, "header.batching.batch_tokens"),
        ({"grad_scale": 2.0}, "header.grad_scale"),
        ({"examples": [*EXAMPLES[:-1], [1, 2, 3]]}, "header.examples"),
        ({"rows_per_unit": 9}, "plan.rows_per_unit"),
        ({"points": "transformer.h.0"}, "header.specs"),
    ],
)
def test_another_dataset_is_not_continued_but_can_be_overwritten(tmp_path, change, named):
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8)
    changed = {"rows_per_unit": 8, "examples": EXAMPLES} | change
    with pytest.raises(DatasetError, match=rf"out must be the same dataset to continue it, got .*{named}"):
        collect(tiny_model(), tmp_path, **changed)
    collect(tiny_model(), tmp_path, overwrite=True, **changed)
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_another_model_does_not_continue_it(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES)
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] += 1e-3
    with pytest.raises(DatasetError, match=r"header\.model\.fingerprint"):
        collect(model, tmp_path, EXAMPLES)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.point = nn.Embedding(256, 4), nn.Linear(4, 256)

    @torch.no_grad()
    def forward(self, input_ids):
        return self.point(self.embed(input_ids))


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            {"model": Detached(), "points": "point"},
            ValueError,
            "loss must be made of the model's output, got a",
        ),
        ({"model": "gpt2"}, TypeError, r"model must be an nn\.Module, got str"),
        ({"points": "transformer.g.*"}, ValueError, "points must match a module, .*Nearest: transformer"),
        ({"reduce": "median"}, ValueError, "reduce must be one of"),
        ({"over": "batch"}, ValueError, "over must keep the batch: a row is an example, got batch"),
        ({"over": -3}, ValueError, "one row for each example"),
        (
            {"seq_len": 3, "bad_examples": "stop"},
            ValueError,
            r"examples must have 3 tokens at most, got \d+ in example",
        ),
        ({"bad_examples": "keep"}, ValueError, "bad_examples must be one of skip, stop, got 'keep'"),
        ({"non_finite": "drop"}, ValueError, "non_finite must be one of keep, flag, stop, got 'drop'"),
        ({"deterministic": "no"}, ValueError, "deterministic must be one of strict, warn, got 'no'"),
        ({"resume": "yes"}, ValueError, "resume must be one of auto, must, never, got 'yes'"),
        ({"resume": "must"}, DatasetError, 'out must be a dataset with resume="must", got none at'),
        ({"disk_wait_s": -1}, ValueError, "disk_wait_s must be 0 or more, got -1"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be a positive number, got 0"),
        ({"rows_per_unit": 2.5}, ValueError, r"rows_per_unit must be a positive number, got 2\.5"),
        ({"padding_side": "top"}, ValueError, "padding_side must be one of right, left"),
        ({"grad_scale": 0.0}, ValueError, r"grad_scale must be positive, got 0\.0"),
        ({"examples": []}, ValueError, "batches must hold examples, got none"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        (
            {"loss": lambda model, batch: model(batch.input_ids).logits},
            ValueError,
            "loss must return one number, got a tensor",
        ),
        ({"header": {"a": {1, 2}}}, ValueError, "header must be JSON"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, change, error, text):
    settings = {"model": tiny_model(), "out": tmp_path / "out", "examples": EXAMPLES} | change
    with pytest.raises(error, match=text):
        collect(**settings)
    assert not (tmp_path / "out").exists()


def test_a_strangers_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(DatasetError, match=r"out must be a new or empty folder.*thesis\.tex"):
        collect(tiny_model(), tmp_path, EXAMPLES, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_memory_holds_two_blocks_however_many_units(tmp_path, monkeypatch):
    blocks = []
    write_unit = tlfast.dataset.DatasetWriter.write_unit

    def watched(self, unit, tensors, *rest):
        blocks.append({tensor.untyped_storage().data_ptr() for tensor in tensors.values()})
        return write_unit(self, unit, tensors, *rest)

    monkeypatch.setattr(tlfast.dataset.DatasetWriter, "write_unit", watched)
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=3)
    assert len(blocks) == 7
    assert len({frozenset(block) for block in blocks}) == 2
    assert all(one.isdisjoint(two) for one, two in pairwise(blocks))


def test_a_full_disk_ends_the_run_with_its_error_and_whole_units(tmp_path, monkeypatch):
    writer = tlfast.dataset.DatasetWriter
    write_unit = writer.write_unit

    def filling(self, unit, *rest):
        if unit.name == "u000002":
            raise OSError(28, "No space left on device")
        return write_unit(self, unit, *rest)

    monkeypatch.setattr(writer, "write_unit", filling)
    with pytest.raises(OSError, match="No space left"):
        collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=4, disk_wait_s=0)
    monkeypatch.undo()
    assert len(tlfast.open_dataset(tmp_path, partial=True)) == 8
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=4)
    assert tlfast.open_dataset(tmp_path).verify().ok


def test_ctrl_c_keeps_whole_units_and_says_how_many(tmp_path):
    n_steps = 0

    def interrupted(model, batch):
        nonlocal n_steps
        n_steps += 1
        if n_steps == 2 + 4 + 4 + 2:  # the probe, two whole units, in the middle of the third
            raise KeyboardInterrupt
        return next_token_loss(model, batch)

    interrupted.__module__, interrupted.__qualname__ = "tests", "loss"
    with pytest.raises(KeyboardInterrupt, match="2 of 5 units are kept in"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=interrupted, rows_per_unit=4, batch_tokens=1)
    assert len(tlfast.open_dataset(tmp_path, partial=True)) == 8


def failing(out):
    """A loss that fails in the first unit, when the dataset is begun."""

    def loss(model, batch):
        if (out / "dataset.json").exists():
            raise ZeroDivisionError("no such separator")
        return next_token_loss(model, batch)

    return loss


def fail(out, **settings):
    with pytest.raises(ZeroDivisionError):
        collect(tiny_model(), out, EXAMPLES, **{"loss": failing(out), "rows_per_unit": 8} | settings)
    assert (out / "dataset.json").exists()
    assert not list(out.glob("commits/*"))


@pytest.mark.parametrize(
    "change",
    [{}, {"reduce": "sum"}, {"rows_per_unit": 5}, {"examples": [*EXAMPLES, [7, 8, 9]]}, {"examples": EXAMPLES[1:]}],
    ids=["loss", "settings", "plan", "more-examples", "others"],
)
def test_what_failed_before_its_first_unit_is_begun_anew(tmp_path, change):
    out = tmp_path / "out"
    fail(out, config="failed: 1")
    (out / "data" / "u000000.safetensors").write_bytes(b"named, and never committed")
    settings = {"examples": EXAMPLES, "rows_per_unit": 8, "config": "corrected: 1"} | change
    collect(tiny_model(), out, **settings)
    collect(tiny_model(), tmp_path / "undisturbed", **settings)
    assert unit_bytes(out) == unit_bytes(tmp_path / "undisturbed")
    assert tlfast.open_dataset(out).verify().ok
    assert (out / "config.yaml").read_text() == "corrected: 1"
    assert (out / "README.md").read_text() == (tmp_path / "undisturbed" / "README.md").read_text()


def test_a_unit_is_no_remains(tmp_path):
    fail(tmp_path)
    collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8, units="1:2")
    before = unit_bytes(tmp_path)
    with pytest.raises(DatasetError, match=r"header\.specs"):
        collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8, reduce="sum")
    assert list(unit_bytes(tmp_path)) == ["data/u000001.safetensors"]
    assert unit_bytes(tmp_path) == before


@pytest.mark.parametrize("settings", [{"resume": "must"}, {"extend": True}, {"resume": "never"}])
def test_remains_are_not_replaced_by_whoever_wants_to_go_on(tmp_path, settings):
    fail(tmp_path)
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(DatasetError):
        collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8, reduce="sum", **settings)
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_what_another_is_at_is_not_removed(tmp_path):
    refused = []

    def loss(model, batch):
        if (tmp_path / "dataset.json").exists() and not refused:
            with pytest.raises(DatasetError, match=r"header\.specs"):
                collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8, reduce="sum")
            refused.append(True)
        return next_token_loss(model, batch)

    collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, identity="mine", rows_per_unit=8)
    assert refused
    assert tlfast.open_dataset(tmp_path).verify().ok
