"""Rows of weight gradients as bergson 2.5.1 defines them, each example alone in float64, and datasets of such rows."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from tiny_models import byte_tokenizer
from torch import nn

from tlfast.dataset import Column, DatasetWriter, Example, Plan
from tlfast.dataset.read.decoding import tokenizer_fingerprint

TEXTS = ["gradient of a row", "a", "rows and rows of units", "the tap fires", "step by step by step"]
MODULES = [
    f"h.{layer}.{name}" for layer in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
DIM = 4
PROJECT = {"dim": DIM, "scheme": "bergson-2"}


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: uint64 [..., 4] counters below 2^32 to as many numbers."""
    low = np.uint64(0xFFFFFFFF)
    x0, x1, x2, x3 = (counter[..., k].astype(np.uint64) for k in range(4))
    k0, k1 = key
    for _ in range(10):
        a, b = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1, x2, x3 = (
            (b >> np.uint64(32)) ^ x1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ x3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], -1)


def signs(identifier: str, rows: int, columns: int) -> torch.Tensor:
    """The matrix of +1 and -1 of an identifier: float64 [rows, columns]."""
    key = np.frombuffer(hashlib.md5(identifier.encode()).digest()[:8], "<u4").astype(np.uint64)
    counter = np.zeros((rows, -(-columns // 128), 4), np.uint64)
    counter[..., 0], counter[..., 1] = np.arange(counter.shape[1]), np.arange(rows)[:, None]
    words = philox(counter, (int(key[0]), int(key[1])))
    bits = (words[..., None] >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(2.0 * bits.reshape(rows, -1)[:, :columns] - 1)


def projected(gradient: torch.Tensor, module: str, dim: int = DIM) -> torch.Tensor:
    """L G R^T of a module's gradient [O, I]: [dim, dim]."""
    left = signs(f"{module}/left", dim, gradient.shape[0])
    right = signs(f"{module}/right", dim, gradient.shape[1])
    return left @ gradient.double() @ right.T / dim


def gradients(model: nn.Module, tokens: list[int], modules=tuple(MODULES)) -> dict[str, torch.Tensor]:
    """The gradient [O, I] of each module's weight (GPT-2 keeps [I, O]) of one example alone, in the model's dtype."""
    weights = [model.get_submodule(f"transformer.{name}").weight for name in modules]
    if len(tokens) < 2:
        return {name: torch.zeros_like(weight.T) for name, weight in zip(modules, weights, strict=True)}
    ids = torch.tensor([tokens])
    logits = model(ids, use_cache=False).logits[0, :-1]
    loss = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    grads = torch.autograd.grad(loss, weights)
    return {name: grad.T for name, grad in zip(modules, grads, strict=True)}


def true_rows(model: nn.Module, texts=tuple(TEXTS)) -> dict[str, torch.Tensor]:
    """The projected rows of the texts by module, float64 [texts, dim, dim]; ``model`` is best of float64."""
    found = [gradients(model, byte_tokenizer()(text)["input_ids"]) for text in texts]
    return {name: torch.stack([projected(one[name], name) for one in found]) for name in MODULES}


def some_rows(columns=("h.0", "h.1"), shape=(DIM, DIM), dtype=torch.float32, n=5, seed=0) -> dict[str, torch.Tensor]:
    """Rows of no model."""
    generator = torch.Generator().manual_seed(seed)
    return {f"{name}:weight": torch.randn(n, *shape, generator=generator).to(dtype) for name in columns}


def write(
    out, rows: dict[str, torch.Tensor], *, specs=None, of="weight", per="example", lengths=None, header=None, config=""
):
    """A dataset of these rows, three in a unit, of the texts; per token of examples with these lengths."""
    specs = [{"points": "h.*", "of": "weight", "project": PROJECT}] if specs is None else specs
    of = of if isinstance(of, dict) else dict.fromkeys(rows, of)
    columns = {name: Column(row.dtype, tuple(row.shape[1:]), of[name], per) for name, row in rows.items()}
    ids = [byte_tokenizer()(text)["input_ids"] for text in TEXTS] if lengths is None else [[7] * n for n in lengths]
    plan, ends = Plan(len(ids), 3), np.cumsum([0, *(len(tokens) for tokens in ids)])
    with DatasetWriter(
        out, header={"specs": specs} | (header or {}), columns=columns, plan=plan, config=config
    ) as writer:
        for unit in plan.units:
            span = slice(unit.start, unit.stop) if per == "example" else slice(ends[unit.start], ends[unit.stop])
            examples = [Example(i, ids[i], "words.txt", 10 * i, len(ids[i])) for i in range(unit.start, unit.stop)]
            writer.write_unit(unit, {name: row[span] for name, row in rows.items()}, examples)
    return out


def collected(out, model_folder, rows: dict[str, torch.Tensor]):
    """A dataset of a GPT-2 in a folder, as `tlfast collect` leaves it: with its names, its tokenizer and its model."""
    header = {
        "model": {"class": "GPT2LMHeadModel", "name": "model", "dtypes": ["float32"]},
        "tokenizer": {"fingerprint": tokenizer_fingerprint(byte_tokenizer())},
    }
    named = {f"transformer.{name}:weight": values for name, values in rows.items()}
    specs = [{"points": "transformer.h.*", "of": "weight", "project": PROJECT}]
    return write(out, named, specs=specs, header=header, config={"model": str(model_folder)})
