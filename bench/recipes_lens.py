"""Recipes: a Jacobian lens beside TransformerLens' own fit, pairs for a gradient SAE beside forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

import tlfast
from tlfast.recipes import fit_jacobian_lens, gradient_sae_pairs
from tlfast.recipes.jacobian_rows import JacobianRows

from .measure import Measured, WrongResult, check_close, interleave, repeat
from .report import Claim, Result, Table, cost_rows

PREDICTION = (
    "Jacobian lens: 1.5x TransformerLens' fit was hoped for. Two thirds of their time are products of matrices, of "
    "which ours makes as many: 1.2x to 1.4x at width 512, a little more at 320. Outside of backward: under 3 %. "
    "Pairs: two rows a token are written and read four times more, 0.1 ms of 1.5 ms a token: 90 % and more of the bare "
    "forward and backward; the SAE's step comes on top of either."
)
ROUNDS = 3
CORPUS = {"corpus": "drawn tokens", "skip_first_positions": 16}
EPS = torch.finfo(torch.float32).eps


def jacobian_lens(result: Result, quick: bool) -> None:
    """One prompt of 48 tokens through a GPT-2 of 4 layers: a fit grows by the third power of the width, and all of it
    must end within minutes."""
    theirs: Any = import_module("transformer_lens.tools.analysis.jacobian_lens")
    lens: Any = import_module("tlfast.transformer_lens")
    bench_lens: Any = import_module("bench.lens")
    width, heads, length, rounds = (64, 1, 32, 1) if quick else (320, 5, 48, ROUNDS)
    bridge = bench_lens.build(4, width, heads, length)
    bridge.to_tokens = lambda prompt, **given: prompt  # it has no tokenizer
    prompt = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0))

    def fit_theirs(given: torch.Tensor) -> Any:
        return theirs.JacobianLens.fit(bridge, [given], show_progress=False, **CORPUS)

    def installed(given: torch.Tensor) -> Any:
        lens.install()
        try:
            return fit_theirs(given)
        finally:
            lens.uninstall()

    calls: dict[str, Callable[[torch.Tensor], Any]] = {
        "theirs": fit_theirs,
        "tlfast": lambda given: fit_jacobian_lens(bridge, [given], **CORPUS),
        "theirs, install": installed,
    }
    short = prompt[:, :24]  # the same code in a shorter time
    truth = fit_theirs(short).jacobians
    for name, call in calls.items():
        for layer, found in call(short).jacobians.items():
            bound = 64 * EPS * truth[layer].abs().max().double().expand_as(truth[layer])
            check_close(f"{name}, layer {layer}", found, truth[layer].double(), bound)
    calls["backwards alone"] = backwards_alone(bridge)
    measured = interleave({name: partial(repeat, partial(call, prompt), 1) for name, call in calls.items()}, rounds)
    title = f"Jacobian lens: 4 layers, d {width}, a prompt of {length} tokens: s"
    result.tables.append(table(title, measured, "theirs"))
    ours, alone = measured["tlfast"]["cpu"], measured["backwards alone"]["cpu"]
    result.claims += [
        Claim("TransformerLens' fit / fit_jacobian_lens", "at least", 1.5, measured["theirs"]["cpu"].ratio(ours)),
        Claim("outside of backward, of the time of a fit", "at most", 0.03, 1 - alone.ratio(ours)),
    ]


def backwards_alone(bridge: Any) -> Callable[[torch.Tensor], None]:
    """All backwards of a fit, with nothing done to what they give."""
    blocks = [bridge.hook_dict[f"blocks.{layer}.hook_out"] for layer in range(bridge.cfg.n_layers)]
    rows = JacobianRows(bridge, blocks, 8, CORPUS["skip_first_positions"])  # type: ignore[arg-type]
    flags = [(p, p.requires_grad) for p in bridge.parameters()]

    def run(prompt: torch.Tensor) -> None:
        for p, _ in flags:
            p.requires_grad_(False)
        residuals = rows.residuals(lambda tokens: bridge(tokens, return_type=None), prompt)
        cotangents = torch.zeros(8, *residuals[-1].shape)
        cotangents[:, 0, 16:-1, 0] = 1.0
        for start in range(0, residuals[-1].shape[2], 8):
            rows._backward(residuals, cotangents, start + 8 < residuals[-1].shape[2], together=True)
        for p, required in flags:
            p.requires_grad_(required)

    return run


def pairs(result: Result, quick: bool) -> None:
    """Tokens of a GPT-2 of 4 layers to the step of an SAE: two points, a buffer, nothing on a disk."""
    transformers: Any = import_module("transformers")
    width, length, n_examples, rounds = (32, 16, 16, 1) if quick else (384, 128, 32, ROUNDS)
    config = transformers.GPT2Config(
        n_layer=4, n_embd=width, n_head=max(1, width // 64), vocab_size=512, n_positions=length, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    tokens = torch.randint(512, (n_examples, length), generator=torch.Generator().manual_seed(0))
    points = ["transformer.h.1", "transformer.h.2"]
    at_once = n_examples // 4
    settings: Any = dict(buffer_tokens=4 * length * at_once, batch_size=length * at_once // 4,
                         batch_tokens=length * at_once)  # fmt: skip

    def read(step: Callable[[torch.Tensor], object] | None) -> int:
        n = 0
        for batch in gradient_sae_pairs(model, list(tokens), points, **settings):
            n += len(batch["id"])
            if step is not None:
                step(torch.cat([batch[f"{points[0]}:act"], batch[points[0]]], 1))
        return n

    def bare() -> None:
        with tlfast.freeze(model):
            for part in tokens.split(at_once):
                logits = model(part, use_cache=False).logits[:, :-1]
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
                ).backward()

    check_pairs(model, tokens, points[0], settings)
    sae = sae_step(2 * width)
    drawn = torch.randn(settings["batch_size"], 2 * width)
    n_batches = n_examples * length // settings["batch_size"]
    calls: dict[str, Callable[[], Any]] = {
        "forward and backward": bare,
        "pairs": lambda: read(None),
        "pairs to an SAE's step": lambda: read(sae),
        "the SAE's steps alone": lambda: [sae(drawn) for _ in range(n_batches)],
    }
    measured = interleave({name: partial(repeat, call, 1) for name, call in calls.items()}, rounds)
    title = f"pairs of 2 points: 4 layers, d {width}, {n_examples} x {length} tokens: s"
    result.tables.append(table(title, measured, "forward and backward"))
    floor = measured["forward and backward"]["cpu"]
    result.claims.append(
        Claim("tokens/s of pairs / forward and backward", "at least", 0.9, floor.ratio(measured["pairs"]["cpu"]))
    )


def check_pairs(model: Any, tokens: torch.Tensor, point: str, settings: dict[str, Any]) -> None:
    """Every token comes once, with the activation and gradient that autograd gives."""
    seen: list[torch.Tensor] = []
    with tlfast.freeze(model):
        hook = model.get_submodule(point).register_forward_hook(
            lambda module, args, out: seen.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        logits = model(tokens, use_cache=False).logits[:, :-1]
        hook.remove()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        (grads,) = torch.autograd.grad(loss, seen[0])
    met = torch.zeros(tokens.shape, dtype=torch.int64)
    for batch in gradient_sae_pairs(model, list(tokens), point, **settings):
        place = batch["id"], batch["position"]
        met[place] += 1
        for name, whole in ((f"{point}:act", seen[0].detach()), (point, grads)):
            truth = whole[place].double()
            # Another batch: sums of the width and the positions in another order.
            check_close(name, batch[name], truth, 1e-3 * whole.abs().max().double().expand_as(truth))
    if not bool((met == 1).all()):
        raise WrongResult("pairs: every token must come once")


def sae_step(width: int) -> Callable[[torch.Tensor], object]:
    """One step of training of a sparse autoencoder of 4 x width latents."""
    encode, decode = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()])

    def step(x: torch.Tensor) -> None:
        latents = encode(x).relu()
        loss = (decode(latents) - x).square().mean() + 1e-3 * latents.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def table(title: str, measured: Measured, floor: str) -> Table:
    """Medians in seconds, and how many times the floor each is."""
    rows = cost_rows(measured, floor, unit=1.0)
    for row in rows:
        row["ratio_cpu"] = measured[str(row["variant"])]["cpu"].ratio(measured[floor]["cpu"])
    return Table(title, floor, ["variant", "median", "min", "ratio_to_floor", "ratio_cpu"], rows)


def run(quick: bool = False) -> Result:
    """Measure the pairs, and the lens where TransformerLens has one."""
    import warnings

    warnings.simplefilter("ignore")  # TransformerLens says at every norm which path it takes
    settings = {"quick": quick, "rounds": 1 if quick else ROUNDS, "threads": torch.get_num_threads()}
    result = Result("recipes_lens", PREDICTION, settings)
    pairs(result, quick)
    if find_spec("transformer_lens") is not None:
        jacobian_lens(result, quick)
    return result
