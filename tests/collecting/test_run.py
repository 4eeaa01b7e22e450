"""`tlfast.collect` as a function: what lands where, and what is left as it was."""

from __future__ import annotations

import pytest
import torch
from tiny_models import N_LAYERS, WIDTH, collect, sequences, tiny_model, unit_bytes
from torch import nn

import tlfast

EXAMPLES = sequences(20)


def test_rows_stand_in_the_order_of_the_examples(tmp_path):
    report = collect(tiny_model(), tmp_path, EXAMPLES, rows_per_unit=8, dtype=torch.bfloat16)
    dataset = tlfast.open_dataset(tmp_path)
    assert (report.n_rows, report.n_units, report.n_tokens) == (20, 3, sum(map(len, EXAMPLES)))
    assert dataset.points == [f"transformer.h.{layer}" for layer in range(N_LAYERS)]
    assert dataset["transformer.h.0"].shape == (20, WIDTH)
    assert dataset["transformer.h.0"].dtype == torch.bfloat16
    assert [example["input_ids"] for example in dataset.examples] == EXAMPLES
    assert [example["id"] for example in dataset.examples] == list(range(20))
    assert dataset.verify().ok
    # Each row is its example's, not only their list: alone in a unit, the row is the same up to rounding.
    collect(tiny_model(), tmp_path / "alone", EXAMPLES, rows_per_unit=1, dtype=torch.bfloat16)
    alone = tlfast.open_dataset(tmp_path / "alone")
    for point in dataset.points:
        step = torch.finfo(torch.bfloat16).eps * alone[point][:].float().abs()
        assert ((dataset[point][:].float() - alone[point][:].float()).abs() <= 2 * step + 1e-6).all()
        assert not torch.equal(alone[point][0], alone[point][1])


def test_the_header_says_how_the_rows_were_made(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES, reduce="last", header={"model": {"name": "tiny"}, "note": "hello"})
    header = tlfast.open_dataset(tmp_path).header
    assert header["model"]["name"] == "tiny"
    assert header["model"]["class"] == "GPT2LMHeadModel"
    assert header["note"] == "hello"
    assert header["loss"] == "next-token cross-entropy, summed over each example's tokens"
    assert header["specs"][0] | {"dtype": None} == {
        "points": "transformer.h.*", "reduce": "last", "over": [1], "dtype": None, "output": None, "name": None
    }  # fmt: skip


def test_the_model_is_left_as_it_was(tmp_path):
    model = tiny_model().train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    training = {name: module.training for name, module in model.named_modules()}
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():  # the caller's mode is not ours
        collect(model, tmp_path, EXAMPLES)
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in model.named_modules()} == training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_model_is_left_as_it_was_after_an_error(tmp_path):
    model = tiny_model().train()
    with pytest.raises(ZeroDivisionError):
        collect(model, tmp_path, EXAMPLES, loss=lambda model, batch: 1 / 0)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_the_bytes_of_a_unit_depend_on_its_examples_alone(tmp_path):
    for name, examples in (("short", EXAMPLES[:16]), ("long", EXAMPLES)):
        collect(tiny_model(), tmp_path / name, examples, rows_per_unit=8)
    short, long = unit_bytes(tmp_path / "short"), unit_bytes(tmp_path / "long")
    assert set(short) == {"data/u000000.safetensors", "data/u000001.safetensors"}
    assert short.items() <= long.items()


def test_rows_that_keep_positions_are_zero_at_padding(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES, reduce="none", seq_len=20)
    dataset = tlfast.open_dataset(tmp_path)
    for row, tokens in zip(dataset["transformer.h.1"][:], EXAMPLES, strict=True):
        assert row.shape == (20, WIDTH)
        assert row[: len(tokens) - 1].abs().amax(1).min() > 0
        assert not row[len(tokens) :].any()


def test_norms_over_the_width_keep_positions(tmp_path):
    collect(tiny_model(), tmp_path / "norm", EXAMPLES, reduce="norm", over=-1)
    collect(tiny_model(), tmp_path / "none", EXAMPLES, reduce="none")
    norm, whole = (tlfast.open_dataset(tmp_path / name) for name in ("norm", "none"))
    expected = whole["transformer.h.0"][:].norm(dim=-1)
    torch.testing.assert_close(norm["transformer.h.0"][:], expected, rtol=WIDTH * torch.finfo().eps, atol=0)


def test_several_specs_make_several_columns(tmp_path):
    specs = [
        tlfast.Spec("transformer.h.*", "mean", dtype=torch.bfloat16),
        tlfast.Spec("transformer.h.1", "norm", over=(1, 2)),
    ]
    collect(tiny_model(), tmp_path, EXAMPLES, points=specs)
    dataset = tlfast.open_dataset(tmp_path)
    assert dataset.points == ["transformer.h.0", "transformer.h.1:mean", "transformer.h.1:norm"]
    assert dataset["transformer.h.1:norm"].shape == (20,)
    assert dataset["transformer.h.1:norm"].dtype == torch.float32


def test_points_may_be_a_predicate_and_batches_a_generator(tmp_path):
    collect(tiny_model(), tmp_path, (list(e) for e in EXAMPLES), points=lambda name: name.endswith(".attn"))
    dataset = tlfast.open_dataset(tmp_path)
    assert dataset.points == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert dataset.header["specs"][0]["points"] == dataset.points


def test_a_plain_module_and_a_loss_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 3))
    collect(model, tmp_path, [[1, 2, 3], [4, 5]], points="1", loss=lambda m, batch: (m(batch.input_ids) * 2).sum())
    assert tlfast.open_dataset(tmp_path)["1"][:].tolist() == [[2.0] * 3] * 2
    assert "lambda" in tlfast.open_dataset(tmp_path).header["loss"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, in torch's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of Dynamo itself
def test_a_compiled_model_gives_the_same_rows(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 256))
    collect(model, tmp_path / "eager", EXAMPLES, points="1", batch_tokens=64)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    collect(compiled, tmp_path / "compiled", EXAMPLES, points="_orig_mod.1", batch_tokens=64)
    torch._dynamo.reset()
    eager, rows = (tlfast.open_dataset(tmp_path / name) for name in ("eager", "compiled"))
    true = eager["1"][:]
    assert true.abs().amax(1).min() > 0
    # The same kernels on the same batches; a compiler may put the terms of 256 logits in another order.
    bound = 256 * torch.finfo().eps * true.abs().max().item()
    torch.testing.assert_close(rows["_orig_mod.1"][:], true, rtol=0, atol=bound)
