"""The pairs of a stream are each real token's activation and gradient, once each, shuffled, in bounded memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from poisoned_rows import poisoned, poisoned_loss
from tiny_models import POINTS, sequences, tiny_model

import tlfast
from tlfast.recipes import gradient_sae_pairs

SETTINGS = {"buffer_tokens": 64, "batch_size": 7, "batch_tokens": 32}


def truth_of(model, tokens, points, labels=None):
    """Activations and gradients [P, D] of one example by torch alone."""
    model.eval()
    seen = {}

    def keep(name):
        def hook(module, args, out):
            seen[name] = out if isinstance(out, torch.Tensor) else out[0]
            seen[name].retain_grad()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in points]
    ids = torch.tensor([tokens])
    wanted = torch.tensor(tokens if labels is None else labels)
    torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], wanted[1:], reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    return {name: (kept.detach()[0], kept.grad[0]) for name, kept in seen.items()}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_token_once_with_its_gradient(kind, side):
    model, examples = tiny_model(kind, torch.float64), sequences(20)
    pairs = gradient_sae_pairs(model, examples, POINTS[kind], padding_side=side, **SETTINGS)
    points = [name for name in pairs.names if not name.endswith(":act")]
    assert len(points) == 2
    seen, sizes = {}, []
    for batch in pairs:
        sizes.append(len(batch["id"]))
        for k, place in enumerate(zip(batch["id"].tolist(), batch["position"].tolist(), strict=True)):
            assert place not in seen
            seen[place] = {name: rows[k] for name, rows in batch.items()}
    assert sorted(seen) == [(k, t) for k, tokens in enumerate(examples) for t in range(len(tokens))]
    assert sizes == [7] * (len(sizes) - 1) + [len(seen) % 7 or 7]
    assert (len(pairs), pairs.n_tokens) == (len(sizes), len(seen))
    for k in (0, 3, 19):
        for name, (acts, grads) in truth_of(model, examples[k], points).items():
            for t in range(len(examples[k])):
                assert torch.allclose(seen[k, t][f"{name}:act"], acts[t], rtol=1e-9)
                assert torch.allclose(seen[k, t][name], grads[t], rtol=1e-7, atol=1e-12)


def order(seed, **more):
    given = {**SETTINGS, "seed": seed, **more}
    pairs = gradient_sae_pairs(tiny_model(), sequences(24), "transformer.h.0", **given)
    return [place for batch in pairs for place in zip(batch["id"].tolist(), batch["position"].tolist(), strict=True)]


def test_the_order_is_the_seeds():
    first, again, other = order(0), order(0), order(1)
    assert first == again != other
    assert sorted(first) == sorted(other) != first
    # Neighbours in a batch are of many examples, and of other places.
    near = sum(a[0] == b[0] and b[1] == a[1] + 1 for a, b in pairwise(first))
    assert near < len(first) / 10
    whole = order(0, drop_last=True)
    assert len(whole) == len(first) // 7 * 7


def test_memory_is_bounded(monkeypatch):
    held, parts = [], []
    buffer = tlfast.collecting.stream._Buffer
    put = buffer.put

    def counted(self, rows):
        put(self, rows)
        parts.append(len(rows["id"]))
        held.append({len(block) for block in self._rows.values()})

    monkeypatch.setattr(buffer, "put", counted)
    n = len(order(0))
    assert all(sizes == {64} for sizes in held)
    assert max(parts) <= 16 < sum(parts) == n > 3 * 64


def test_fields_of_examples_are_those_of_the_loss():
    model, points = tiny_model("gpt2", torch.float64), ["transformer.h.0"]
    examples = [
        {"input_ids": tokens, "labels": [-100] * (len(tokens) - 1) + tokens[-1:], "more": "x"}
        for tokens in sequences(9)
    ]
    bad = {"input_ids": [1], "labels": [1], "more": "y"}
    settings = {"loss": "response", "fields": ["input_ids", "labels"], **SETTINGS}
    given = [*examples[:4], bad, *examples[4:]]
    with gradient_sae_pairs(model, iter(given), points, bad_examples="skip", **settings) as pairs:
        batches = list(pairs)
    assert pairs.skipped == [("#4", 0, "1 token, less than 2")]
    assert (len(pairs), pairs.n_tokens) == (len(batches), sum(len(one["input_ids"]) for one in examples))
    found = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for k, one in enumerate(examples):
        mine = (found["id"] == k).nonzero()[:, 0]
        mine = mine[found["position"][mine].argsort()]
        act, grad = truth_of(model, one["input_ids"], points, one["labels"])[points[0]]
        assert torch.allclose(found[f"{points[0]}:act"][mine], act, rtol=1e-9)
        assert torch.allclose(found[points[0]][mine], grad, rtol=1e-7, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"^gradient_sae_pairs: examples must have 2 tokens or more, got 1 in example 4"
    ):
        gradient_sae_pairs(model, given, points, **settings)


def test_a_row_that_is_not_finite_is_told_by_its_name():
    examples, settings = poisoned(sequences(6), (3,)), SETTINGS | {"buffer_tokens": 128, "dtype": torch.float16}
    text = "^gradient_sae_pairs: rows must be finite, got NaN or infinity in example 3 of .* Leave this example out."
    with pytest.raises(FloatingPointError, match=text):
        list(gradient_sae_pairs(tiny_model(), examples, "transformer.h.0", loss=poisoned_loss, **settings))


def test_memory_goes_when_it_is_closed():
    with gradient_sae_pairs(tiny_model(), sequences(10), "transformer.h.0", **SETTINGS) as pairs:
        next(pairs)
    with pytest.raises(StopIteration):
        next(pairs)


@pytest.mark.parametrize(
    "text, changed",
    [
        ("gradient_sae_pairs: buffer_tokens must have room for two batches, and 4 times for the longest example: 64",
         {"buffer_tokens": 63}),
        ("gradient_sae_pairs: batch_size must be a positive number, got 0", {"batch_size": 0}),
        ("^gradient_sae_pairs: points must match a module", {"points": "absent"}),
        ("gradient_sae_pairs: points must be names, modules or a function, got a Spec. Give the Spec's points: what a ",
         {"points": [tlfast.Spec("transformer.h.0")]}),
        ("gradient_sae_pairs: points must be names, modules or a function", {"points": tlfast.Spec("transformer.h.0")}),
        ("gradient_sae_pairs: settings must be among side, heads, .*, got reduce. Leave it out.", {"reduce": "sum"}),
        ("gradient_sae_pairs: seed must be an int, got 'a'", {"seed": "a"}),
    ],
)  # fmt: skip
def test_what_is_refused(text, changed):
    settings = {"points": "transformer.h.0", **SETTINGS} | changed
    with pytest.raises((ValueError, TypeError), match=text):
        gradient_sae_pairs(tiny_model(), [list(range(16)), [1, 2]], settings.pop("points"), **settings)
