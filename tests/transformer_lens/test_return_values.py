"""The seed's regression: what a backward hook may return, by version, and that tlfast is right on both sides."""

from __future__ import annotations

import pytest
import torch
from lens_models import MODELS, tokens

import tlfast.transformer_lens as lens
from tlfast.transformer_lens.compatibility import accepts, registered_hooks
from tlfast.transformer_lens.library import hook_point_type

POINTS = ("blocks.0.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.0.attn.hook_z")
RETURNED = {"None": lambda grad: None, "grad": lambda grad: grad, "(grad,)": lambda grad: (grad,)}
KIND = "hooked_transformer" if "hooked_transformer" in MODELS else "gpt2_bridge"
# What 2.0.0 to 2.2.1 did with a returned gradient: behind one operation with one input, the tuple passes for that
# operation's own gradients.
BROKEN = {("None", name): None for name in POINTS} | {("grad", name): TypeError for name in POINTS} | {
    ("(grad,)", "blocks.0.hook_resid_post"): RuntimeError, ("(grad,)", "blocks.0.attn.hook_z"): RuntimeError,
}  # fmt: skip


def parameter_gradients(model):
    model.zero_grad()
    model(tokens(), return_type="loss").backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def resolved(model, name):
    # A bridge's hook_z has a conversion, which takes no tuple in return.
    converts = getattr(model.hook_dict.get(name), "hook_conversion", None) is not None
    return "blocks.0.attn.hook_pattern" if converts else name


@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("returned", RETURNED)
def test_what_a_hook_may_return(returned, name):
    model = MODELS[KIND]()
    name = resolved(model, name)
    plain = parameter_gradients(model)
    model.add_hook(name, lambda grad, hook: RETURNED[returned](grad), dir="bwd")
    if registered_hooks() == "full":
        if accepts(returned):
            hooked = parameter_gradients(model)
            assert all(torch.equal(plain[key], hooked[key]) for key in plain)
        else:
            assert returned == "grad"  # of 2.2.2: its tensor is read as a tuple
            with pytest.raises(RuntimeError, match="invalid number of grad_input"):
                parameter_gradients(model)
    elif (returned, name) in BROKEN and BROKEN[returned, name] is None:
        hooked = parameter_gradients(model)
        assert all(torch.equal(plain[key], hooked[key]) for key in plain)
    elif (returned, name) in BROKEN:
        with pytest.raises(BROKEN[returned, name]):
            parameter_gradients(model)
    else:  # accepted, and silently something else
        hooked = parameter_gradients(model)
        assert not all(torch.equal(plain[key], hooked[key]) for key in plain)


@pytest.mark.parametrize("name", POINTS)
def test_captures_are_right_on_both_sides(name, backend):
    model = MODELS[KIND]()
    name = resolved(model, name)
    point, truth = model.hook_dict[name], []
    handle = point.register_full_backward_hook(lambda module, given, grads: truth.append(grads[0].clone()))
    with lens.capture(model, name, rows=2, backend=backend) as cap:
        model(tokens(), return_type="loss").backward()
    handle.remove()
    cached = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, names_filter=name)[1]
    convert = getattr(getattr(point, "hook_conversion", None), "convert", lambda grad: grad)
    assert torch.equal(cap[name], convert(truth[0]))
    assert torch.equal(cached[name + "_grad"], convert(truth[0]))


def test_the_warning_comes_where_it_is_due(recwarn):
    lens.install()
    lens.uninstall()
    said = [str(warning.message) for warning in recwarn if "tlfast.transformer_lens" in str(warning.message)]
    assert bool(said) == (registered_hooks() != "full")
    assert all("use TransformerLens 2.2.2 or newer" in text for text in said)


def test_deprecated_hooks_are_told_from_full_ones(monkeypatch):
    point = hook_point_type()
    monkeypatch.setattr(
        point, "register_full_backward_hook", lambda self, hook, prepend=False: self.register_backward_hook(hook),
        raising=False,
    )  # fmt: skip
    assert registered_hooks() == "deprecated"
    assert lens.check().startswith("deprecated backward hooks")
