"""A capture inside LXT's rules, patched into models of transformers: gradients as these models then have them."""

from fnmatch import fnmatchcase

import pytest
import torch
from models import Setup, activation_gradients, uneven
from relevance_rules import CASES, HELD, patch, points, small

import tlfast
from tlfast import Spec
from tlfast.dataset import open_dataset

pytestmark = pytest.mark.peers("lxt")
MLP = {"gpt2": ("transformer.h.1.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.h.1.ln_2")}
GATED = ("model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.layers.1.input_layernorm")


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


def modules(model, patterns):
    """The names that globs mean, whose stars cross no dots."""
    same = [(name, pattern) for name, _ in model.named_modules() for pattern in patterns]
    return list(dict.fromkeys(n for n, p in same if fnmatchcase(n, p) and n.count(".") == p.count(".")))


def batch(side):
    """Three examples of 5, 3 and 6 tokens, and their mask."""
    ids = torch.randint(1, 23, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[5], [3], [6]])
    return ids, mask.flip(1) if side == "left" else mask


def test_gradients_at_every_kind_of_module(case, backend, attach, monkeypatch):
    model, (ids, _) = small(case[0]), batch("right")
    names = modules(model, points(*case))
    setup = Setup(model, names, lambda: uneven(model(ids).logits))
    plain = activation_gradients(setup)
    cap = tlfast.capture(model, points(*case), rows=4, attach=attach, backend=backend)  # made before, entered inside
    patch(monkeypatch, *case)
    right = activation_gradients(setup)
    with cap:
        setup.loss().backward()
    assert sorted(cap.names) == sorted(names)
    for name in names:
        assert_close(cap[name], right[name][0])
    last = "transformer.ln_f" if case[0] == "gpt2" else "model.norm"
    changed = [name for name in names if not torch.allclose(plain[name][0], right[name][0], rtol=0.1)]
    assert changed == [name for name in names if name != last]  # behind it there is no rule


@pytest.mark.parametrize("case", [("llama", "cp_LRP"), ("qwen3", "cp_LRP")], ids="-".join)
def test_what_a_rule_holds_still_is_told(case, backend, monkeypatch):
    model, (ids, _) = small(case[0]), batch("right")
    patch(monkeypatch, *case)
    with (
        pytest.raises(RuntimeError, match=r"every point must fire .*q_proj.* does not go through the output"),
        tlfast.capture(model, [*points(*case), *HELD], rows=3, backend=backend),
    ):
        uneven(model(ids).logits).backward()


@pytest.mark.parametrize("side", ["left", "right"])
def test_weights_products_and_tokens(case, backend, side, monkeypatch):
    """Each example alone, whichever side its padding is on: what autograd gives for its weights, inputs and tokens."""
    model, (ids, mask) = small(case[0]), batch(side)
    first, second, _ = MLP.get(case[0], GATED)
    patch(monkeypatch, *case)
    specs = [
        Spec([first, second], of="weight"),
        Spec([first, second], of="weight", per="token", name="factors"),
        Spec(second, "sum", (1, 2), of="grad*act", side="input"),
        Spec(first, of="act", per="token"),
        Spec(first, at=-1),
    ]
    with tlfast.capture(model, specs, rows=3, backend=backend) as cap, cap.batch(mask):
        logits = model(ids, attention_mask=mask.long()).logits
        uneven(logits).backward()
    factors, whose = {name: cap[f"{name}:factors"] for name in (first, second)}, cap.where(f"{first}:factors")
    for example in range(3):
        kept = {}
        handles = [
            model.get_submodule(first).register_forward_hook(lambda m, args, out, kept=kept: kept.update(first=out)),
            model.get_submodule(second).register_forward_pre_hook(
                lambda m, args, kept=kept: kept.update(given=args[0])
            ),
        ]
        logits = model(ids, attention_mask=mask.long()).logits
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(uneven(logits), [kept["first"], kept["given"]])
        real = mask[example]
        here = whose[0] == example
        assert_close(cap[first][example], grads[0][example, real][-1])
        assert_close(cap[f"{first}:act"][here], kept["first"][example, real])
        assert_close(cap[f"{second}:input:grad*act"][example], (grads[1] * kept["given"])[example, real].sum())
        g = factors[first][here][:, : grads[0].shape[-1]]
        assert_close(g, grads[0][example, real])
        for name in (first, second):
            n_outputs = cap[f"{name}:weight"].shape[1]
            g, a = factors[name][here].split([n_outputs, factors[name].shape[1] - n_outputs], 1)
            assert_close(g.T @ a, cap[f"{name}:weight"][example])


def assert_close(found, right):
    """Equal but for the rounding of sums of some dozens of float32 products."""
    right = right.detach()
    torch.testing.assert_close(found, right, rtol=0, atol=64 * 2**-24 * float(right.abs().max()))


def test_the_weight_gradient_of_a_whole_batch(case, backend, monkeypatch):
    """Without padding the rows of all examples add up to what autograd gives a weight."""
    model, (ids, _) = small(case[0]), batch("right")
    names = MLP.get(case[0], GATED)
    patch(monkeypatch, *case)
    with tlfast.capture(model, Spec(list(names), of="weight"), rows=3, backend=backend) as cap:
        uneven(model(ids).logits).backward()
    grads = torch.autograd.grad(uneven(model(ids).logits), [model.get_submodule(name).weight for name in names])
    for name, grad in zip(names, grads, strict=True):
        found = cap[f"{name}:weight"].sum(0)
        assert_close(found, grad if found.shape == grad.shape else grad.T)


def test_a_dataset_of_relevance(case, tmp_path, monkeypatch):
    model, (ids, mask) = small(case[0]), batch("right")
    texts, first = [row[real].tolist() for row, real in zip(ids, mask, strict=True)], MLP.get(case[0], GATED)[0]
    patch(monkeypatch, *case)
    tlfast.collect(model, texts, tmp_path / "ds", points=first, of="grad*act", per="token", reduce="sum", over=-1,
                   dtype=torch.float32, progress=False)  # fmt: skip
    ds = open_dataset(tmp_path / "ds")
    for example, text in enumerate(texts):
        kept = {}
        handle = model.get_submodule(first).register_forward_hook(lambda m, args, out, kept=kept: kept.update(out=out))
        logits = model(torch.tensor([text])).logits
        handle.remove()
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(text[1:]), reduction="sum")
        (grad,) = torch.autograd.grad(loss, kept["out"])
        assert_close(ds[f"{first}:grad*act"][example], (grad * kept["out"])[0].sum(-1))
