"""Gradients written on several streams of a GPU, and their readers: who waits for whom, by notes, without a GPU."""

from __future__ import annotations

import pytest
import torch
from backends import usable
from stream_notes import FakeStreams, launches_before
from torch import nn

import tlfast
from tlfast import _build_info
from tlfast.backends import backwards, column, keepers, ledger, recipe, rows, streams, tensor_cache

B, P, D = 2, 3, 4
pytestmark = pytest.mark.simt


@pytest.fixture(params=["native", "python"])
def gpu(request, monkeypatch):
    """Streams that take notes: (the backend, they)."""
    if request.param == "native":
        usable("native")
        if not _build_info.SIMT:
            pytest.skip("tlfast._C is not the build of make simt")
        yield "native", torch.ops.tlfast_simt
        torch.ops.tlfast_simt.set_stream(0)
        return
    fakes = FakeStreams()
    for module in (streams, backwards, column, keepers, ledger, rows, tensor_cache):
        monkeypatch.setattr(module, "current_stream", fakes.current_stream)
    for module in (streams, backwards, keepers, rows, tensor_cache):
        monkeypatch.setattr(module, "read_on", fakes.read_on)
    for kind, name in (
        (recipe.Recipe, "write"),
        (column.Column, "put_stack"),
        (column.Column, "put_sum"),
        (rows.Rows, "fill_nan"),
    ):
        monkeypatch.setattr(kind, name, fakes.launching(getattr(kind, name)))
    yield "python", fakes


class Switch(torch.autograd.Function):
    """An identity whose backward makes another stream the current one, as the engine does for a node."""

    @staticmethod
    def forward(ctx, x, ops, number):
        ctx.ops, ctx.number = ops, number
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.ops.set_stream(ctx.number)
        return grad, None, None


class Caller(torch.autograd.Function):
    """What backward is called on: at the end the stream of the caller is the current one again, as in the engine."""

    @staticmethod
    def forward(ctx, x, ops):
        ctx.ops = ops
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ops = ctx.ops
        torch.autograd.Variable._execution_engine.queue_callback(lambda: ops.set_stream(0))
        return grad, None


def step(ops, model, numbers, fails=False):
    """A backward from stream 0 that writes the gradients of the model's calls on these streams, the first one last."""
    x = torch.ones(B, P, D, requires_grad=True)
    y = x
    for number in numbers:
        y = Switch.apply(model(y), ops, number)
    if fails:
        x.register_hook(lambda grad: pytest.fail("on purpose"))
    Caller.apply(y.sum(), ops).backward()


def test_what_orders_launches():
    notes = ["launch 1", "record 1 7", "launch 1", "launch 2", "read 2", "wait 0 7", "launch 0"]
    assert launches_before(notes) == {
        1: [set(), {0}, {0, 1}],
        2: [set(), {2}],
        0: [{0}, {0, 3}],
    }
    assert launches_before([]) == {0: [set()]}


@pytest.mark.parametrize("reduce", ["none", "mean"])
def test_a_reader_on_the_stream_of_the_caller_finds_all_rows(gpu, reduce):
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", reduce=reduce, rows=4 * B, calls="last", backend=backend):
        for numbers in [(0,), (1,), (1, 2), (2, 1)]:
            ops.start_notes()
            step(ops, model, numbers)
            before = launches_before(ops.take_notes())
            assert len(before[0][-1]) == len(numbers)


def test_points_on_streams_of_their_own(gpu):
    backend, ops = gpu
    model = nn.ModuleList([nn.Identity(), nn.Identity()])
    with tlfast.capture(model, ["0", "1"], rows=B, backend=backend):
        x = torch.ones(B, P, D, requires_grad=True)
        ops.start_notes()
        y = Switch.apply(model[1](Switch.apply(model[0](x), ops, 1)), ops, 2)
        Caller.apply(y.sum(), ops).backward()
        assert launches_before(ops.take_notes())[0][-1] == {0, 1}


@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_calls_of_a_point_on_several_streams(gpu, calls):
    """The rows or the sum of a later call come after those of an earlier one."""
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=B, calls=calls, backend=backend) as cap:
        ops.start_notes()
        step(ops, model, (1, 2))
        notes = ops.take_notes()
        on_2 = [note.split()[2] for note in notes if note.startswith("record 2")]  # the last call fires first
        assert any(f"wait 1 {event}" in notes for event in on_2)
        if calls == "last":
            assert launches_before(notes)[1][0] == {0}
        if calls != "last":
            assert "read 0" in notes  # the memory of what waits is another stream's
        if calls == "stack":
            assert launches_before(notes)[0][-2] == {0, 1}  # before the parts are put together
        assert not torch.isnan(cap["0"]).any()


def test_products_of_several_calls_on_several_streams(gpu):
    """Each is reduced where it fires, and what is added up there is read at the end on the caller's stream."""
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    spec = tlfast.Spec("0", "sum", of="grad*act")
    with tlfast.capture(model, spec, rows=2 * B, calls="sum", backend=backend) as cap:
        for _ in range(2):
            ops.start_notes()
            step(ops, model, (1, 2))
            notes = ops.take_notes()
            on_2 = [note.split()[2] for note in notes if note.startswith("record 2")]  # the last call fires first
            assert any(f"wait 1 {event}" in notes for event in on_2)
            assert {"read 0", "read 1"} <= set(notes)
            assert launches_before(notes)[0][-1] >= {0, 1}
        assert (cap["0:grad*act"] == 2 * P).all()


def test_a_backward_after_one_that_failed(gpu):
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=B, backend=backend) as cap:
        ops.start_notes()
        with pytest.raises(pytest.fail.Exception, match="on purpose"):
            step(ops, model, (1,), fails=True)
        ops.set_stream(0)
        assert cap.rows == 0
        step(ops, model, (2,))
        assert launches_before(ops.take_notes())[2][0] == {0}  # into the same rows
        assert cap.rows == B


def test_a_mask_is_there_and_stays_for_the_stream_that_reads_it(gpu):
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    mask = torch.ones(B, P, dtype=torch.bool)
    with tlfast.capture(model, "0", reduce="sum", rows=4 * B, backend=backend) as cap:
        step(ops, model, (0,))
        for number, told in ((0, False), (3, True)):
            ops.start_notes()
            with cap.batch(mask=mask):
                step(ops, model, (number,))
            notes = ops.take_notes()
            made = next(note.split()[2] for note in notes if note.startswith("record 0"))
            assert (f"wait 3 {made}" in notes, "read 3" in notes) == (told, told)
            if told:
                assert notes.index(f"wait 3 {made}") < notes.index("launch 3")


@pytest.mark.parametrize("kind", ["masks", "refs", "chosen", "constant"])
def test_what_a_column_is_given_is_there_and_stays_for_the_stream_that_reads_it(gpu, kind):
    backend, ops = gpu
    model, ref, mask = nn.Sequential(nn.Identity()), torch.full((D,), 2.0), torch.ones(B, P, dtype=torch.bool)
    more = {"refs": {"of": "grad*ref"}, "constant": {"of": "grad*ref", "ref": ref}, "chosen": {"at": "where"}}
    given = {"masks": {"masks": {"0": mask}}, "refs": {"refs": {"0": ref}}, "chosen": {"at": {"where": mask}}}
    ops.start_notes()
    with tlfast.capture(model, tlfast.Spec("0", "sum", **more.get(kind, {})), rows=2 * B, backend=backend) as cap:
        with cap.batch(**given.get(kind, {})):
            step(ops, model, (3,))
        notes = ops.take_notes()
        (made,) = {note.split()[2] for note in notes if note.startswith("record 0")}
        assert "read 3" in notes
        assert notes.index(f"wait 3 {made}") < notes.index("launch 3")
        assert cap.rows == B


def test_rows_that_one_stream_fills_are_written_on_another(gpu):
    """The native rows are filled on the stream of the first gradient; a geometry that is known on one stream is learnt
    on the next.
    """
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=4 * B, backend=backend):
        ops.start_notes()
        step(ops, model, (1,))
        first = ops.take_notes()
        ops.start_notes()
        step(ops, model, (2,))
        filled = [note.split()[2] for note in first if note.startswith("record 1")]
        waits = [note for note in ops.take_notes() if note.startswith("wait 2")]
        if backend == "native":
            assert any(note.split()[2] in filled for note in waits)


def test_backwards_that_fail_again_and_again(gpu):
    """What is waited for doesn't grow: the last of them has waited for those before."""
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=B, backend=backend) as cap:
        for _ in range(20):
            with pytest.raises(pytest.fail.Exception, match="on purpose"):
                step(ops, model, (1,), fails=True)
            ops.set_stream(0)
        ops.start_notes()
        step(ops, model, (2,))
        notes = ops.take_notes()
        assert sum(note.startswith("wait 2") for note in notes) <= 4
        assert cap.rows == B


def test_counts_come_after_a_backward_that_failed(gpu):
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=B, backend=backend) as cap:
        ops.start_notes()
        with pytest.raises(pytest.fail.Exception, match="on purpose"):
            step(ops, model, (1,), fails=True)
        ops.set_stream(0)
        assert cap.counts == {"0": {"nonfinite": 0, "saturated": 0}}
        assert 0 in launches_before(ops.take_notes())[0][-1]
        step(ops, model, (0,))


def test_the_allocator_knows_who_reads_the_rows(gpu):
    """They are memory of the first gradient's stream: who uses them on another tells so, once."""
    backend, ops = gpu
    model = nn.Sequential(nn.Identity())
    with tlfast.capture(model, "0", rows=4 * B, backend=backend):
        for number, told in ((1, {"read 0"}), (1, set()), (2, {"read 2"}), (2, set())):
            ops.start_notes()
            step(ops, model, (number,))
            assert {note for note in ops.take_notes() if note.startswith("read")} == told


@pytest.mark.parametrize("gpu", ["python"], indirect=True)  # only taps reach the native cache
def test_a_sum_in_a_cache_over_several_streams(gpu):
    _, ops = gpu
    cache = tensor_cache.TensorCache()
    cache.add("0", None)
    ops.start_notes()
    for number in (1, 2):
        ops.set_stream(number)
        cache.gradient(0, torch.ones(2), sum=True, alone=False)
    ops.set_stream(0)
    notes = ops.take_notes()
    made = next(note.split()[2] for note in notes if note.startswith("record 1"))
    assert notes.index(f"wait 2 {made}") < notes.index("read 2")
    assert cache.gradients()[0][1].tolist() == [2.0, 2.0]
