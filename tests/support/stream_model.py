"""A small model with hook points as in TransformerLens: linear throughout, or with norms and a real attention."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

HEADS, D_HEAD, WIDTH, VOCAB, LAYERS = 2, 3, 8, 11, 2


class HookPoint(nn.Module):
    """Puts out what it is given."""

    def forward(self, x):
        return x


class Attention(nn.Module):
    """Heads as a HookedTransformer has them; ``linear`` means a causal mean in place of the pattern."""

    def __init__(self, linear, n_kv):
        super().__init__()
        self.linear = linear
        self.W_Q, self.W_K, self.W_V = (
            nn.Parameter(torch.randn(n, WIDTH, D_HEAD) / WIDTH**0.5) for n in (HEADS, n_kv, n_kv)
        )
        self.W_O = nn.Parameter(torch.randn(HEADS, D_HEAD, WIDTH) / D_HEAD**0.5)
        self.b_O = nn.Parameter(torch.randn(WIDTH))
        for kind in "qkvz":
            setattr(self, f"hook_{kind}", HookPoint())

    def forward(self, x):
        q, k, v = (
            hook(torch.einsum("bpd,hde->bphe", x, weight))
            for hook, weight in ((self.hook_q, self.W_Q), (self.hook_k, self.W_K), (self.hook_v, self.W_V))
        )
        k, v = (side.repeat_interleave(HEADS // side.shape[2], 2) for side in (k, v))
        scores = torch.einsum("bqhe,bkhe->bhqk", q, k) * (0.0 if self.linear else 1.0)
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(hidden, -1e9).softmax(-1)
        z = self.hook_z(torch.einsum("bhqk,bkhe->bqhe", pattern, v))
        return torch.einsum("bqhe,hed->bqd", z, self.W_O) + self.b_O


class Block(nn.Module):
    """Attention and an MLP that add to the stream; ``scaled`` makes it one that isn't additive."""

    def __init__(self, linear, n_kv, norm, scaled):
        super().__init__()
        self.scaled, self.parallel = scaled, False
        self.ln1, self.ln2 = norm(), norm()
        self.attn = Attention(linear, n_kv)
        self.mlp = nn.Linear(WIDTH, WIDTH) if linear else nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.hook_resid_pre, self.hook_mlp_out, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()

    def forward(self, x):
        x = self.hook_resid_pre(x)
        mid = x + self.attn(self.ln1(x)) * self.scaled
        return self.hook_resid_post(mid + self.hook_mlp_out(self.mlp(self.ln2(x if self.parallel else mid))))


class Stream(nn.Module):
    """Tokens [pairs, P] to logits; ``hook_dict``, ``blocks`` and ``cfg`` are as in a HookedTransformer."""

    def __init__(self, linear=True, n_kv=HEADS, norm=nn.Identity, scaled=1.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hook_embed = nn.Embedding(VOCAB, WIDTH), HookPoint()
        self.blocks = nn.ModuleList(Block(linear, n_kv, norm, scaled) for _ in range(LAYERS))
        self.ln_final, self.unembed = norm(), nn.Linear(WIDTH, VOCAB)
        self.reentrant = None  # how blocks are checkpointed, if they are
        self.cfg = SimpleNamespace(n_heads=HEADS, n_layers=LAYERS, d_model=WIDTH, n_key_value_heads=n_kv)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    @property
    def hook_dict(self):
        return {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}

    def forward(self, tokens):
        x = self.hook_embed(self.embed(tokens))
        for block in self.blocks:
            again = self.reentrant is not None and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=self.reentrant) if again else block(x)
        return self.unembed(self.ln_final(x))


def pairs(n=5, length=6):
    """Two batches of tokens."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n, length), generator=generator) for _ in range(2)]


def difference(logits, pairs=None):
    """A metric of each pair."""
    return logits[:, -1, 0] - logits[:, -1, 1]
