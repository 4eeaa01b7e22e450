"""Points at the input of a module: the gradient through it alone, and what it was given."""

import pytest
import torch
from comparison import assert_same_bits
from models import HookPoint, inputs, uneven
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlfast
from tlfast import Spec

pytestmark = pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
AT_INPUT = [Spec("layer", of=of, side="input") for of in ("grad", "act", "grad*act")]
GRAD, ACT, PRODUCT = COLUMNS = ["layer:input", "layer:input:act", "layer:input:grad*act"]


class Branched(nn.Module):
    """The layer's input goes past it, too."""

    def __init__(self, layer=None):
        super().__init__()
        self.layer = nn.Linear(6, 6) if layer is None else layer

    def forward(self, x):
        hidden = torch.tanh(x)
        return self.layer(hidden) + 5 * hidden


def right(model, x):
    """The layer's input, and its gradient through the layer alone, by `torch.autograd.grad`."""
    hidden = torch.tanh(x).detach()
    alone = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(uneven(model.layer(alone) + 5 * hidden), alone)
    return grad, hidden


def rows_of(model, run, backend, specs=AT_INPUT, **options):
    with tlfast.capture(model, specs, rows=16, backend=backend, **options) as cap:
        run().backward()
    return cap


def test_through_the_module_alone(backend):
    model, x = Branched(), inputs()
    cap = rows_of(model, lambda: uneven(model(x)), backend)
    grad, act = right(model, x)
    assert cap.names == COLUMNS
    torch.testing.assert_close(cap[GRAD], grad)
    assert_same_bits(cap[ACT], act)
    torch.testing.assert_close(cap[PRODUCT], grad * act)


def test_as_pytorchs_full_hook(backend):
    model, x, seen = Branched(), inputs(), []
    with model.layer.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_input[0])):
        uneven(model(x)).backward()
    cap = rows_of(model, lambda: uneven(model(x)), backend)
    assert_same_bits(cap[GRAD], seen[0])


def test_both_sides_of_one_module(backend):
    model, x = Branched(), inputs()
    specs = [*AT_INPUT[:2], Spec("layer"), Spec("layer", "sum", of="act")]
    cap = rows_of(model, lambda: uneven(model(x)), backend, specs)
    assert cap.names == ["layer", "layer:act", "layer:input", "layer:input:act"]
    grad, act = right(model, x)
    torch.testing.assert_close(cap[GRAD], grad)
    torch.testing.assert_close(cap["layer"] @ model.layer.weight.detach(), cap[GRAD])
    torch.testing.assert_close(cap["layer:act"], model.layer(act).sum(1).detach())


def test_the_model_computes_the_same(backend):
    model, x = Branched(), inputs()
    plain = torch.autograd.grad(uneven(model(x)), [x, *model.parameters()])
    with tlfast.capture(model, AT_INPUT, rows=4, backend=backend):
        hooked = torch.autograd.grad(uneven(model(x)), [x, *model.parameters()])
    for a, b in zip(plain, hooked, strict=True):
        assert_same_bits(a, b)
    assert not model.layer._forward_pre_hooks
    assert not model.layer._forward_pre_hooks_with_kwargs


class Named(nn.Module):
    def forward(self, ids, *, hidden=None, scale=None):
        return hidden * scale


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Named()

    def forward(self, x):
        return self.layer(7, scale=x.exp(), hidden=x.tanh())


@pytest.mark.parametrize("which, right", [(None, torch.exp), ("hidden", torch.tanh), ("scale", torch.exp)])
def test_inputs_by_keyword(backend, which, right):
    model, x = Caller(), inputs()
    cap = rows_of(model, lambda: model(x).sum(), backend, [Spec("layer", of="act", side="input", output=which)])
    assert_same_bits(cap[ACT], right(x).detach())


def test_one_input_of_several(backend):
    class Two(nn.Module):
        def forward(self, ids, a, b):
            return a * b

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Two()

        def forward(self, x):
            return self.layer(3, x.exp(), x.tanh())

    model, x = Model(), inputs()
    for which, act, grad in (
        (None, x.exp(), x.tanh()),
        (1, x.exp(), x.tanh()),
        (2, x.tanh(), x.exp()),
        (-1, x.tanh(), x.exp()),
    ):
        specs = [Spec("layer", of=of, side="input", output=which) for of in ("grad", "act")]
        cap = rows_of(model, lambda: model(x).sum(), backend, specs)
        assert_same_bits(cap[ACT], act.detach())
        torch.testing.assert_close(cap[GRAD], grad.detach())


def test_a_module_that_changes_its_input_in_place(backend):
    """The gradient is that of what it was given; what it was given is gone."""
    model, x = Branched(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))), inputs()

    def loss():
        hidden = torch.tanh(x) + 0.0
        return uneven(model.layer(hidden))

    cap = rows_of(model, loss, backend, AT_INPUT[:1])
    alone = torch.tanh(x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(uneven(model.layer(alone + 0.0)), alone)
    assert_same_bits(cap[GRAD], grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows_of(model, loss, backend, AT_INPUT[1:2])


@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_several_calls(backend, calls):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    model, x, seen = Model(), inputs(), []
    with model.layer.register_full_backward_hook(lambda m, grad_input, grad_output: seen.append(grad_input[0])):
        uneven(model(x)).backward()
    second, first = seen
    cap = rows_of(model, lambda: uneven(model(x)), backend, AT_INPUT[:1], calls=calls)
    want = {"sum": first + second, "last": first, "stack": torch.stack([first, second], 1)}[calls]
    torch.testing.assert_close(cap[GRAD], want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(backend, reentrant):
    model, x = Branched(), inputs()
    cap = rows_of(model, lambda: uneven(checkpoint(model, x, use_reentrant=reentrant)), backend)
    grad, act = right(model, x)
    torch.testing.assert_close(cap[GRAD], grad)
    assert_same_bits(cap[ACT], act)


def test_errors_say_input(backend):
    class Wrong(nn.Module):
        def __init__(self, given):
            super().__init__()
            self.layer, self.given = HookPoint(), given

        def forward(self, x):
            self.layer(self.given)
            return x

    def run(given):
        model, x = Wrong(given), inputs()
        rows_of(model, lambda: model(x).sum(), backend)

    with pytest.raises(TypeError, match=r"^capture at layer: the input must hold a tensor, got tuple"):
        run("text")
    with pytest.raises(RuntimeError, match=r"^capture at layer: the input must require grad, got a tensor without a"):
        run(torch.ones(2))
    with pytest.raises(ValueError, match=r"^capture at layer: the input must be dense, got torch.sparse_coo"):
        run(torch.eye(2).to_sparse().requires_grad_())


def test_refusals():
    with pytest.raises(ValueError, match=r"^Spec: side must be one of output, input, got 'inside'"):
        Spec("0", side="inside")
    with pytest.raises(ValueError, match=r"got 'full' with of='grad', side='input'"):
        tlfast.capture(nn.Linear(2, 2), Spec("", side="input"), attach="full", rows=1)


def test_z_of_an_attention_and_the_hidden_layer_of_an_mlp(backend):
    """What needs a model's source edited elsewhere: the inputs of two output projections of GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, n_positions=8, vocab_size=17)).eval()
    tokens = torch.randint(17, (3, 6))
    points = "transformer.h.*.{}.c_proj"
    specs = [Spec(points.format(part), "sum", (1, 2), of="grad*act", side="input") for part in ("attn", "mlp")]
    with tlfast.freeze(model), tlfast.capture(model, specs, rows=3, backend=backend) as cap:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    kept = {}
    names = [f"transformer.h.{layer}.{part}.c_proj" for layer in (0, 1) for part in ("attn", "mlp")]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: kept.__setitem__(name, args[0]))
        for name in names
    ]
    loss = model(tokens, labels=tokens, use_cache=False).loss
    grads = torch.autograd.grad(loss, [kept[name] for name in names])
    for hook in hooks:
        hook.remove()
    for name, grad in zip(names, grads, strict=True):
        torch.testing.assert_close(cap[f"{name}:input:grad*act"], (grad * kept[name]).sum((1, 2)).detach())
