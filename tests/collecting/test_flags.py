"""What is odd in the data is flagged and counted, and the progress shows it."""

from __future__ import annotations

import io

import pytest
import torch
from tiny_models import collect
from torch import nn

import tlfast
from tlfast.collecting.progress import Progress
from tlfast.dataset import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED


class Poisoned(nn.Module):
    """Logits that are the embedding times a number that one token makes large, infinite or NaN."""

    def __init__(self, factor):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.point = nn.Identity()
        self.factor = factor

    def forward(self, input_ids):
        factor = torch.where(input_ids == 7, self.factor, 1.0).amax(1)
        return self.point(self.embed(input_ids)) * factor[:, None, None]


def times_sum(model, batch):
    return model(batch.input_ids).sum()


@pytest.mark.parametrize(
    "factor, dtype, flag, n_saturated",
    [
        (float("nan"), torch.float32, FLAG_NON_FINITE, 0),
        (float("inf"), torch.float32, FLAG_NON_FINITE, 0),
        (1e6, torch.float16, FLAG_NON_FINITE | FLAG_SATURATED, 4),
        (1e6, torch.float32, 0, 0),
    ],
)
def test_rows_that_are_not_finite_are_flagged_and_counted(tmp_path, factor, dtype, flag, n_saturated):
    examples = [[1, 2], [3, 4, 5], [1, 7], [2, 2, 2], [1, 1]]
    report = collect(
        Poisoned(factor), tmp_path, examples, points="point", dtype=dtype, loss=times_sum, rows_per_unit=2
    )  # fmt: skip
    dataset = tlfast.open_dataset(tmp_path)
    assert [example["flags"] for example in dataset.examples] == [0, 0, flag, 0, 0]
    assert dataset.info()["non_finite_rows"] == report.n_nonfinite_rows == (1 if flag else 0)
    assert report.n_saturated == n_saturated
    assert dataset["point"][:].isfinite().all(1).tolist() == [True, True, not flag, True, True]


class Skipping(nn.Module):
    """A module of which one half is left out where the batch holds token 7."""

    def __init__(self):
        super().__init__()
        self.embed, self.always, self.sometimes = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids):
        hidden = self.always(self.embed(input_ids))
        return hidden if (input_ids == 7).any() else self.sometimes(hidden)


def test_points_that_do_not_fire_are_nan_and_flagged_on_request(tmp_path):
    examples = [[1, 2], [1, 7], [3, 4]]
    settings = {"points": "*s*", "batch_tokens": 2, "loss": times_sum}
    with pytest.raises(RuntimeError, match="no call of sometimes since the last step"):
        collect(Skipping(), tmp_path / "raise", examples, **settings)
    collect(Skipping(), tmp_path / "nan", examples, missing="nan", **settings)
    dataset = tlfast.open_dataset(tmp_path / "nan")
    assert [example["flags"] for example in dataset.examples] == [0, FLAG_MISSING | FLAG_NON_FINITE, 0]
    assert dataset["sometimes"][:].isnan().all(1).tolist() == [False, True, False]
    assert dataset["always"][:].isfinite().all()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_a_bar_in_a_terminal_and_lines_elsewhere(monkeypatch):
    bar, lines, silent = Terminal(), io.StringIO(), io.StringIO()
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("tlfast.collecting.progress.time.monotonic", lambda: float(next(clock)))
    for file, enabled in ((bar, True), (lines, True), (silent, False)):
        with Progress(10, 2, enabled, file) as progress:
            progress.n_nonfinite, progress.n_bytes, progress.waited_s = 3, 1_500_000_000, 3.21
            for _ in range(4):
                progress.step(2, 100)
            progress.step(0, 0)
    assert "10/10" in bar.getvalue()
    assert "3 non-finite rows" in bar.getvalue()
    assert "1.500 GB" in bar.getvalue()
    first = lines.getvalue().splitlines()[0]
    assert first.startswith("collect: ")
    assert all(
        figure in first
        for figure in ("/10 examples", "examples/s", "tokens/s", "1.500 GB", "3 non-finite", "for the disk 3.2 s")
    )
    assert silent.getvalue() == ""
