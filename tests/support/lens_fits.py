"""A small causal model with a residual stream, prompts for it, and its Jacobian lens, one number after the other."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, TOKENS, SKIP = 5, 11, 2


class Block(nn.Module):
    """Adds to each position something of those before it; of all positions where it isn't causal."""

    def __init__(self, causal=True):
        super().__init__()
        self.inner, self.act, self.outer, self.causal = nn.Linear(WIDTH, 7), nn.GELU(), nn.Linear(7, WIDTH), causal

    def forward(self, h):
        before = h.cumsum(1) if self.causal else h.sum(1, keepdim=True).expand_as(h)
        return h + self.outer(self.act(self.inner(before / h.shape[1]) + h[..., :1])), "beside"


class OneByOne(torch.autograd.Function):
    """An identity whose backward takes no batch of gradients."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy().copy())


class Stream(nn.Module):
    """An embedding and blocks; with ``one_by_one`` a backward has to be run for one gradient at a time."""

    def __init__(self, n_layers=3, causal=True, one_by_one=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.one_by_one = nn.Embedding(TOKENS, WIDTH), one_by_one
        self.blocks = nn.ModuleList(Block(causal) for _ in range(n_layers))
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h)[0]
            h = OneByOne.apply(h) if self.one_by_one else h
        return self.head(h)


def prompts(n=4, seed=3):
    """Lists of 6 to 9 tokens, each with another length."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(TOKENS, (6 + k % 4,), generator=draw).tolist() for k in range(n)]


def outputs_of(blocks, call):
    """What each block puts out, of one forward."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0]))
        for block in blocks
    ]
    call()
    for hook in hooks:
        hook.remove()
    return seen


def plain_lens(model, blocks, given, skip=SKIP):
    """Of each block but the last the mean Jacobian [D, D] by the formula, and the sum of sizes of what was added."""
    total = bound = 0
    for tokens in given:
        *sources, target = outputs_of(blocks, lambda tokens=tokens: model(torch.tensor([tokens])))
        real = slice(skip, target.shape[1] - 1)
        rows = [
            torch.autograd.grad(target[0, real, k].sum(), sources, retain_graph=True) for k in range(target.shape[2])
        ]
        found = [torch.stack([row[layer][0, real] for row in rows]).double() for layer in range(len(sources))]
        total = total + torch.stack([each.mean(1) for each in found])
        bound = bound + torch.stack([each.abs().mean(1) for each in found])
    return total / len(given), bound / len(given)
