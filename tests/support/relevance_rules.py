"""The relevance rules of LXT in the classes of transformers, for as long as a test takes, and small models of these."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import nn

IMPORTED = ("bert", "gemma3", "gpt2", "llama", "qwen2", "qwen3")  # what LXT imports of transformers
# Of BERT and Gemma 3 LXT 2.1 warns that it can't patch all of a transformers that it can be imported beside.
CASES = [(kind, rules) for kind in ("gpt2", "llama", "qwen3") for rules in ("attnLRP", "cp_LRP")]
SIZES = {
    "vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def modeling(kind: str) -> ModuleType:
    """The file of transformers that a kind of model is in."""
    return import_module(f"transformers.models.{kind}.modeling_{kind}")


def import_rules(kind: str) -> ModuleType:
    """LXT's file of rules for a kind of model.

    It imports torchvision for another kind, and the one on the registry fits no torch for the CPU: a stand-in does.
    """
    for name in IMPORTED:
        modeling(name)  # before: these look for torchvision, too
    stands_in = {} if find_spec("torchvision") else {n: ModuleType(n) for n in ("torchvision", "torchvision.models")}
    if stands_in:
        stands_in["torchvision.models"].vision_transformer = ModuleType("vision_transformer")
        stands_in["torchvision.models"].vision_transformer.nn = nn
    sys.modules.update(stands_in)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zennit, which it has for images
            return import_module(f"lxt.efficient.models.{kind}")
    finally:
        for name in stands_in:
            del sys.modules[name]


def patch(monkeypatch, kind: str, rules: str) -> None:
    """Let LXT put its rules into the classes of a kind of model; ``monkeypatch`` takes them out, which LXT can't."""
    found = getattr(import_rules(kind), rules)
    for target in found:
        if isinstance(target, type):
            monkeypatch.setattr(target, "forward", target.forward)
            continue
        for name in (
            "eager_attention_forward",
            "ALL_ATTENTION_FUNCTIONS",
        ):  # one rule replaces them, another fills them
            monkeypatch.setattr(target, name, getattr(target, name))
        for name, function in list(target.ALL_ATTENTION_FUNCTIONS.items()):
            monkeypatch.setitem(target.ALL_ATTENTION_FUNCTIONS, name, function)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what it couldn't patch
        import_module("lxt.efficient").monkey_patch(modeling(kind), found)


def small(kind: str) -> nn.Module:
    """A language model of a kind, with grouped queries where it can have them."""
    torch.manual_seed(0)
    transformers, sizes = import_module("transformers"), dict(SIZES)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=23, n_embd=16, n_inner=20, n_layer=2, n_head=4, n_positions=16, bos_token_id=None,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()
    sizes |= {"num_key_value_heads": 2, "head_dim": 4}
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[kind]
    return model(config(**sizes)).eval()


# Of each kind modules that the gradient reaches under all rules; and those that CP-LRP holds still.
BLOCK = "model.layers.*"
GATED = [
    "model.embed_tokens", BLOCK, f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm",
    f"{BLOCK}.self_attn.v_proj", f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj",
    f"{BLOCK}.mlp", "model.norm",
]  # fmt: skip
HELD = [f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.self_attn.k_proj", f"{BLOCK}.mlp.gate_proj"]
OF_GPT2 = [
    "transformer.wte", "transformer.h.*", "transformer.h.*.ln_1", "transformer.h.*.attn.c_attn",
    "transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_fc", "transformer.h.*.mlp", "transformer.ln_f",
]  # fmt: skip


def points(kind: str, rules: str) -> list[str]:
    """The points of a small model that gradients reach under these rules."""
    if kind == "gpt2":
        return OF_GPT2
    return GATED + (HELD if rules == "attnLRP" else [])
