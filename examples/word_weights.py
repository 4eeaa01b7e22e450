"""Which words decide, and from which layer on does the model know? Saliency, integrated gradients, a Jacobian lens.

    python examples/word_weights.py [--steps 200] [--html words.html]

A GPT-2 of four layers reads ten words and answers whether the good ones outweigh the bad ones: the more they do, the
likelier is a yes. What a word weighs is known here, so the scores of the words can be compared with it: gradient times
input, and integrated gradients on the way from the word "the" everywhere. Then a Jacobian lens is fitted, which says of
the output of each layer what it will have become behind the last one, and so which answer it stands for; the logit
lens, which takes it as it is, beside it.

Runs offline, in less than a minute on a CPU. Needs transformers, which tlfast[collect] brings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tlfast.recipes import fit_jacobian_lens, integrated_gradients, saliency

WEIGHTS = {
    "the": 0, "a": 0, "film": 0, "was": 0, "it": 0, "and": 0, "we": 0, "saw": 0, "here": 0, "then": 0,
    "fine": 1, "good": 1, "warm": 1, "great": 3, "poor": -1, "bad": -1, "cold": -1, "awful": -3,
    "?": 0, "yes": 0, "no": 0,
}  # fmt: skip
WORDS = list(WEIGHTS)
N_WORDS, ASK, YES, NO = 10, WORDS.index("?"), WORDS.index("yes"), WORDS.index("no")
LAYERS, WIDTH = 4, 32


class Tokenizer:
    """Words and their numbers."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [WORDS.index(word) for word in text.split()]}

    def decode(self, tokens: list[int]) -> str:
        return "".join(f"{WORDS[token]} " for token in tokens)


def weights_of(words: torch.Tensor) -> torch.Tensor:
    """What each word weighs, of the shape of the words."""
    return torch.tensor(list(WEIGHTS.values()))[words].float()


def draw(n: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens [n, N_WORDS + 2]: words, the question, and the answer, a yes as likely as the words together say."""
    words = torch.randint(ASK, (n, N_WORDS), generator=generator)
    likely = torch.sigmoid(weights_of(words).sum(1))
    answers = torch.where(torch.rand(n, generator=generator) < likely, YES, NO)[:, None]
    return torch.cat([words, torch.full_like(answers, ASK), answers], 1)


def train(model: Any, steps: int, generator: torch.Generator) -> float:
    """Train to answer; returns the correlation of what it says with what the words weigh, in the last batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens = draw(128, generator)
        logits = model(tokens[:, :-1], use_cache=False).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = (logits[:, YES] - logits[:, NO]).detach()
    return float(torch.corrcoef(torch.stack([said, weights_of(tokens[:, :N_WORDS]).sum(1)]))[0, 1])


def metric(logits: torch.Tensor, batch: Any) -> torch.Tensor:
    """Of each example [B]: how far yes stands above no. All are as long, so none is padded."""
    return logits[:, -1, YES] - logits[:, -1, NO]


def correlation(scores: list[torch.Tensor], tokens: torch.Tensor) -> float:
    """Of the scores of all words with what they weigh."""
    found = torch.stack(scores)[:, :N_WORDS].flatten()
    return float(torch.corrcoef(torch.stack([found, weights_of(tokens[:, :N_WORDS]).flatten()]))[0, 1])


@torch.no_grad()
def answers_by_layer(model: Any, tokens: torch.Tensor, lens: Any) -> list[tuple[int, float, float]]:
    """For each layer how often the Jacobian lens, and the logit lens, say there what the model answers."""
    output = model(tokens, use_cache=False, output_hidden_states=True)
    answer = output.logits[:, -1].argmax(1)
    found = []
    for layer in lens.source_layers:
        here = output.hidden_states[layer + 1][:, -1]
        said = [model.lm_head(model.transformer.ln_f(h)).argmax(1) for h in (here @ lens.jacobians[layer].T, here)]
        found.append((layer, *(float((each == answer).float().mean()) for each in said)))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Train, score, draw, fit, read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--html", type=Path, help="also draw the scores into this page")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS), n_positions=16, n_layer=LAYERS, n_head=4, n_embd=WIDTH, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    print(f"trained: its answers go with the weights, correlation {train(model, options.steps, generator):.2f}")
    model.eval()

    tokens = draw(64, generator)[:, :-1]
    quick = saliency(model, tokens, metric, tokenizer=Tokenizer())
    paths = integrated_gradients(model, tokens, metric, WORDS.index("the"), tokenizer=Tokenizer())
    print(f"correlation with what the words weigh: saliency {correlation(quick.scores, tokens):.2f}, ", end="")
    print(f"integrated gradients {correlation(paths.scores, tokens):.2f}")
    print(f"the scores miss the whole by {float(paths.delta.abs().max()):.1e} at most\n")  # type: ignore[union-attr]
    print("\n".join(str(paths).splitlines()[: N_WORDS + 2]))
    if options.html is not None:
        options.html.write_text(f'<!doctype html><meta charset="utf-8">{paths.html()}', encoding="utf-8")

    lens = fit_jacobian_lens(model, list(tokens[:32]), corpus="32 of the sentences", skip_first_positions=0)
    print("\nlayer  Jacobian lens  logit lens   (how often it says the model's answer)")
    for layer, jacobian, logit in answers_by_layer(model, tokens, lens):
        print(f"{layer:5} {jacobian:14.0%} {logit:11.0%}")


if __name__ == "__main__":
    main()
