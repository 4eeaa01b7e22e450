"""The taps of a cached run serve the next run of the same points, and nothing of one run gets into another."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from lens_models import MODELS, WIDTH, root_module, tokens
from threads import in_threads

import tlfast.transformer_lens as lens
from tlfast.transformer_lens import caching_taps, running
from tlfast.transformer_lens.theirs import is_bridge

RESID = "blocks.*.hook_resid_post"


KINDS = list(MODELS)


@pytest.fixture(params=KINDS)
def model(request):
    """Each kind of model that takes tokens."""
    return MODELS[request.param]()


@pytest.fixture
def counted(monkeypatch):
    """One for each set of taps that was made so far."""
    made = []
    for_points = caching_taps.CachingTaps

    def counting(*args):
        made.append(len(made))
        return for_points(*args)

    monkeypatch.setattr(running, "CachingTaps", counting)
    return made


def same(got, truth):
    assert list(got.keys()) == list(truth.keys())
    for name in truth:
        assert torch.equal(got[name], truth[name]), name


def total(output):
    return output.sum()


@pytest.mark.parametrize("backend", ["native", "python"])
def test_three_runs_have_one_set_of_taps(model, counted, backend):
    def cached(seed):
        return dict(lens.run_with_cache(model, tokens(seed=seed), metric=total, backend=backend)[1].items())

    truths = []
    for seed in range(3):
        caching_taps._kept.clear()
        truths.append(cached(seed))
    caching_taps._kept.clear()
    counted.clear()
    for found, truth in zip([cached(seed) for seed in range(3)], truths, strict=True):
        same(found, truth)
    assert len(counted) == 1


def test_other_points_and_other_settings_have_others(model, counted):
    for more in [{}, dict(names_filter=RESID), dict(names_filter=RESID, calls="last"), dict(metric=None)]:
        for _ in range(2):
            lens.run_with_cache(model, tokens(), **dict(metric=total) | more)
    assert len(counted) == 4
    for _ in range(2):  # what is made of a tensor may depend on more than the settings
        lens.run_with_cache(model, tokens(), metric=total, pos_slice=-1)
    assert len(counted) == 6


@pytest.mark.parametrize("backend", ["native", "python"])
def test_a_late_backward_of_one_run_is_nothing_to_the_next(model, counted, backend):
    outputs = []

    def left_alone(output):  # its graph stays
        outputs.append(output)
        return next(model.parameters()).sum()

    def with_a_late_one(output):
        outputs[0].sum().backward()
        return total(output)

    options = dict(names_filter=RESID, backend=backend)
    _, truth = lens.run_with_cache(model, tokens(), metric=total, **options)
    lens.run_with_cache(model, tokens(seed=2), metric=left_alone, **options)
    _, found = lens.run_with_cache(model, tokens(), metric=with_a_late_one, **options)
    assert len(counted) == 1
    same(found, truth)


def test_a_run_inside_another_has_taps_of_its_own(model, counted):
    _, truth = lens.run_with_cache(model, tokens(), metric=total)
    inner = []

    def metric(output):
        inner.append(lens.run_with_cache(model, tokens(seed=2), metric=total)[1])
        return total(output)

    _, found = lens.run_with_cache(model, tokens(), metric=metric)
    assert len(counted) == 2
    same(lens.run_with_cache(model, tokens(seed=2), metric=total)[1], inner[0])
    # What ran inside is behind hooks of the outer run as well; its own points are those that count.
    assert found.keys() == truth.keys()


def test_after_an_error_there_are_new_ones(model, counted):

    def wrong(output):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lens.run_with_cache(model, tokens(), metric=wrong)
    lens.run_with_cache(model, tokens(), metric=total)
    assert len(counted) == 2


def test_a_point_that_is_another_one_gets_a_tap(model, counted):
    lens.run_with_cache(model, tokens(), metric=total, names_filter=RESID)
    points = [point for name, point in model.hook_dict.items() if name.endswith("blocks.0.hook_resid_post")]
    assert points
    ((_, kept),) = caching_taps._kept[model].items()
    assert kept.are_at([model.hook_dict[name] for name in kept._names])
    assert not kept.are_at([torch.nn.Identity() for _ in kept._names])
    assert not kept.are_at(points[:0])


def looking_at_gradients(output):
    """A metric that has a backward of its own: the second one adds to it, with calls="sum"."""
    output.sum().backward(retain_graph=True)
    return output.sum()


@pytest.mark.parametrize("backend", ["native", "python"])
@pytest.mark.parametrize("between", ["an output that is kept", "a forward without gradients"])
def test_calls_of_an_earlier_run_are_none_of_this_one(model, backend, between):
    def cached():
        return lens.run_with_cache(model, tokens(), metric=looking_at_gradients, names_filter=RESID, backend=backend)

    def looks(output):
        with torch.no_grad():
            model(tokens(seed=2))
        return total(output)

    _, truth = cached()
    gc.collect()
    if between == "an output that is kept":
        held = cached()
    else:
        held = lens.run_with_cache(model, tokens(), metric=looks, names_filter=RESID, backend=backend)
    same(cached()[1], truth)
    del held


def test_points_with_hooks_have_as_many_taps_in_every_run(model):
    point = next(point for name, point in model.hook_dict.items() if name in ("blocks.0.hook_resid_post",))
    point.add_hook(lambda value, hook: None)
    for _ in range(3):
        lens.run_with_cache(model, tokens(), metric=total, names_filter=RESID, backend="python")
        (kept,) = caching_taps._kept[model].values()
        assert len(kept.backwards.points) == len(kept._points)


@pytest.mark.parametrize("backend", ["native", "python"])
def test_a_copy_made_inside_a_run_is_reset_alone(backend):
    model, x = root_module(), torch.randn(2, WIDTH)
    keys = lens.run_with_cache(model, x, incl_bwd=True, backend=backend)[1].keys()
    left = []

    def copies(*_):
        copied = copy.deepcopy(model)
        copied.reset_hooks()
        left.extend(len(point._forward_hooks) for point in copied.hook_dict.values())
        pickle.dumps(model.hook_in)

    handle = model.layer.register_forward_hook(copies)
    found = lens.run_with_cache(model, x, incl_bwd=True, backend=backend)[1]
    handle.remove()
    assert found.keys() == keys
    assert set(left) == {0}


def test_a_gradient_that_comes_after_its_run_is_nothing_to_the_next(monkeypatch):
    """Of a backward in another thread, which is inside of what makes a gradient smaller when its run fails.

    Natively, where that is done without a lock; in Python the end of the run waits for it.
    """
    model, x = root_module(), torch.randn(2, WIDTH)
    inside, may_go, late = threading.Event(), threading.Event(), []
    made_at = running.Kept.at

    def slow_at(self, model, known, name, point):
        select = made_at(self, model, known, name, point)

        def slow(tensor):
            if threading.current_thread() in late and name == "hook_in":
                inside.set()
                assert may_go.wait(60)
            return select(tensor)

        return slow

    def fails(output):
        late.append(threading.Thread(target=lambda: (777 * output).backward(retain_graph=True)))
        late[0].start()
        assert inside.wait(60)
        raise ZeroDivisionError

    def while_it_comes(output):
        output.backward(retain_graph=True)
        may_go.set()
        late[0].join()
        return output * 0

    options = dict(backend="native", dtype="float32", calls="last")
    _, truth = lens.run_with_cache(model, x, metric=lambda output: output, **options)
    monkeypatch.setattr(running.Kept, "at", slow_at)
    with pytest.raises(ZeroDivisionError):
        lens.run_with_cache(model, x, metric=fails, **options)
    _, found = lens.run_with_cache(model, x, metric=lambda output: (while_it_comes(output), output)[1], **options)
    for name in truth:
        torch.testing.assert_close(found[name], truth[name])


@pytest.mark.parametrize("backend", ["native", "python"])
def test_what_another_thread_does_with_the_model_meanwhile(model, backend):
    """Neither its plain step nor its cached run is a part of this one, and the other way round.

    A bridge marks its modules while it runs, to call no hook twice: two forwards of one at once call some twice or
    never, with or without a cache. So those take turns, and the backwards meet.
    """
    forwards = threading.Lock() if is_bridge(model) else contextlib.nullcontext()

    def cached(seed, between=contextlib.ExitStack, metric=total):
        with between() as forward:

            def after(output):
                forward.close()
                return metric(output)

            return dict(lens.run_with_cache(model, tokens(seed=seed), metric=after, backend=backend)[1].items())

    @contextlib.contextmanager
    def in_turn():
        with contextlib.ExitStack() as forward:
            forward.enter_context(forwards)
            yield forward

    def plain():
        with forwards:
            output = model(tokens(seed=1))
        output.sum().backward()

    first, second, found = cached(0), cached(1), {}

    def meanwhile(output):
        in_threads(plain, lambda: found.update(cached(1, in_turn)))
        return output.sum()

    same(cached(0, metric=meanwhile), first)
    same(found, second)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_holds_a_model_or_what_it_kept(kind):
    model = MODELS[kind]()
    _, cache = lens.run_with_cache(model, tokens(), metric=total, names_filter=RESID)
    held = [weakref.ref(tensor) for tensor in cache.values()]
    held += [weakref.ref(model), *map(weakref.ref, model.hook_dict.values())]
    kept = weakref.ref(*caching_taps._kept[model].values())
    del cache, _
    gc.collect()
    assert {held[place]() for place in range(2)} == {None}
    assert held[-1]() is not None
    assert kept() is not None
    del model
    gc.collect()
    assert [one() for one in (*held, kept)] == [None] * (len(held) + 1)
