"""How noisy is a policy gradient? A row of each episode, with its reward as it is and with the mean reward taken off.

    python examples/policy_gradient.py [--out episodes] [--steps 60] [--episodes 500]

A tiny language model is a policy: it writes tokens, and is rewarded for each that is one more than that before it. It
is trained by REINFORCE for a moment. Then each of its new episodes gives a row, the reward times the gradient of the
log-probability of its tokens. Taking the mean reward off leaves what is expected, and takes off noise: how many times
fewer episodes are needed, the rows say. A search finds the episodes that pull most in the direction of the mean.

Runs offline, in less than a minute on a CPU. Needs tlfast[collect].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config

import tlfast

VOCABULARY, LENGTH = 8, 12  # tokens there are; those that an episode writes, behind a 0 that it is given
POINT = "transformer.h.0"


@torch.no_grad()
def play(model: Any, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Episodes [n, 1 + LENGTH] that the policy writes, and their rewards [n]."""
    tokens = torch.zeros(n, 1, dtype=torch.long)
    for _ in range(LENGTH):
        chances = model(tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return tokens, ((tokens[:, 1:] - tokens[:, :-1]) % VOCABULARY == 1).sum(1).float()


def train(model: Any, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        tokens, rewards = play(model, 64, generator)
        logits = model(tokens[:, :-1], use_cache=False).logits
        log_chances = -torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none").sum(1)
        optimizer.zero_grad()
        (-(rewards - rewards.mean()) * log_chances).mean().backward()
        optimizer.step()


def collected(model: Any, tokens: torch.Tensor, rewards: torch.Tensor, baseline: float, out: Path) -> Any:
    """A dataset of the episodes' rows: each is what its episode alone adds to the policy gradient at the point."""
    examples = [
        {"input_ids": episode, "reward": reward - baseline, "earned": int(reward)}
        for episode, reward in zip(tokens.tolist(), rewards.tolist(), strict=True)
    ]
    tlfast.collect(
        model, examples, out, points=POINT, reduce="sum", loss="reward_logprob", keep_fields=("earned",),
        overwrite=True, progress=False,
    )  # fmt: skip
    return tlfast.open_dataset(out)


def main(arguments: list[str] | None = None) -> None:
    """Train, play, collect twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("episodes"), help="two datasets; those that are there go")
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--episodes", type=int, default=500)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # of products this small, more threads make slower ones
    generator = torch.Generator().manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=1 + LENGTH, n_layer=2, n_embd=32, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    before = play(model, options.episodes, generator)[1].mean()
    train(model, options.steps, generator)
    tokens, rewards = play(model, options.episodes, generator)
    print(f"trained: mean reward {before:.2f} -> {rewards.mean():.2f} of {LENGTH}")

    plain = collected(model, tokens, rewards, 0.0, options.out / "reward")
    less = collected(model, tokens, rewards, rewards.mean().item(), options.out / "advantage")
    noise = [ds[POINT][:].float().var(0).sum() for ds in (plain, less)]
    print(f"the same precision takes {noise[0] / noise[1]:.1f} times fewer episodes with the mean reward taken off")

    direction = less[POINT][:].float().mean(0, keepdim=True)
    print("\nwhat pulls most in the direction of the mean, and most against it")
    for sign in (1, -1):
        for hit in less.search(sign * direction, k=3, point=POINT)[0]:
            episode = " ".join(str(token) for token in list(hit["input_ids"])[1:])
            print(f"  {sign * hit['score']:8.2f}  {episode}  reward {hit['earned']}")


if __name__ == "__main__":
    main()
