"""A row for each token, and encoded rows: collected, of one's own loop, streamed; the same, and never with padding."""

from __future__ import annotations

import re

import pytest
import torch
from poisoned_rows import files_of, poisoned, poisoned_loss
from tiny_models import POINTS, alone, collect, collect_words, save_model, save_text, sequences, tiny_model
from torch import nn

import tlfast
from tlfast import Spec
from tlfast.cli import main
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.loss import next_token_loss
from tlfast.dataset import FLAG_NON_FINITE, Column, DatasetWriter, Example, Plan
from tlfast.dataset.format.encodings import BLOCKS, STOCHASTIC, encode
from tlfast.dataset.format.rounding import rounding_of
from tlfast.dataset.write import native as native_writer
from tlfast.spec import ENCODINGS

EXAMPLES = sequences(11)
POINT = "transformer.h.1"
LOW = {"per": "token", "encoding": "int8"}


def refuses(text, kind=ValueError):
    return pytest.raises(kind, match="^" + re.escape(text))


# The rows.


@pytest.mark.parametrize("kind, side", [("gpt2", "right"), ("llama", "left")])
def test_rows_are_those_of_each_example_alone(tmp_path, kind, side):
    model, points = tiny_model(kind).eval(), POINTS[kind]
    specs = [Spec(points, per="token"), Spec(points, per="token", of="act"), Spec(points, "sum", name="sum")]
    collect(model, tmp_path, EXAMPLES, points=specs, rows_per_unit=4, batch_tokens=40, padding_side=side)
    rows = tlfast.open_dataset(tmp_path)
    assert rows.verify().ok
    point = points.replace("*", "1")
    for number, tokens in enumerate(EXAMPLES):
        act, grad = alone(model, point, tokens)
        atol = 1e-5 * len(tokens) * float(act.abs().max())
        torch.testing.assert_close(rows[f"{point}:none"][number].double(), grad, rtol=1e-4, atol=atol)
        torch.testing.assert_close(rows[f"{point}:act"][number].double(), act, rtol=1e-4, atol=atol)
        torch.testing.assert_close(rows[f"{point}:sum"][number].double(), grad.sum(0), rtol=1e-4, atol=atol)
    flat = rows[f"{point}:none"]
    owners, positions = flat.where()
    assert [owners.tolist().count(n) for n in range(11)] == list(map(len, EXAMPLES)) == flat.lengths().tolist()
    assert torch.equal(flat.flat[:][(owners == 7) & (positions == 1)][0], flat[7][1])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_loop_of_ones_own_and_a_stream_have_the_same_rows(tmp_path, backend, side, monkeypatch):
    native, encoded = native_writer.loaded(), []
    if native is not None:
        encode_natively = native.encode_rows
        monkeypatch.setattr(native, "encode_rows", lambda *given: (encoded.append(given), encode_natively(*given)))
    model = tiny_model().eval()
    specs = [Spec(POINTS["gpt2"], per="token"), Spec(POINTS["gpt2"], of="act", **LOW), Spec(POINT, "mean", name="m")]
    settings = {"rows_per_unit": 4, "batch_tokens": 40, "padding_side": side, "backend": backend}
    collect(model, tmp_path / "collected", EXAMPLES, points=specs, **settings)
    by_collect = len(encoded)
    rows = tlfast.open_dataset(tmp_path / "collected")
    known, batching = as_examples(EXAMPLES), Batching(40, padding_side=side, one_width=True)
    # Twice: the second one continues what the first has begun.
    for begin, end in ((0, 2), (2, 3)):
        with (
            tlfast.freeze(model),
            tlfast.capture(model, specs, rows=4, backend=backend) as cap,
            cap.into(tmp_path / "own", plan=Plan(11, 4), header=rows.header) as written,
        ):
            assert [unit.name for unit in written.units] == ["u000000", "u000001", "u000002"][begin:]
            for unit in written.plan.units[begin:end]:
                part = known[unit.start : unit.stop]
                for chosen, batch in batching.batches(part, batching.order(part)):
                    with cap.batch(batch.mask, ids=[part[k] for k in chosen]):
                        next_token_loss(model, batch).backward()
    assert files_of(tmp_path / "own") == files_of(tmp_path / "collected")
    assert (by_collect > 0) == (backend == "native")
    assert (len(encoded) > by_collect) == (native is not None)  # a loop's writer is native where it can be
    seen = []
    settings |= {"buffer_rows": 90, "batch_size": 7}
    for batch in tlfast.stream(model, EXAMPLES, specs[:1], seed=3, **settings):
        owners, positions = batch["id"], batch["position"]
        column = rows[f"{POINT}:none"]
        expected = [column[i][p] for i, p in zip(owners.tolist(), positions.tolist(), strict=True)]
        assert torch.equal(batch[POINT], torch.stack(expected))
        seen += zip(owners.tolist(), positions.tolist(), strict=True)
    assert sorted(seen) == [(i, p) for i, tokens in enumerate(EXAMPLES) for p in range(len(tokens))] != seen
    assert seen[:7] != sorted(seen[:7])


def test_a_stream_cuts_units_of_its_own(tmp_path):
    made = tlfast.stream(tiny_model(), EXAMPLES, POINT, per="token", buffer_rows=40, batch_size=8, drop_last=True)
    assert len(made) == sum(map(len, EXAMPLES)) // 8 == len([batch for batch in made if len(batch["id"]) == 8])
    assert made.n_rows == sum(map(len, EXAMPLES))
    assert made.columns[POINT] == Column(torch.float32, (16,), per="token")
    with refuses("stream: per must be the same at all points of a stream, got 'example' and 'token'. Make a stream "):
        tlfast.stream(
            tiny_model(), EXAMPLES, [Spec("transformer.h.0"), Spec(POINT, per="token")], buffer_rows=40, batch_size=8
        )
    with refuses("stream: encoding must be None: its rows lie in memory, got 'int8'. Leave it out; a dataset stores "):
        tlfast.stream(tiny_model(), EXAMPLES, Spec(POINT, encoding="int8"), buffer_rows=40, batch_size=8)
    longest = max(map(len, EXAMPLES))
    with refuses(f"stream: buffer_rows must have room for a batch of 8 beside a unit of {longest}, got 12. Give more"):
        tlfast.stream(tiny_model(), EXAMPLES, POINT, per="token", buffer_rows=12, batch_size=8)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_stored_encoded_are_the_same_rows(tmp_path, encoding):
    model, settings = tiny_model(), {"rows_per_unit": 4}
    plain = [Spec(POINT, "mean", name="mean"), Spec(POINT, "none", name="tokens", per="token")]
    low = [
        Spec(POINT, "mean", name="mean", encoding=encoding),
        Spec(POINT, name="tokens", per="token", encoding=encoding),
    ]
    collect(model, tmp_path / "plain", EXAMPLES, points=plain, **settings)
    collect(model, tmp_path / "low", EXAMPLES, points=low, **settings)
    rows, stored = (tlfast.open_dataset(tmp_path / name) for name in ("plain", "low"))
    means, tokens = f"{POINT}:mean", f"{POINT}:tokens"
    drawn = encoding in STOCHASTIC
    rounding = rounding_of(means, 0, [1] * 11) if drawn else None
    for ours, theirs in zip(stored.raw(means)[:], encode(rows[means][:], encoding, rounding=rounding), strict=True):
        assert torch.equal(ours, theirs)
    for i in range(11):
        rounding = rounding_of(tokens, i, [len(EXAMPLES[i])]) if drawn else None
        for ours, theirs in zip(
            stored.raw(tokens)[i], encode(rows[tokens][i], encoding, rounding=rounding), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_words_of_encodings_are_those_of_datasets():
    assert tuple(BLOCKS) == ENCODINGS


def test_rows_that_are_not_finite_are_flagged_by_their_example(tmp_path):
    examples = poisoned(EXAMPLES, (3, 9))
    specs = [Spec(POINT, name="t", per="token", dtype="float16"), Spec(POINT, name="q", dtype="float16", **LOW)]
    report = collect(tiny_model(), tmp_path, examples, points=specs, loss=poisoned_loss, rows_per_unit=4)
    rows = tlfast.open_dataset(tmp_path)
    assert [example["id"] for example in rows.examples if example["flags"] & FLAG_NON_FINITE] == [3, 9]
    assert report.n_nonfinite_rows == 2
    assert [row.example for row in report.non_finite] == [3, 9]
    assert rows[f"{POINT}:q"][3].isnan().any()
    assert rows[f"{POINT}:q"][4].isfinite().all()


def test_a_point_without_a_gradient_has_rows_of_nan(tmp_path):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.point = nn.Embedding(256, 4), nn.Linear(4, 256)

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            even = (input_ids[:, 0] % 2 == 0).all()
            return self.point(hidden) if even else hidden @ self.point.weight.T

    specs = [Spec("embed", "mean"), Spec("point", per="token"), Spec("point", name="q", **LOW)]
    examples = [[k % 2, 3, 4] for k in range(6)]
    collect(Skipping(), tmp_path, examples, points=specs, missing="nan", batch_tokens=1, rows_per_unit=1)
    rows = tlfast.open_dataset(tmp_path)
    for name in ("point:none", "point:q"):
        assert [int(rows[name][i].isnan().all()) for i in range(6)] == [0, 1] * 3


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path):
    settings = {"points": [Spec(POINTS["gpt2"], **LOW), Spec(POINT, "mean", name="m")], "rows_per_unit": 3}
    collect(tiny_model(), tmp_path / "whole", EXAMPLES, **settings)
    collect(tiny_model(), tmp_path / "parts", EXAMPLES, units="2:3", **settings)
    collect(tiny_model(), tmp_path / "parts", EXAMPLES, units="0:1", **settings)
    assert collect(tiny_model(), tmp_path / "parts", EXAMPLES, **settings).n_rows == 5
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")
    with pytest.raises(tlfast.dataset.DatasetError, match="encoding"):
        collect(
            tiny_model(), tmp_path / "parts", EXAMPLES, **settings | {"points": [Spec(POINTS["gpt2"], per="token")]}
        )
    more = [*EXAMPLES, *sequences(4, longest=30, seed=5)]  # longer ones: units of their own
    assert collect(tiny_model(), tmp_path / "parts", more, extend=True, **settings).n_rows == 4
    assert len(tlfast.open_dataset(tmp_path / "parts")[f"{POINT}:none"][14]) == len(more[14])


def test_by_words_of_the_command(tmp_path, capsys):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text", n_files=3)
    arguments = collect_words(tmp_path, of="act,grad", side="input", per="token", encoding="int8:64")
    assert main(["collect", *arguments, "--dry-run"]) == 0
    assert "F32 [16], act, per token, as int8:64" in capsys.readouterr().out
    assert main(["collect", *arguments]) == 0
    rows = tlfast.open_dataset(tmp_path / "out")
    assert set(map(rows.column, rows.points)) == {
        Column(torch.float32, (16,), of, "token", "int8:64") for of in ("act", "grad")
    }
    said = rows.header["specs"][0]
    assert (said["reduce"], said["per"], said["encoding"]) == ("none", "token", "int8:64")
    assert main(["collect", str(tmp_path / "out" / "config.yaml")]) == 0


def test_what_a_collate_function_pads(tmp_path):
    def together(examples):
        width = max(len(example["input_ids"]) for example in examples)
        ids, mask = torch.zeros(len(examples), width, dtype=torch.int64), torch.zeros(len(examples), width)
        for row, example in enumerate(examples):
            n = len(example["input_ids"])
            ids[row, width - n :], mask[row, width - n :] = torch.tensor(example["input_ids"]), 1
        return {"input_ids": ids, "attention_mask": mask}

    class Still(nn.Module):
        """Without positions: padding on either side changes nothing."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.point = nn.Embedding(256, 4), nn.Linear(4, 256)

        def forward(self, input_ids):
            return self.point(self.embed(input_ids))

    settings = {"points": "embed", "per": "token", "rows_per_unit": 1}
    collect(Still(), tmp_path / "plain", EXAMPLES, **settings)
    collect(Still(), tmp_path / "own", EXAMPLES, collate=together, **settings)
    plain, own = (tlfast.open_dataset(tmp_path / name)["embed"] for name in ("plain", "own"))
    torch.testing.assert_close(own.flat[:], plain.flat[:])

    def cut(examples):
        return {name: values[:, 1:] for name, values in together(examples).items()}

    with refuses("collect: a batch must have the "):
        collect(Still(), tmp_path / "cut", EXAMPLES, collate=cut, **settings)


# What there are no such rows of.


class Odd(nn.Module):
    """Points without positions, with them elsewhere, and with more of them than there are tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.pooled, self.turned, self.longer = (
            nn.Embedding(256, 4),
            nn.Identity(),
            nn.Identity(),
            nn.Identity(),
        )

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        pooled = self.pooled(hidden.sum(1))
        turned = self.turned(hidden.mT).mT
        longer = self.longer(torch.cat([hidden, hidden[:, :1]], 1))[:, :-1]
        return (longer + turned + pooled[:, None]) @ self.embed.weight.T


@pytest.mark.parametrize("point", ["pooled", "turned", "longer"])
def test_points_without_the_positions_of_the_tokens(tmp_path, point):
    with refuses(f'collect at {point}: per="token" must mean a dimension 1 that is the positions, got ['):
        collect(Odd(), tmp_path / "out", [[1, 2, 3, 4, 5], [1, 2, 3]], points=point, per="token")
    assert not (tmp_path / "out").exists()


def test_rows_that_can_not_be_encoded(tmp_path):
    model = tiny_model(dtype=torch.float64)
    text = f"collect at {POINT}: rows must be float32, bfloat16 or float16 to be encoded, got torch.float64. dtype="
    with refuses(text):
        collect(model, tmp_path / "out", EXAMPLES, points=POINT, encoding="int8")
    collect(model, tmp_path / "cast", EXAMPLES, points=POINT, encoding="int8", dtype="float32")
    items = [{"x": torch.ones(3), "labels": k} for k in range(3)]
    loss = lambda model, batch: model(batch["x"]).square().sum() + 0 * batch["labels"].sum()  # noqa: E731
    text = 'collect: examples must have input_ids for per="token", got none. Leave per= out: a row is an example.'
    with refuses(text):
        collect(nn.Linear(3, 3), tmp_path / "out", items, points="", per="token", loss=loss)
    assert not (tmp_path / "out").exists()


# One's own loop.


def looped(cap, out, side="right"):
    """Four examples of 2, 1, 3 and 2 tokens, two units."""
    model, lengths = cap._model, [2, 1, 3, 2]
    for ids in out.batches(2):
        mask = torch.arange(3)[None] < torch.tensor([lengths[i] for i in ids])[:, None]
        mask = mask if side == "right" else mask.flip(1)
        with cap.batch(mask, ids=ids):
            model(torch.ones(2, 3, 4) * torch.tensor(ids)[:, None, None]).square().sum().backward()


def test_examples_without_a_length_get_that_of_their_rows(tmp_path):
    columns = {"": Column(torch.float32, (4,), per="token", encoding="int8")}
    writer = DatasetWriter(tmp_path, header={}, columns=columns, plan=Plan(4, 2))
    with tlfast.capture(nn.Linear(4, 4), "", rows=2, **LOW) as cap, cap.into(writer) as out:
        looped(cap, out)
    rows = tlfast.open_dataset(tmp_path)
    assert [example["length"] for example in rows.examples] == [2, 1, 3, 2] == rows[""].lengths().tolist()


def test_lengths_and_masks_that_do_not_agree(tmp_path):
    with tlfast.capture(nn.Linear(4, 4), "", rows=4, per="token") as cap, cap.into(tmp_path, plan=Plan(2, 2)):
        text = "into: the mask must have the 2 tokens of example 0, got 3. See the mask of this batch."
        for mask in (torch.ones(1, 3, dtype=torch.bool), None):
            with refuses(text), cap.batch(mask, ids=[Example(0, [1, 2], "", 0, 2)]):
                cap._model(torch.ones(1, 3, 4)).sum().backward()
        for ids in ([0], [1]):
            with cap.batch(ids=ids):
                cap._model(torch.ones(1, 3, 4)).sum().backward()
    assert tlfast.open_dataset(tmp_path)[""].lengths().tolist() == [3, 3]


def test_points_of_a_loop_that_fire_late_or_have_other_positions(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x, late=True):
            return self.a(x * 1).sum() + (self.b(x[:, 1:] if late is None else x * 1).sum() if late is not False else 0)

    model, x, mask = Two(), torch.ones(1, 3, 4, requires_grad=True), torch.tensor([[True, True, False]])
    specs = [Spec("a"), Spec("b", **LOW)]
    with tlfast.capture(model, specs, rows=4, missing="nan") as cap, cap.into(tmp_path / "late", plan=Plan(2, 2)):
        text = "into: a batch must have a mask where no point per token has fired yet, got none. Give cap.batch(mask="
        with refuses(text), cap.batch(ids=[0]):
            model(x, late=False).backward()
        for number, late in ((0, False), (1, True)):
            with cap.batch(mask, ids=[number]):
                model(x, late).backward()
    rows = tlfast.open_dataset(tmp_path / "late")
    assert rows["b"].lengths().tolist() == [2, 2]
    assert [bool(rows["b"][i].isnan().all()) for i in range(2)] == [True, False]
    text = "into: rows must be of the same positions in all columns per token, got 2 and 3. Take points with the "
    specs = [Spec("a", per="token"), Spec("b", per="token")]
    cap = tlfast.capture(model, specs, rows=2)
    with cap, cap.into(tmp_path / "other", plan=Plan(1, 1)), refuses(text), cap.batch(ids=[0]):
        model(x, late=None).backward()
