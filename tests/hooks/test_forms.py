"""Products with a tensor of one's own, heads, and chosen positions: against the truth, alone and padded, refusals."""

import functools
import math
import re
from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch
from comparison import assert_close_to_truth, assert_same_bits, truth
from models import HookPoint, Repeated, inputs, uneven
from torch import nn

import tlfast
from tlfast import Spec
from tlfast.backends.recipe import Given, Recipe, Seen
from tlfast.hooks.normalizers import AdamNormalizer

pytestmark = pytest.mark.filterwarnings("ignore:capture. no backward reached the points")
B, P, N, D = 4, 7, 2, 3
LENGTHS = (7, 3, 2, 4)
GIVEN = {"one": [1, -1, 0, 3], "two": [[0, 1], [2, -3], [1, 1], [-1, 0]]}
AT = (None, 1, -1, (0, -2), (1, 0, 1), "one", "two")


def model_and_input(dtype=torch.float32, n=B):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, N * D), nn.GELU(), nn.Linear(N * D, 4)).to(dtype), torch.randn(n, P, 6).to(dtype)


def mask_of(side):
    counted = torch.arange(P) if side == "right" else torch.arange(P).flip(0)
    return None if side is None else counted < torch.tensor(LENGTHS)[:, None]


def right(model, x):
    """The first module's output and its gradient."""
    out = model[0](x).detach().requires_grad_()
    (grad,) = torch.autograd.grad(uneven(model[1:](out)), out)
    return grad, out.detach()


def chosen(tensor, at, mask):
    """[B, k, ...], each example by itself: its real tokens are listed, and these are counted."""
    rows = []
    for example in range(len(tensor)):
        real = tensor[example] if mask is None else tensor[example][mask[example]]
        wanted = GIVEN[at][example] if isinstance(at, str) else at
        rows.append(torch.stack([real[k] for k in ([wanted] if isinstance(wanted, int) else wanted)]))
    return torch.stack(rows)


def right_row(grad, factor, spec, mask):
    """The true rows, and how far rounding may move them."""
    dims, one = spec.dims, spec.at is not None and (isinstance(spec.at, int) or spec.at == "one")
    if spec.at is not None:
        grad, factor = (None if part is None else chosen(part, spec.at, mask) for part in (grad, factor))
        mask = None
    if spec.heads is not None:
        grad, factor = (None if part is None else part.reshape(*part.shape[:2], N, D) for part in (grad, factor))
    value, moved = truth(grad, spec.reduce, dims, mask, 1.0, factor)
    gone = one and not {1, 1 - grad.dim()} & {*dims}
    return (value.squeeze(1), moved.squeeze(1)) if gone else (value, moved)


def refs_of(dtype):
    torch.manual_seed(8)
    return [torch.randn(shape).to(dtype) for shape in ((6,), (P, 6), (B, P, 6), (B, 1, 6), (1, P, 1), ())]


@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("heads", [None, (N, D)])
def test_against_the_truth(backend, attach, heads, side):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, x = model_and_input(dtype)
        grad, act = right(model, x)
        mask = mask_of(side)
        refs = refs_of(torch.float32 if dtype == torch.bfloat16 else dtype)
        kept, factors = [], []
        for k, (reduce, over) in enumerate([("none", 1), ("sum", -1), ("mean", (1, -1)), ("last", 1), ("sum", 1)]):
            for j, at in enumerate(AT):
                ref = refs[(k + j) % len(refs)]
                same = dict(reduce=reduce, over=over, dtype=torch.float32, heads=heads, at=at)
                kept.append(Spec("0", of="grad*ref", ref=ref, name=f"{k}.{j}.ref", **same))
                factors.append(ref.expand_as(grad))
                if attach == "tensor":
                    kept.append(Spec("0", of="grad*act", name=f"{k}.{j}.act", **same))
                    factors.append(act)
        kept.append(Spec("0", "norm", -1, torch.float32, heads=heads, at=(0, -1), name="norm"))
        kept.append(Spec("0", "absmax", (1, -1), torch.float32, heads=heads, at=-1, name="absmax"))
        with (
            tlfast.capture(model, kept, rows=B, attach=attach, backend=backend) as cap,
            cap.batch(mask=mask, at=GIVEN, grad_scale=0.5),
        ):
            uneven(model(x)).mul(0.5).backward()
        for spec, factor in zip(kept, [*factors, None, None], strict=True):
            assert_close_to_truth(cap[f"0:{spec.name}"], *right_row(grad, factor, spec, mask), spec)


def some_specs():
    every = [Spec("0", at=at, name=f"at{k}") for k, at in enumerate(AT[1:])]
    every += [Spec("0", "sum", -1, of="grad*ref", heads=(N, D), at=(0, -1), name="ref")]
    return [*every, Spec("0", "sum", (1, -1), of="grad*act", heads=(N, D), name="heads"), Spec("0", "mean", at="bool")]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_is_that_of_its_example_alone(backend, side):
    """Whatever stands beside it, and wherever the padding is: positions are those of its own tokens."""
    model, x = model_and_input()
    mask, ref = mask_of(side), torch.linspace(-1, 1, 6)
    even = torch.zeros(B, P, dtype=torch.bool)
    even[mask] = torch.cat([torch.arange(n) % 2 == 0 for n in LENGTHS])
    settings = dict(rows=B, backend=backend)
    with (
        tlfast.capture(model, some_specs(), **settings) as cap,
        cap.batch(mask, at=GIVEN | {"bool": even}, refs={"0": ref}),
    ):
        model(x).square().sum().backward()
    for example in range(B):
        alone = {name: [given[example]] for name, given in GIVEN.items()}
        here = {"bool": even[example][mask[example]][None]}
        with tlfast.capture(model, some_specs(), **settings) as one, one.batch(at=alone | here, refs={"0": ref}):
            model(x[example][mask[example]][None]).square().sum().backward()
        for name in cap.names:
            torch.testing.assert_close(cap[name][example], one[name][0], rtol=1e-5, atol=1e-6)


def test_both_backends_keep_the_same_bits(native):
    model, x = model_and_input()
    rows = {}
    for backend in ("native", "python"):
        with tlfast.capture(model, some_specs()[:-3], rows=3 * B, backend=backend) as cap:
            for side in ("right", "right", "left"):  # the second by what was learnt
                with cap.batch(mask_of(side), at=GIVEN):
                    uneven(model(x)).backward()
        rows[backend] = {name: cap[name] for name in cap.names}
    for name, kept in rows["native"].items():
        assert_same_bits(kept, rows["python"][name])


def test_one_position_and_a_list_of_one(backend):
    """As many numbers, in other rows: what was learnt of the one is of no use for the other."""
    model, x = model_and_input()
    with tlfast.capture(model, Spec("0", at="where"), rows=9, backend=backend) as cap:
        with cap.batch(at={"where": torch.tensor([2, 2, 2, 2])}):
            uneven(model(x)).backward()
        assert cap["0"].shape == (B, 6)
        text = r"^capture at 0: a row must have shape \[6\] in every step, got \[1, 6\]"
        with pytest.raises(ValueError, match=text), cap.batch(at={"where": [[2]] * B}):
            uneven(model(x)).backward()
        cap.clear()
        with cap.batch(at={"where": torch.tensor([[2], [2], [2], [2]])}):
            uneven(model(x)).backward()
        assert_same_bits(cap["0"], right(model, x)[0][:, 2:3])


@pytest.mark.parametrize("of", ["grad", "grad*ref"])
@pytest.mark.parametrize("calls", ["sum", "last", "stack"])
def test_several_calls(backend, calls, of):
    model, x = nn.Sequential(Repeated()), inputs()
    seen, ref = [], torch.linspace(-1, 1, 6)
    handle = model[0].shared.register_forward_hook(lambda m, a, out: seen.append(out))
    grads = torch.autograd.grad(uneven(model(x)), seen)
    handle.remove()
    given = dict(refs={"0.shared": ref}) if of == "grad*ref" else {}
    spec = Spec("0.shared", "sum", -1, of=of, heads=(2, 3), at=(0, -1), name="kept")
    with tlfast.capture(model, spec, rows=4, calls=calls, backend=backend) as cap, cap.batch(**given):
        uneven(model(x)).backward()
    parts = torch.stack([grad * ref if given else grad for grad in grads], 1)[:, :, [0, -1]].unflatten(-1, (2, 3))
    rows = {"sum": parts.sum(1), "last": parts[:, 0], "stack": parts}[calls].sum(-1)
    torch.testing.assert_close(cap[cap.names[0]], rows, rtol=1e-5, atol=1e-6)


def test_a_batch_that_is_reduced(backend):
    model, x = model_and_input()
    with tlfast.capture(model, Spec("0", "sum", (0, -1), heads=(N, D), at=-1), rows=2, backend=backend) as cap:
        for _ in range(2):
            uneven(model(x)).backward()
    want = right(model, x)[0][:, -1].unflatten(-1, (N, D)).sum((0, -1))
    torch.testing.assert_close(cap["0"], want.expand(2, -1))


@pytest.mark.parametrize("side", ["output", "input"])
def test_patching_a_linear_model_is_exact(backend, side):
    """sum(g * ref) - sum(g * a) is what the metric gains where a is set to ref, at each head and position."""
    torch.manual_seed(4)
    model, clean, corrupted = (
        nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 2)),
        torch.randn(3, 4, 5),
        torch.randn(3, 4, 5),
    )
    weights = torch.randn(2)
    point = "0" if side == "output" else "1"
    of = [
        Spec(point, "sum", -1, of="grad*ref", ref=model[0], heads=(2, 3), side=side),
        Spec(point, "sum", -1, of="grad*act", heads=(2, 3), side=side),
    ]
    with tlfast.capture(model, of, rows=3, backend=backend) as cap, cap.batch(batch=clean):
        (model(corrupted) * weights).sum().backward()
    gains = cap[cap.names[0]] - cap[cap.names[1]]
    for position in range(4):
        for head in range(2):
            patched, there = model[0](corrupted), slice(3 * head, 3 * head + 3)
            patched[:, position, there] = model[0](clean)[:, position, there]
            gained = ((model[1](patched) - model(corrupted)) * weights).sum()
            torch.testing.assert_close(gains[:, position, head].sum(), gained, rtol=1e-4, atol=1e-4)


def test_a_function_of_the_batch(backend):
    """It is called once a step, makes no graph, and may run the captured model."""
    model, x = model_and_input()
    called = []

    def patched_minus_own(batch):
        called.append(torch.is_grad_enabled())
        outputs = model[0](batch["clean"]) - model[0](x)
        return {"0": outputs, "1": model[1](outputs)}

    specs = [Spec(["0", "1"], "sum", -1, of="grad*ref", ref=patched_minus_own), Spec(["0", "1"])]
    batch = {"clean": x + 1}
    with tlfast.capture(model, specs, rows=2 * B, backend=backend) as cap:
        for _ in range(2):
            with cap.batch(batch=batch, ids=range(B)):
                uneven(model(x)).backward()
    assert called == [False, False]
    found = patched_minus_own(batch)
    for point in ("0", "1"):
        torch.testing.assert_close(cap[f"{point}:grad*ref"][B:], (cap[point][B:] * found[point].detach()).sum(-1))


def test_a_point_or_a_column_names_a_ref(backend):
    model, x = model_and_input()
    specs = [Spec("*", of="grad*ref", name="own"), Spec("0", of="grad*ref", ref=torch.ones(6)), Spec("*")]
    refs = {"0": torch.full((6,), 2.0), "1:own": torch.full((1, 1), 3.0), "2": torch.tensor(4.0)}
    with tlfast.capture(model, specs[:1] + specs[2:], rows=4, backend=backend) as cap, cap.batch(refs=refs):
        uneven(model(x)).backward()
    for name, factor in (("0", 2), ("1", 3), ("2", 4)):
        assert_same_bits(cap[f"{name}:own"], cap[name] * factor)
    cap = tlfast.capture(model, specs, rows=4, backend=backend)
    text = r"^batch: refs must give 0:grad\*ref one thing to multiply with, got two\. Say it once"
    with pytest.raises(ValueError, match=text), cap, cap.batch(refs=refs):
        pass


def test_what_a_step_gave_is_gone_behind_it(backend):
    model, x = model_and_input()
    specs = [Spec("0", of="grad*ref"), Spec("1", of="grad*ref", ref=torch.tensor(2.0)), Spec("1"), Spec("2", at="p")]
    with tlfast.capture(model, specs, rows=9, backend=backend) as cap:
        with cap.batch(refs={"0": torch.tensor(3.0)}, at={"p": [0] * B}):
            uneven(model(x)).backward()
        with pytest.raises(ValueError, match=r"^capture at 2: at must be given for each step, got none\."):
            uneven(model(x)).backward()
        with pytest.raises(ValueError, match=r"^batch: refs must have one for 0:grad\*ref, got none"), cap.batch():
            pass
        assert cap.rows == B
        with cap.batch(refs={"0": torch.tensor(5.0)}, at={"p": [1] * B}):
            uneven(model(x)).backward()
    assert_same_bits(cap["1:grad*ref"], cap["1"] * 2)
    torch.testing.assert_close(cap["0:grad*ref"][B:] * 3, cap["0:grad*ref"][:B] * 5)


def test_views_alone_are_read():
    """Nothing of the operands' size is made: of heads, of what broadcasts, of a position that all examples have."""
    grad = torch.randn(B, P, N * D)
    ref = torch.randn(N * D)
    for at in (None, -1):
        read = Recipe("who", "sum", (-1,), None, "grad*ref", (N, D), at).read(Seen(grad), Given(ref=ref))
        assert torch._C._is_alias_of(read.tensor, grad)
        assert torch._C._is_alias_of(read.ref, ref)


# Refusals.

X = torch.zeros(B, P, 6)
OF_REF = functools.partial(Spec, "0", of="grad*ref")
RIGHT, WHERE = mask_of("right"), functools.partial(Spec, "0", at="where")


@pytest.mark.parametrize(
    "spec, given, text",
    [
        (
            OF_REF(ref=torch.ones(5)),
            {},
            (
                "capture at 0:grad*ref: ref must broadcast to a gradient of shape [4, 7, 6], got [5]. Give it the "
                "gradient's sizes, 1 for those it doesn't have."
            ),
        ),
        (
            OF_REF(ref=torch.ones(1, B, P, 6)),
            {},
            (
                "capture at 0:grad*ref: ref must broadcast to a gradient of shape [4, 7, 6], got [1, 4, 7, 6]. Give "
                "it the gradient's sizes, 1 for those it doesn't have."
            ),
        ),
        (
            OF_REF(),
            None,
            (
                "capture at 0:grad*ref: ref must be given for each step, got none. Say cap.batch(refs={...}) around "
                "forward and backward, or Spec(ref=...)."
            ),
        ),
        (
            OF_REF(),
            {},
            "batch: refs must have one for 0:grad*ref, got none. Say refs={'0:grad*ref': tensor}, or Spec(ref=...).",
        ),
        (
            OF_REF(),
            {"refs": {"0": X.long()}},
            "batch at 0:grad*ref: ref must be float32, bfloat16, float16 or float64, got torch.int64. Cast it first.",
        ),
        (
            OF_REF(),
            {"refs": {"0": 3.0}},
            "batch at 0:grad*ref: ref must be a tensor, got float. Pass a plain one.",
        ),
        (
            OF_REF(),
            {"refs": {"0": X.to("meta")}},
            "capture at 0:grad*ref: ref must be on cpu, as grad is, got meta. Move one of them.",
        ),
        (
            OF_REF(),
            {"refs": {"0": X, "1": X}},
            (
                "batch: refs must name columns with of=\"grad*ref\", or points of such, got '1'. Columns with a ref: "
                "0:grad*ref."
            ),
        ),
        (
            Spec("0"),
            {"refs": {"0": X}},
            (
                "batch: refs must name columns with of=\"grad*ref\", or points of such, got '0'. Columns with a ref: "
                "there is none."
            ),
        ),
        (
            Spec("0"),
            {"batch": X},
            (
                "batch: batch must be left out where no Spec has a function for its ref, got a Tensor. Or say "
                "ref=function."
            ),
        ),
        (
            OF_REF(ref=len),
            {},
            (
                "batch: batch must be given for the function that is the ref of 0:grad*ref, got none. Say "
                "cap.batch(batch=...)."
            ),
        ),
        (
            OF_REF(ref=len),
            {"batch": X},
            (
                "batch at 0:grad*ref: the function that is ref must return a tensor, or a mapping of one for each "
                "point, got a int. Check it."
            ),
        ),
        (
            OF_REF(ref=dict),
            {"batch": {"1": X}},
            (
                "batch at 0:grad*ref: the function that is ref must return a tensor for 0, got none. Add it to the "
                "mapping."
            ),
        ),
        (
            OF_REF(ref=dict),
            {"batch": {"0": X, "1": X}},
            (
                "batch: the function that is ref must return tensors for the points of its specs alone, got '1'. "
                "Leave the others out."
            ),
        ),
        (
            Spec("0", heads=(4, 2)),
            {},
            (
                "capture at 0: heads must be (n, d) with n * d the last dimension, 6, got (4, 2). Check the point, "
                "and the model's number of heads."
            ),
        ),
        (
            Spec("0", at=-8),
            {},
            (
                "capture at 0: at must be positions of dimension 1 of a gradient of shape [4, 7, 6], got -8. Check "
                "them: the last one is -1."
            ),
        ),
        (
            Spec("0", at=(0, 7)),
            {},
            (
                "capture at 0: at must be positions of dimension 1 of a gradient of shape [4, 7, 6], got 7. Check "
                "them: the last one is -1."
            ),
        ),
        (
            Spec("0", at=2),
            {"mask": RIGHT},
            (
                "batch at 0: at must be a real position of each example, got 2 for example 2, which has 2 real "
                "tokens. Check both, and the mask."
            ),
        ),
        (
            Spec("0", at=(0, -4)),
            {"mask": RIGHT},
            (
                "batch at 0: at must be a real position of each example, got -4 for example 1, which has 3 real "
                "tokens. Check both, and the mask."
            ),
        ),
        (
            Spec("0", at=-1),
            {"mask": RIGHT[:, 0]},
            "batch at 0: mask must be [B, P] where there is an at=, got [4]. Positions are dimension 1.",
        ),
        (
            Spec("0", at=-1),
            {"mask": RIGHT[:, :4]},
            (
                "capture at 0: mask must have the leading sizes of a gradient of shape [4, 7, 6], got [4, 4]. Pass "
                "the attention mask of this very batch. It covers the positions that a model adds, too: 3 virtual "
                "tokens?"
            ),
        ),
        (
            WHERE(),
            None,
            (
                "capture at 0: at must be given for each step, got none. Say cap.batch(at={...}) around forward and "
                "backward."
            ),
        ),
        (WHERE(), {}, "batch: at must have 'where', of 0, got none. Say at={'where': positions}."),
        (
            WHERE(),
            {"at": {"where": [0] * B, "there": 1}},
            (
                "batch: at must have names that are the at= of a Spec (where), got 'there'. Leave it out, or say at= "
                "in the Spec."
            ),
        ),
        (
            WHERE(),
            {"at": {"where": [0, 0, 0]}},
            "capture at 0: at must have positions for 4 examples, got 3. Give those of this very batch.",
        ),
        (
            WHERE(),
            {"mask": RIGHT, "at": {"where": [0, 0, 0]}},
            "batch at 0: at must have positions for 4 examples, as the mask has, got 3. Give those of this very batch.",
        ),
        (
            WHERE(),
            {"at": {"where": [0, 0, 9, 0]}},
            (
                "capture at 0: at must be positions of dimension 1 of a gradient of shape [4, 7, 6], got 9 for "
                "example 2. Check them: the last one is -1."
            ),
        ),
        (
            WHERE(),
            {"at": {"where": [0.5] * B}},
            (
                "batch at 0: at['where'] must be whole numbers [B] or [B, k], or bool [B, P], got torch.float32 [4]. "
                "Give a position for each example."
            ),
        ),
        (
            WHERE(),
            {"at": {"where": "answer"}},
            (
                "batch at 0: at['where'] must be whole numbers [B] or [B, k], or bool [B, P], got str. Give a "
                "tensor, or lists of whole numbers."
            ),
        ),
        (
            WHERE(),
            {"mask": RIGHT, "at": {"where": mask_of("left")}},
            (
                "batch at 0: at must choose real positions alone, got position 4 of example 1, which is padding. "
                "Check both, and the mask."
            ),
        ),
        (
            WHERE(),
            {"mask": RIGHT, "at": {"where": RIGHT[:, 1:]}},
            "batch at 0: at must have the shape [4, 7] of the mask, got [4, 6]. Give that of this very batch.",
        ),
        (
            Spec("0", at="a_mask"),
            {"at": {"a_mask": RIGHT.int()}},
            (
                "batch at 0: at['a_mask'] must be bool where its name ends in mask, got torch.int32. Use .bool(), or "
                "another name."
            ),
        ),
    ],
)
def test_refusals(backend, spec, given, text):
    model, x = model_and_input()
    cap = tlfast.capture(model, spec, rows=B, backend=backend)
    step = nullcontext() if given is None else cap.batch(**given)
    with pytest.raises((ValueError, TypeError)) as error, cap, step:
        uneven(model(x)).backward()
    assert str(error.value) == text
    assert cap.rows == 0


def test_positions_of_a_gradient_that_has_none(backend):
    model = nn.Sequential(HookPoint(), nn.Flatten(0))
    cap = tlfast.capture(model, Spec("1", at=0), rows=24, backend=backend)
    text = r"^capture at 1: a gradient must have positions as dimension 1, got \[24\]\. Leave at= out\.$"
    with pytest.raises(ValueError, match=text), cap:
        model(torch.randn(4, 6, requires_grad=True)).sum().backward()


@pytest.mark.parametrize(
    "given, text",
    [
        (
            {"ref": X},
            'ref must be left out unless of="grad*ref", got one with of=\'grad\'. Say of="grad*ref", or leave it out.',
        ),
        (
            {"of": "grad*ref", "ref": X.int()},
            "ref must be float32, bfloat16, float16, float64, got torch.int32. Cast it first.",
        ),
        (
            {"of": "grad*ref", "ref": 3},
            "ref must be a tensor or a function, got int. Pass a tensor, or a function of the step's batch.",
        ),
        (
            {"of": "grad*ref", "reduce": "norm"},
            (
                "reduce must be none, sum, mean or last of products, got 'norm'. Keep each product by \"none\", and "
                "reduce these by reduce_into."
            ),
        ),
        (
            {"heads": (2, 0)},
            "heads must be (n, d), two positive numbers, got (2, 0). Say heads=(n_heads, d_head).",
        ),
        (
            {"heads": 2},
            "heads must be (n, d), two positive numbers, got 2. Say heads=(n_heads, d_head).",
        ),
        (
            {"at": ()},
            (
                "at must be a position, a list of them, or the name by which each step gives them, got (). Those of "
                "each example go into cap.batch(at={name: ...})."
            ),
        ),
        (
            {"at": True},
            (
                "at must be a position, a list of them, or the name by which each step gives them, got True. Those "
                "of each example go into cap.batch(at={name: ...})."
            ),
        ),
        (
            {"at": [0, 1.0]},
            (
                "at must be a position, a list of them, or the name by which each step gives them, got [0, 1.0]. "
                "Those of each example go into cap.batch(at={name: ...})."
            ),
        ),
    ],
)
def test_specs_that_are_none(given, text):
    for who, make in (
        ("Spec", Spec),
        ("capture", lambda points, **given: tlfast.capture(nn.Linear(2, 2), points, rows=1, **given)),
    ):
        with pytest.raises((ValueError, TypeError)) as error:
            make("", **given)
        assert str(error.value) == f"{who}: {text}"


def test_settings_beside_specs():
    beside = {
        "reduce": "mean", "over": -1, "dtype": torch.float16, "output": 0, "of": ["grad"], "side": "input", "ref": X,
        "heads": (1, 2), "at": 0, "per": "token", "encoding": "int8",
        "project": 4, "bias": True, "normalizer": AdamNormalizer(torch.ones(2, 2)), "summed": True,
    }  # fmt: skip
    assert {"points", *beside} == {field.name for field in fields(Spec)} - {"name", "queries"}
    for argument, value in beside.items():
        got = "one" if argument in ("ref", "normalizer") else repr(value)
        text = f"capture: {argument} must be left out where points are Specs, got {got} beside them. Say it in each Sp"
        for points in (Spec(""), [Spec(""), Spec("", "sum")]):
            with pytest.raises(ValueError, match="^" + re.escape(text)):
                tlfast.capture(nn.Linear(2, 2), points, rows=1, **{argument: value})
    defaults = {"reduce": "none", "over": "pos", "dtype": None, "output": None, "of": "grad", "side": "output"}
    assert tlfast.capture(nn.Linear(2, 2), Spec("", "sum"), rows=1, **defaults).wanted[""][1].reduce == "sum"
    sources = tlfast.capture(nn.Linear(2, 2), "", of=("grad", "grad*ref"), ref=X, heads=[1, 2], at=range(2), rows=1)
    (_, plain), (_, product) = sources.wanted.values()
    assert plain.ref is None
    assert product.ref is X
    assert (plain.heads, product.at) == ((1, 2), (0, 1))
    assert math.prod(product.heads) == 2


@pytest.mark.parametrize("inner", [{}, {"at": {"p": [1, 1]}}], ids=["nothing", "positions"])
def test_a_batch_inside_another_that_gives_columns_something(backend, inner):
    model, x = model_and_input(n=2)
    with tlfast.capture(model, Spec("0", at="p"), rows=9, backend=backend) as cap, cap.batch(at={"p": [0, 1]}):
        uneven(model(x)).backward()
        given = {"at": {"p": torch.ones(2, P, dtype=torch.bool)}} | inner
        rule = "batch: the block must be outside of another batch of this capture"
        with pytest.raises(RuntimeError, match=rule), cap.batch(**given):
            pass
    assert cap.rows == 2


def test_a_ref_that_is_the_rows_is_refused_at_every_step(backend):
    model, x = model_and_input()
    with tlfast.capture(model, Spec("0", of="grad*ref"), rows=3 * B, backend=backend) as cap:
        with cap.batch(refs={"0": torch.ones(B, P, N * D)}):
            uneven(model(x)).backward()
        with (
            pytest.raises(ValueError, match="out must not share memory with ref"),
            cap.batch(refs={"0": cap["0:grad*ref"]}),
        ):
            uneven(model(x)).backward()
    assert cap.rows == B


def test_positions_of_no_examples(backend):
    model, x = model_and_input(n=2)
    with tlfast.capture(model, [Spec("0", at="one"), Spec("0", at="two", name="two")], rows=9, backend=backend) as cap:
        for mask in (None, torch.ones(0, P, dtype=torch.bool)):
            positions = {"one": torch.zeros(0, dtype=torch.long), "two": torch.zeros(0, 2, dtype=torch.long)}
            with cap.batch(mask=mask, at=positions):
                uneven(model(x[:0])).backward()
        with cap.batch(at={"one": [0, 1], "two": [[0, 1], [1, 2]]}):
            uneven(model(x)).backward()
    assert cap.rows == 2
