"""What a caller could tell apart: errors, warnings, signatures, the model's own keywords, subclasses, hooks left."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from importlib import import_module

import lens_models
import pytest
import torch
from lens_models import CACHING, MODELS, VOCAB, WIDTH, state, tokens
from torch import nn

import tlfast.transformer_lens as lens
from tlfast.transformer_lens.library import hook_point_type, root_module_type


@pytest.fixture(params=CACHING)
def model(request):
    """Each kind of model whose own cache has gradients to compare with."""
    return CACHING[request.param]()


@contextlib.contextmanager
def installed(model):
    lens.install()
    try:
        yield model
    finally:
        lens.uninstall()


HOW = {"accelerate": lens.accelerate, "install": installed}
both = pytest.mark.parametrize("how", HOW)


def resid(model, layer=0):
    return next(name for name in model.hook_dict if name.endswith(f"{layer}.hook_resid_post"))


def at_points(model):
    return state(nn.ModuleList(model.hook_dict.values()))[1:]


def raised(model, **options):
    try:
        model.run_with_cache(tokens(), incl_bwd=True, **options)
    except Exception as error:
        return type(error), str(error)
    return None


# --- errors and warnings --------------------------------------------------------------------------------------------


@both
def test_errors_are_theirs(model, how):
    no_single_number = raised(model, return_type="logits")
    wrong_name = raised(model, return_type="loss", nosuch=1)
    wrong_slice = raised(model, return_type="loss", pos_slice="x")
    with torch.no_grad():
        no_gradients = raised(model, return_type="loss")
    model.requires_grad_(False)
    frozen = raised(model, return_type="loss")
    assert None not in (no_single_number, no_gradients, frozen)
    before = at_points(model)
    with HOW[how](model):
        assert raised(model, return_type="loss") == frozen
        model.requires_grad_(True)
        assert raised(model, return_type="logits") == no_single_number
        assert raised(model, return_type="loss", nosuch=1) == wrong_name
        assert raised(model, return_type="loss", pos_slice="x") == wrong_slice
        with torch.no_grad():
            assert raised(model, return_type="loss") == no_gradients
    assert at_points(model) == before


def noted(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [(str(one.message), one.category, one.filename, one.lineno) for one in caught]


@both
def test_warnings_are_theirs_and_point_to_the_caller(model, how):
    gated = next(name for name in model.hook_dict if name.endswith(("hook_mlp_in", "attn.hook_result")))
    names = [gated, resid(model)]

    def run():
        model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=names)
        model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=lambda name: name in names)

    plain = noted(run)
    with HOW[how](model):
        assert noted(run) == plain
    skipped = [one for one in plain if "skipped" in one[0]]
    assert len(skipped) == (2 if hasattr(model, "compatibility_mode") else 0)
    assert all(one[2] == __file__ for one in skipped)


@both
def test_what_is_replaced_looks_as_it_did(model, how):
    point = hook_point_type()
    names = ("register_full_backward_hook", "register_backward_hook")
    before = [model.run_with_cache, *(getattr(point(), name) for name in names)]
    with HOW[how](model):
        some = next(iter(model.hook_dict.values()))
        now = [model.run_with_cache, *(getattr(some, name) for name in names)]
        assert all(one.__func__ is not other.__func__ for one, other in zip(before, now, strict=True))
        for one, other in zip(before, now, strict=True):
            assert inspect.signature(one) == inspect.signature(other)
            for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
                assert getattr(one, attribute) == getattr(other, attribute)


@both
@pytest.mark.parametrize("method", ["add_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("options", [{}, {"clear_contexts": True}], ids=["plain", "left_to_theirs"])
def test_a_set_up_that_fails_half_way_leaves_what_theirs_leaves(model, how, method, options):
    names = list(model.hook_dict)
    point = model.hook_dict[resid(model)]
    point.add_hook(lambda value, hook: None, dir="fwd")

    def failing(*args, **kwargs):
        raise RuntimeError("no more hooks")

    seen = []
    for context in (contextlib.nullcontext(), HOW[how](model)):
        broken = model.hook_dict[resid(model, 1)]
        with context:
            vars(broken)[method] = failing
            with pytest.raises(RuntimeError, match="no more hooks"):
                model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, **options)
        del vars(broken)[method]
        seen.append([(name, len(p.fwd_hooks), len(p.bwd_hooks)) for name, p in model.hook_dict.items()])
        model.reset_hooks()
        point.add_hook(lambda value, hook: None, dir="fwd")
    assert seen[0] == seen[1]
    assert list(model.hook_dict) == names


# --- the model's own arguments --------------------------------------------------------------------------------------


class Scaling(root_module_type()):
    """A model whose forward has the names of tlfast's options."""

    def __init__(self):
        super().__init__()
        self.layer, self.hook_out = nn.Linear(WIDTH, WIDTH), hook_point_type()()
        self.setup()

    def forward(self, x, reduce="sum", dtype=1.0, over=1.0, backend=1.0, metric=1.0, params=1.0, calls=1.0, gated=1.0,
                model=1.0, found=1.0, original=1.0):  # fmt: skip
        out = self.hook_out(self.layer(x)) * dtype * over * backend * metric * params * calls * gated * model * found
        return (out * original).mean() if reduce == "mean" else out.sum()


@both
def test_every_keyword_goes_to_the_model(how):
    model, x = Scaling(), torch.randn(2, WIDTH)
    given = {name: 2.0 for name in inspect.signature(model.forward).parameters if name not in ("x", "reduce")}
    for options in ({}, {"incl_bwd": True}):
        out, cache = model.run_with_cache(x, reduce="mean", **given, **options)
        with HOW[how](model):
            ours, our_cache = model.run_with_cache(x, reduce="mean", **given, **options)
        assert torch.equal(out, ours)
        assert list(cache) == list(our_cache)
        assert all(torch.equal(cache[name], our_cache[name]) for name in cache)


def test_a_keyword_that_both_take_must_be_said_whose_it_is(backend):
    model, x = Scaling(), torch.randn(2, 3, WIDTH)
    options = dict(names_filter="hook_out", incl_bwd=True)
    message = (
        r"run_with_cache: reduce must be told apart from the argument of the model's forward, got 'mean'\. Give the "
        r"model's in model_kwargs=\{\.\.\.\}; beside model_kwargs, which may be empty, reduce= is tlfast's\."
    )
    with pytest.raises(ValueError, match=message):
        lens.run_with_cache(model, x, reduce="mean", **options)
    out, cache = lens.run_with_cache(model, x, model_kwargs={"reduce": "mean", "backend": 3.0}, **options)
    assert torch.equal(out, model(x, reduce="mean", backend=3.0))
    assert cache["hook_out"].shape == (2, 3, WIDTH)
    out, cache = lens.run_with_cache(model, x, reduce="mean", backend=backend, model_kwargs={}, **options)
    assert torch.equal(out, model(x))
    assert cache["hook_out_grad"].shape == (2, WIDTH)
    with pytest.raises(ValueError, match="cache_fwd_and_bwd: calls must be told apart"):
        lens.cache_fwd_and_bwd(model, x, lambda out: out, calls="last")
    value, _, grads = lens.cache_fwd_and_bwd(model, x, lambda out: out, model_kwargs={"calls": 2.0})
    assert value == model(x, calls=2.0).item()
    assert torch.equal(grads["hook_out"], torch.full((2, 3, WIDTH), 2.0))


def test_what_makes_no_sense_for_two_caches_is_an_error():
    with pytest.raises(ValueError, match=r"cache_fwd_and_bwd: incl_bwd must be left out, got True. Use run_with_cache"):
        lens.cache_fwd_and_bwd(Scaling(), torch.randn(2, WIDTH), lambda out: out, incl_bwd=True)


@pytest.mark.parametrize("kind", sorted(CACHING.keys() - {"hooked_transformer"}))
def test_what_a_bridge_takes_by_position(kind):
    model, given = CACHING[kind](), tokens(batch=1)
    name = resid(model)
    for args in ((given, False, False, name), (given, True, True, [name]), (given, True)):
        out, cache = model.run_with_cache(*args, return_type="loss", incl_bwd=True)
        for run in (lens.run_with_cache, "accelerate"):
            if run == "accelerate":
                with lens.accelerate(model):
                    ours, our_cache = model.run_with_cache(*args, return_type="loss", incl_bwd=True)
            else:
                ours, our_cache = run(model, *args, return_type="loss", incl_bwd=True, calls="last")
            assert torch.equal(out, ours)
            assert type(cache) is type(our_cache)
            assert list(cache) == list(our_cache)
            assert all(torch.equal(cache[key], our_cache[key]) for key in cache)
    with pytest.raises(TypeError, match="names_filter"):
        lens.run_with_cache(model, given, True, False, name, names_filter=name)


# --- subclasses -----------------------------------------------------------------------------------------------------


def overriding(model, hard):
    """The model as one of a subclass that prepares its input and caches gradients unasked; a list of what it did."""
    done = []

    class Overriding(type(model)):
        def run_with_cache(self, numbers, *args, incl_bwd=True, **kwargs):
            done.append("prepared")
            options = {"incl_bwd": True} if hard else {"incl_bwd": incl_bwd}
            kwargs.setdefault("return_type", "loss")
            return super().run_with_cache(torch.tensor(numbers), *args, **options, **kwargs)

        def forward(self, *args, **kwargs):
            done.append("forward")
            return super().forward(*args, **kwargs)

    model.__class__ = Overriding
    return model, done


@pytest.mark.parametrize("how", [*HOW, "ours"])
@pytest.mark.parametrize("hard", [False, True], ids=["by_default", "always"])
@pytest.mark.parametrize("options", [{}, {"incl_bwd": True}], ids=["unasked", "asked"])
def test_an_overridden_run_with_cache_is_run_once_and_so_is_backward(model, how, hard, options):
    model, done = overriding(model, hard)
    given = tokens().tolist()
    model.zero_grad()
    out, cache = model.run_with_cache(given, **options)
    plain = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    done.clear()
    model.zero_grad()
    if how == "ours":
        ours, our_cache = lens.run_with_cache(model, given, params=True, calls="last", **options)
    else:
        with HOW[how](model):
            ours, our_cache = model.run_with_cache(given, **options)
    assert done == ["prepared", "forward"]
    assert torch.equal(out, ours)
    assert list(cache) == list(our_cache)
    assert all(torch.equal(cache[name], our_cache[name]) for name in cache)
    assert all(torch.equal(plain[name], dict(model.named_parameters())[name].grad) for name in plain)


def test_a_metric_of_a_model_that_runs_backward_itself(model):
    model, _ = overriding(model, hard=True)
    with pytest.raises(ValueError, match="metric must be left out with a model whose run_with_cache runs a backward"):
        lens.run_with_cache(model, tokens().tolist(), metric=lambda loss: loss)


# --- what backward reaches ------------------------------------------------------------------------------------------


def test_hooks_at_and_below_the_lowest_point_are_called(model, backend):
    asked, below = resid(model, 1), resid(model, 0)
    seen, kept, leaf = {}, [], torch.zeros(2, 7, WIDTH, requires_grad=True)

    def see(grad, hook):
        seen.setdefault(hook.name, []).append(grad.clone())

    def patch(value, hook):
        kept.append(value + leaf)
        kept[0].retain_grad()
        kept[0].register_hook(lambda grad: seen.setdefault("tensor", []).append(grad.clone()))
        return kept[0]

    def run(how, **options):
        seen.clear()
        kept.clear()
        leaf.grad = None
        model.zero_grad()
        with model.hooks([(below, patch)], [(asked, see), (below, see), ("hook_embed", see)]):
            cache = how(tokens(), return_type="loss", incl_bwd=True, names_filter=asked, **options)[1]
        return {**{name: grads[0] for name, grads in seen.items()}, "leaf": leaf.grad, "retained": kept[0].grad,
                "asked": cache[asked + "_grad"]}, {name: len(grads) for name, grads in seen.items()}  # fmt: skip

    theirs, counts = run(model.run_with_cache)
    ours, our_counts = run(lambda *args, **kwargs: lens.run_with_cache(model, *args, backend=backend, **kwargs))
    assert our_counts == counts
    assert len(theirs) >= 7
    assert theirs.keys() == ours.keys()
    assert [name for name in theirs if not torch.equal(theirs[name], ours[name])] == []
    assert all(param.grad is None for param in model.parameters())


def test_a_leaf_that_was_put_in_gets_its_gradient(model, backend):
    name = resid(model)
    middle = torch.randn(2, 7, WIDTH, requires_grad=True, generator=torch.Generator().manual_seed(4))

    def grad(run, **options):
        middle.grad = None
        with model.hooks([(name, lambda value, hook: middle)]):
            run(tokens(), return_type="loss", incl_bwd=True, names_filter=resid(model, 1), **options)
        return middle.grad.clone()

    theirs = grad(model.run_with_cache)
    assert theirs.abs().sum() > 0
    ours = grad(lambda *args, **kwargs: lens.run_with_cache(model, *args, backend=backend, **kwargs))
    assert torch.equal(theirs, ours)


def test_a_capture_below_the_lowest_point_gets_its_rows(model, backend):
    with lens.capture(model, resid(model), rows=2, backend=backend) as cap:
        lens.run_with_cache(
            model, tokens(), return_type="loss", incl_bwd=True, names_filter=resid(model, 1), backend=backend
        )
    cache = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=resid(model))[1]
    assert torch.equal(cap[resid(model)], cache[resid(model) + "_grad"])


# --- what stays -----------------------------------------------------------------------------------------------------


def test_hooks_that_are_to_stay_fill_the_cache_again(model, backend):
    name, given = resid(model), tokens(seed=5)
    options = dict(return_type="loss", incl_bwd=True, names_filter=name, reset_hooks_end=False, pos_slice=(1, 4))
    _, cache = lens.run_with_cache(model, tokens(), backend=backend, **options)
    first = {key: cache[key].clone() for key in cache}
    handles = [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in model.hook_dict.values()]
    model(given, return_type="loss").backward()
    again = {key: cache[key].clone() for key in cache}
    model.reset_hooks()
    assert not any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    _, theirs = model.run_with_cache(tokens(), **options)
    assert list(theirs) == list(first) == list(again)
    assert all(torch.equal(theirs[key], first[key]) for key in first)
    model(given, return_type="loss").backward()
    assert all(torch.equal(theirs[key], again[key]) for key in first)
    assert {name for name in first if torch.equal(first[name], again[name])} == set()
    theirs_left = [(len(point.fwd_hooks), len(point.bwd_hooks)) for point in model.hook_dict.values()]
    assert [left != (0, 0) for left in handles] == [left != (0, 0) for left in theirs_left]
    model.reset_hooks()


# --- forward only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_a_forward_alone_leaves_no_trace_among_backward_hooks(kind, backend):
    model, given, listed = MODELS[kind](), tokens(), []
    plain = model(given)
    point = next(iter(model.hook_dict.values()))
    handle = point.register_forward_hook(
        lambda *_: listed.extend((bool(p.fwd_hooks), bool(p.bwd_hooks)) for p in model.hook_dict.values())
    )
    out, cache = lens.run_with_cache(model, given, backend=backend)
    handle.remove()
    assert all(one == (True, False) for one in listed)
    assert torch.equal(plain, out)
    assert out.grad_fn.name() != "TlfastIdentity"
    theirs = dict(model.run_with_cache(given)[1].items())
    assert list(theirs) == list(cache)
    assert all(torch.equal(theirs[name], cache[name]) for name in theirs if theirs[name] is not None)


@pytest.mark.parametrize("kind", MODELS)
def test_a_capture_at_a_norm_changes_no_forward_without_gradients(kind, backend):
    model, given = MODELS[kind](), tokens()
    name = next(name for name in model.hook_dict if name.endswith("ln1.hook_normalized"))
    with torch.no_grad():
        plain = model(given)
    with lens.capture(model, name, rows=2, backend=backend) as cap:
        with torch.no_grad():
            assert noted(lambda: torch.equal(model(given), plain)) == []
            assert torch.equal(model(given), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs, of the other path
            model(given, return_type="loss").backward()
    with torch.no_grad():
        assert torch.equal(model(given), plain)
    assert cap[name].abs().sum() > 0
    assert not any(point.bwd_hooks for point in model.hook_dict.values())


@pytest.mark.skipif("native_bridge" not in MODELS, reason="of 4.0 on")
def test_a_capture_at_a_norm_that_a_hook_makes_another_is_an_error(backend):
    transformers = import_module("transformers")
    config = transformers.T5Config(
        d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=VOCAB, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    model = lens_models.BUILDER.build_bridge_from_module(model, "T5ForConditionalGeneration", hf_config=config)
    norm = "encoder_blocks.0.ln1"
    given = dict(decoder_input=tokens())
    text = rf"capture at {norm}.hook_normalized: the norm must be the same with a backward hook there, got an output "
    error = pytest.raises(RuntimeError, match=rf"{text}that is 0\.\d+ of its size off. Capture {norm}.hook_in or")
    with error, lens.capture(model, f"{norm}.hook_normalized", rows=2, backend=backend):
        model(tokens(), **given)
    with lens.capture(model, f"{norm}.hook_out", rows=2, backend=backend) as cap:
        model(tokens(), **given).sum().backward()
    assert cap[f"{norm}.hook_out"].abs().sum() > 0
