"""Datasets that `tlfast.collect` began and did not finish: the model, the calls, and how the golden ones were made.

``python tests/support/half_finished.py FOLDER`` makes them with the code of today, and prints the digests of whole
ones: only for new ones, beside those that are there, which no change of tlfast may touch.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from torch import nn

import tlfast

N_TOKENS, WIDTH = 8, 4
EXAMPLES = [[1, 2, 3], [4, 5], [7, 6, 5, 1], [2, 4], [3, 1, 5]]


def model() -> nn.Module:
    """Small whole numbers, and logits that are all 0: each gradient is a sum of a few eighths.

    So the bytes are the same on every CPU, in whatever order it adds and however its exponential function rounds.
    """
    embedding, head = nn.Embedding(N_TOKENS, WIDTH), nn.Linear(WIDTH, N_TOKENS)
    weight = torch.arange(N_TOKENS * WIDTH, dtype=torch.float32).mul(5).remainder(7).sub(3)
    with torch.no_grad():
        embedding.weight.zero_()
        head.weight.copy_(weight.reshape(N_TOKENS, WIDTH))
        head.bias.zero_()
    return nn.Sequential(embedding, nn.Identity(), head)


def weighted_sum(model: nn.Module, batch: tlfast.batches.Batch) -> torch.Tensor:
    """A loss of the user's: every logit at a real token, times its token."""
    mask = 1 if batch.mask is None else batch.mask
    return (model(batch.input_ids).sum(-1) * batch.input_ids * mask).sum()


# What is given beside model, examples and folder: as little as can be, and all that an identity says.
CALLS = {
    "plain": {"points": "0", "dtype": "bfloat16", "rows_per_unit": 2},
    "changed": {
        "points": [tlfast.Spec("0", "none", dtype="float16"), tlfast.Spec(["0", "1"], "sum", "pos", name="all")],
        "loss": weighted_sum, "identity": "tokens times logits", "batch_tokens": 9, "seq_len": 4,
        "rows_per_unit": 3, "padding_side": "left", "pad_id": 2, "grad_scale": 4.0, "calls": "sum", "missing": "nan",
        "skipped": [("a.txt", 3, "no UTF-8 text")], "header": {"model": {"name": "golden"}, "made": "for tests"},
        "embedding": "0",
    },
}  # fmt: skip
BEGUN = "1:2"  # the units that the golden ones have
# What is warned of on another kind of CPU than began them; their last bits depend on none, see `model`.
OTHER_CPU = "ignore:collect. device must be of the kind:RuntimeWarning"


def collect(name: str, out: Path, **more: object) -> object:
    """`tlfast.collect` of one of them."""
    return tlfast.collect(model(), EXAMPLES, out, **{"progress": False} | CALLS[name] | more)


def digest(out: Path) -> str:
    """SHA-256 of the names and bytes of all unit files."""
    found = hashlib.sha256()
    for path in sorted((out / "data").iterdir()):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    import half_finished  # a loss is called by its module, which isn't __main__ in the tests

    torch.set_num_threads(1)
    for name in CALLS:
        half_finished.collect(name, Path(sys.argv[1]) / name, units=BEGUN)
        half_finished.collect(name, Path(sys.argv[1]) / f"{name}-whole")
        print(name, half_finished.digest(Path(sys.argv[1]) / f"{name}-whole"))
