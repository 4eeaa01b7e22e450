"""Rows with NaN or infinity: kept, kept and named, or the end of the run with all units before theirs."""

from __future__ import annotations

import pytest
import torch
from tiny_models import collect, collect_words, complaint_of, save_model, save_text, unit_bytes
from torch import nn

import tlfast
from tlfast.collecting import huggingface
from tlfast.collecting.progress import NonFinite

POISON = 7  # a token that makes the gradient of its example infinite
EXAMPLES = [[1, 2], [3, 4, 5], [1, 1], [2, 2, 2], [1, POISON], [3, 3], [POISON, 1], [2, 1]]
ROWS_PER_UNIT = 2


class Poisoned(nn.Module):
    """Logits that are a sum of two points, of which the second overflows for some examples."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.second = nn.Embedding(8, 4), nn.Identity(), nn.Identity()

    def forward(self, input_ids):
        embedded = self.embed(input_ids)
        factor = torch.where(input_ids == POISON, torch.inf, 1.0).amax(1)[:, None, None]
        return self.first(embedded) + self.second(embedded) * factor


def run(out, **settings):
    torch.manual_seed(0)
    defaults = {"points": ["first", "second"], "loss": times_sum, "rows_per_unit": ROWS_PER_UNIT}
    return collect(Poisoned(), out, EXAMPLES, **defaults | settings)


def times_sum(model, batch):
    return model(batch.input_ids).sum()


def test_keep_and_flag_make_the_same_bytes_and_flag_names_the_rows(tmp_path, capsys):
    flagged = run(tmp_path / "flag", progress=True)
    named = NonFinite("u000002", 4, "second"), NonFinite("u000003", 6, "second")
    assert (flagged.n_nonfinite_rows, flagged.non_finite) == (2, named)
    assert capsys.readouterr().err == (
        "collect: 2 rows are not finite, and flagged; the first: example 4 of u000002 at second, example 6 of u000003"
        " at second\n"
    )
    kept = run(tmp_path / "keep", non_finite="keep", progress=True)
    assert kept.n_nonfinite_rows == 2
    assert capsys.readouterr().err == ""
    assert unit_bytes(tmp_path / "keep") == unit_bytes(tmp_path / "flag")
    tables = [
        [example["flags"] for example in tlfast.open_dataset(tmp_path / name).examples] for name in ("keep", "flag")
    ]
    assert tables == [[0, 0, 0, 0, 1, 0, 1, 0]] * 2
    assert run(tmp_path / "flag", non_finite="stop").n_rows == 0  # it is not part of what the data are


def test_stop_names_the_row_and_keeps_the_units_before(tmp_path):
    text = (
        "collect: rows must be finite, got NaN or infinity in example 4 of u000002 at second."
        ' non_finite="flag" (--non-finite flag) keeps and flags such rows.'
    )
    with pytest.raises(FloatingPointError) as stopped:
        run(tmp_path, non_finite="stop")
    assert str(stopped.value) == text
    ds = tlfast.open_dataset(tmp_path, partial=True)
    assert [unit.name for unit in ds.units] == ["u000000", "u000001"]
    assert ds.verify().ok
    assert run(tmp_path).n_rows_before == 4
    assert tlfast.open_dataset(tmp_path).verify().ok


class Skipping(Poisoned):
    """The second point is left out of batches with the poison."""

    def forward(self, input_ids):
        embedded = self.first(self.embed(input_ids))
        return embedded if (input_ids == POISON).any() else self.second(embedded)


def test_points_that_did_not_fire_do_not_stop_a_run_that_takes_them_as_nan(tmp_path):
    settings = {"points": "*[td]", "loss": times_sum, "missing": "nan", "batch_tokens": 2, "rows_per_unit": 2}
    report = collect(Skipping(), tmp_path, EXAMPLES, non_finite="stop", **settings)
    assert (report.n_rows, report.non_finite) == (8, ())
    assert tlfast.open_dataset(tmp_path)["second"][:].isnan().all(1).tolist() == [POISON in e for e in EXAMPLES]


def test_only_the_first_rows_are_named(tmp_path):
    torch.manual_seed(0)
    examples = [[1, POISON]] * 12
    report = collect(Poisoned(), tmp_path, examples, points="second", loss=times_sum, rows_per_unit=3)
    assert report.n_nonfinite_rows == 12
    assert [row.example for row in report.non_finite] == [0, 1, 2, 3, 4]


def test_on_the_command_line(tmp_path, capsys, monkeypatch):
    """Exit code 1, one line that says how to go on."""

    def overflowing(*arguments):
        model = huggingface.load_model(*arguments)
        weight = model.transformer.h[1].mlp.c_fc.weight
        weight.data[:, 0] = torch.finfo(weight.dtype).max
        return model

    save_model(tmp_path / "model")
    save_text(tmp_path / "text")
    monkeypatch.setattr("tlfast.collecting.from_text.load_model", overflowing)
    complaint = complaint_of(capsys, ["collect", *collect_words(tmp_path), "--non-finite", "stop"], code=1)
    assert complaint.startswith("collect: rows must be finite, got NaN or infinity in example 0 of u000000 at trans")
    assert complaint.endswith(f"To continue: tlfast collect {tmp_path}/out/config.yaml")
