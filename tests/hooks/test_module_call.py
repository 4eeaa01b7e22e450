"""A module with one tap and no other hook is called natively, and in PyTorch's own way as soon as there is one."""

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module

import tlfast
from tlfast.hooks import attachment

pytestmark = [
    pytest.mark.usefixtures("native"),
    pytest.mark.filterwarnings("ignore:capture. no backward reached the points"),
]
CALL = "_compiled_call_impl"


class Scale(nn.Module):
    """A module with a fresh output, and what a test wants to do while it runs."""

    def __init__(self):
        super().__init__()
        self.weight, self.inside = nn.Parameter(torch.tensor([1.0, 2.0, 3.0])), None

    def forward(self, x, factor=1.0):
        if self.inside is not None:
            self.inside(self)
        return x * self.weight * factor


class Model(nn.Module):
    def __init__(self, point):
        super().__init__()
        self.point = point

    def forward(self, x):
        return self.point(x, factor=3.0)


def captured(model, **options):
    return tlfast.capture(model, "point", rows=64, backend="native", **options)


def step(model, x=None):
    """The output, without its history, and what the gradient at the point is by hand."""
    given = torch.ones(2, 3) if x is None else x
    output = model(given)
    (output * output).sum().backward()
    return output.detach()


def frames_of(call):
    """The names of the functions of torch/nn/modules/module.py that run in a call, each time one is entered."""
    seen = []

    def look(frame, event, _):
        if event == "call" and frame.f_code.co_filename == torch_module.__file__:
            seen.append(frame.f_code.co_name)

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def is_native(model):
    """Whether the point is called past PyTorch's path of hooks, in a step of the model."""
    return frames_of(lambda: model.point(torch.ones(2, 3))).count("inner") == 0


@pytest.fixture
def model():
    return Model(Scale())


def test_the_call_is_native_and_leaves_nothing(model):
    before, plain = list(vars(model.point)), step(model)
    with captured(model) as cap:
        assert isinstance(vars(model.point)[CALL], attachment.ModuleCall)
        assert is_native(model)
        assert torch.equal(step(model), plain)
    assert torch.equal(cap["point"], 2 * plain)
    assert list(vars(model.point)) == before


def add_forward(point):
    return point.register_forward_hook(lambda module, args, output: 2 * output)


def add_prepended(point):
    return point.register_forward_hook(lambda module, args, output: 2 * output, prepend=True)


def add_pre(point):
    return point.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def add_full(point):
    return point.register_full_backward_hook(lambda module, grad_input, grad_output: None)


def add_full_pre(point):
    return point.register_full_backward_pre_hook(lambda module, grad_output: (2 * grad_output[0],))


def add_global_forward(point):
    return torch_module.register_module_forward_hook(
        lambda module, args, output: 2 * output if module is point else None
    )


def add_global_pre(point):
    return torch_module.register_module_forward_pre_hook(
        lambda module, args: (2 * args[0],) if module is point else None
    )


def add_global_full(point):
    return torch_module.register_module_full_backward_hook(lambda module, grad_input, grad_output: None)


class _Undo:
    def __init__(self, remove):
        self.remove = remove


def own_call_impl(point):
    point._call_impl = lambda *args, **kwargs: 2 * nn.Module._call_impl(point, *args, **kwargs)
    return _Undo(lambda: delattr(point, "_call_impl"))


def patched_call_impl(point):
    plain = nn.Module._call_impl

    def doubling(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        return 2 * output if self is point else output

    nn.Module._call_impl = doubling
    return _Undo(lambda: setattr(nn.Module, "_call_impl", plain))


def own_forward(point):
    point.forward = lambda x, factor: 2 * type(point).forward(point, x, factor)
    return _Undo(lambda: delattr(point, "forward"))


OTHERS = [add_forward, add_prepended, add_pre, add_full, add_full_pre, add_global_forward, add_global_pre,
          add_global_full, own_call_impl, patched_call_impl, own_forward]  # fmt: skip


@pytest.mark.parametrize("add", OTHERS, ids=lambda add: add.__name__)
@pytest.mark.parametrize("when", ["before", "inside"])
def test_what_others_add_is_called_as_without_us(model, monkeypatch, add, when):
    def run(x):
        handles = [add(model.point)] if when == "before" else []
        with captured(model) as cap:
            handles = handles or [add(model.point)]
            outputs = [step(model, x)]
            handles.pop().remove()
            outputs.append(step(model, x))
            assert is_native(model) == (attachment.call_natively is call_natively)
        return cap["point"], outputs, x.grad

    call_natively = attachment.call_natively
    ours = run(torch.ones(2, 3, requires_grad=True))
    monkeypatch.setattr(attachment, "call_natively", lambda *_: [])
    theirs = run(torch.ones(2, 3, requires_grad=True))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[0][2:], 2 * ours[1][1])
    assert all(map(torch.equal, ours[1], theirs[1]))
    assert torch.equal(ours[2], theirs[2])


def test_a_hook_that_is_gone_is_not_called(model):
    with captured(model, missing="nan") as cap:
        model.point._forward_hooks.clear()
        assert not is_native(model)
        step(model)
    assert cap.rows == 0


def test_hooks_that_are_registered_while_the_module_runs(model):
    order = []

    def inside(point):
        handles.append(point.register_forward_hook(lambda *_: order.append("plain")))
        handles.append(point.register_forward_hook(lambda *_, **__: order.append("named"), with_kwargs=True))
        handles.append(point.register_forward_hook(lambda module, args, output: 2 * output))

    handles, plain = [], step(model)
    with captured(model) as cap:
        model.point.inside = inside
        assert torch.equal(step(model), 2 * plain)
        model.point.inside = None
        assert order == ["plain", "named"]
        for handle in handles:
            handle.remove()
        assert torch.equal(step(model), plain)
    # Ours was the last when the module was entered: it sees what was there then, as in PyTorch's own way.
    assert torch.equal(cap["point"], torch.cat([8 * plain, 2 * plain]))


@pytest.mark.parametrize("fails_too", [False, True])
def test_an_error_in_the_module_calls_what_is_always_called(model, fails_too):
    seen = []

    def always(module, args, output):
        seen.append(output)
        if fails_too:
            raise KeyError("in the hook")

    def inside(point):
        point.register_forward_hook(always, always_call=True)
        raise ZeroDivisionError("in the module")

    with captured(model):
        model.point.inside = inside
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with pytest.raises(ZeroDivisionError, match="in the module"):
                model(torch.ones(2, 3))
    assert seen == [None]
    assert len(told) == fails_too


def test_an_error_leaves_the_next_step_right(model):
    def fails(point):
        raise ZeroDivisionError

    plain = step(model)
    with captured(model) as cap:
        for _ in range(3):
            model.point.inside = fails
            with pytest.raises(ZeroDivisionError):
                model(torch.ones(2, 3))
            with pytest.raises(TypeError, match="unknown"):
                model.point(torch.ones(2, 3), unknown=1)
            model.point.inside = None
            with pytest.raises(RuntimeError, match="the output must require grad"):
                model.requires_grad_(False)(torch.ones(2, 3))
            model.requires_grad_(True)
            assert torch.equal(step(model), plain)
    assert torch.equal(cap["point"], torch.cat([2 * plain] * 3))


class OwnState(Scale):
    def __getstate__(self):
        return self.__dict__.copy()


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda point: pickle.loads(pickle.dumps(point)),
    "replica": lambda point: point._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [Scale, OwnState])
def test_a_copy_runs_its_own_forward(kind, make):
    model = Model(kind())
    with captured(model) as cap:
        other = make(model.point)
        own = nn.Parameter(torch.full((3,), 5.0))
        other.__dict__["_parameters"] = {"weight": own}
        output = other(torch.ones(2, 3), factor=2.0)
        assert torch.equal(output, torch.full((2, 3), 10.0))
        plain = step(model)
        assert torch.equal(plain, 3 * torch.ones(2, 3) * model.point.weight)
    assert torch.equal(cap["point"][-2:], 2 * plain)
    assert torch.equal(other(torch.ones(2, 3)), torch.full((2, 3), 5.0))


def test_a_compiled_call_of_somebody_stays(model):
    before = lambda *args, **kwargs: model.point._call_impl(*args, **kwargs)  # noqa: E731
    inside = lambda *args, **kwargs: model.point._call_impl(*args, **kwargs)  # noqa: E731
    plain = step(model)
    with captured(model) as cap:
        model.point._compiled_call_impl = inside
        step(model)
    assert vars(model.point)[CALL] is inside
    del model.point._compiled_call_impl
    model.point.__dict__[CALL] = before
    handles = attachment.call_natively(model.point, attachment.Hook(None), None, None)
    assert handles == []
    assert vars(model.point)[CALL] is before
    assert torch.equal(cap["point"], 2 * plain)


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_captures_of_one_module(model, first_out):
    plain = step(model)
    caps = [captured(model), captured(model)]
    for cap in caps:
        cap.__enter__()
    step(model)
    caps[first_out].__exit__(None, None, None)
    step(model)
    caps[1 - first_out].__exit__(None, None, None)
    assert CALL not in vars(model.point)
    assert [cap.rows for cap in caps] == ([2, 4] if first_out == 0 else [4, 2])
    for cap in caps:
        assert torch.equal(cap["point"][:2], 2 * plain)


def test_nothing_is_left_of_it(model):
    with captured(model):
        step(model)
        held = [weakref.ref(model.point), weakref.ref(vars(model.point)[CALL])]
    gc.collect()
    assert held[1]() is None
    del model
    gc.collect()


def test_a_model_that_goes_inside_is_free():
    model = Model(Scale())
    point = weakref.ref(model.point)
    with captured(model) as cap:
        step(model)
        del cap._model, cap._taps
        del model
        gc.collect()
        assert point() is None


def test_steps_leave_no_objects(model):
    with captured(model) as cap:
        for round_number in range(4):
            for _ in range(50):
                step(model)
                cap.clear()
            gc.collect()
            if round_number == 1:
                before = len(gc.get_objects()), sys.getrefcount(vars(model.point)[CALL])
        after = len(gc.get_objects()), sys.getrefcount(vars(model.point)[CALL])
    assert after[0] - before[0] < 20
    assert after[1] == before[1]


def test_threads_have_rows_of_their_own(model):
    weights = model.point.weight.detach()
    failed = []

    def run(number):
        try:
            for _ in range(20):
                step(model, torch.full((1, 3), float(number)))
        except BaseException as error:
            failed.append(error)

    with captured(model) as cap:
        threads = [threading.Thread(target=run, args=(number,)) for number in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed
    assert sorted(cap["point"][:, 0].tolist()) == sorted([6.0 * weights[0].item() * n for n in (1, 2, 3)] * 20)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_traced_as_without_us(model):
    with captured(model, missing="nan"):
        frames = frames_of(lambda: torch.jit.trace(model, torch.ones(2, 3), check_trace=False))
    assert "_slow_forward" in frames


def test_called_by_hand(model):
    with captured(model):
        call = vars(model.point)[CALL]
        assert torch.equal(call(torch.ones(2, 3), factor=3.0), step(model))
        del call.native
        with pytest.raises(AttributeError, match="native"):
            model(torch.ones(2, 3))
        call.native = 1
        with pytest.raises(TypeError, match="a module's call must have a native one, got int"):
            model(torch.ones(2, 3))
