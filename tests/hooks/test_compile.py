"""Capture inside torch.compile: no graph break, the rows of the eager model, and traps 24 to 26."""

import pytest
import torch
from backends import usable
from comparison import assert_captured, assert_rows, assert_same_bits
from models import Pair, Repeated, Setup, activation_gradients, chain, inputs, residual, uneven
from torch import nn

import tlfast

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit, in torch's own imports
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # of Dynamo itself
]
NO_ROWS = "ignore:capture. no backward reached the points"


@pytest.fixture(params=["python", "native"])
def backend(request):
    """Without the mark of the sanitizer run: compilers are too much for it."""
    return usable(request.param)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(compile_threads=1):  # no pool of processes that outlives the test
        yield
    torch._dynamo.reset()


def compiled_rows(setup, compiler, backend, steps=2, **options):
    """Capture a compiled model over some steps; the points' names don't change."""
    with tlfast.capture(setup.model, setup.points, rows=20, backend=backend, **options) as cap:
        step = torch.compile(setup.loss, backend=compiler, fullgraph=True)
        for _ in range(steps):
            step().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    return cap


def test_trap_26_inductor_without_a_graph_break(backend):
    setup = chain()
    setup.points = ["linear", "tanh", "hook"]
    right = activation_gradients(setup)
    cap = compiled_rows(setup, "inductor", backend)
    assert cap.rows == 6
    for name in setup.points:
        torch.testing.assert_close(cap[name], right[name][0].repeat(2, 1, 1), rtol=1e-5, atol=1e-6)
        assert cap._columns[name].rows[6:].isnan().all()


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("make", [residual, chain])
def test_trap_26_rows_are_those_of_the_eager_model(backend, compiler, make):
    setup = make()
    setup.points = [name for name in setup.points if name]  # what is compiled is called from outside of the root
    right = activation_gradients(setup)
    cap = compiled_rows(setup, compiler, backend)
    for name in setup.points:
        torch.testing.assert_close(cap[name], right[name][0].repeat(2, 1, 1), rtol=1e-5, atol=1e-6)


def test_trap_26_reductions_masks_and_outputs(backend):
    model, x = nn.Sequential(Pair()), inputs()
    setup = Setup(model, ["0"], lambda: sum(uneven(y) for y in model(x)[1:]), output=2)
    right = activation_gradients(setup)["0"][0]
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    with tlfast.capture(model, "0", reduce="mean", dtype=torch.bfloat16, output=2, rows=8, backend=backend) as cap:
        step = torch.compile(setup.loss, backend="aot_eager", fullgraph=True)
        with cap.batch(mask=mask, ids="abc"):
            step().backward()
        step().backward()
    assert cap.ids == [*"abc", None, None, None]
    assert_captured(cap["0"][:3], right, "mean", (1,), mask)
    assert_captured(cap["0"][3:], right, "mean", (1,))


@pytest.mark.parametrize("calls", ["raise", "sum", "stack", "last"])
def test_trap_06_a_module_called_several_times_in_compiled_code(backend, calls):
    model, x = Repeated(3), inputs()
    setup = Setup(model, ["hook"], lambda: uneven(model(x)))
    grads = activation_gradients(setup)["hook"]
    if calls == "raise":
        with pytest.raises(RuntimeError, match="capture at hook: a point must fire once in a backward, got a second"):
            compiled_rows(setup, "aot_eager", backend)
        return
    cap = compiled_rows(setup, "aot_eager", backend, calls=calls)
    want = {"sum": (grads[2] + grads[1]) + grads[0], "stack": torch.stack(grads, 1), "last": grads[0]}[calls]
    torch.testing.assert_close(cap["hook"], torch.cat([want, want]), rtol=1e-5, atol=1e-6)


def test_after_the_capture_compiled_code_writes_nothing(backend):
    setup = chain()
    setup.points = ["tanh", "hook"]
    with tlfast.capture(setup.model, setup.points, rows=4, backend=backend) as cap:
        step = torch.compile(setup.loss, backend="aot_eager", fullgraph=True)
        step().backward()
    before = {name: cap._columns[name].rows.clone() for name in cap.names}
    step().backward()
    assert cap.rows == 3
    for name in cap.names:
        assert_same_bits(cap._columns[name].rows, before[name])
    del cap
    step().backward()  # its taps are gone altogether


def test_a_point_that_did_not_fire_in_compiled_code(backend):
    model, x = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}), inputs()
    with tlfast.capture(model, ["a", "b"], rows=4, backend=backend) as cap:
        step = torch.compile(
            lambda: uneven(model["a"](x) + model["b"](x).detach()), backend="aot_eager", fullgraph=True
        )
        with pytest.raises(RuntimeError, match="got no gradient at b"):
            step().backward()
        uneven(model["a"](x) + model["b"](x)).backward()
    assert cap.rows == 3


def test_compiled_submodules_of_one_class(backend):
    setup = residual()
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, setup.points, rows=8, backend=backend) as cap:
        for block in setup.model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        for _ in range(2):
            setup.loss().backward()
    for name in setup.points:
        torch.testing.assert_close(cap[name], right[name][0].repeat(2, 1, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("guarded", [True, False])
def test_compiled_submodules_that_share_code_without_hooks(backend, guarded):
    # The second block runs the code of the first, which has no hook inside: found, never missed in silence.
    setup = residual()
    with (
        torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded),
        tlfast.capture(setup.model, ["blocks.1", "blocks.1.hook_resid_post"], rows=4, backend=backend) as cap,
    ):
        for block in setup.model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        if guarded:
            setup.loss().backward()
        else:
            with pytest.raises(
                RuntimeError,
                match=r"got no call of blocks\.1\.hook_resid_post since .* \(none is seen in compiled code\)",
            ):
                setup.loss().backward()
            torch._dynamo.reset()
            setup.model.blocks[0]._compiled_call_impl = None
            setup.loss().backward()
    assert cap.rows == 3


def test_compiled_code_without_hooks_is_named_in_the_warning(backend):
    setup = residual()
    for block in setup.model.blocks:
        block.compile(backend="eager", fullgraph=True)
    cap = tlfast.capture(setup.model, "blocks.1.hook_resid_post", rows=4, backend=backend)
    cap.__enter__()
    setup.loss().backward()
    with pytest.warns(UserWarning, match=r"torch\._dynamo\.config\.skip_nnmodule_hook_guards = False"):
        cap.__exit__(None, None, None)
    assert cap.rows == 0


COMPILED = {
    "model": lambda model: torch.compile(model, backend="eager"),
    "function": lambda model: torch.compile(lambda x: model(x), backend="eager"),
    "method": lambda model: model.compile(backend="eager") or model,
}


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("library", [True, False], ids=["nn.Sequential", "own class"])
def test_trap_24_compiled_before_the_capture(backend, attach, way, library):
    x = inputs()
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh()) if library else chain().model
    point = "0" if library else "linear"
    run = COMPILED[way](model)
    run(x)

    def captured():
        with tlfast.capture(model, point, rows=4, attach=attach, backend=backend) as cap:
            uneven(run(x)).backward()
        return cap

    if library and way == "method":  # PyTorch leaves the loop over such a container to Python: the hooks are called
        assert captured().rows == 3
        return
    with pytest.raises(RuntimeError, match="capture: a compiled model must be captured before its first call") as error:
        captured()
    assert "torch._dynamo.reset()" in str(error.value)
    torch._dynamo.reset()
    assert captured().rows == 3


def test_trap_24_a_wrapped_model_before_the_capture(backend):
    model, x = chain().model, inputs()
    wrapped = torch.compile(model, backend="eager")
    wrapped(x)
    with (
        pytest.raises(RuntimeError, match="a compiled model must be captured before its first call"),
        tlfast.capture(wrapped, "_orig_mod.linear", rows=4, backend=backend),
    ):
        uneven(wrapped(x)).backward()


@pytest.mark.filterwarnings(NO_ROWS)
def test_full_hooks_break_the_graph(backend):
    setup = chain()
    setup.points = ["tanh", "hook"]
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, setup.points, rows=4, attach="full", backend=backend) as cap:
        whole = torch.compile(setup.loss, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="backwards hooks require compiled autograd"):
            whole()
        torch.compile(setup.loss, backend="eager")().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name][0])


@pytest.mark.filterwarnings(NO_ROWS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_trap_25_compiled_autograd_is_refused(backend, attach, compiler):
    setup = chain()
    with tlfast.capture(setup.model, ["tanh", "hook"], rows=4, attach=attach, backend=backend) as cap:
        loss = setup.loss()
        with (
            pytest.raises(RuntimeError, match="the backward must run in the eager engine, got compiled autograd"),
            torch._dynamo.compiled_autograd._enable(torch.compile(backend=compiler)),
        ):
            loss.backward()
        assert cap.rows == 0


def test_opcheck_of_the_firing_op(backend):
    op = torch.ops.tlfast.fire.default if backend == "native" else torch.ops.tlfast_python.fire.default
    torch.library.opcheck(op, (torch.zeros(1), torch.randn(2, 3), 10**9))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_activations_and_products_in_compiled_code(backend, compiler):
    """What is kept for the backward is an output of the compiled forward, as what any formula needs."""
    setup = chain()
    right = activation_gradients(setup)
    acts = {}
    hooks = [
        setup.model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: acts.__setitem__(name, out.detach().clone())
        )
        for name in ("linear", "tanh")
    ]
    setup.loss()
    for hook in hooks:
        hook.remove()
    setup.points = [tlfast.Spec(["linear", "tanh"], of=of) for of in ("grad", "act", "grad*act")]
    cap = compiled_rows(setup, compiler, backend)
    for name, act in acts.items():
        torch.testing.assert_close(cap[f"{name}:act"], act.repeat(2, 1, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(cap[name], right[name][0].repeat(2, 1, 1), rtol=1e-5, atol=1e-6)
        want = (right[name][0] * act).repeat(2, 1, 1)
        torch.testing.assert_close(cap[f"{name}:grad*act"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_inputs_in_compiled_code(backend, compiler):
    setup = chain()
    specs = [tlfast.Spec("tanh", of=of, side="input") for of in ("grad", "act", "grad*act")]
    right = activation_gradients(Setup(setup.model, ["linear"], setup.loss))["linear"][0]
    kept = []
    with setup.model.tanh.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach().clone())):
        setup.loss()
    setup.points = specs
    cap = compiled_rows(setup, compiler, backend)
    for name, want in (("input", right), ("input:act", kept[0]), ("input:grad*act", right * kept[0])):
        torch.testing.assert_close(cap[f"tanh:{name}"], want.repeat(2, 1, 1), rtol=1e-5, atol=1e-6)


def test_heads_positions_and_refs_in_compiled_code(backend):
    """They are read where the tap fires: nothing of them is in a graph."""
    setup, ref = chain(), torch.linspace(-1, 1, 6)
    right = activation_gradients(setup)["linear"][0]
    p = right.shape[1]
    mask, where = torch.arange(p).flip(0) < torch.tensor([p, 2, 1])[:, None], torch.tensor([0, 1, -1])
    specs = [tlfast.Spec("linear", "sum", -1, of="grad*ref", heads=(2, 3)), tlfast.Spec("linear", at="where")]
    with tlfast.capture(setup.model, specs, rows=20, backend=backend) as cap:
        step = torch.compile(setup.loss, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            with cap.batch(mask, refs={"linear": ref}, at={"where": where}):
                step().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    products = (right * ref * mask[..., None]).unflatten(-1, (2, 3)).sum(-1).repeat(2, 1, 1)
    torch.testing.assert_close(cap["linear:grad*ref"], products, rtol=1e-5, atol=1e-6)
    at = torch.stack([right[0, 0], right[1, p - 1], right[2, p - 1]]).repeat(2, 1)
    torch.testing.assert_close(cap["linear"], at, rtol=1e-5, atol=1e-6)
