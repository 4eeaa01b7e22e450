"""Bit for bit what TransformerLens' own run_with_cache(incl_bwd=True) gives, over all points; finite differences."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lens_models import CACHING, called_several_times, root_module, state, tokens

import tlfast.transformer_lens as lens
from tlfast.transformer_lens.library import hook_point_type


@pytest.fixture(params=CACHING)
def model(request):
    """Each kind of model whose own cache has gradients to compare with."""
    return CACHING[request.param]()


def theirs(model, *args, **kwargs):
    model.zero_grad()
    out, cache = model.run_with_cache(*args, incl_bwd=True, **kwargs)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), dict(cache.items()), grads


def ours(model, *args, **kwargs):
    model.zero_grad()
    out, cache = lens.run_with_cache(model, *args, incl_bwd=True, **kwargs)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), dict(cache.items()), grads


def differing(first, second):
    assert list(first) == list(second)
    return [name for name in first if not torch.equal(first[name], second[name])]


@pytest.mark.parametrize("params", [False, True])
def test_all_points_are_equal(model, backend, params):
    given = tokens()
    loss, cache, grads = theirs(model, given, return_type="loss")
    before = state(model)
    our_loss, our_cache, our_grads = ours(
        model, given, return_type="loss", calls="last", params=params, backend=backend
    )
    assert torch.equal(loss, our_loss)
    assert sum(name.endswith("_grad") for name in cache) >= 30
    assert differing(cache, our_cache) == []
    assert differing(grads, our_grads if params else grads) == []
    assert params or our_grads == {}
    assert state(model) == before


def test_the_default_differs_where_a_point_is_called_several_times(model, backend):
    given = tokens()
    _, cache, _ = theirs(model, given, return_type="loss")
    _, our_cache, _ = ours(model, given, return_type="loss", backend=backend)
    wrong = differing(cache, our_cache)
    several = [name for name in cache if name.endswith("_grad") and called_several_times(name.removesuffix("_grad"))]
    hooked = not hasattr(model, "compatibility_mode")
    assert wrong == (several if hooked else [])


def test_a_comparison_can_fail(model):
    _, cache, _ = theirs(model, tokens(), return_type="loss")
    name = next(name for name in cache if name.endswith("hook_resid_post_grad"))
    assert differing(cache, {**cache, name: cache[name] * 2}) == [name]


def test_a_root_module_is_equal(backend):
    model, x = root_module(), torch.randn(2, 3, 16)
    loss, cache, grads = theirs(model, x)
    our_loss, our_cache, our_grads = ours(model, x, calls="last", params=True, backend=backend)
    assert torch.equal(loss, our_loss)
    assert differing(cache, our_cache) == differing(grads, our_grads) == []
    summed = ours(model, x, backend=backend)[1]
    assert differing(cache, summed) == ["hook_twice_grad"]


def test_a_point_that_another_calls_in_a_hook_has_its_gradient_first(backend):
    model, x = root_module(), torch.randn(2, 3, 16)
    model.hook_inner, model.hook_innermost = hook_point_type()(), hook_point_type()()
    model.setup()
    model.hook_in.add_hook(lambda value, hook: model.hook_inner(value) * 1, is_permanent=True)
    model.hook_inner.add_hook(lambda value, hook: model.hook_innermost(value), is_permanent=True)
    _, cache, _ = theirs(model, x)
    assert [name for name in cache if "_in" in name and "_grad" in name] == [
        "hook_innermost_grad", "hook_inner_grad", "hook_in_grad",
    ]  # fmt: skip
    for params in (True, False):
        assert differing(cache, ours(model, x, calls="last", params=params, backend=backend)[1]) == []


def calling(first, last):
    """A root module: ``first`` gives two tensors to a point, ``last`` makes one of what comes out."""
    model = root_module()

    def forward(x):
        inner = model.hook_in(model.layer(x))
        outer = last(*first(model.hook_twice, inner, inner * 2))
        return model.hook_out(outer.tanh()).square().sum()

    model.forward = forward
    return model


def as_tuple(point, one, other):
    return point((one, other))


def by_keyword(point, one, other):
    return point(x=one), other


class NoGradient(torch.autograd.Function):
    """The sum of two, whose first has no gradient, not even zeros."""

    @staticmethod
    def forward(ctx, one, other):
        return one + other

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def hooked_by_pytorch(model, x):
    """The gradients of full backward hooks at the points, those of the parameters, and the warnings."""
    cache, handles = {}, []
    for name, point in model.hook_dict.items():

        def keep(module, grad_input, grad_output, name=name):
            if grad_output[0] is not None:
                cache[f"{name}_grad"] = grad_output[0]

        handles.append(point.register_full_backward_hook(keep))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        model(x).backward()
    for handle in handles:
        handle.remove()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return cache, grads, [str(one.message) for one in warned]


@pytest.mark.parametrize("params", [True, False])
@pytest.mark.parametrize(
    "first, last, fires, warns",
    [
        (by_keyword, lambda one, other: one, True, True),
        (as_tuple, lambda one, other: one, True, True),
        (as_tuple, lambda one, other: one * other, True, True),
        (as_tuple, lambda one, other: other, False, True),
        (as_tuple, lambda one, other: one.detach() * other, False, True),
        (lambda point, one, other: (point(one), other), NoGradient.apply, False, False),
        (lambda point, one, other: (point(one), other), lambda one, other: one * other, True, False),
    ],
)
def test_what_a_point_is_given_decides_where_it_fires(backend, params, first, last, fires, warns):
    """In a tuple, by keyword, or as itself; PyTorch warns where a full backward hook fires at the output."""
    model, x = calling(first, last), torch.randn(2, 3, 16)
    expected, grads, warned = hooked_by_pytorch(model, x)
    assert (len(warned), "hook_twice_grad" in expected) == (warns, fires)
    with warnings.catch_warnings(record=True) as ours_warned:
        warnings.simplefilter("always")
        _, cache, our_grads = ours(model, x, calls="last", params=params, backend=backend)
    assert [str(one.message) for one in ours_warned] == warned
    assert differing(expected, {name: kept for name, kept in cache.items() if name.endswith("_grad")}) == []
    assert differing(grads, our_grads if params else grads) == []


def test_caching_hooks_warn_as_full_backward_hooks_do():
    model, x = calling(by_keyword, torch.add), torch.randn(2, 3, 16)
    found = []
    for context in (nullcontext, partial(lens.accelerate, model)):
        with context(), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            cache = model.add_caching_hooks(incl_bwd=True)
            model(x).backward()
            model.reset_hooks()
        found.append((cache, [(str(one.message), one.filename, one.lineno) for one in warned]))
    (theirs_cache, theirs_warned), (our_cache, our_warned) = found
    assert len(theirs_warned) == 1
    assert our_warned == theirs_warned
    assert differing(theirs_cache, our_cache) == []


@pytest.mark.parametrize("name", ["blocks.0.ln1.hook_normalized", "blocks.1.ln1.hook_scale", "blocks.1.hook_resid_pre"])
def test_the_default_agrees_with_finite_differences(model, backend, name):
    if name not in model.hook_dict:
        name = "blocks.0.hook_in"
    model = model.double()
    model.cfg.dtype = torch.float64  # to which norms and attention cast
    given = tokens(batch=1)
    grad = ours(model, given, return_type="loss", names_filter=name, backend=backend)[1][name + "_grad"]
    step = torch.randn(grad.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(size):
        def patch(value, hook):
            return value + size * step

        # A backward hook lets a bridge's norm take the path on which a patch goes through.
        with model.hooks(fwd_hooks=[(name, patch)], bwd_hooks=[(name, lambda grad, hook: None)]):
            return model(given, return_type="loss").item()

    # Central differences of size h err by h^2 of the third derivative, and by eps / h of rounding.
    size = 1e-5
    slope = (loss(size) - loss(-size)) / (2 * size)
    assert slope == pytest.approx((grad * step).sum().item(), rel=1e-5, abs=1e-8)


def test_a_subset_alone_has_the_same_gradients_and_no_parameter_gradient(model):
    given = tokens()
    name = "blocks.1.hook_resid_post"
    _, cache, _ = theirs(model, given, return_type="loss", names_filter=name)
    _, our_cache, our_grads = ours(model, given, return_type="loss", names_filter=name)
    assert differing(cache, our_cache) == []
    assert our_grads == {}


@pytest.mark.parametrize("pos_slice", [-1, (1, 4), [0, 2]])
def test_a_slice_is_theirs_and_frees_the_rest(model, pos_slice):
    given = tokens()
    _, cache, _ = theirs(model, given, return_type="loss", pos_slice=pos_slice)
    _, our_cache, _ = ours(model, given, return_type="loss", pos_slice=pos_slice, calls="last")
    assert differing(cache, our_cache) == []
    held = our_cache["blocks.0.hook_resid_post_grad"]
    assert held.untyped_storage().nbytes() == held.nbytes


def test_dtype_device_and_reduction_at_capture(model):
    given = tokens()
    name = "blocks.0.hook_resid_post"
    whole = ours(model, given, return_type="loss", names_filter=name)[1][name + "_grad"]
    options = dict(return_type="loss", names_filter=name, device="cpu")
    half = ours(model, given, dtype=torch.float16, **options)[1][name + "_grad"]
    assert torch.equal(half, whole.half())
    summed = ours(model, given, dtype=torch.bfloat16, reduce="absmax", **options)
    assert torch.equal(summed[1][name + "_grad"], whole.abs().amax(1).bfloat16())
