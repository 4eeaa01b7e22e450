"""accelerate and install differ in nothing but time: keys, their order, overrides, patches, views, copies, warnings."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from lens_models import CACHING, MODELS, root_module, state, tokens

import tlfast.transformer_lens as lens
from tlfast.transformer_lens import acceleration
from tlfast.transformer_lens.library import hook_point_type


@pytest.fixture(params=CACHING)
def model(request):
    """Each kind of model whose own cache has gradients to compare with."""
    return CACHING[request.param]()


def at_points(model):
    return state(torch.nn.ModuleList(model.hook_dict.values()))[1:]


def resid(model, layer=0):
    return next(name for name in model.hook_dict if name.endswith(f"{layer}.hook_resid_post"))


def loss(model, **options):
    return model.run_with_cache(tokens(options.pop("batch", 2)), return_type="loss", incl_bwd=True, **options)[1]


def outcome(run, model):
    """What a caller sees of a run: keys in their order, values, strides, parameter gradients, warnings, the error."""
    model.zero_grad()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            cache, error = dict(run(model).items()), None
        except Exception as raised:
            cache, error = {}, (type(raised), str(raised))
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    strides = {key: kept.stride() for key, kept in cache.items()}
    return list(cache), cache, grads, strides, [(w.category, str(w.message)) for w in said], error


def assert_same(model, run):
    plain = outcome(run, model)
    before = at_points(model)
    with lens.accelerate(model):
        fast = outcome(run, model)
    assert fast[0] == plain[0]
    for ours, theirs in zip(fast[1:3], plain[1:3], strict=True):
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
    assert fast[3:] == plain[3:]
    assert at_points(model) == before
    return fast


@pytest.fixture(params=[False, True], ids=["plain", "compatible"])
def any_mode(request, model):
    """A model, and a bridge in its compatibility mode, too."""
    if request.param and not hasattr(model, "compatibility_mode"):
        pytest.skip("a bridge alone has a compatibility mode")
    if request.param:
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    return model


@pytest.mark.parametrize(
    "names_filter",
    [
        None, "blocks.0.hook_resid_post", ["blocks.1.hook_resid_pre", "hook_embed", "blocks.0.attn.hook_q"], [],
        lambda name: name.endswith("hook_resid_post"), lambda name: name.endswith(("hook_out", "hook_mlp_in")),
        lambda name: True, "no_such_point", ["hook_embed", "no_such_point"], ("hook_embed",), 3,
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"remove_batch_dim": True, "batch": 1}, {"pos_slice": (1, 3)}], ids=str)
def test_filters(any_mode, names_filter, options):
    assert_same(any_mode, lambda model: loss(model, names_filter=names_filter, **options))


def test_the_tests_take_the_fast_way(any_mode, monkeypatch):
    runs = []
    monkeypatch.setattr(acceleration, "run_as_theirs", lambda *args: runs.append(args) or (None, {}))
    with lens.accelerate(any_mode):
        for names_filter in (None, "blocks.0.hook_resid_post", ["hook_embed"], lambda name: True):
            loss(any_mode, names_filter=names_filter)
        with any_mode.hooks(fwd_hooks=[(resid(any_mode), lambda value, hook: None)]):
            loss(any_mode)
    assert len(runs) == 5


def test_more_ways_to_cache(any_mode):
    def caching_hooks(model):
        cache, fwd, bwd = model.get_caching_hooks(lambda name: "resid" in name, incl_bwd=True)
        with model.hooks(fwd, bwd):
            model(tokens(), return_type="loss").backward()
        return cache

    def added(model):
        cache = model.add_caching_hooks(["blocks.0.hook_resid_post", "hook_embed"], incl_bwd=True)
        model(tokens(), return_type="loss").backward()
        model.reset_hooks()
        return cache

    for run in (caching_hooks, added) if hasattr(any_mode, "get_caching_hooks") else ():
        assert_same(any_mode, run)
    for options in ({"reset_hooks_end": False}, {"clear_contexts": True}, {"return_cache_object": False},
                    {"stop_at_layer": 1}, {"names_filter": "hook_embed", "device": "cpu"}):  # fmt: skip
        assert_same(any_mode, lambda model, options=options: (loss(model, **options), model.reset_hooks())[0])


def test_errors_are_theirs(model):
    assert_same(model, lambda model: model.run_with_cache(tokens(), incl_bwd=True)[1])  # not one number
    model.requires_grad_(False)
    assert assert_same(model, loss)[5] is not None


class Scaling(hook_point_type()):
    """A point whose hooks see ten times as much, and which takes a tenth of what they return."""

    def add_hook(self, hook, *args, **kwargs):
        def scaled(value, hook_point=None, hook_=hook, **given):
            hook_(value * 10, hook=given.get("hook", hook_point))

        return super().add_hook(scaled, *args, **kwargs)


def test_a_point_of_a_users_class(model):
    name = resid(model)
    plain = loss(model)[name]
    model.hook_dict[name].__class__ = Scaling
    found = assert_same(model, loss)
    assert torch.equal(found[1][name], plain * 10)
    _, ours = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, params=True, calls="last")
    assert [key for key in found[1] if not torch.equal(ours[key], found[1][key])] == []


@pytest.mark.parametrize("method", ["hooks", "get_caching_hooks", "reset_hooks"])
def test_a_method_of_a_users_class(model, method):
    if not hasattr(model, method):
        pytest.skip("not in this version")
    calls = []

    class Mine(type(model)):
        pass

    def called(self, *args, **kwargs):
        calls.append((len(args), list(kwargs), bool(args and args[0])))
        return getattr(super(Mine, self), method)(*args, **kwargs)

    setattr(Mine, method, called)
    model.__class__ = Mine
    plain = outcome(loss, model)
    counted = calls.copy()
    calls.clear()
    with lens.accelerate(model):
        fast = outcome(loss, model)
    assert fast[0] == plain[0]
    assert calls == counted


def test_a_method_that_is_replaced_on_the_object_or_in_the_class(model, monkeypatch):
    if not hasattr(model, "get_caching_hooks"):
        pytest.skip("not in this version")
    point, seen = hook_point_type(), []
    original = point.add_hook

    def add_hook(self, *args, **kwargs):
        seen.append(self.name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(point, "add_hook", add_hook)
    with lens.accelerate(model):
        loss(model, names_filter=resid(model))
    assert seen


@pytest.mark.parametrize("kind", ["leaf", "other", "function", "in place", "none"])
def test_patches(model, kind):
    name, other = resid(model, 1), resid(model, 0)
    kept = {}

    def patch(value, hook):
        if kind == "leaf":
            return value.detach().clone().requires_grad_()
        if kind == "other":
            return kept["value"] * 2
        return value.mul_(2) if kind == "in place" else value * 2 if kind == "function" else None

    def run(model):
        with model.hooks(fwd_hooks=[(other, lambda value, hook: kept.update(value=value)), (name, patch)]):
            return loss(model, names_filter=lambda n: n.endswith("hook_resid_post"))

    if kind == "in place":
        plain = outcome(run, model)
        assert plain[5][0] is RuntimeError
        with lens.accelerate(model):
            fast = outcome(run, model)
        if fast[5] is None:  # native hooks allow it; then it is as any function that makes the same
            kind = "function"
            want = outcome(run, model)
            assert fast[2].keys() == want[2].keys()
            assert all(torch.equal(fast[2][key], want[2][key]) for key in want[2])
        else:
            assert fast == plain
        return
    found = assert_same(model, run)
    assert (name + "_grad" in found[0]) == (kind in ("function", "none"))

    def ours(model):
        with model.hooks(fwd_hooks=[(other, lambda value, hook: kept.update(value=value)), (name, patch)]):
            wanted = lambda n: n.endswith("hook_resid_post")  # noqa: E731
            return lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, names_filter=wanted)[1]

    assert list(ours(model)) == found[0]

    def added(model):  # the patch comes after the caching hooks
        cache = model.add_caching_hooks(lambda n: n.endswith("hook_resid_post"), incl_bwd=True)
        with model.hooks(fwd_hooks=[(other, lambda value, hook: kept.update(value=value)), (name, patch)]):
            model(tokens(), return_type="loss").backward()
        model.reset_hooks()
        return cache

    if hasattr(model, "add_caching_hooks"):
        assert_same(model, added)


def test_a_change_of_a_gradient_in_place_shows(model):
    name = resid(model)

    def change(grad, hook):
        grad.mul_(2)

    def run(model):
        with model.hooks(bwd_hooks=[(name, change)]):
            return loss(model, pos_slice=(1, 3), names_filter=name)

    found = assert_same(model, run)
    plain = loss(model, names_filter=name)[name + "_grad"]
    assert torch.equal(found[1][name + "_grad"], 2 * plain[:, 1:3])
    with model.hooks(bwd_hooks=[(name, change)]):
        options = dict(return_type="loss", incl_bwd=True, params=True, pos_slice=(1, 3), names_filter=name)
        ours = lens.run_with_cache(model, tokens(), **options)[1][name + "_grad"]
    assert torch.equal(ours, found[1][name + "_grad"])
    assert ours.untyped_storage().nbytes() == ours.nbytes


def test_stop_at_layer_of_ours(model):
    for stop in (0, 1, -1):
        theirs = model.run_with_cache(tokens(), stop_at_layer=stop)
        ours = lens.run_with_cache(model, tokens(), stop_at_layer=stop)
        assert list(ours[1]) == list(theirs[1])
        assert torch.equal(ours[0], theirs[0])


def test_start_at_layer_of_ours(model):
    given = torch.randn(2, 7, 16)
    try:
        theirs = model.run_with_cache(given, start_at_layer=1)[1]
    except (TypeError, KeyError, ValueError, NotImplementedError):
        pytest.skip("not in this version")
    assert list(lens.run_with_cache(model, given, start_at_layer=1)[1]) == list(theirs)


def test_outputs_that_are_no_tensors():
    class Value:
        def __init__(self, value):
            self.value = value

        def backward(self):
            (self.value * 2).backward()

    model, x = root_module(), torch.randn(2, 3, 16)
    inner = model.forward
    model.forward = lambda x: Value(inner(x))
    found = assert_same(model, lambda model: model.run_with_cache(x, incl_bwd=True)[1])
    assert "hook_out_grad" in found[0]
    ours = lens.run_with_cache(model, x, incl_bwd=True, calls="last")[1]
    assert [key for key in found[1] if not torch.equal(ours[key], found[1][key])] == []


def test_two_of_one_model_end_in_any_order(model):
    before = state(model)
    first, second = lens.accelerate(model), lens.accelerate(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert acceleration._in_force.concern(model)
    second.__exit__(None, None, None)
    assert not acceleration._in_force.concern(model)
    assert state(model) == before
    assert not hasattr(type(model).run_with_cache, "tlfast_replaced")


def test_copies_are_plain(model):
    with lens.accelerate(model):
        other = copy.deepcopy(model)
        assert acceleration._in_force.concern(model)
        assert not acceleration._in_force.concern(other)
        loss(other)
        state_of_copy = state(other)
    loss(other)
    assert state(other) == state_of_copy


def test_a_pickle_made_inside_is_plain():
    model = hook_point_type()()
    model.hook_dict = {"itself": model}
    plain = pickle.dumps(model)
    with lens.accelerate(model):
        assert pickle.dumps(model) == plain


def test_somebody_who_stands_on_ours_keeps_it(monkeypatch):
    point = hook_point_type()
    lens.install()
    ours = point.register_full_backward_hook
    standing = lambda self, *args, **kwargs: ours(self, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(point, "register_full_backward_hook", standing)
    lens.uninstall()
    assert vars(point)["register_full_backward_hook"] is standing
    one = point()
    one.add_hook(lambda grad, hook: None, dir="bwd")
    assert len(one._backward_hooks) == 1
    delattr(point, "register_full_backward_hook")


@pytest.mark.parametrize("kind", sorted(CACHING))
def test_points_are_looked_up_no_more_often(kind, monkeypatch):
    model = MODELS[kind]()
    if not isinstance(vars(type(model)).get("hook_dict", getattr(type(model), "hook_dict", None)), property):
        pytest.skip("the points of this kind are there")
    cls = next(cls for cls in type(model).__mro__ if "hook_dict" in vars(cls))
    reads, made = [], vars(cls)["hook_dict"]

    def hook_dict(self):
        reads.append(1)
        return made.fget(self)

    # By its globals it is one of theirs, and not an override.
    counted = type(hook_dict)(
        hook_dict.__code__, {**globals(), "__name__": "transformer_lens.test"}, "hook_dict", None, hook_dict.__closure__
    )
    monkeypatch.setattr(cls, "hook_dict", property(counted))
    for names_filter in (None, [resid(model, 0), resid(model, 1)], lambda name: "resid" in name):
        reads.clear()
        loss(model, names_filter=names_filter)
        theirs = len(reads)
        lens.install()
        reads.clear()
        try:
            loss(model, names_filter=names_filter)
        finally:
            lens.uninstall()
        assert len(reads) <= min(theirs, 1)


def grouped():
    """A HookedTransformer whose keys and values have fewer heads than its queries, each with an input of its own."""
    model = MODELS["hooked_transformer"](n_key_value_heads=1)
    model.set_use_split_qkv_input(True)
    return model


@pytest.mark.skipif("hooked_transformer" not in MODELS, reason="whose norms are called with several shapes")
def test_a_point_whose_calls_have_several_shapes_fails_no_other(backend):
    model, name = grouped(), "blocks.1.ln1.hook_normalized"
    theirs = assert_same(model, loss)[1]
    options = dict(return_type="loss", incl_bwd=True, backend=backend)
    why = f"capture at {name}: a point must have one shape in all calls to be summed"
    with pytest.warns(UserWarning, match="run_with_cache: left out a gradient") as said:
        ours = lens.run_with_cache(model, tokens(), **options)[1]
    assert any(f"left out a gradient. {why}" in str(warning.message) for warning in said)
    assert {warning.filename for warning in said} == {__file__}
    lacking = {name for name in theirs if name not in ours}
    assert lacking == {f"blocks.{layer}.ln1.hook_{kind}_grad" for layer in range(2) for kind in ("scale", "normalized")}
    assert torch.equal(ours["hook_embed_grad"], theirs["hook_embed_grad"])
    with pytest.warns(UserWarning, match="cache_fwd_and_bwd: left out a gradient"):
        lens.cache_fwd_and_bwd(model, tokens(), lambda value: value, backend=backend, return_type="loss")
    with pytest.raises(ValueError, match=f'^{why} .* got .*. Choose calls="last".$'):
        lens.run_with_cache(model, tokens(), names_filter=[name, "hook_embed"], **options)
    last = lens.run_with_cache(model, tokens(), names_filter=[name, "hook_embed"], calls="last", **options)[1]
    assert torch.equal(last[name + "_grad"], theirs[name + "_grad"])
