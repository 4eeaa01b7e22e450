"""Second moments of optimizers, their own and those that were saved, as what normalizes weight gradients."""

import re

import pytest
import torch
from torch import nn

import tlfast
from tlfast.hooks.normalizers import AdafactorNormalizer, AdamNormalizer


def refuses(text, kind=ValueError):
    return pytest.raises(kind, match="^" + re.escape(text))


def model_of_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 5, bias=False))


def trained(model, optimizer):
    for seed in range(3):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randint(0, 7, (3, 4))).square().sum().backward()
        optimizer.step()
    return optimizer


def in_two_groups(model):
    """As transformers' Trainer makes them."""
    decayed = [p for name, p in model.named_parameters() if not name.startswith("2") and not name.endswith("bias")]
    others = [p for name, p in model.named_parameters() if name.startswith("2") or name.endswith("bias")]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


@pytest.mark.parametrize("order", ["one", "two", "named", "given"])
def test_adam_as_it_was_saved(order, tmp_path):
    model = model_of_layers()
    given = {
        "one": model.parameters(), "two": in_two_groups(model), "named": list(model.named_parameters()),
        "given": list(model.parameters())[::-1],
    }[order]  # fmt: skip
    optimizer = trained(model, torch.optim.AdamW(given))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    names = [name for name, _ in model.named_parameters()][::-1] if order == "given" else None
    found = tlfast.read_optimizer(tmp_path, model, bias=True, names=names)
    assert list(found) == ["1", "3"]
    gradient = torch.randn(2, 5, 5)
    v = torch.cat(
        [optimizer.state[model[1].weight]["exp_avg_sq"], optimizer.state[model[1].bias]["exp_avg_sq"][:, None]], 1
    )
    torch.testing.assert_close(found["1"](gradient), gradient / (v.sqrt() + 1e-8))
    v = optimizer.state[model[3].weight]["exp_avg_sq"]
    torch.testing.assert_close(found["3"](gradient), gradient / (v.sqrt() + 1e-8))
    assert found["3"](gradient.bfloat16()).dtype == torch.bfloat16
    without = tlfast.read_optimizer(tmp_path / "optimizer.pt", model, names=names)
    assert without["1"].second_moment.shape == (5, 4)


def test_adam_of_convolutions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=2), nn.Flatten(), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(3, 4, 3, 2)
    model(x).square().sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    held = tlfast.read_optimizer(tmp_path, model, bias=True)
    optimizer.zero_grad()
    spec = tlfast.Spec(["0", "2"], of="weight", normalizer=held, bias=True)
    with tlfast.capture(model, spec, rows=3) as cap:
        model(x).square().sum().backward()
    for name, layer in (("0", model[0]), ("2", model[2])):
        rows = cap[f"{name}:weight"].sum(0)
        for found, one in ((rows[:, :-1], layer.weight), (rows[:, -1:], layer.bias)):
            wanted = one.grad / (optimizer.state[one]["exp_avg_sq"].sqrt() + 1e-8)
            torch.testing.assert_close(found, wanted.reshape(found.shape), rtol=1e-4, atol=1e-4)


def test_adafactor_and_turned_weights(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), transformers.pytorch_utils.Conv1D(6, 4), nn.Linear(6, 3))
    optimizer = trained(model, transformers.optimization.Adafactor(model.parameters(), lr=1e-3, relative_step=False))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    found = tlfast.read_optimizer(tmp_path, model, bias=True)
    for name, turned in (("1", True), ("2", False)):
        module = model.get_submodule(name)
        state, of_bias = optimizer.state[module.weight], optimizer.state[module.bias]["exp_avg_sq"]
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        v = row[:, None] * col / row.mean()
        v = v.T if turned else v
        gradient = torch.randn(2, v.shape[0], v.shape[1] + 1)
        wanted = torch.cat([gradient[..., :-1] * v.rsqrt(), gradient[..., -1:] * (of_bias[:, None] + 1e-8).rsqrt()], -1)
        torch.testing.assert_close(found[name](gradient), wanted, rtol=1e-4, atol=1e-5)
    adam = trained(model, torch.optim.Adam(model.parameters()))
    torch.save(adam.state_dict(), tmp_path / "optimizer.pt")
    assert torch.equal(
        tlfast.read_optimizer(tmp_path, model)["1"].second_moment.float(), adam.state[model[1].weight]["exp_avg_sq"].T
    )


def test_of_factors():
    model, examples = model_of_layers(), [[1, 2, 3], [4, 5], [6, 1, 2]]
    found = tlfast.factors(model, examples, "1", kinds="adam", bias=True, loss=squares)
    v = found["1"].second_moment
    assert torch.equal(found.normalizers()["1"].second_moment, v)
    normalizer = found.normalizers("adafactor")["1"]
    assert torch.equal(normalizer.row, v[:, :4].mean(1))
    assert torch.equal(normalizer.col, v[:, :4].mean(0))
    assert torch.equal(normalizer.bias, v[:, 4])
    # The factors of a gradient, normalized apart, are those of the normalized one.
    g, a = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    outputs, inputs = normalizer.scales
    of_factors = torch.einsum("to,ti->oi", g * outputs, a * inputs)
    torch.testing.assert_close(AdafactorNormalizer(normalizer.row, normalizer.col)(g.T @ a), of_factors)


def squares(model, batch):
    return model(batch.input_ids).square().sum()


def test_what_is_refused(tmp_path):
    model = model_of_layers()
    path = tmp_path / "optimizer.pt"

    def saved(what):
        torch.save(what, path)

    with pytest.raises(FileNotFoundError):
        tlfast.read_optimizer(path, model)
    path.write_text("no file of torch's")
    with refuses(f"read_optimizer: path must hold the state_dict of an optimizer, got {str(path)!r} ("):
        tlfast.read_optimizer(path, model)
    saved([1])
    with refuses(f"read_optimizer: path must hold the state_dict of an optimizer, got {str(path)!r}."):
        tlfast.read_optimizer(path, model)
    saved(trained(model, torch.optim.SGD(model.parameters(), momentum=0.9)).state_dict())
    with refuses("read_optimizer: the optimizer at 1 must have a second moment of its shape, got momentum_buffer."):
        tlfast.read_optimizer(path, model)
    saved(torch.optim.Adam(model.parameters()).state_dict())
    with refuses("read_optimizer: path must have second moments of linear layers or convolutions, got none."):
        tlfast.read_optimizer(path, model)
    saved(trained(model, torch.optim.Adam(list(model.parameters())[::-1])).state_dict())
    with refuses("read_optimizer: the optimizer must have the model's parameters, in an order that is known"):
        tlfast.read_optimizer(path, model)
    saved(trained(model, torch.optim.Adam(model[1].parameters())).state_dict())
    with refuses("read_optimizer: the optimizer must have the model's parameters, in an order that is known"):
        tlfast.read_optimizer(path, model)
    alike = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    optimizer = torch.optim.Adam([{"params": [alike[2].weight]}, {"params": [alike[1].weight]}])
    saved(trained(alike, optimizer).state_dict())
    with refuses("read_optimizer: the optimizer must have the model's parameters, in an order that is known"):
        tlfast.read_optimizer(path, alike[1:])  # two groups of a user's own, of layers of one shape
    for normalizer in (AdamNormalizer(torch.ones(2, 3)), AdafactorNormalizer(torch.ones(2), torch.ones(3))):
        with refuses("a normalizer: a gradient must be [..., 2, 3], got [3, 2]."):
            normalizer(torch.ones(3, 2))
    with refuses("Factors: squares of '1' must be of the kinds", AttributeError):
        tlfast.factors(model, [[1, 2], [3, 4]], "1", loss=squares).normalizers()
    with refuses("Factors.normalizers: kind must be one of adam, adafactor, got "):
        tlfast.factors(model, [[1, 2], [3, 4]], "1", loss=squares).normalizers("sgd")
