"""Models small enough for a test, and examples for them."""

from __future__ import annotations

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging

import tlfast
from tlfast.cli import main

N_TOKENS = 256
N_LAYERS = 2
WIDTH = 16
POINTS = {"gpt2": "transformer.h.*", "llama": "model.layers.*"}


def tiny_config(kind):
    """A model of two layers over bytes; llama has rotary positions and shared key-value heads."""
    # A large initializer: gradients that differ from example to example, far above rounding.
    shared = {"vocab_size": N_TOKENS, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.2}
    if kind == "gpt2":
        return GPT2Config(n_layer=N_LAYERS, n_embd=WIDTH, n_head=2, n_positions=64, **shared)
    return LlamaConfig(
        num_hidden_layers=N_LAYERS, hidden_size=WIDTH, intermediate_size=32, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **shared,
    )  # fmt: skip


def tiny_model(kind="gpt2", dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind)).to(dtype)


def byte_tokenizer(**settings):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def save_model(folder, kind="gpt2"):
    """A model and its tokenizer, as `save_pretrained` leaves them."""
    logging.disable_progress_bar()
    tiny_model(kind).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_text(folder, n_files=12):
    """Files of words, some of them in a folder within."""
    draw = random.Random(0)
    words = ["gradient", "tap", "ring", "row", "unit", "step", "point", "spec", "\u00e9t\u00e9", "the", "of", "a"]
    for k in range(n_files):
        path = folder / ("inner" if k % 3 == 0 else "") / f"{k:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(draw.choice(words) for _ in range(draw.randrange(40, 120))), encoding="utf-8")
    return folder


def sequences(n, longest=16, seed=0):
    """``n`` token sequences of 2 to ``longest`` tokens."""
    draw = random.Random(seed)
    return [[draw.randrange(N_TOKENS) for _ in range(draw.randrange(2, longest + 1))] for _ in range(n)]


def unit_bytes(folder):
    """The bytes of all unit files and commits of a dataset, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("data/*"))}


def collect(model, out, examples, **settings):
    """`tlfast.collect` at every block, in silence."""
    return tlfast.collect(model, examples, out, **{"points": POINTS["gpt2"], "progress": False} | settings)


def collect_words(folder, **changes):
    """The arguments of `tlfast collect` for the model and the text in a folder."""
    settings = {
        "model": str(folder / "model"), "text": str(folder / "text"), "points": "transformer.h.*", "reduce": "mean",
        "dtype": "bfloat16", "out": str(folder / "out"), "seq_len": "32", "max_examples": "24",
        "rows_per_unit": "10",
    } | changes  # fmt: skip
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", *value.split("\n"))]


def complaint_of(capsys, arguments, code=2):
    """The one line on stderr with which a command ended."""
    capsys.readouterr()
    assert main(arguments) == code
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    if arguments[0] == "collect" and lines[0] == tlfast.backend():  # said once the arguments are read
        lines.pop(0)
    assert len(lines) == 1, shown.err
    assert shown.out == ""
    return lines[0]


def alone(model, point, tokens):
    """The output of a point for one example, and its gradient, by `torch.autograd.grad`: float64 [P, D] each."""
    kept = []
    handle = model.get_submodule(point).register_forward_hook(
        lambda m, args, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    ids = torch.tensor([tokens])
    logits = model(ids, use_cache=False).logits[0, :-1]
    handle.remove()
    loss = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    (grad,) = torch.autograd.grad(loss, kept)
    return kept[0][0].detach().double(), grad[0].double()
