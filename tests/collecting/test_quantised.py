"""A base model with quantised weights, under an adapter: its rows, and its weights in the dataset's identity."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from task_models import examples_of, gradients_alone, task_model
from tiny_models import collect

from tlfast.collecting.fingerprint import model_fingerprint
from tlfast.dataset import DatasetError, open_dataset

POINTS = ["model.layers.0", "model.layers.1"]
EXAMPLES = examples_of("plain")


class Int8Weight(torch.Tensor):
    """What torchao makes of a weight: a tensor without memory of its own, made of codes and scales."""

    @staticmethod
    def __new__(cls, codes, scales):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scales.dtype)

    def __init__(self, codes, scales):
        self.codes, self.scales = codes, scales

    def __tensor_flatten__(self):
        return ["codes", "scales"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            inputs, weight, *bias = args
            return F.linear(inputs, weight.codes.to(weight.scales.dtype) * weight.scales, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scales)
        raise NotImplementedError(f"{function} of a quantised weight")


class Adapted(torch.nn.Module):
    """A layer with two small ones beside it, as LoRA has them."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.a = torch.nn.Linear(base.in_features, rank, bias=False)
        self.b = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def quantised_model():
    model = task_model("llama", "causal")
    for layer in model.model.layers:
        for name in ("up_proj", "down_proj"):
            base = getattr(layer.mlp, name)
            scales = base.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (base.weight.detach() / scales).round().to(torch.int8)
            base.weight = torch.nn.Parameter(Int8Weight(codes, scales), requires_grad=False)
            setattr(layer.mlp, name, Adapted(base))
    return model.eval()


def test_rows_are_those_of_each_example_alone(tmp_path):
    model = quantised_model()
    for tokens in (1, 1000):
        out = tmp_path / str(tokens)
        collect(model, out, EXAMPLES, points=POINTS, reduce="sum", dtype="float32", batch_tokens=tokens)
        dataset = open_dataset(out)
        for k, example in enumerate(EXAMPLES):
            ids = torch.tensor([example["input_ids"]])

            def loss(ids=ids):
                return F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="sum")

            for point, grad in gradients_alone(model, POINTS, loss).items():
                torch.testing.assert_close(dataset[point][k], grad[0].sum(0), rtol=1e-3, atol=1e-4)


def test_other_codes_or_scales_are_another_model(tmp_path):
    model = quantised_model()
    settings = {"points": POINTS, "dtype": "float32", "rows_per_unit": 2}
    collect(model, tmp_path, EXAMPLES, units="0:1", **settings)
    weight = model.model.layers[1].mlp.up_proj.base.weight
    for part in (weight.codes, weight.scales):
        before, fingerprint = copy.deepcopy(part), model_fingerprint(model)
        part[3, 5 % part.shape[1]] += 1
        assert model_fingerprint(model) != fingerprint
        with pytest.raises(DatasetError, match=r"header\.model\.fingerprint"):
            collect(model, tmp_path, EXAMPLES, **settings)
        part.copy_(before)
    assert collect(model, tmp_path, EXAMPLES, **settings).n_rows_before == 2


def test_layers_without_a_backward_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch hands them over to torchao
        model = torch.ao.quantization.quantize_dynamic(task_model("llama", "causal"), {torch.nn.Linear})
    text = (
        r"^collect: model must have layers with a backward, got torch\.ao\.nn\.quantized\.dynamic\.modules\.linear\."
        r"Linear at model\.layers\.0\.self_attn\.q_proj\. Quantise weights alone, with torchao or bitsandbytes\.$"
    )
    with pytest.raises(ValueError, match=text):
        collect(model, tmp_path / "out", EXAMPLES, points=POINTS)
    assert not (tmp_path / "out").exists()


class LosesTheGradient(Int8Weight):
    """What torchao makes of a weight where it quantises what the layer is given, too."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return super().__torch_function__(function, types, (args[0].detach(), *args[1:]), kwargs)
        return super().__torch_function__(function, types, args, kwargs)


def test_layers_that_lose_the_gradient_are_refused(tmp_path):
    """Beside an adapter some gradient passes, and nothing else would show that the rest is missing."""
    model = quantised_model()
    layer = model.model.layers[1].mlp.up_proj.base
    layer.weight = torch.nn.Parameter(LosesTheGradient(layer.weight.codes, layer.weight.scales), requires_grad=False)
    text = r"collect: model must have layers with a backward, got .*LosesTheGradient at model\.layers\.1\.mlp\."
    with pytest.raises(ValueError, match=text):
        collect(model, tmp_path / "out", EXAMPLES, points=POINTS)
    assert not (tmp_path / "out").exists()
