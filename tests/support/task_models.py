"""Tiny models of each task, examples with the fields that they take, and the truth: gradients of each example alone."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

N_TOKENS, WIDTH, N_CLASSES = 64, 16, 3
SHARED = {"vocab_size": N_TOKENS, "pad_token_id": 0, "initializer_range": 0.2}
ENCODER = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "num_labels": N_CLASSES, **SHARED,
}  # fmt: skip
CONFIGS = {
    "bert": lambda: BertConfig(**ENCODER),
    "roberta": lambda: RobertaConfig(**ENCODER),
    "distilbert": lambda: DistilBertConfig(
        dim=WIDTH, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, num_labels=N_CLASSES, **SHARED
    ),
    "llama": lambda: LlamaConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None, **SHARED,
    ),
    "t5": lambda: T5Config(
        d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        vocab_size=N_TOKENS, pad_token_id=0, initializer_factor=2.0,
    ),
    "bart": lambda: BartConfig(
        d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, decoder_start_token_id=2,
        bos_token_id=1, eos_token_id=2, forced_eos_token_id=None, init_std=0.2, vocab_size=N_TOKENS, pad_token_id=0,
    ),
    "vit": lambda: ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
        patch_size=4, num_labels=N_CLASSES, initializer_range=0.2,
    ),
}  # fmt: skip
HEADS = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "sequence": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
    "seq2seq": AutoModelForSeq2SeqLM,
    "image": AutoModelForImageClassification,
}


def task_model(kind, head, **settings):
    """A model of two layers with random weights; ``settings`` change its config."""
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    for name, value in settings.items():
        setattr(config, name, value)
    return HEADS[head].from_config(config).eval()


class Pixels(nn.Module):
    """A convolutional classifier whose forward names its input, and nothing else."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, N_CLASSES)

    def forward(self, x):
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def tokens_of(n, least=3, most=14, seed=0):
    """Sequences of mixed lengths, none of which has the padding's token."""
    draw = random.Random(seed)
    return [[draw.randrange(3, N_TOKENS) for _ in range(draw.randint(least, most))] for _ in range(n)]


def examples_of(task, n=6):
    """Examples for a task: mappings with the fields that its loss asks for."""
    draw = random.Random(1)
    tokens = tokens_of(n)
    if task == "image":
        images = torch.Generator().manual_seed(2)
        return [{"pixel_values": torch.randn(3, 8, 8, generator=images), "labels": k % N_CLASSES} for k in range(n)]
    if task == "response":
        return [{"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]} for ids in tokens]
    if task == "masked":
        return [{"input_ids": ids, "labels": [t if k % 3 == 0 else -100 for k, t in enumerate(ids)]} for ids in tokens]
    if task == "sequence":
        return [{"input_ids": ids, "labels": k % N_CLASSES} for k, ids in enumerate(tokens)]
    if task == "tokens":
        return [{"input_ids": ids, "labels": [draw.randrange(N_CLASSES) for _ in ids]} for ids in tokens]
    if task == "seq2seq":
        return [
            {"input_ids": ids, "labels": labels} for ids, labels in zip(tokens, tokens_of(n, 2, 9, seed=3), strict=True)
        ]
    if task == "reward":
        return [{"input_ids": ids, "reward": draw.uniform(-2, 2)} for ids in tokens]
    if task == "difference":
        return [{"input_ids": ids, "answer_ids": 5 + k, "wrong_ids": 20 + k} for k, ids in enumerate(tokens)]
    return [{"input_ids": ids} for ids in tokens]


def gradients_alone(model, points, loss_of):
    """By point, the gradient of ``loss_of()`` at the module's output, from `torch.autograd.grad`."""
    kept = {}

    def keep(name):
        def hook(module, args, output):
            tensor = output if isinstance(output, torch.Tensor) else output[0]
            kept[name] = tensor if tensor.requires_grad else tensor.requires_grad_()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(keep(name)) for name in points]
    try:
        loss = loss_of()
        return dict(zip(points, torch.autograd.grad(loss, [kept[name] for name in points]), strict=True))
    finally:
        for handle in handles:
            handle.remove()
