"""What is known to go wrong in others' code of these studies: each fault is made here, and isn't ours."""

from __future__ import annotations

import torch
from stream_model import LAYERS, WIDTH, Stream, difference, pairs
from tiny_models import N_TOKENS, tiny_model
from torch import nn

from tlfast.recipes import attribution_patching, eap, integrated_gradients, saliency

EPS = torch.finfo(torch.float32).eps


def in_bfloat16(terms):
    total = torch.zeros((), dtype=torch.bfloat16)
    for term in terms.flatten().bfloat16():
        total += term
    return total.double()


def embedded(model, tokens, metric):
    """Embeddings [1, P, D] of a prompt and their gradient, in the model's dtype."""
    e = model.get_input_embeddings()(tokens).detach().requires_grad_()
    metric(model(inputs_embeds=e).logits).sum().backward()
    model.zero_grad()
    return e.detach(), e.grad


def test_sums_are_not_made_in_bfloat16():
    model, draw = tiny_model(dtype=torch.bfloat16).eval(), torch.Generator().manual_seed(1)
    clean, corrupted = (torch.randint(N_TOKENS, (1, 40), generator=draw) for _ in range(2))
    base, grad = embedded(model, corrupted, difference)
    terms = grad.double() * (embedded(model, clean, difference)[0].double() - base.double())
    node = attribution_patching(model, clean, corrupted, difference, "transformer.wte")["transformer.wte"]
    tokens = saliency(model, corrupted, lambda logits, batch: difference(logits)).scores[0]
    whole, by_token = terms.sum(), (grad.double() * base.double())[0]
    assert node.dtype == tokens.dtype == torch.float32
    error = abs(float(node[0].double() - whole))
    assert error <= terms.numel() * EPS * float(terms.abs().sum())
    assert abs(float(in_bfloat16(terms) - whole)) > 100 * error
    worst = (tokens.double() - by_token.sum(1)).abs().max()
    assert worst <= 40 * EPS * by_token.abs().sum(1).max()
    assert max(abs(float(in_bfloat16(row) - row.sum())) for row in by_token) > 100 * float(worst)


def test_steps_of_a_path_are_not_added_up_in_bfloat16():
    torch.manual_seed(0)
    layer, x = nn.Linear(4, 1, bias=False).bfloat16(), torch.rand(1, 4).bfloat16()
    found = integrated_gradients(layer, x, lambda y, given: y[:, 0], steps=256)
    truth = (layer.weight.detach().float() * x.float())[0]  # of a linear model any number of steps is exact
    assert torch.allclose(found.scores[0], truth, rtol=1e-5)
    added = torch.zeros(4, dtype=torch.bfloat16)
    for _ in range(256):
        added += layer.weight.detach()[0] / 256
    assert not torch.allclose((added * x[0]).float(), truth, rtol=1e-3)


def test_the_scale_of_a_norm_is_that_of_the_run_and_not_of_the_gradients():
    """A writer's part of a normed stream is divided by the stream's own deviation in the corrupted run."""
    model, (clean, corrupted) = Stream(linear=False, norm=lambda: nn.LayerNorm(WIDTH, eps=1e-3)), pairs(3)
    end = model.blocks[-1].hook_resid_post
    kept = []
    for tokens in (clean, corrupted):
        with end.register_forward_hook(lambda m, args, out: out.retain_grad() or kept.append(out)):
            logits = model(tokens)
    normed = model.ln_final(kept[1])
    (at_norm,) = torch.autograd.grad(difference(model.unembed(normed)).sum(), normed)
    difference(logits).sum().backward()
    delta = (kept[0] - kept[1]).detach()

    def back(x):
        """The gradient behind the norm taken back through it, as if it had been given x."""
        x = x.detach().requires_grad_()
        return torch.autograd.grad(model.ln_final(x), x, at_norm)[0]

    found = eap(model, clean, corrupted, difference)
    total = sum(found[writer, "logits"] for writer in found.writers)
    right, wrong = ((back(x) * delta).sum() / len(clean) for x in (kept[1], kept[1].grad))
    size = float(found.scores.abs().max())
    assert abs(float(total - right)) <= 1e-4 * size
    assert abs(float(wrong - right)) > 0.1 * abs(float(right))


def test_means_are_over_pairs_and_over_nothing_else():
    """Three pairs of six tokens: a mean over positions, or over pairs and positions, is another number."""
    model, (clean, corrupted) = Stream(linear=False), pairs(3)
    name = f"blocks.{LAYERS - 1}.hook_mlp_out"
    found = attribution_patching(model, clean, corrupted, difference, name, "position")
    edges = eap(model, clean, corrupted, difference, batch_size=2)
    by_position = eap(model, clean, corrupted, difference, per_position=True)
    alone = [
        (
            attribution_patching(model, clean[k : k + 1], corrupted[k : k + 1], difference, name, "position")[name],
            eap(model, clean[k : k + 1], corrupted[k : k + 1], difference).scores,
        )
        for k in range(3)
    ]
    nodes, scores = (torch.stack(side) for side in zip(*alone, strict=True))
    assert found[name].shape == (3, 6)
    assert found.mean()[name].shape == (6,)
    assert torch.allclose(found.mean()[name], nodes.mean((0, 1)), rtol=1e-4, atol=1e-6)
    assert torch.allclose(edges.scores, scores.mean(0), atol=1e-5 * float(scores.abs().max()))
    assert torch.allclose(by_position.scores.sum(0), edges.scores, atol=1e-5 * float(scores.abs().max()))
    assert not torch.allclose(nodes.mean((0, 1)), nodes.mean(2).mean(), rtol=0.1)


def test_padding_does_not_water_down_a_mean():
    """A pair that is padded to twice its length counts as much as it does alone."""
    model, draw = tiny_model().eval(), torch.Generator().manual_seed(4)
    clean, corrupted = (torch.randint(N_TOKENS, (2, 8), generator=draw) for _ in range(2))
    mask = torch.tensor([[1] * 4 + [0] * 4, [1] * 8])

    def metric(logits, pairs):
        last = logits[torch.arange(len(pairs)), pairs.mask.sum(1) - 1]
        return last[:, 0] - last[:, 1]

    both = [{"input_ids": tokens, "attention_mask": mask} for tokens in (clean, corrupted)]
    name = "transformer.h.0"
    padded = attribution_patching(model, *both, metric, name, batch_size=None).mean()[name]
    alone = [
        attribution_patching(model, clean[k : k + 1, :n], corrupted[k : k + 1, :n], difference, name)[name]
        for k, n in ((0, 4), (1, 8))
    ]
    assert torch.allclose(padded, torch.cat(alone).mean(), rtol=1e-4, atol=1e-6)
    edges = [eap(model, clean[k : k + 1, :n], corrupted[k : k + 1, :n], difference).scores for k, n in ((0, 4), (1, 8))]
    found = eap(model, *both, metric).scores
    assert torch.allclose(found, torch.stack(edges).mean(0), atol=2e-5 * float(found.abs().max()))
