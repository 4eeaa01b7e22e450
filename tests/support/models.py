"""Small models whose points cover what a hook can meet, and the right gradients of their points by autograd.grad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH = 6


class HookPoint(nn.Module):
    """An identity: its output is its input."""

    def forward(self, x):
        return x


class Block(nn.Module):
    """A residual block whose hook points share their tensors with the branches beside them."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.hook_resid_pre, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        x = self.hook_resid_pre(x)
        return self.hook_resid_post(x + self.hook_mlp_out(self.down(torch.tanh(self.up(self.norm(x))))))


class Residual(nn.Module):
    """Token ids -> embedding -> blocks -> logits, with a hook point at each place."""

    def __init__(self, n_layers=2, n_tokens=11, width=WIDTH):
        super().__init__()
        self.embed, self.hook_embed = nn.Embedding(n_tokens, width), HookPoint()
        self.blocks = nn.ModuleList(Block(width) for _ in range(n_layers))
        self.unembed = nn.Linear(width, n_tokens, bias=False)

    def forward(self, tokens):
        x = self.hook_embed(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


class Pair(nn.Module):
    """Outputs a tuple: a number of tokens, a value, and a second value made of the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        first = self.first(x)
        return x.shape[1], first, torch.tanh(self.second(first))


class Named(nn.Module):
    """Outputs a mapping with a missing entry in front."""

    def __init__(self, kind=dict):
        super().__init__()
        self.kind, self.pair = kind, Pair()

    def forward(self, x):
        _, first, second = self.pair(x)
        return self.kind(nothing=None, first=first, second=second)


class Experts(nn.Module):
    """Each token goes to the expert that the router picks; an expert without a token isn't called."""

    def __init__(self, n_experts=3):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n_experts))

    def forward(self, x, choice):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if (choice == number).any():
                out = out + torch.where((choice == number)[..., None], expert(x), 0.0)
        return out


class Penalised(nn.Module):
    """Uses its output itself, beside returning it: ``self.penalty`` is a part of the loss."""

    def __init__(self):
        super().__init__()
        self.encode, self.penalty = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def forward(self, x):
        out = torch.relu(self.encode(x)) * 1.5
        self.penalty = out.square().sum()
        return out


class Repeated(nn.Module):
    """Calls one module several times in a forward."""

    def __init__(self, n_calls=3):
        super().__init__()
        self.n_calls, self.shared, self.hook = n_calls, nn.Linear(WIDTH, WIDTH), HookPoint()

    def forward(self, x):
        for _ in range(self.n_calls):
            x = torch.tanh(self.hook(self.shared(x)))
        return x


class Chain(nn.Module):
    """A plain chain with fresh, view and identity outputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.tanh, self.hook = nn.Linear(WIDTH, WIDTH), nn.Tanh(), HookPoint()
        self.flat, self.head = nn.Flatten(0, 1), nn.Linear(WIDTH, 2)

    def forward(self, x):
        return self.head(self.flat(self.hook(self.tanh(self.linear(x))))).unflatten(0, x.shape[:2])


@dataclass
class Setup:
    """A model, the points to capture, and one forward that ends in a loss."""

    model: nn.Module
    points: list[str]
    loss: Callable[[], torch.Tensor]
    output: int | str | None = None
    batch: torch.Tensor | None = None


def inputs(n_examples=3, n_positions=4) -> torch.Tensor:
    """A batch that requires grad, as behind an embedding."""
    return torch.randn(n_examples, n_positions, WIDTH, requires_grad=True)


def tokens(n_examples=3, n_positions=4, n_tokens=11) -> torch.Tensor:
    """A batch of token ids."""
    return torch.randint(n_tokens, (n_examples, n_positions))


def uneven(x: torch.Tensor) -> torch.Tensor:
    """A loss with another gradient at each element."""
    return (x * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum() + x.square().sum() / 7


def residual() -> Setup:
    model, batch = Residual(), tokens()
    points = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1", "blocks.1.hook_resid_post"]
    return Setup(model, ["embed", *points, "unembed"], lambda: uneven(model(batch)), batch=batch)


def chain() -> Setup:
    # Without `flat`: it folds the examples and the positions into one dimension.
    model, x = Chain(), inputs()
    return Setup(model, ["linear", "tanh", "hook", ""], lambda: uneven(model(x)))


def pair() -> Setup:
    model, x = nn.Sequential(Pair()), inputs()
    return Setup(model, ["0", "0.first", "0.second"], lambda: sum(uneven(y) for y in model(x)[1:]))


def second_of_pair() -> Setup:
    model, x = nn.Sequential(Pair()), inputs()
    return Setup(model, ["0"], lambda: sum(uneven(y) for y in model(x)[1:]), output=2)


def penalised() -> Setup:
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Penalised()), inputs()
    return Setup(model, ["0", "1", "1.encode"], lambda: uneven(model(x)) + model[1].penalty)


def gpt2() -> Setup:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=11, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    batch = tokens()
    points = ["transformer.wte", "transformer.drop", "transformer.h.0", "transformer.h.0.attn", "transformer.h.1.ln_1"]
    return Setup(model, [*points, "transformer.h.1.mlp.act", "lm_head"], lambda: uneven(model(batch).logits))


SETUPS = {f.__name__: f for f in (residual, chain, pair, second_of_pair, penalised, gpt2)}


def activation_gradients(setup: Setup) -> dict[str, list[torch.Tensor | None]]:
    """The gradient with respect to each output of each point, in the order of calls, by autograd.grad on copies."""
    copies: list[tuple[str, torch.Tensor]] = []

    def copy(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, torch.Tensor):
                copies.append((name, output.clone()))
                return copies[-1][1]
            at = setup.output
            if at is None:
                at = next(i for i, value in enumerate(output) if isinstance(value, torch.Tensor))
            copies.append((name, output[at].clone()))
            return tuple(copies[-1][1] if i == at else value for i, value in enumerate(output))

        return hook

    modules = dict(setup.model.named_modules())
    handles = [modules[name].register_forward_hook(copy(name)) for name in setup.points]
    try:
        loss = setup.loss()
    finally:
        for handle in handles:
            handle.remove()
    grads = torch.autograd.grad(loss, [tensor for _, tensor in copies], allow_unused=True)
    found: dict[str, list[torch.Tensor | None]] = {name: [] for name in setup.points}
    for (name, _), grad in zip(copies, grads, strict=True):
        found[name].append(grad)
    return found


def hooks_left(model: nn.Module) -> list[tuple[str, str]]:
    """Every hook on every module: (module, kind)."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [(name, kind) for name, m in model.named_modules() for kind in kinds for _ in getattr(m, kind)]
