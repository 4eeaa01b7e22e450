"""Which word does each digit come from? An encoder-decoder, the loss of a digit at a time, and saliency at its source.

    python examples/number_words.py [--out digits] [--steps 500]

A tiny T5 learns to write numbers: from the words of the hundreds, the tens and the ones, in any order, their digits in
the right one. Each number gives three examples, whose labels leave one digit in the loss. Their rows hold a number for
each source word, the gradient of the loss times the word's embedding, added up over its width.

Runs offline, in less than a minute on a CPU. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, T5Config

import tlfast

PARTS = ("hundreds", "tens", "ones")  # a word of part p and digit d is token 1 + 10 p + d; digits are tokens 31 to 40
DIGIT = 31
POINT = "encoder.block.0"  # what it is given are the embedded words
COLUMN = f"{POINT}:input:grad*act"


def numbers(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words [n, 3] in any order, the part that each is of [n, 3], and digits [n, 3] in the right order."""
    digits = torch.randint(10, (n, 3), generator=generator)
    parts = torch.rand(n, 3, generator=generator).argsort(1)
    return 1 + 10 * parts + digits.gather(1, parts), parts, DIGIT + digits


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train on new numbers; returns how many digits of the last batch are right."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        words, _, digits = numbers(64, generator)
        logits = model(input_ids=words, decoder_input_ids=torch.nn.functional.pad(digits[:, :-1], (1, 0))).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), digits.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((logits.argmax(2) == digits).float().mean())


def one_digit_each(n: int, generator: torch.Generator) -> list[dict[str, Any]]:
    """Three examples of each of ``n`` numbers: of each digit the loss alone."""
    examples = []
    for words, parts, digits in zip(*numbers(n, generator), strict=True):
        for asked in range(len(PARTS)):
            # The decoder reads all digits before its own, whatever the loss leaves out.
            labels = [int(digit) if place == asked else -100 for place, digit in enumerate(digits)]
            given = {"input_ids": words.tolist(), "labels": labels, "decoder_input_ids": [0, *digits[:-1].tolist()]}
            examples.append({**given, "parts": parts.tolist(), "asked": asked})
    return examples


def main(arguments: list[str] | None = None) -> None:
    """Train, collect, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("digits"), help="the dataset; one that is there goes")
    parser.add_argument("--steps", type=int, default=500, help="of training")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    config = T5Config(
        vocab_size=DIGIT + 10, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config)
    print(f"trained: {train(model, options.steps, generator):.0%} of the digits are right")

    tlfast.collect(
        model, one_digit_each(200, generator), options.out, points=POINT, of="grad*act", side="input", reduce="sum",
        over=2, loss="seq2seq", keep_fields=("parts", "asked"), overwrite=True, progress=False,
    )  # fmt: skip
    ds = tlfast.open_dataset(options.out)
    sizes = ds[COLUMN][:].float().abs()  # [examples, words]
    shares = sizes / sizes.sum(1, keepdim=True)
    fields = [ds.examples[row] for row in range(len(ds))]
    parts, asked = (torch.tensor([field[name] for field in fields]) for name in ("parts", "asked"))
    print("\nhow much of the saliency lies on the word of the")
    print("digit of the  " + "".join(f"{part:>10}" for part in PARTS))
    by_part = shares.gather(1, parts.argsort(1))  # the words in the order of PARTS
    for number, part in enumerate(PARTS):
        mean = by_part[asked == number].mean(0)
        print(f"  {part:12}" + "".join(f"{share:10.0%}" for share in mean.tolist()))
    right = (by_part.argmax(1) == asked).float().mean()
    print(f"\nthe word of the digit has the most in {right:.0%} of the examples")


if __name__ == "__main__":
    main()
