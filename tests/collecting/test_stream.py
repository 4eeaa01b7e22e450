"""`stream`: the rows that `collect` stores, in shuffled batches, out of a buffer; and a model that is left alone."""

from __future__ import annotations

import gc
import inspect
import re
import threading
import weakref

import pytest
import torch
from poisoned_rows import poisoned, poisoned_loss
from tiny_models import POINTS, collect, sequences, tiny_model
from torch import nn

import tlfast
import tlfast.collecting.stream
from tlfast.collecting.loss import next_token_loss
from tlfast.collecting.stream import SETTINGS
from tlfast.errors import SpeakingAs

EXAMPLES = sequences(30)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.point = nn.Embedding(256, 4), nn.Linear(4, 256)

    def forward(self, input_ids):
        return self.point(self.embed(input_ids))


def streamed(model=None, examples=EXAMPLES, points="embed", **settings):
    model = Small() if model is None else model
    return tlfast.stream(model, examples, points, **{"buffer_rows": 16, "batch_size": 4} | settings)


def ids_of(batches):
    return torch.cat([batch["id"] for batch in batches]).tolist()


# The rows.


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": torch.bfloat16},
        {"reduce": "none", "batch_tokens": 40},
        {"reduce": "last", "padding_side": "left", "grad_scale": 4.0, "seq_len": 16},
    ],
)
def test_an_epoch_has_the_rows_of_a_dataset_to_the_bit(tmp_path, backend, settings):
    settings = {"rows_per_unit": 7, "backend": backend} | settings
    collect(tiny_model(), tmp_path, EXAMPLES, **settings)
    dataset, seen = tlfast.open_dataset(tmp_path), []
    batches = streamed(tiny_model(), points=POINTS["gpt2"], **settings)
    assert {name: (column.dtype, column.row_shape) for name, column in batches.columns.items()} == {
        name: (dataset[name].dtype, dataset[name].shape[1:]) for name in dataset.points
    }
    for batch in batches:
        assert list(batch) == ["id", *dataset.points]
        for name in dataset.points:
            assert torch.equal(batch[name], dataset[name][batch["id"].tolist()])
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(30))


def test_specs_and_points_that_do_not_fire(tmp_path):
    class Skipping(Small):
        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            return self.point(hidden) if (input_ids[:, 0] % 2 == 0).all() else hidden @ self.point.weight.T

    points = [tlfast.Spec("embed", reduce="sum"), tlfast.Spec("point", reduce="norm"), tlfast.Spec("embed", "last")]
    settings = {"missing": "nan", "batch_tokens": 1, "rows_per_unit": 4}
    collect(Skipping(), tmp_path, EXAMPLES, points=points, **settings)
    dataset, n_nan = tlfast.open_dataset(tmp_path), 0
    for batch in streamed(Skipping(), points=points, **settings):  # what is missing doesn't stop it
        for name in ("embed:sum", "point", "embed:last"):
            torch.testing.assert_close(batch[name], dataset[name][batch["id"].tolist()], rtol=0, atol=0, equal_nan=True)
        n_nan += int(batch["point"].isnan().all(1).sum())
    assert n_nan == sum(tokens[0] % 2 for tokens in EXAMPLES) > 0


@pytest.mark.parametrize("size, last", [(4, [2]), (15, []), (7, [2])])
def test_batches_are_full_but_the_last(size, last):
    full = [size] * (30 // size)
    for drop_last in (False, True):
        batches = streamed(batch_size=size, buffer_rows=20, rows_per_unit=5, drop_last=drop_last)
        expected = full + (last if not drop_last else [])
        assert len(batches) == len(expected)
        assert [len(batch["embed"]) for batch in batches] == expected


def test_the_order_belongs_to_the_seed():
    first, again, other = (ids_of(streamed(seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other) == list(range(30)) != first


def test_a_batch_mixes_the_units_of_the_buffer():
    batches = [set((batch["id"] // 4).tolist()) for batch in streamed(batch_size=8, rows_per_unit=4)]
    assert all(len(units) > 1 for units in batches)
    assert len(set.union(*batches)) == 8


def test_no_more_is_computed_than_the_buffer_holds():
    n_computed = [0]

    def counting(model, batch):
        n_computed[0] += len(batch.input_ids)
        return next_token_loss(model, batch)

    batches = streamed(loss=counting, rows_per_unit=3)
    n_computed[0], n_given = 0, 0
    for batch in batches:
        assert n_computed[0] - n_given <= 16
        assert n_computed[0] in (15, 30) or n_computed[0] - n_given > 16 - 3 - 4  # and as much as it has room for
        n_given += len(batch["id"])
    assert (n_computed[0], n_given) == (30, 30)


def test_batches_are_their_owners():
    batches = streamed()
    first = next(batches)
    kept = first["embed"].clone()
    first["embed"].zero_()
    others = list(batches)
    rest = {name: torch.cat([batch[name] for batch in others]) for name in ("id", "embed")}
    assert len(rest["id"]) == 26
    again = {int(k): row for batch in streamed() for k, row in zip(batch["id"], batch["embed"], strict=True)}
    assert torch.equal(kept, torch.stack([again[k] for k in first["id"].tolist()]))
    assert torch.equal(rest["embed"], torch.stack([again[k] for k in rest["id"].tolist()]))


def test_bad_examples_are_left_out_and_named():
    batches = streamed(examples=[[1, 2], [3], [4, 5, 6]], seq_len=4)
    assert batches.skipped == [("#1", 0, "1 token, less than 2")]
    assert sorted(ids_of(batches)) == [0, 1]
    with pytest.raises(ValueError, match=r"^stream: examples must have 2 tokens or more"):
        streamed(examples=[[1, 2], [3]], bad_examples="stop")


def test_rows_that_are_not_finite():
    settings = {"dtype": torch.float16, "loss": poisoned_loss, "rows_per_unit": 4, "points": POINTS["gpt2"]}
    examples = poisoned(EXAMPLES, (17,))
    text = (
        "stream: rows must be finite, got NaN or infinity in example 17 of u000004 at transformer.h.0. "
        'non_finite="keep" gives them out, too.'
    )
    batches = streamed(tiny_model(), examples, **settings)
    with pytest.raises(FloatingPointError, match=re.escape(text)):
        list(batches)
    assert list(batches) == []
    kept = list(streamed(tiny_model(), examples, non_finite="keep", **settings))
    bad = torch.cat([batch["transformer.h.0"] for batch in kept]).isfinite().logical_not().any(1)
    assert torch.tensor(ids_of(kept))[bad].tolist() == [17]


# The model, and what is left behind.


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [p.grad is None for p in model.parameters()],
        torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), threading.active_count(),
    )  # fmt: skip


def test_the_model_is_its_owners_between_batches():
    model = Small().train()
    model.point.eval()
    model.embed.weight.requires_grad_(False)
    with torch.no_grad():  # the caller's mode is not ours
        before = state_of(model)
        batches = streamed(model)
        assert state_of(model) == before
        for _ in batches:
            assert state_of(model) == before
        assert state_of(model) == before


def test_the_model_may_be_used_between_batches():
    model = Small()
    rows = {}
    for batch in streamed(model):
        next_token = model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum()
        next_token.backward()  # neither hooked nor frozen
        assert model.point.weight.grad is not None
        rows |= dict(zip(batch["id"].tolist(), batch["embed"], strict=True))
    for batch in streamed(Small()):
        for number, row in zip(batch["id"].tolist(), batch["embed"], strict=True):
            assert torch.equal(rows[number], row)


def test_an_error_ends_it_and_leaves_nothing():
    model, n_steps = Small().train(), [0]

    def failing(model, batch):
        n_steps[0] += 1
        if n_steps[0] == fails_at:
            raise LookupError("mine")
        return next_token_loss(model, batch)

    fails_at, before = None, state_of(model)
    batches = streamed(model, loss=failing, rows_per_unit=4)
    fails_at = n_steps[0] + 5
    with pytest.raises(LookupError, match="mine"):
        list(batches)
    assert n_steps[0] == fails_at
    assert state_of(model) == before
    assert list(batches) == []


def test_close_ends_it_and_lets_the_rows_go():
    model = Small()
    before = state_of(model)
    with streamed(model) as batches:
        next(batches)
        buffer = weakref.ref(batches._batches.gi_frame.f_locals["buffer"])
    gc.collect()
    assert buffer() is None
    assert state_of(model) == before
    assert list(batches) == []
    batches.close()  # twice does no harm


@pytest.mark.parametrize("begun", [False, True])
def test_rows_do_not_know_the_autocast_of_who_asks_for_them(begun):
    def autocast(enabled):
        return torch.autocast("cpu", torch.bfloat16, enabled)

    with autocast(begun):
        expected, batches = list(streamed(Small())), streamed(Small())
    with autocast(not begun):
        for batch, truth in zip(batches, expected, strict=True):
            assert torch.is_autocast_enabled("cpu") is not begun
            assert torch.equal(batch["embed"], truth["embed"])
        other = next(streamed(Small()))
    assert not torch.equal(other["embed"], expected[0]["embed"])  # it does matter


# What is refused.


@pytest.mark.parametrize("begin", ["stream", "collect", "next"])
def test_inside_a_capture_of_the_model(tmp_path, begin):
    model = Small()
    batches = streamed(model)
    text = (
        ": model must be in no capture, got <tlfast.Capture of point: 2 of 4 rows, {}> already. "
        "The rows would be in that capture too: leave its block first."
    )
    with tlfast.capture(model, "point", rows=4) as cap:
        model(torch.tensor([[1], [2]])).sum().backward()
        unread = iter(EXAMPLES)
        work = {
            "stream": lambda: streamed(model, unread),
            "collect": lambda: collect(model, tmp_path / "new", unread, points="embed"),
            "next": lambda: next(batches),
        }
        speaker = "collect" if begin == "collect" else "stream"
        with pytest.raises(RuntimeError, match=f"^{speaker}{re.escape(text.format(cap.backend))}"):
            work[begin]()
        assert cap.rows == 2
        assert next(unread) == EXAMPLES[0]
        assert len(list(streamed(Small()))) == 8  # another model may
    assert not (tmp_path / "new").exists()
    assert len(list(streamed(model))) == 8


def test_inference_mode():
    batches = streamed()
    text = (
        "stream: torch.inference_mode must be off, got on. "
        "Leave that block: its tensors never have gradients. torch.no_grad() may stay."
    )
    for ask in (streamed, lambda: next(batches)):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=re.escape(text)):
            ask()


@pytest.mark.parametrize("what", ["one stream", "two streams"])
def test_two_threads(what):
    model, inside, asked, given = Small(), threading.Event(), threading.Event(), []

    def waiting(model, batch):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert asked.wait(60)
        return next_token_loss(model, batch)

    batches = streamed(model, loss=waiting)
    others = batches if what == "one stream" else streamed(model)
    thread = threading.Thread(target=lambda: given.append(next(batches)))
    thread.start()
    assert inside.wait(60)
    text = {
        "one stream": "stream: a stream must be read by one thread at a time, got a second one. Put a lock around next",
        "two streams": "stream: model must be ",
    }[what]
    try:
        with pytest.raises(RuntimeError, match=re.escape(text)):
            next(others)
    finally:
        asked.set()
        thread.join(60)
    assert [list(batch) for batch in given] == [["id", "embed"]]


def mean_loss(model, batch):
    return next_token_loss(model, batch) / batch.next_tokens.ne(-100).sum()


class SeesAll(Small):
    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        return self.point(hidden + hidden.mean(1, keepdim=True))


@pytest.mark.parametrize(
    "model, examples, settings",
    [
        (Small(), [{"input_ids": [1, 2], "labels": [1, 2]}], {}),
        (Small(), [], {}),
        (Small(), EXAMPLES, {"loss": mean_loss}),  # rows that depend on their batch
        (SeesAll(), [[1, 2, 3], [4, 5, 6]], {}),  # and on the token that is to be predicted
        (SeesAll(), EXAMPLES, {}),
        (Small(), EXAMPLES, {"points": "nowhere"}),
        (Small(), EXAMPLES, {"over": "batch"}),
        (Small(), EXAMPLES, {"embedding": "nowhere"}),
        (Small(), EXAMPLES, {"loss": lambda model, batch: None}),
        (3, EXAMPLES, {}),
        (Small(), EXAMPLES, {"loss": 3}),
        (Small(), EXAMPLES, {"seq_len": -1}),
        (Small(), EXAMPLES, {"rows_per_unit": 0}),
        (Small(), EXAMPLES, {"grad_scale": 0}),
        (Small(), EXAMPLES, {"padding_side": "up"}),
        (Small(), EXAMPLES, {"missing": "x"}),
    ],
)
def test_what_collect_refuses_is_refused_in_its_words_and_our_name(tmp_path, model, examples, settings):
    given = {"points": "embed"} | settings
    with pytest.raises((ValueError, TypeError)) as theirs:
        collect(model, tmp_path, examples, **given)
    with pytest.raises(type(theirs.value)) as ours:
        streamed(model, examples, **given)
    assert str(ours.value) == re.sub("^collect: ", "stream: ", str(theirs.value))
    assert not isinstance(model, nn.Module) or not any(module._forward_hooks for module in model.modules())


def test_who_was_called_speaks():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    calls = {
        "stream": lambda **more: tlfast.stream(model, [[1]], "1", buffer_rows=4, batch_size=2, **more),
        "running": lambda **more: tlfast.running(model, [[1]], "1", **more),
        "factors": lambda **more: tlfast.factors(model, [[1]], "1", **more),
        "score": lambda **more: tlfast.score(model, {"1": torch.ones(1, 9, 4)}, examples=[[1]], **more),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: examples must have 2 tokens or more, got 1 in example 0"):
            call(bad_examples="stop")


NO_ROOM = "have room for a batch of 4 beside a unit of 5, got 8. Give more, or a smaller batch_size or rows_per_unit."


@pytest.mark.parametrize(
    "settings, error, text",
    [
        ({"out": "x"}, TypeError, f"settings must be among {', '.join(SETTINGS)}, got out. Leave it out."),
        ({"buffer_rows": 0}, ValueError, "buffer_rows must be a positive number, got 0. Give a whole number."),
        ({"batch_size": 1.5}, ValueError, "batch_size must be a positive number, got 1.5. Give a whole number."),
        ({"buffer_rows": 8, "rows_per_unit": 5}, ValueError, f"buffer_rows must {NO_ROOM}"),
        ({"seed": "a"}, TypeError, "seed must be an int, got 'a'. Give a whole number."),
        ({"seed": 2**70}, ValueError, f"seed must be in -2**63..2**63-1, got {2**70}. Give one of 64 bits."),
        ({"seed": -(2**64)}, ValueError, f"seed must be in -2**63..2**63-1, got -{2**64}. Give one of 64 bits."),
        ({"non_finite": "flag"}, ValueError, "non_finite must be one of keep, stop, got 'flag'."),
    ],
)
def test_bad_arguments(settings, error, text):
    with pytest.raises(error, match=re.escape(f"stream: {text}")):
        streamed(**settings)


def test_a_point_with_the_name_of_the_numbers():
    model = Small()
    model.id = model.embed
    text = "stream: points must not have the name of the examples' numbers, got id. Give its module another name."
    with pytest.raises(ValueError, match=re.escape(text)):
        streamed(model, points="id")


def test_a_sharded_model(monkeypatch):
    monkeypatch.setattr(tlfast.collecting.stream, "is_sharded", lambda model: True)
    text = "stream: model must be whole in this process, got a sharded one. Collect a dataset, and read it with"
    with pytest.raises(ValueError, match=re.escape(text)):
        streamed()


def test_settings_are_those_of_collect():
    assert set(SETTINGS) < set(inspect.signature(tlfast.collect).parameters)


@pytest.mark.parametrize("said", ["collect: model must be", "collect at h.0: the rows must be"])
def test_an_error_says_who_was_called(said):
    with pytest.raises(ValueError, match=f"^{said.replace('collect', 'stream')}"), SpeakingAs("stream", "collect"):
        raise ValueError(said)


def test_an_error_of_something_else_stays_as_it_is():
    with pytest.raises(ValueError, match=r"^collection: mine$"), SpeakingAs("stream", "collect"):
        raise ValueError("collection: mine")
