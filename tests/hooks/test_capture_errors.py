"""Capture refuses what is wrong by name, keeps committed rows, and leaves no hook behind."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits, assert_untouched
from models import SETUPS, Chain, activation_gradients, hooks_left, inputs, uneven

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"

ARGUMENTS = {
    "rows=0": ({"rows": 0}, ValueError, "capture: rows must be a positive number, got 0. Give the rows to hold."),
    "rows=True": ({"rows": True}, ValueError, "capture: rows must be a positive number, got True. "),
    "rows=2.5": ({"rows": 2.5}, ValueError, "capture: rows must be a positive number, got 2.5. "),
    "reduce": (
        {"reduce": "average"}, ValueError,
        "capture: reduce must be one of none, sum, mean, last, norm, absmax, got 'average'. Check the spelling.",
    ),
    "over": ({"over": "width", "reduce": "sum"}, ValueError, 'capture: over must be "batch", "pos" or dimension num'),
    "dtype": (
        {"dtype": torch.int8}, ValueError,
        "capture: dtype must be one of float32, bfloat16, float16, float64 or None, got torch.int8. ",
    ),
    "attach": (
        {"attach": "node"}, ValueError,
        "capture: attach must be one of auto, tensor, full, got 'node'. Check the spelling.",
    ),
    "backend": ({"backend": "cuda"}, ValueError, "capture: backend must be one of auto, native, python, got 'cuda'. "),
    "calls": ({"calls": "first"}, ValueError, "capture: calls must be one of raise, sum, last, stack, got 'first'. "),
    "missing": ({"missing": "zero"}, ValueError, "capture: missing must be one of raise, nan, got 'zero'. "),
    "points": ({"points": "hok"}, ValueError, "capture: points must match a module, got 'hok'. Nearest: hook."),
    "no points": ({"points": []}, ValueError, "capture: points must name at least one module, got []. "),
    "mixed points": ({"points": [tlfast.Spec("hook"), "tanh"]}, TypeError, "capture: points must be all names or all "),
    "two outputs": (
        {"points": [tlfast.Spec("hook"), tlfast.Spec("hook", output=1)]}, ValueError,
        "capture: output must be the same in all specs of hook, got [None, 1]. Use one capture for each output.",
    ),
    "one name twice": (
        {"points": [tlfast.Spec("hook"), tlfast.Spec("hook")]}, ValueError,
        "capture: specs must have columns of different names, got hook:none. Give Spec a name=.",
    ),
    "model": ({"model": "gpt2"}, TypeError, "capture: model must be an nn.Module, got str. Pass the model."),
}  # fmt: skip


@pytest.mark.parametrize("wrong, kind, text", ARGUMENTS.values(), ids=ARGUMENTS)
def test_bad_arguments(backend, wrong, kind, text):
    model = Chain()
    arguments = {"model": model, "points": "hook", "rows": 4, "backend": backend} | wrong
    with pytest.raises(kind) as error:
        tlfast.capture(arguments.pop("model"), arguments.pop("points"), **arguments)
    assert str(error.value).startswith(text)
    assert not hooks_left(model)


def test_unknown_column(backend):
    cap = tlfast.capture(Chain(), ["hook", "tanh"], rows=4, backend=backend)
    with pytest.raises(KeyError, match=r"capture: a name must be one of tanh, hook, got 'hok'\. See cap\.names\."):
        cap["hok"]


def test_entered_twice(backend):
    setup = SETUPS["chain"]()
    cap = tlfast.capture(setup.model, "hook", rows=4, backend=backend)
    with cap:
        setup.loss().backward()
    with pytest.raises(RuntimeError, match="capture: a Capture must be entered once, got a second time"):
        cap.__enter__()
    assert not hooks_left(setup.model)
    assert cap.rows == 3


def fails(setup, backend, attach, kind, text, step, **options):
    """A good step, ``step(cap)`` that must raise, a good step: the rows of the good ones are there and no hook is."""
    setup.points = ["tanh", "hook"]  # the second fires first, in both attachments
    right = activation_gradients(setup)
    options = {"rows": 7, "attach": attach, "backend": backend} | options
    with tlfast.capture(setup.model, setup.points, **options) as cap:
        setup.loss().backward()
        with pytest.raises(kind) as error:
            step(cap)
        assert cap.rows == 3
        setup.loss().backward()
    assert str(error.value).startswith(text), error.value
    assert not hooks_left(setup.model)
    for name in setup.points:
        assert_same_bits(cap[name], right[name][0].repeat(2, 1, 1), name)
        assert cap._columns[name].rows[6:].isnan().all() or options["rows"] == 6


def test_backward_outside_of_batch_sizes(backend, attach):
    setup = SETUPS["chain"]()

    def step(cap):
        with cap.batch(ids=[1, 2]):
            setup.loss().backward()

    text = "capture at hook: a step must have the 2 rows that batch() announced, got 3. Check mask and ids; a reduced b"
    fails(setup, backend, attach, ValueError, text, step)


def test_mask_that_does_not_fit_the_gradient(backend, attach):
    setup = SETUPS["chain"]()

    def step(cap):
        with cap.batch(mask=torch.ones(3, 5, dtype=torch.bool)):
            setup.loss().backward()

    text = "capture at hook: mask must have the leading sizes of a gradient of shape [3, 4, 6], got [3, 5]. Pass the"
    fails(setup, backend, attach, ValueError, text, step)


def test_batch_without_backward(backend, attach):
    setup = SETUPS["chain"]()

    def step(cap):
        with cap.batch():
            setup.loss()

    fails(setup, backend, attach, RuntimeError, "batch: the block must hold a forward and a backward, got no co", step)


def test_full_ring(backend, attach):
    setup = SETUPS["chain"]()
    x = inputs(5)
    text = "capture at hook: rows must hold the 3 rows written and 5 more, got 6. Give capture more rows, or read them"
    fails(setup, backend, attach, RuntimeError, text, lambda cap: uneven(setup.model(x)).backward(), rows=6)


def test_rows_of_another_shape(backend, attach):
    setup = SETUPS["chain"]()
    text = "capture at hook: a row must have shape [4, 6] in every step, got [5, 6]. Pad the batches to one length, red"
    x = inputs(3, 5)
    fails(setup, backend, attach, ValueError, text, lambda cap: uneven(setup.model(x)).backward())


def test_a_mask_without_the_positions_that_a_model_adds(backend, attach):
    model, mask = Chain(), torch.ones(3, 4, dtype=torch.bool)
    with tlfast.capture(model, "hook", reduce="sum", rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(ValueError, match="mask") as error, cap.batch(mask=mask):
            uneven(model(inputs(3, 6))).backward()
        with cap.batch(mask=mask):
            uneven(model(inputs(3, 4))).backward()
    assert cap.rows == 3
    assert str(error.value) == (
        "capture at hook: mask must have the leading sizes of a gradient of shape [3, 6, 6], got [3, 4]. Pass the "
        "attention mask of this very batch. It covers the positions that a model adds, too: 2 virtual tokens?"
    )


@pytest.mark.filterwarnings(NO_ROWS)
def test_points_with_different_numbers_of_rows(backend, attach):
    model, x = Chain(), inputs()
    with tlfast.capture(model, ["flat", "hook"], rows=40, attach=attach, backend=backend) as cap:
        with pytest.raises(
            ValueError, match="capture at hook: a step must have the same number of rows at every point"
        ):
            uneven(model(x)).backward()
        assert cap.rows == 0
    # What fired before the error lies beyond the rows that count.
    assert cap["flat"].shape[0] == 0


def test_error_in_the_model_and_in_backward(backend, attach):
    setup = SETUPS["chain"]()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError("in backward")

    def in_the_middle(cap):
        def hook(module, args, output):
            return Fails.apply(output)

        handle = setup.model.tanh.register_forward_hook(hook)
        try:
            setup.loss().backward()
        finally:
            handle.remove()

    def in_forward(cap):
        setup.model(torch.zeros(3, 4, 5))

    fails(setup, backend, attach, ZeroDivisionError, "in backward", in_the_middle)
    fails(setup, backend, attach, RuntimeError, "mat1 and mat2", in_forward)


def test_error_inside_the_with_leaves_no_hook(backend, attach):
    setup = SETUPS["chain"]()
    right = activation_gradients(setup)["hook"][0]
    cap = tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend)

    def interrupted():
        with cap:
            setup.loss().backward()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not hooks_left(setup.model)
    assert_rows(cap, "hook", right)
    setup.loss().backward()  # no tap fires any more
    assert_rows(cap, "hook", right)


def test_clear_inside_a_backward(backend, attach):
    setup = SETUPS["chain"]()
    found = []

    def clear(grad):
        try:
            cap.clear()
        except RuntimeError as error:
            found.append(str(error))

    handle = setup.model.tanh.register_forward_hook(lambda m, a, out: out.register_hook(clear) and None)
    with tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    handle.remove()
    text = "clear: the capture must be at rest, got a running backward. Call it after backward() returned."
    assert found == [text]
    assert cap.rows == 3


def test_aborted_rows_between_good_ones_are_not_counted(backend, attach):
    # A failed step writes into its rows before it fails; the next step takes them over.
    setup = SETUPS["chain"]()
    right = activation_gradients(setup)
    with tlfast.capture(setup.model, ["hook", "tanh"], rows=8, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        out = setup.model(inputs())
        out.register_hook(lambda g: torch.full_like(g, 1e6))
        with pytest.raises(ValueError, match="batch"), cap.batch(mask=torch.ones(3, 9, dtype=torch.bool)):
            out.sum().backward()
        setup.loss().backward()
    assert_same_bits(cap["hook"], right["hook"][0].repeat(2, 1, 1))
    assert_untouched(cap._columns["hook"].rows, 6)
