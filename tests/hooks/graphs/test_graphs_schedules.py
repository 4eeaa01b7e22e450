"""Recorded and eager steps in any order, with failures between them: the rows are those that ended well."""

import pytest
import torch
from comparison import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from rerun_graphs import B, Model, P, step_of

import tlfast

ROWS = 4 * B
DO = ("eager", "graph", "short", "clear", "graph fails", "backward fails", "record again")


@pytest.mark.simt
def test_any_order(rerun):
    torch.manual_seed(0)
    model = Model()
    tokens = [torch.randint(11, (B, P)) for _ in range(4)]
    one_by_one = {"whole": [], "short": []}  # a matrix product may round otherwise in a batch of one
    with tlfast.freeze(model), tlfast.capture(model, "first", reduce="mean", rows=ROWS, backend="native") as cap:
        for batch in tokens:
            for length, part in (("whole", batch), ("short", batch[:1])):
                cap.clear()
                step_of(model)(part)
                one_by_one[length].append(cap["first"].clone())

    @settings(max_examples=150)
    @given(st.lists(st.tuples(st.sampled_from(DO), st.integers(0, 3)), max_size=14))
    def check(order):
        with tlfast.freeze(model), tlfast.capture(model, "first", reduce="mean", rows=ROWS, backend="native") as cap:
            run(cap, order, model, tokens, one_by_one, rerun)

    check()


def run(cap, order, model, tokens, one_by_one, rerun):
    """Do what ``order`` says, and keep the books beside it."""
    steps = {"eager": (step_of(model), None)}
    steps["graph"] = rerun(cap, step_of(model), tokens[0], warmup=1)
    steps["short"] = rerun(cap, step_of(model), tokens[0][:1], warmup=1)
    expected, n_writes = [], 0
    for what, which in order:
        batch, rows = tokens[which], one_by_one["short" if what == "short" else "whole"][which]
        if what == "clear":
            cap.clear()
            expected.clear()
        elif what == "graph fails":
            fails(steps["graph"], batch)
        elif what == "backward fails":
            backward_fails(model, batch)
        elif what == "record again" and sum(map(len, expected)) + B <= ROWS:
            steps["graph"] = rerun(cap, step_of(model), batch, warmup=1)
        elif what in steps:
            batch = batch[:1] if what == "short" else batch
            if sum(map(len, expected)) + len(rows) > ROWS:
                with pytest.raises(RuntimeError, match="rows must hold"):
                    steps[what][0](batch)
            else:
                steps[what][0](batch)
                expected.append(rows)
                n_writes += 1
        assert cap.rows == sum(map(len, expected)), (what, which)
        if expected:
            assert_same_bits(cap["first"], torch.cat(expected), (what, which))
    done = [ring.counters[2].item() - ring.n_writes for ring in cap._columns.values()]
    assert done == [0]
    assert cap._columns["first"].n_writes >= n_writes


def fails(graph, batch):
    step, made = graph

    def fail():
        raise RuntimeError("the device is gone")

    made.instead = fail
    with pytest.raises(RuntimeError, match=r"the device is gone|rows must hold"):
        step(batch)
    made.instead = None


def backward_fails(model, batch):
    def fail(grad):
        raise ValueError("not this time")

    handle = model.embed.register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    try:
        with pytest.raises((ValueError, RuntimeError), match=r"not this time|rows must hold"):
            step_of(model)(batch)
    finally:
        handle.remove()
