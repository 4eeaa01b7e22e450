"""Recipes inside LXT's rules, patched into models of transformers: what the plain formulas give there."""

import pytest
import torch
from relevance_rules import CASES, patch, small

from tlfast.recipes import attribution_patching, eap, fit_jacobian_lens, saliency

pytestmark = pytest.mark.peers("lxt")


@pytest.fixture(params=CASES, ids="-".join)
def case(request, monkeypatch):
    """A small model under rules, the name of its layers, a metric, and whether the attention is held still."""
    kind, rules = request.param
    model, weights = small(kind), torch.linspace(-1, 1, 23).cos()
    patch(monkeypatch, kind, rules)
    layers = "transformer.h" if kind == "gpt2" else "model.layers"
    return model, layers, lambda logits: logits[:, -1] @ weights, rules == "cp_LRP"


def pairs():
    return torch.randint(1, 23, (2, 3, 6), generator=torch.Generator().manual_seed(2))


def outputs(model, names, ids):
    """What modules put out, with their graph, and the logits."""
    kept = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: kept.update({name: out}))
        for name in names
    ]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return {name: out[0] if isinstance(out, tuple) else out for name, out in kept.items()}, logits


def assert_close(found, right):
    right = right.detach()
    torch.testing.assert_close(found, right, rtol=0, atol=256 * 2**-24 * float(right.abs().max()))


def test_attribution_patching_and_edges(case):
    model, layers, metric, held_still = case
    (clean, corrupted), names = pairs(), [f"{layers}.{i}.mlp" for i in range(2)]
    there, _ = outputs(model, names, clean)
    here, logits = outputs(model, names, corrupted)
    grads = torch.autograd.grad(metric(logits).sum(), [here[name] for name in names])
    right = {n: (g * (there[n] - here[n])).sum((1, 2)) for n, g in zip(names, grads, strict=True)}
    found = attribution_patching(model, clean, corrupted, lambda logits, pairs: metric(logits), names, "node")
    for name in names:
        assert_close(found[name], right[name])
    if held_still:  # queries and keys, by which it learns whose the columns of a projection are
        with pytest.raises(ValueError, match="whose queries, keys and values can't be told apart"):
            eap(model, clean, corrupted, lambda logits, pairs: metric(logits))
        return
    nodes = eap(model, clean, corrupted, lambda logits, pairs: metric(logits)).nodes()
    for i, name in enumerate(names):
        assert_close(torch.as_tensor(nodes[f"m{i}"]), right[name].mean())


def test_saliency(case):
    model, _, metric, _ = case
    ids = pairs()[0]
    found = saliency(model, ids.tolist(), lambda logits, batch: metric(logits))
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    (grad,) = torch.autograd.grad(metric(model(inputs_embeds=given).logits).sum(), given)
    assert_close(torch.stack([torch.as_tensor(scores) for scores in found.scores]), (given * grad).sum(-1))


@pytest.mark.parametrize("dim_batch", [1, 5])
def test_a_jacobian_lens(case, dim_batch):
    """Activation functions run inside of LXT's own there, whose derivative is another."""
    model, layers, *_ = case
    ids = pairs()[0][:1]
    lens = fit_jacobian_lens(model, ids.tolist(), skip_first_positions=1, dim_batch=dim_batch, corpus="one")
    kept, _ = outputs(model, [f"{layers}.0", f"{layers}.1"], ids)
    first, last = kept.values()
    rows = [
        torch.autograd.grad(last[0, 1:-1, k].sum(), first, retain_graph=True)[0][0, 1:-1].mean(0) for k in range(16)
    ]
    assert_close(lens.jacobians[0].float(), torch.stack(rows))
