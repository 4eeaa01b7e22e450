"""Recorded steps: the rows of a replay are those of the step itself, and nothing else is touched."""

import gc

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from rerun_graphs import B, D, Model, N, P, eager_rows, step_of
from torch.multiprocessing.reductions import StorageWeakRef

import tlfast


@pytest.mark.simt
@pytest.mark.parametrize("reduce", ["none", "sum", "mean", "last", "norm", "absmax"])
@pytest.mark.parametrize("over", ["pos", "batch"])
def test_replays_write_the_rows_of_the_step(rerun, model, batches, reduce, over):
    options = {"points": "first", "reduce": reduce, "over": over, "dtype": torch.bfloat16, "rows": 40}
    expected, counts = eager_rows(model, batches, **options)
    with tlfast.freeze(model), tlfast.capture(model, backend="native", **options) as cap:
        step, made = rerun(cap, step_of(model), batches[-1], warmup=3)
        assert (cap.rows, made.n_warmups, step.n_rows) == (0, 3, len(expected["first"]) // N)
        for tokens in batches:
            step(tokens)
        assert made.n_replays == N
        assert_rows(cap, "first", expected["first"])
        assert cap.counts == counts


@pytest.mark.simt
@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_points_that_are_called_twice(rerun, model, batches, calls):
    options = {"points": ["first", "shared"], "reduce": "mean", "calls": calls, "rows": 40}
    expected, _ = eager_rows(model, batches, **options)
    with tlfast.freeze(model), tlfast.capture(model, backend="native", **options) as cap:
        step, _ = rerun(cap, step_of(model), batches[0])
        for tokens in batches:
            step(tokens)
        for name, rows in expected.items():
            assert_rows(cap, name, rows)


@pytest.mark.simt
@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_activations_and_products(rerun, model, batches, calls):
    kinds = [("grad", "mean"), ("grad*act", "sum"), ("grad*act", "none")]
    kinds += [("act", "mean")] if calls != "sum" else []
    points = [
        tlfast.Spec(["first", "shared"], reduce, of=of, dtype=torch.bfloat16, name=f"{of}:{reduce}")
        for of, reduce in kinds
    ]
    options = {"points": points, "calls": calls, "rows": 40}
    expected, counts = eager_rows(model, batches, **options)
    with tlfast.freeze(model), tlfast.capture(model, backend="native", **options) as cap:
        step, _ = rerun(cap, step_of(model), batches[0])
        for tokens in batches:
            step(tokens)
        for name, rows in expected.items():
            assert_rows(cap, name, rows)
        assert cap.counts == counts


@pytest.mark.simt
@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_refs_heads_and_positions(rerun, model, batches, calls):
    same = {"heads": (D // 2, 2), "dtype": torch.bfloat16}
    points = [
        tlfast.Spec("first", "sum", -1, of="grad*ref", ref=torch.linspace(-1, 1, D), name="ref", **same),
        tlfast.Spec("shared", "sum", (1, -1), of="grad*ref", ref=torch.linspace(0, 1, D), at=(0, -1), **same),
        tlfast.Spec("first", at=-1, name="at", **same),
        tlfast.Spec("first", "sum", -1, of="grad*ref", ref=torch.tensor(2.0), at=(1, -1), name="all", **same),
    ]
    options = {"points": points, "calls": calls, "rows": 40}
    expected, counts = eager_rows(model, batches, **options)
    with tlfast.freeze(model), tlfast.capture(model, backend="native", **options) as cap:
        step, _ = rerun(cap, step_of(model), batches[0])
        for tokens in batches:
            step(tokens)
        for name, rows in expected.items():
            assert_rows(cap, name, rows)
        assert cap.counts == counts


@pytest.mark.simt
def test_missing_rows_are_nan_where_the_cursor_stands(rerun, model, batches):
    with (
        tlfast.freeze(model),
        tlfast.capture(model, ["first", "optional"], missing="nan", rows=40, backend="native") as cap,
    ):
        step_of(model)(batches[0])  # fires
        model.skips = True
        step, _ = rerun(cap, step_of(model), batches[0])
        step(batches[1])
        step(batches[2])
        assert cap.missing["optional"].tolist() == [False] * B + [True] * 2 * B
        assert torch.isnan(cap["optional"][B:]).all()
        assert not torch.isnan(cap["optional"][:B]).any()
        assert not torch.isnan(cap["first"]).any()


@pytest.mark.simt
def test_a_mask_is_an_input(rerun, model, batches):
    masks = [torch.rand(B, P) < 0.7 for _ in batches]
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="mean", rows=40, backend="native") as cap:
        for tokens, mask in zip(batches, masks, strict=True):
            step_of(model, cap)(tokens, mask)
        expected = cap["first"].clone()
        cap.clear()
        step, _ = rerun(cap, step_of(model, cap), batches[0], masks[0])
        for tokens, mask in zip(batches, masks, strict=True):
            step(tokens, mask)
        assert_same_bits(cap["first"], expected)


@pytest.mark.simt
def test_replays_among_eager_steps_and_other_graphs(rerun, model, batches):
    short = [tokens[:2] for tokens in batches]
    order = [("graph", 0), ("eager", 1), ("short", 2), ("graph", 3), ("short", 0), ("eager", 2), ("graph", 1)]
    chosen = [short[i] if kind == "short" else batches[i] for kind, i in order]
    expected, _ = eager_rows(model, chosen, points="first", reduce="sum", rows=40)
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="sum", rows=40, backend="native") as cap:
        steps = {"eager": step_of(model)}
        steps["graph"], _ = rerun(cap, step_of(model), batches[0])
        steps["short"], _ = rerun(cap, step_of(model), short[0])
        for _ in range(2):  # after clear() the cursor starts anew
            cap.clear()
            for (kind, _), tokens in zip(order, chosen, strict=True):
                steps[kind](tokens)
            assert_rows(cap, "first", expected["first"])


@pytest.mark.simt
def test_what_the_step_returns_and_ids(rerun, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="sum", rows=40, backend="native") as cap:
        with cap.batch(ids=["a", "b", "c"]):
            step_of(model)(batches[0])
        step, _ = rerun(cap, step_of(model), batches[1])
        assert cap.ids == ["a", "b", "c"], "the warm-up leaves no ids"
        loss = step(batches[2])
        assert_same_bits(loss, model(batches[2]).detach())
        with cap.batch(ids=["d", "e", "f"]):
            step(batches[3])
        assert cap.ids == ["a", "b", "c", None, None, None, "d", "e", "f"]


@pytest.mark.simt
def test_what_a_step_returns_keeps_no_graph(rerun, model, batches):
    """It would keep the nodes that add up parameter gradients, and so the stream of the recording."""

    def with_history(tokens):
        loss = model(tokens)
        loss.backward()
        return {"loss": loss, "rows": len(tokens)}

    with tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step, _ = rerun(cap, with_history, batches[0])
        out = step._out
        assert out["rows"] == B
        assert out["loss"].item() == model(batches[0]).item()
        assert out["loss"].grad_fn is None


@pytest.mark.simt
def test_counts_are_those_of_the_replays(rerun, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", dtype=torch.float16, rows=40, backend="native") as cap:
        step, _ = rerun(cap, lambda tokens: (model(tokens) * 1e30).backward(), batches[0])
        assert cap.counts["first"] == {"nonfinite": 0, "saturated": 0}, "the warm-up counts nothing"
        step(batches[0])
        bad = int((~cap["first"].isfinite()).sum())
        assert bad > 0
        assert cap.counts["first"] == {"nonfinite": bad, "saturated": bad}


@pytest.mark.simt
def test_the_scratch_of_a_recorded_step_goes_with_it(rerun, batches):
    """A sum over so many positions is split, and its parts lie in memory that each replay uses again."""
    model = Model()
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="sum", rows=40, backend="native") as cap:
        step, _ = rerun(cap, step_of(model), batches[0].repeat(1, 4000))
        (scratch,) = step._recording.scratch
        held = StorageWeakRef(scratch.untyped_storage())
        del scratch
        for length in range(1, 9):  # as many other geometries as a column remembers
            step_of(model)(batches[0].repeat(1, length))
        assert not held.expired(), "the recording needs it"
        step(batches[0].repeat(1, 4000))
        del step
        gc.collect()
        assert held.expired()
