"""Threads: each with its own model, several in one model, a busy one beside, and no Python under a native tap."""

import os
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from fresh_python import run
from models import HookPoint, Setup, activation_gradients, chain, hooks_left, inputs, uneven
from threads import in_threads
from torch import nn

import tlfast
from tlfast import Spec


@contextmanager
def busy_python_thread():
    """A thread that asks for the GIL all the time."""
    stop = threading.Event()

    def spin():
        n = 0
        while not stop.is_set():
            n += 1

    thread = threading.Thread(target=spin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_trap_27_each_thread_its_own_model_and_capture(backend, attach):
    def work():
        setup = chain()
        right = activation_gradients(setup)
        with tlfast.capture(setup.model, ["tanh", "hook"], rows=31, attach=attach, backend=backend) as cap:
            for _ in range(10):
                setup.loss().backward()
        for name in cap.names:
            assert_rows(cap, name, right[name][0].repeat(10, 1, 1))

    in_threads(*[work] * 4)


@pytest.mark.parametrize("calls", ["raise", "sum", "stack"])
def test_trap_27_several_backwards_through_one_captured_model(backend, attach, calls):
    setup = chain()
    model, n_steps, n_threads = setup.model.requires_grad_(False), 15, 3
    points = ["linear", "hook"]
    batches = [inputs(n + 1) for n in range(n_threads)]
    right = [activation_gradients(Setup(model, points, lambda x=x: uneven(model(x)))) for x in batches]
    n_rows = n_steps * sum(len(x) for x in batches)
    with tlfast.capture(model, points, rows=n_rows + 1, attach=attach, backend=backend, calls=calls) as cap:

        def work(x):
            for _ in range(n_steps):
                uneven(model(x)).backward()

        in_threads(*[lambda x=x: work(x) for x in batches])
    assert cap.rows == n_rows
    blocks = cap._ledger.committed()
    sizes = sorted(n for _, n, _ in blocks)
    assert sizes == sorted(len(x) for x in batches for _ in range(n_steps))
    for start, n, missing in blocks:
        assert not missing
        for name in points:
            got = cap[name][start : start + n]
            assert_same_bits(got[:, 0] if calls == "stack" else got, right[n - 1][name][0])
    assert not hooks_left(model)


def test_rings_are_allocated_once_by_whoever_is_first(backend, attach):
    model = chain().model.requires_grad_(False)
    batches = [inputs(1) for _ in range(6)]
    for _ in range(5):
        with tlfast.capture(model, "hook", rows=7, attach=attach, backend=backend) as cap:
            losses = [uneven(model(x)) for x in batches]
            in_threads(*[loss.backward for loss in losses])
        assert cap.rows == 6
        assert not cap["hook"].isnan().any(), "a row went into a ring that another thread replaced"


def test_forward_here_backward_there(backend, attach):
    setup = chain()
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, ["tanh", "hook"], rows=7, attach=attach, backend=backend) as cap:
        for _ in range(2):
            loss = setup.loss()
            in_threads(loss.backward)
    for name in cap.names:
        assert_rows(cap, name, right[name][0].repeat(2, 1, 1))


def test_a_backward_keeps_what_its_batch_said(backend):
    """Also where it ends in another thread, behind the block in which it began."""
    model, x = nn.Sequential(HookPoint(), HookPoint()), inputs()
    mask, begun, go_on = torch.arange(4).expand(3, 4) > 1, threading.Event(), threading.Event()
    specs = [Spec("0", "sum"), Spec("0", of="grad*ref"), Spec("1", "sum")]

    def wait(grad):
        begun.set()
        assert go_on.wait(60)

    with tlfast.capture(model, specs, rows=3, backend=backend) as cap:
        hidden = model[0](x)
        hidden.register_hook(wait)
        thread = threading.Thread(target=uneven(model[1](hidden)).backward)
        refs = {"0:grad*ref": torch.full((6,), 3.0)}
        block = cap.batch(masks={"0": mask}, refs=refs)
        block.__enter__()
        thread.start()
        assert begun.wait(60)
        with pytest.raises(RuntimeError, match="no committed row"):
            block.__exit__(None, None, None)
        go_on.set()
        thread.join(60)
    assert cap.rows == 3
    assert_same_bits(cap["0:grad*ref"], x.grad * 3)
    torch.testing.assert_close(cap["0"], (x.grad * mask[..., None]).sum(1))
    torch.testing.assert_close(cap["1"], x.grad.sum(1))


def test_blocks_of_two_threads_are_refused(backend):
    setup = chain()
    with tlfast.capture(setup.model, "hook", rows=7, backend=backend) as cap:

        def beside():
            rule = "^batch: the block must be the only one that is open in a capture, got one beside that of another"
            with pytest.raises(RuntimeError, match=rule), cap.batch(ids="xyz"):
                pass

        with cap.batch(ids="abc"):
            in_threads(beside)
            in_threads(setup.loss().backward)
        in_threads(lambda: batch_of(cap, setup, "def"))
    assert cap.ids == [*"abcdef"]


def batch_of(cap, setup, ids):
    with cap.batch(ids=ids):
        setup.loss().backward()


def test_trap_28_a_busy_python_thread_beside(backend, attach):
    setup = chain()
    right = activation_gradients(setup)
    with (
        busy_python_thread(),
        tlfast.capture(setup.model, ["tanh", "hook"], rows=16, attach=attach, backend=backend) as cap,
    ):
        for _ in range(5):
            setup.loss().backward()
    for name in cap.names:
        assert_rows(cap, name, right[name][0].repeat(5, 1, 1))


def test_trap_27_and_28_no_python_runs_under_a_native_tap(backend, attach):
    setup, package = chain(), f"{os.path.dirname(tlfast.__file__)}{os.sep}"
    entered = []

    def profile(frame, event, arg):
        if event == "call" and frame.f_code.co_filename.startswith(package):
            entered.append(frame.f_code.co_name)

    with tlfast.capture(
        setup.model, ["linear", "tanh", "hook"], reduce="mean", rows=7, attach=attach, backend=backend
    ) as cap:
        setup.loss().backward()
        loss = setup.loss()
        sys.setprofile(profile)
        try:
            loss.backward()
        finally:
            sys.setprofile(None)
    assert cap.rows == 6
    if backend == "native":
        assert entered == []
    else:
        assert len(entered) >= 3, "the others do run Python, and the profiler sees it"


def test_a_failed_backward_beside_a_good_one_leaves_a_hole_that_is_not_counted(backend, attach):
    setup = chain()
    model, points = setup.model, ["tanh", "hook"]
    right = activation_gradients(Setup(model, points, setup.loss))
    other = inputs(2)
    right_other = activation_gradients(Setup(model, points, lambda: uneven(model(other))))

    def in_the_middle(grad):
        in_threads(lambda: uneven(model(other)).backward())  # reserves its rows behind those of the running backward
        raise ZeroDivisionError

    def fail_in_backward(module, args, output):
        if output.shape[0] == 3:
            output.register_hook(in_the_middle)

    with tlfast.capture(model, points, rows=12, attach=attach, backend=backend) as cap:
        handle = model.linear.register_forward_hook(fail_in_backward)
        with pytest.raises(ZeroDivisionError):
            setup.loss().backward()
        handle.remove()
        assert cap.rows == 2
        setup.loss().backward()
    assert cap.rows == 5
    for name in points:
        assert_same_bits(cap[name], torch.cat([right_other[name][0], right[name][0]]))


FIRST_CAPTURES = """
import sys, threading, torch, tlfast
sys.setswitchinterval(1e-6)
line, forms, rows = threading.Barrier(8), [], []

def work():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4)
    line.wait(60)
    for _ in range(3):
        with tlfast.capture(model, "0", rows=2, backend="native") as cap:
            y = model(x)
            forms.append(type(y.grad_fn).__name__)
            y.sum().backward()
        rows.append(cap["0"].tolist())

threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert rows == [[[1.0] * 4] * 2] * 24, rows
assert set(forms) == {"AddmmBackward0"}, forms
"""

FORWARD_IN_THE_PROBE = """
import sys, threading, torch, tlfast
from torch.nn.modules.module import register_module_forward_hook
model, x = torch.nn.Sequential(torch.nn.Linear(4, 4)), torch.ones(2, 4)
held, held_by_others = [], register_module_forward_hook(lambda *_: None)
first = tlfast.capture(model, "0", rows=4, backend="native").__enter__()  # with a global hook there, nothing is learnt
held_by_others.remove()

def forward():
    held.append(model(x))  # an output that others hold, while a probe runs
    held[0].sum().backward()

def in_the_probe(*args, **kwargs):
    if sys._getframe(1).f_code.co_name == "_learn_references" and not held:
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    return zeros(*args, **kwargs)

zeros, torch.zeros = torch.zeros, in_the_probe
other = torch.nn.Sequential(torch.nn.Linear(4, 4))
with tlfast.capture(other, "0", rows=4, backend="native") as second:
    y = other(x)
    assert type(y.grad_fn).__name__ == "AddmmBackward0", y.grad_fn
    y.sum().backward()
    assert len(held) == 1
assert first.rows == 2 and (first["0"] == 1).all(), first.rows
assert second.rows == 2
first.__exit__(None, None, None)
"""


@pytest.mark.parametrize("code", [FIRST_CAPTURES, FORWARD_IN_THE_PROBE], ids=["at once", "in the probe"])
def test_trap_27_what_a_probe_learns_is_no_matter_of_other_threads(native, code):
    done = run("-W", "error", "-c", code)
    assert done.returncode == 0, done.stderr
