"""Traps 13, 21 and 30: copies of hooked models, frozen models, one process of a distributed run."""

import copy
import io
import os
import pickle

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Residual, Setup, activation_gradients, hooks_left, residual, tokens, uneven
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
def test_trap_13_a_copy_carries_no_capture(backend, attach, way):
    setup = residual()
    right = activation_gradients(setup)
    batch = tokens()
    with tlfast.capture(setup.model, setup.points, rows=8, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        twin = COPIES[way](setup.model)
        uneven(twin(batch)).backward()
        assert cap.rows == 3, "the copy wrote into the original's rows"
        with tlfast.capture(twin, setup.points, rows=8, attach=attach, backend=backend) as own:
            uneven(twin(batch)).backward()
        assert (cap.rows, own.rows) == (3, 3)
        setup.loss().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name][0].repeat(2, 1, 1))
    assert not hooks_left(setup.model)
    right = activation_gradients(Setup(twin, setup.points, lambda: uneven(twin(batch))))
    for name in setup.points:
        assert_rows(own, name, right[name][0])


def test_trap_13_a_capture_itself_can_not_be_copied_by_accident(backend):
    setup = residual()
    with tlfast.capture(setup.model, "unembed", rows=8, backend=backend) as cap:
        setup.model.capture = cap  # kept by the model: its copy must be one without a capture, or an error
        try:
            twin = copy.deepcopy(setup.model)
        except (TypeError, RuntimeError):
            pass
        else:
            uneven(twin(tokens())).backward()
        del setup.model.capture
        assert cap.rows == 0
        setup.loss().backward()
    assert cap.rows == 3


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_21_nothing_can_fire_in_a_frozen_model(backend, attach):
    model = Residual().requires_grad_(False)
    with tlfast.capture(model, ["hook_embed", "unembed"], rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(RuntimeError) as error:
            model(tokens())
        assert cap.rows == 0
    assert str(error.value) == (
        "capture at hook_embed: the output must require grad, got a tensor without a graph: no gradient can reach it. "
        'Use freeze(model) to start the graph at the embedding, or pass missing="nan".'
    )


@pytest.mark.parametrize("name", ["residual", "gpt2"])
def test_trap_21_freeze_gives_the_same_rows_and_no_parameter_gradient(backend, attach, name):
    setup = SETUPS[name]()
    with tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    setup.model.zero_grad()
    for frozen_first in (True, False):
        outer = tlfast.freeze(setup.model)
        inner = tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend)
        first, second = (outer, inner) if frozen_first else (inner, outer)
        with first, second:
            setup.loss().backward()
        for point in setup.points:
            assert_rows(inner, point, cap[point])
        assert all(p.grad is None and p.requires_grad for p in setup.model.parameters())
    assert not hooks_left(setup.model)


class CountProducts(TorchDispatchMode):
    """Counts matrix products, and notes their shapes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_trap_21_no_weight_gradient_is_computed(backend, attach, tied):
    model, batch = Residual(n_tokens=37), tokens(5, 4, 37)  # 20 positions: no size of a weight
    if tied:
        model.unembed.weight = model.embed.weight
    products = {}
    for frozen in (False, True):
        context = tlfast.freeze(model) if frozen else torch.enable_grad()
        with context, tlfast.capture(model, "blocks.*", rows=6, attach=attach, backend=backend):
            loss = uneven(model(batch))
            with CountProducts() as count:
                loss.backward()
        products[frozen] = count.shapes
        model.zero_grad()
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    assert [s for s in products[False] if s in weights], "without freeze there are weight gradients to be seen"
    assert not [s for s in products[True] if s in weights]
    assert len(products[True]) == len(products[False]) // 2


@pytest.fixture
def one_process():
    """A gloo group of this process alone."""
    from torch import distributed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [True, False])
def test_trap_30_ddp_rows_are_those_of_the_model(backend, attach, one_process, inside):
    setup = residual()
    right = activation_gradients(setup)
    model = nn.parallel.DistributedDataParallel(setup.model)
    target, prefix = (setup.model, "") if inside else (model, "module.")
    points = [prefix + name for name in setup.points]
    with tlfast.capture(target, points, rows=8, attach=attach, backend=backend) as cap:
        for _ in range(2):
            uneven(model(setup.batch)).backward()
    for name in setup.points:
        assert_rows(cap, prefix + name, right[name][0].repeat(2, 1, 1))
    grads = [p.grad.clone() for p in setup.model.parameters()]
    setup.model.zero_grad()
    setup.loss().backward()
    setup.loss().backward()
    for p, grad in zip(setup.model.parameters(), grads, strict=True):
        assert_same_bits(p.grad, grad)
