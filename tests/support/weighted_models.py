"""Models with a layer of each kind whose weight gradients can be captured, and these of each example alone."""

import functools

import torch
from torch import nn

import tlfast

B, P, D = 4, 6, 8


class RMSNorm(nn.Module):
    """As Llama has it, or with 1 + weight, as Gemma has it."""

    def __init__(self, size, one=0.0):
        super().__init__()
        self.weight, self.eps, self.one = nn.Parameter(torch.rand(size) + 0.5), 1e-5, one

    def forward(self, x):
        normal = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normal * (self.one + self.weight)


class Turned(nn.Module):
    """Positions for channels, and back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


def of_tokens():
    return nn.Sequential(
        nn.Embedding(11, D, padding_idx=3), nn.Linear(D, 10), nn.GELU(), nn.LayerNorm(10), nn.Linear(10, D, bias=False),
        nn.RMSNorm(D), Turned(nn.Conv1d(D, 6, 3, padding="same", groups=2)), RMSNorm(6, one=1.0), nn.Linear(6, 3),
    )  # fmt: skip


def of_images():
    return nn.Sequential(
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), padding_mode="reflect"), nn.GELU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6, bias=False), nn.Unflatten(1, (2, 3)),
        nn.Conv3d(2, 4, 2, groups=1), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


MODELS = {
    "tokens": (of_tokens, lambda: torch.randint(0, 11, (B, P))),
    "images": (of_images, lambda: torch.randn(B, 4, 7, 6)),
}
LAYERS = {"tokens": ["0", "1", "3", "4", "5", "6.inner", "7", "8"], "images": ["0", "2", "4", "6"]}


def score(made):
    return made.flatten(1).square().mul(torch.linspace(-1, 1, made.flatten(1).shape[1]).to(made)).sum()


@functools.cache
def made(kind):
    torch.manual_seed(5)
    build, draw = MODELS[kind]
    model, x = build(), draw()
    with torch.no_grad():
        model(x)
    return model, x


@functools.cache
def truths(kind, bias):
    """By layer: G of each example alone, [B, O, I], or [B, D] of a norm; in float64."""
    model, x = made(kind)
    wide = build_like(kind, model).double()
    found = {name: [] for name in LAYERS[kind]}
    for one in x.split(1):
        wide.zero_grad()
        score(wide(one if one.dtype == torch.int64 else one.double())).backward()
        for name, rows in found.items():
            layer = wide.get_submodule(name)
            grad = layer.weight.grad
            if isinstance(layer, nn.Embedding):
                grad = grad.T
            grad = grad.flatten(1) if grad.dim() > 1 else grad
            if bias and getattr(layer, "bias", None) is not None:
                grad = torch.cat([grad, layer.bias.grad[:, None] if grad.dim() > 1 else layer.bias.grad], -1)
            rows.append(grad.clone())
    return {name: torch.stack(rows) for name, rows in found.items()}


def build_like(kind, model):
    other = MODELS[kind][0]()
    with torch.no_grad():
        other(made(kind)[1])
    other.load_state_dict(model.state_dict())
    return other


def projected(name, full, projection):
    right = projection.matrix(name, "right", full.shape[-1]).double()
    if full.dim() == 2:
        return full @ right.T * projection.scale
    left = projection.matrix(name, "left", full.shape[1]).double()
    return left @ full @ right.T * projection.row_scale


def assert_near(found, wanted, n=1):
    """Within the rounding of sums of n products in float32, measured against the largest row."""
    assert found.shape == wanted.shape
    bound = 2**-22 * max(1, n) ** 0.5 * wanted.flatten(1 if wanted.dim() > 1 else 0).norm(dim=-1).max().clamp_min(1e-6)
    assert (found.double() - wanted).abs().max() <= bound


def captured(model, specs, run, backend, **options):
    options = {"rows": B, "backend": backend, **options}
    with tlfast.capture(model, specs, **options) as cap:
        run()
    return cap
