"""Which pairs of a fine-tuning set teach the same: the gradient of each answer, and its nearest neighbours.

    python examples/sft_neighbours.py [--out neighbours] [--steps 150] [--pairs 800]

A small causal model learns to write the first line of a docstring below the line of its `def`; the pairs are cut from
the standard library. Then each pair gives a row, the gradient of the loss of its answer alone, and a search finds the
pairs whose rows point the same way. It also counts how often the nearest one is out of the same package of the library,
which the rows were never told.

Runs offline, in less than a minute on a CPU. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tlfast

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
LONGEST = 80  # bytes, each a token
BATCH = 16
POINT = "transformer.h.1"


def pairs(most: int) -> list[dict[str, Any]]:
    """Examples of prompt and response: labels are -100 at the tokens of the prompt. Drawn from all packages alike."""
    found: dict[bytes, dict[str, Any]] = {}  # each text once: what is said twice is its own nearest neighbour
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(path for package in PACKAGES for path in (folder / package).rglob("*.py")):
        if "test" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (documented := ast.get_docstring(node)):
                prompt = list(f"def {node.name}({', '.join(a.arg for a in node.args.args)}):\n".encode())
                response = list(f"{documented.splitlines()[0]}\n".encode())
                if len(prompt) + len(response) <= LONGEST:
                    labels = [-100] * len(prompt) + response
                    package = path.relative_to(folder).parts[0]
                    example = {"input_ids": prompt + response, "labels": labels, "package": package}
                    found.setdefault(bytes(prompt + response), example)
    examples = list(found.values())
    drawn = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    return [examples[i] for i in drawn[:most].tolist()]


def train(model: Any, examples: list[dict[str, Any]], steps: int) -> tuple[float, float]:
    """Fine-tune on the answers; returns the first loss and the mean of the last ten, nats per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        chosen = [examples[i] for i in torch.randint(len(examples), (BATCH,), generator=generator).tolist()]
        tokens, labels = torch.zeros(BATCH, LONGEST, dtype=torch.long), torch.full((BATCH, LONGEST), -100)
        for row, example in enumerate(chosen):
            tokens[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
            labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / len(losses[-10:])


def one_line(tokens: Any) -> str:
    return bytes(tokens).decode().strip().replace("\n", "  # ")


def main(arguments: list[str] | None = None) -> None:
    """Train, collect, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("neighbours"), help="the dataset; one that is there goes")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    parser.add_argument("--pairs", type=int, default=800, help="examples, at most")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    examples = pairs(options.pairs)
    config = GPT2Config(
        vocab_size=256, n_positions=LONGEST, n_layer=2, n_embd=64, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config)
    first, last = train(model, examples, options.steps)
    print(f"trained on {len(examples)} pairs: loss {first:.2f} -> {last:.2f} nats per byte")

    tlfast.collect(
        model, examples, options.out, points=POINT, reduce="sum", loss="response", keep_fields=("package",),
        overwrite=True, progress=False,
    )  # fmt: skip
    ds = tlfast.open_dataset(options.out)
    found = ds.search(ds[POINT][:], k=4, point=POINT, metric="cosine")
    for query in range(3):
        itself, *neighbours = found[query]  # a row is nearest to itself
        print(f"\n{itself['package']:15} {one_line(itself['input_ids'])}")
        for hit in neighbours:
            print(f"  {hit['score']:.2f} {hit['package']:15} {one_line(hit['input_ids'])}")

    packages = [example["package"] for example in examples]
    same = sum(packages[row] == packages[nearest] for row, nearest in enumerate(found.indices[:, 1].tolist()))
    chance = sum(n * (n - 1) for n in Counter(packages).values()) / (len(packages) * (len(packages) - 1))
    print(f"\nnearest neighbour of the same package: {same / len(packages):.0%}, of pairs by chance: {chance:.0%}")


if __name__ == "__main__":
    main()
