"""Ours and theirs differ in nothing that a caller can tell, over every kind of model that can be made tiny.

A drawn part of the kinds runs with the other tests; `make test-lens-all` takes all of them.
"""

from __future__ import annotations

import inspect
import re
import warnings

import pytest
from lens_calls import calls, compared, layer_calls, metric_calls, refusals
from lens_kinds import DRAWN, NOT_BUILT, architectures, compatible, example, kinds

KINDS = kinds()


def pytest_generate_tests(metafunc):
    if "kind" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-kind", default=False)
        metafunc.parametrize("kind", [kind for kind in KINDS if every or kind in DRAWN])


@pytest.fixture
def made(kind):
    """A model of each kind, and what a call of it takes; a bridge wires some hooks of its own when it first runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TransformerLens' and transformers' own affairs
        model = KINDS[kind]()
        args, kwargs, loss = example(model)
        model.run_with_cache(*args, **kwargs)
    return model, args, kwargs, loss


# With remove_batch_dim 2.18.0 slices a dimension that the points of experts don't have; ours keeps the tensors.
THEIR_FAULT = re.compile(
    r"one example; ours, \w+: error: \('IndexError', 'list assignment index out of range'\) and None"
)


def same(model, found):
    """Make the calls in each way; fail with all differences. How many of the calls gave gradients."""
    wrong, with_gradients = compared(model, found)
    wrong = [difference for difference in wrong if not THEIR_FAULT.search(difference)]
    assert not wrong, "\n".join([f"{len(wrong)} differences, of which", *wrong[:100]])
    return with_gradients


def test_what_a_call_gives(made):
    assert same(made[0], calls(*made)) or hookless_norms(*made)


def hookless_norms(model, args, kwargs, loss):
    """Whether theirs fails with backward hooks on all points: norms of some bridges do, without weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model.run_with_cache(*args, **kwargs, **(loss or {}), incl_bwd=True)
        except AttributeError as error:
            return "has no attribute 'weight'" in str(error)
        except (ValueError, RuntimeError):  # it has no loss
            return False
    return False


def test_what_a_call_refuses(made):
    same(made[0], refusals(*made))


def test_calls_of_some_layers(made):
    model = made[0]
    methods = model.forward, model.run_with_cache
    if any("stop_at_layer" in inspect.signature(method).parameters for method in methods):
        same(model, layer_calls(*made[:3]))


def test_gradients_of_a_metric(made):
    if hasattr(made[0], "get_caching_hooks") and not hookless_norms(*made):
        same(made[0], metric_calls(*made[:3]))


def test_compatibility_mode(made):
    model = compatible(made[0])
    if model is not None:
        # Which names there are, and in which order, is what this mode changes.
        filters = ("all", "a name", "a list", "a predicate", "one example", "a list of one example")
        found = calls(model, *made[1:])
        same(model, {name: call for name, call in found.items() if name.split(", ")[1] in filters})


def test_every_architecture_is_built_or_what_it_needs_is_said():
    known = architectures()
    assert not known or set(NOT_BUILT) <= set(known)
    assert set(known) - set(NOT_BUILT) <= set(KINDS)
