"""Recorded steps that fail, are lost or refused: no row that can't be trusted, and the capture goes on."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits, assert_untouched
from rerun_graphs import B, eager_rows, step_of

import tlfast
from tlfast import _build_info


@pytest.mark.simt
def test_a_lost_replay_is_found(rerun, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step, made = rerun(cap, step_of(model), batches[0])
        step(batches[0])
        assert cap.counts["first"]["nonfinite"] == 0
        made.instead = lambda: None
        step(batches[1])
        with pytest.raises(RuntimeError, match=r"capture at first: rows must have been written 2 times, got 1\."):
            _ = cap.counts


@pytest.mark.simt
def test_a_replay_that_fails_leaves_no_row(rerun, model, batches):
    def fail():
        raise RuntimeError("the device is gone")

    expected, counts = eager_rows(model, batches[:2], points="first", rows=40)
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step, made = rerun(cap, step_of(model), batches[0])
        step(batches[0])
        made.instead = fail
        with pytest.raises(RuntimeError, match="the device is gone"):
            step(batches[3])
        made.instead = None
        assert cap.rows == B
        step(batches[1])
        assert_rows(cap, "first", expected["first"])
        assert cap.counts == counts


@pytest.mark.simt
def test_no_room_is_told_before_anything_runs(rerun, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="sum", rows=2 * B + 1, backend="native") as cap:
        step, made = rerun(cap, step_of(model), batches[0])
        step(batches[0])
        step(batches[1])
        before = cap["first"].clone()
        with pytest.raises(RuntimeError, match="capture: rows must hold the 6 rows written and 3 more, got 7"):
            step(batches[2])
        assert made.n_replays == 2
        assert_rows(cap, "first", before)
        assert_untouched(cap._columns["first"].rows, 2 * B)


@pytest.mark.simt
def test_a_step_that_cannot_be_recorded_leaves_the_capture_as_it_was(rerun, model, batches):
    def fails_later(tokens):
        seen.append(None)
        if len(seen) == 3:
            raise RuntimeError("an operation that can't be captured")
        model(tokens).backward()

    expected, _ = eager_rows(model, batches[:2], points="first", rows=40)
    seen = []
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step_of(model)(batches[0])
        with pytest.raises(RuntimeError, match="can't be captured"):
            rerun(cap, fails_later, batches[3], warmup=2)
        with pytest.raises(RuntimeError, match="graph_step: step must run one backward that reaches the points, got 0"):
            rerun(cap, lambda tokens: model(tokens).detach(), batches[3])
        with pytest.raises(RuntimeError, match="graph_step: step must run one backward that reaches the points, got 2"):
            rerun(cap, lambda tokens: step_of(model)(tokens) + step_of(model)(tokens), batches[3])
        step_of(model)(batches[1])
        assert_same_bits(cap["first"], expected["first"])  # behind them, what was warmed up may lie


@pytest.mark.simt
def test_positions_that_the_host_must_find(rerun, model, batches):
    """A graph would keep those of the batch with which it was recorded."""
    mask = torch.ones(B, batches[0].shape[1], dtype=torch.bool)
    text = "^batch at first: at must be the same for all examples, and without a mask, in a step that is recorded, got "
    for at, given in ((-1, {"mask": mask}), ("where", {"at": {"where": [0] * B}})):
        with tlfast.freeze(model), tlfast.capture(model, tlfast.Spec("first", at=at), rows=40, backend="native") as cap:

            def step(tokens, cap=cap, given=given):
                with cap.batch(**given):
                    model(tokens).sum().backward()

            with pytest.raises(RuntimeError, match=text):
                rerun(cap, step, batches[0])
            step(batches[0])
            assert cap.rows == B


@pytest.mark.simt
def test_inputs_of_another_kind(rerun, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step, _ = rerun(cap, step_of(model), batches[0])
        text = r"graph_step: inputs must be torch.int64 \[3, 5\], got torch.int64 \[2, 5\]\. Record a graph for each"
        with pytest.raises(ValueError, match=text):
            step(batches[0][:2])
        assert cap.rows == 0
        step(batches[0])
    with pytest.raises(RuntimeError, match="graph_step: the capture must be entered, got one that is left"):
        step(batches[1])


def test_the_cpu_has_no_graphs(native, model, batches):
    if _build_info.SIMT:
        pytest.skip("the build of make simt")
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        with pytest.raises(RuntimeError, match=r"graph_step: inputs\[0\] must be on a CUDA device, got cpu\."):
            tlfast.graph_step(cap, step_of(model), batches[0])
        with pytest.raises(RuntimeError, match="graph_step: the device must be one of CUDA, got cpu"):
            cap._ledger.start_recording(torch.device("cpu"))
        step_of(model)(batches[0])
        assert cap.rows == B


def test_rows_elsewhere_than_the_cursor(native, model, batches):
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step_of(model)(batches[0])
        text = r"graph_step: all rows must be on meta, as inputs\[0\] is, got cpu at first\. Run the step itself\."
        with pytest.raises(RuntimeError, match=text):
            cap._ledger.start_recording(torch.device("meta"))
        step_of(model)(batches[1])
        assert cap.rows == 2 * B


def test_bad_arguments(native, model, batches):
    cap = tlfast.capture(model, "first", rows=40, backend="native")
    with pytest.raises(RuntimeError, match="graph_step: cap must be entered, got a capture outside its with"):
        tlfast.graph_step(cap, step_of(model), batches[0])
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        with pytest.raises(TypeError, match=r"graph_step: inputs must be one tensor or more, got \[\]"):
            tlfast.graph_step(cap, step_of(model))
        with pytest.raises(TypeError, match=r"graph_step: inputs must be one tensor or more, got \['int'\]"):
            tlfast.graph_step(cap, step_of(model), 3)
        with pytest.raises(ValueError, match="graph_step: warmup must be at least 1, got 0"):
            tlfast.graph_step(cap, step_of(model), batches[0], warmup=0)
        step_of(model)(batches[0])
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="python") as cap:
        with pytest.raises(RuntimeError, match="graph_step: cap must run the native code, got the python backend"):
            tlfast.graph_step(cap, step_of(model), batches[0])
        step_of(model)(batches[0])


@pytest.mark.simt
def test_a_step_recorded_before_rows_took_another_shape_is_refused(rerun, model, batches):
    long = torch.randint(11, (B, batches[0].shape[1] + 2))
    expected, _ = eager_rows(model, batches[:1], points="first", rows=40)
    with tlfast.freeze(model), tlfast.capture(model, "first", rows=40, backend="native") as cap:
        step, _ = rerun(cap, step_of(model), batches[0])
        cap.clear()
        step(batches[0])  # rows of the same shape lie where they lay
        with pytest.raises(ValueError, match="capture at first: a row must have shape"):
            step_of(model)(long)
        assert_rows(cap, "first", expected["first"])
        cap.clear()
        step_of(model)(long)
        with pytest.raises(RuntimeError) as error:
            step(batches[0])
        assert cap.rows == B
        assert cap["first"].shape[1] == long.shape[1]
        cap.clear()
        step, _ = rerun(cap, step_of(model), batches[0])
        step(batches[0])
        assert_rows(cap, "first", expected["first"])
    assert str(error.value) == (
        "graph_step: a recorded step must find the rows where they were when it was recorded, got others at first. "
        "Record it again: after clear() their shape changed."
    )
