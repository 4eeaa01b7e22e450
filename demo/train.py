"""A small GPT-2 that learns to write Python, byte by byte, from the standard library's own source files."""

from __future__ import annotations

import math
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.utils import logging

STDLIB = Path(sysconfig.get_path("stdlib"))
HELD_OUT = ("asyncio", "json", "email")  # packages that the model never sees in training: gradients are taken there
LEFT_OUT = {*HELD_OUT, "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SEQ_LEN = 128
BATCH = 16
LEAST_STEPS = 24  # however slow the machine is: so many until the loss has visibly moved


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token: 256 of them, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def training_files() -> list[Path]:
    """The library's modules, without its tests, what was installed into it, and what is held out."""
    files = (path for path in STDLIB.rglob("*.py") if LEFT_OUT.isdisjoint(path.relative_to(STDLIB).parts))
    return sorted(files)


def training_tokens(tokenizer: PreTrainedTokenizerFast, most_bytes: int = 4_000_000) -> torch.Tensor:
    """One long row of tokens: files from all over the library until there are enough."""
    files = training_files()
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
    tokens: list[int] = []
    for i in order:
        tokens += tokenizer(files[i].read_text(errors="ignore"), verbose=False)["input_ids"]
        if len(tokens) > most_bytes:
            break
    return torch.tensor(tokens, dtype=torch.uint8)


def train(folder: Path, time_s: float) -> tuple[float, float]:
    """Train for about ``time_s`` seconds and save all in ``folder``; return the first and last loss, nats per byte."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=256, n_positions=SEQ_LEN, n_layer=6, n_embd=128, n_head=4, bos_token_id=None, eos_token_id=None,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    tokens = training_tokens(tokenizer)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"training a GPT-2 of {n_parameters / 1e6:.1f} M parameters on {len(tokens) / 1e6:.1f} MB of {STDLIB.name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    start = shown = time.monotonic()
    first = mean = math.nan
    step = 0
    while (done := min((time.monotonic() - start) / time_s, step / LEAST_STEPS)) < 1:
        # Up over 10 steps, then down to a tenth when all is done.
        rate = 3e-3 * min(1.0, (step + 1) / 10) * (0.55 + 0.45 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(tokens) - SEQ_LEN - 1, (BATCH, 1))
        window = tokens[starts + torch.arange(SEQ_LEN + 1)].long()
        logits = model(window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if step == 0 else 0.9 * mean + 0.1 * loss.item()
        first = mean if step == 0 else first
        step += 1
        if step == 1 or time.monotonic() - shown > max(time_s / 8, 2.0):
            shown = time.monotonic()
            print(f"  step {step:4d}  {shown - start:5.1f} s  loss {mean:.3f}", flush=True)
    print(f"  step {step:4d}  {time.monotonic() - start:5.1f} s  loss {mean:.3f} (running mean)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return first, mean
