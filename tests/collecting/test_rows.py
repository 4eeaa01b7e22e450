"""A row is the gradient of its example: the same whatever batch the example was in, and by autograd's own word."""

from __future__ import annotations

import pytest
import torch
from tiny_models import N_LAYERS, N_TOKENS, POINTS, WIDTH, sequences, tiny_model

import tlfast
from tlfast.collecting.loss import next_token_loss

LONGEST = 16
EXAMPLES = sequences(16, LONGEST)


def example_gradients(model, points, tokens):
    """The gradients of one example's own loss at the points, by `torch.autograd.grad`: each [P, D]."""
    kept = []

    def keep(module, args, output):
        kept.append(output if isinstance(output, torch.Tensor) else output[0])

    model.eval()  # it was collected in training mode, where dropout would show
    handles = [model.get_submodule(point).register_forward_hook(keep) for point in points]
    ids = torch.tensor([tokens])
    logits = model(ids, use_cache=False).logits[0, :-1]
    loss = -logits.double().log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    for handle in handles:
        handle.remove()
    return [grad[0].double() for grad in torch.autograd.grad(loss, kept)]


def reduced(grad, reduce):
    if reduce == "none":
        return torch.cat([grad, grad.new_zeros(LONGEST - len(grad), WIDTH)])
    return {"mean": grad.mean(0), "sum": grad.sum(0), "last": grad[-1], "norm": grad.norm(dim=0)}[reduce]


def rounding(grad, reduce, dtype):
    """How far rounding may move a row: one eps for each term of the longest chain of sums between loss and point.

    Per layer the sums run over the width (4 times: query, key, value, output), the inner width of the MLP (2 times,
    up to 4 widths) and the positions (2 times); then the vocabulary, and the reduction itself.
    """
    n_terms = N_LAYERS * (4 * WIDTH + 8 * WIDTH + 2 * LONGEST) + 2 * N_TOKENS + len(grad)
    # What is added up has the size of the gradient's largest element, for a sum over positions so many times.
    size = grad.abs().max() * (len(grad) if reduce in ("sum", "norm") else 1)
    return n_terms * torch.finfo(dtype).eps * size


def all_gradients(model, points):
    """For each of EXAMPLES, its gradients at the points."""
    return [example_gradients(model, points, tokens) for tokens in EXAMPLES]


def assert_rows_are_true(dataset, gradients, dtype, reduce):
    for row, grads in enumerate(gradients):
        for point, grad in zip(dataset.points, grads, strict=True):
            stored, true = dataset[point][row].double(), reduced(grad, reduce)
            if reduce == "none" and dataset.header["batching"]["padding_side"] == "left":
                true = true.roll(LONGEST - len(grad), 0)
            error, bound = (stored - true).abs().max(), rounding(grad, reduce, dtype)
            assert error <= bound, f"row {row} of {point}: off by {error}, rounding explains {bound}"


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_do_not_depend_on_the_batch(tmp_path, kind, batch_size, padding_side):
    for dtype in (torch.float64, torch.float32):
        model = tiny_model(kind, dtype)
        gradients = all_gradients(model, [POINTS[kind].replace("*", str(layer)) for layer in range(N_LAYERS)])
        for reduce in ("mean", "none", "last", "norm"):
            out = tmp_path / f"{dtype}-{reduce}"
            model.train()
            tlfast.collect(
                model, EXAMPLES, out, points=POINTS[kind], reduce=reduce, batch_tokens=batch_size * LONGEST,
                padding_side=padding_side, progress=False,
            )  # fmt: skip
            dataset = tlfast.open_dataset(out)
            assert dataset[dataset.points[0]].dtype == dtype
            assert_rows_are_true(dataset, gradients, dtype, reduce)


def mean_loss(model, batch):
    return next_token_loss(model, batch) / batch.next_tokens.ne(-100).sum()


def no_mask(model, batch):
    # Left padding that the model takes for text.
    return torch.nn.functional.cross_entropy(
        model(batch.input_ids).logits.flatten(0, 1), batch.next_tokens.flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("wrong", [mean_loss, no_mask])
def test_the_comparison_finds_a_row_that_depends_on_its_batch(tmp_path, wrong, monkeypatch):
    monkeypatch.setattr("tlfast.collecting.probe.Probe._check_rows", lambda *_: None)  # which would refuse it
    model = tiny_model(dtype=torch.float64)
    tlfast.collect(model, EXAMPLES, tmp_path, points=POINTS["gpt2"], padding_side="left", loss=wrong, progress=False)
    dataset = tlfast.open_dataset(tmp_path)
    with pytest.raises(AssertionError, match="rounding explains"):
        assert_rows_are_true(dataset, all_gradients(model, dataset.points), torch.float64, "mean")


def test_sum_and_mean_agree_with_the_length(tmp_path):
    model = tiny_model(dtype=torch.float64)
    for reduce in ("sum", "mean"):
        tlfast.collect(model, EXAMPLES, tmp_path / reduce, points=POINTS["gpt2"], reduce=reduce, progress=False)
    total, mean = (tlfast.open_dataset(tmp_path / reduce) for reduce in ("sum", "mean"))
    lengths = torch.tensor([len(tokens) for tokens in EXAMPLES])[:, None]
    for point in total.points:
        torch.testing.assert_close(total[point][:], mean[point][:] * lengths, rtol=2 * torch.finfo().eps, atol=0)


@pytest.mark.parametrize("scale", [1024.0, 0.25])
def test_grad_scale_cancels(tmp_path, scale):
    model = tiny_model()
    for name, grad_scale in (("plain", 1.0), ("scaled", scale)):
        tlfast.collect(
            model, EXAMPLES, tmp_path / name, points=POINTS["gpt2"], grad_scale=grad_scale, progress=False
        )  # fmt: skip
    plain, scaled = (tlfast.open_dataset(tmp_path / name) for name in ("plain", "scaled"))
    assert scaled.header["grad_scale"] == scale
    for point in plain.points:  # a power of two changes no bit of a float32, away from its limits
        assert torch.equal(plain[point][:], scaled[point][:])
