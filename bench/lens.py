"""Caching gradients of a TransformerLens model: the plain step, TransformerLens' own run_with_cache, and ours.

Needs TransformerLens, whose version is part of the bench's name: run it in an environment of `make test-lens`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch

from .measure import WrongResult, calls_for, check_equal, interleave, repeat
from .report import Claim, Result, Table, cost_rows

PREDICTION = (
    "dispatch-bound, all points: theirs 2.6 to 3.2 of the plain step, ours 1.3 (a tap with its registration costs "
    "15 us a point, a plain step 100 us), 1.05 at resid_post alone; gpt2 width: 0.70 of theirs without parameter "
    "gradients; a point costs a tenth of theirs"
)
RESID = "blocks.*.hook_resid_post"


def build(n_layers: int, width: int, heads: int, length: int) -> Any:
    """A model with random weights, of the kind that this TransformerLens is about."""
    lens = import_module("transformer_lens")
    torch.manual_seed(0)
    shape = dict(
        n_layers=n_layers, d_model=width, n_ctx=length, d_head=width // heads, n_heads=heads, d_vocab=512,
        act_fn="gelu", normalization_type="LN", seed=0,
    )  # fmt: skip
    if int(version("transformer-lens").split(".")[0]) < 4:
        return lens.HookedTransformer(lens.HookedTransformerConfig(**shape, device="cpu"))
    builder = import_module("transformer_lens.model_bridge.sources._bridge_builder")
    transformers = import_module("transformers")
    config = transformers.GPT2Config(
        n_layer=n_layers, n_embd=width, n_head=heads, vocab_size=512, n_positions=length,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    return builder.build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config, dtype=torch.float32)


def retyped(model: Any, tokens: Any, metric: Callable[[Any], Any], names: list[str]) -> tuple[float, dict, dict]:
    """What notebooks write: caches filled by forward and backward hooks, and a backward for all parameters."""
    acts: dict[str, Any] = {}
    grads: dict[str, Any] = {}

    def keep_act(value: Any, hook: Any, name: str) -> None:
        acts[name] = value.detach()

    def keep_grad(grad: Any, hook: Any, name: str) -> None:
        grads[name] = grad.detach()

    model.reset_hooks()
    with model.hooks(
        fwd_hooks=[(name, partial(keep_act, name=name)) for name in names],
        bwd_hooks=[(name, partial(keep_grad, name=name)) for name in names],
    ):
        value = metric(model(tokens))
        value.backward()
    return value.item(), acts, grads


def notebook(model: Any, tokens: Any) -> tuple[dict, dict]:
    """What the notebook "Attribution Patching" has: every activation and gradient, by hooks added one by one."""
    acts: dict[str, Any] = {}
    grads: dict[str, Any] = {}

    def forward_cache_hook(act: Any, hook: Any) -> None:
        acts[hook.name] = act.detach()

    def backward_cache_hook(grad: Any, hook: Any) -> None:
        grads[hook.name] = grad.detach()

    def every(name: str) -> bool:  # but those that TransformerLens computes on request alone
        return not name.endswith(("_input", "hook_result", "hook_attn_in", "hook_mlp_in"))

    model.reset_hooks()
    model.add_hook(every, forward_cache_hook, "fwd")
    model.add_hook(every, backward_cache_hook, "bwd")
    model(tokens, return_type="loss").backward()
    model.reset_hooks()
    return acts, grads


def check_caches(what: str, got: Any, truth: Any) -> None:
    """Every tensor of a cache is theirs, to the bit."""
    if set(got.keys()) != set(truth.keys()):
        raise WrongResult(f"{what}: keys must be those of TransformerLens")
    for name in truth:
        check_equal(f"{what} at {name}", got[name], truth[name])


def dispatch_bound(result: Result, rounds: int) -> None:
    """4 layers, d 64, seq 8, batch 1: what is paid is calls."""
    import tlfast.transformer_lens as lens

    model, tokens = build(4, 64, 4, 8), torch.randint(512, (1, 8), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(return_type="loss", incl_bwd=True)
    resid = dict(names_filter=lambda name: name.endswith("resid_post"), **options)
    check_caches("all points", lens.run_with_cache(model, tokens, calls="last", **options)[1],
                 model.run_with_cache(tokens, **options)[1])  # fmt: skip

    def accelerated() -> None:
        with lens.accelerate(model):
            model.run_with_cache(tokens, **options)

    steps: dict[str, Callable[[], object]] = {
        "plain": lambda: model(tokens, return_type="loss").backward(),
        "theirs, all": lambda: model.run_with_cache(tokens, **options),
        "tlfast, all": lambda: lens.run_with_cache(model, tokens, **options),
        "tlfast, all, params": lambda: lens.run_with_cache(model, tokens, params=True, **options),
        "accelerate, all": accelerated,
        "theirs, resid_post": lambda: model.run_with_cache(tokens, **resid),
        "tlfast, resid_post": lambda: lens.run_with_cache(model, tokens, names_filter=RESID, **options),
        "tlfast, resid_post, params": lambda: lens.run_with_cache(
            model, tokens, names_filter=RESID, params=True, **options
        ),
    }  # fmt: skip
    measured = measure(model, steps, rounds)
    result.tables.append(table("4 layers, d 64, [1, 8]: ms", measured))
    ratio = {name: times["total"].ratio(measured["plain"]["total"]) for name, times in measured.items()}
    result.claims += [
        Claim("tlfast, all points / plain step", "at most", 1.4, ratio["tlfast, all"]),
        Claim("tlfast, resid_post / plain step", "at most", 1.1, ratio["tlfast, resid_post"]),
    ]


def users_hooks(result: Result, rounds: int) -> None:
    """The same model with hooks of the user's own: where do they cost less inside install, and how much?"""
    import tlfast.transformer_lens as lens

    model, tokens = build(4, 64, 4, 8), torch.randint(512, (1, 8), generator=torch.Generator().manual_seed(0))

    def installed(call: Callable[[], Any]) -> Any:
        lens.install()
        try:
            return call()
        finally:
            lens.uninstall()

    theirs = notebook(model, tokens)
    model.zero_grad()  # a gradient that is kept without a copy may be that of a parameter, too, which adds up
    ours = installed(lambda: notebook(model, tokens))
    for what, got, truth in zip(("activations", "gradients"), ours, theirs, strict=True):
        check_caches(f"the notebook's {what}", got, truth)
    measured = measure(
        model,
        {
            "plain": lambda: model(tokens, return_type="loss").backward(),
            "notebook": lambda: notebook(model, tokens),
            "notebook, install": lambda: installed(lambda: notebook(model, tokens)),
        },
        rounds,
    )
    result.tables.append(table(f"hooks of the user's on {len(theirs[0])} points of the small model: ms", measured))
    above = {name: times["total"].above(measured["plain"]["total"]) for name, times in measured.items()}
    result.claims.append(
        Claim("the notebook / the same inside install, above the plain step", "at least", 2.0,
              above["notebook"] / above["notebook, install"])
    )  # fmt: skip


def gpt2_width(result: Result, rounds: int, batch: int, length: int) -> None:
    """4 layers, d 768: what is paid is arithmetic."""
    import tlfast.transformer_lens as lens

    model = build(4, 768, 12, length)
    tokens = torch.randint(512, (batch, length), generator=torch.Generator().manual_seed(0))
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]

    def metric(logits: Any) -> Any:
        return logits[:, -1, 0].sum() - logits[:, -1, 1].sum()

    kept = dict(reduce="sum", dtype=torch.float16)
    _, acts, grads = lens.cache_fwd_and_bwd(model, tokens, metric, names)
    _, their_acts, their_grads = retyped(model, tokens, metric, names)
    check_caches("activations", acts, their_acts)
    check_caches("gradients", grads, their_grads)
    small = lens.cache_fwd_and_bwd(model, tokens, metric, names, **kept)
    held = [sum(t.untyped_storage().nbytes() for c in caches for t in c.values())
            for caches in ((their_acts, their_grads), small[1:])]  # fmt: skip
    del acts, grads, their_acts, their_grads, small
    measured = measure(
        model,
        {
            "plain": lambda: metric(model(tokens)).backward(),
            "retyped": lambda: retyped(model, tokens, metric, names),
            "tlfast": lambda: lens.cache_fwd_and_bwd(model, tokens, metric, names),
            "tlfast, sum, float16": lambda: lens.cache_fwd_and_bwd(model, tokens, metric, names, **kept),
        },
        rounds,
    )
    result.tables.append(table(f"4 layers, d 768, [{batch}, {length}], resid_post: ms", measured))
    ratio = measured["tlfast"]["total"].ratio(measured["retyped"]["total"])
    result.claims += [
        Claim("cache_fwd_and_bwd / the function of notebooks", "at most", 0.75, ratio),
        Claim("bytes held, theirs / sum in float16", "at least", 200.0, held[0] / held[1]),
    ]


def one_point(result: Result, rounds: int, n_points: int) -> None:
    """A chain of hook points and nothing else: what each costs."""
    import tlfast.transformer_lens as lens

    points = import_module("transformer_lens.hook_points")
    root = getattr(import_module("transformer_lens"), "HookedRootModule", None) or points.HookedRootModule

    class Chain(root):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.chain = torch.nn.ModuleList(points.HookPoint() for _ in range(n_points))
            self.setup()

        def forward(self, x: Any) -> Any:
            x = x * self.scale
            for point in self.chain:
                x = point(x * 1.0)
            return x.sum()

    model, x = Chain(), torch.ones(1, 4, 8)
    check_caches("chain", lens.run_with_cache(model, x, incl_bwd=True)[1], model.run_with_cache(x, incl_bwd=True)[1])
    measured = measure(
        model,
        {
            "plain": lambda: model(x).backward(),
            "theirs": lambda: model.run_with_cache(x, incl_bwd=True),
            "tlfast, params": lambda: lens.run_with_cache(model, x, incl_bwd=True, params=True),
            "tlfast": lambda: lens.run_with_cache(model, x, incl_bwd=True),
        },
        rounds,
    )
    rows = cost_rows(measured, "plain", n_points)
    result.tables.append(Table(f"a chain of {n_points} points: us a point", "plain", list(rows[0]), rows))
    floor = measured["plain"]["total"]
    above = {name: times["total"].above(floor) for name, times in measured.items()}
    result.claims.append(
        Claim("theirs / tlfast, above the bare model", "at least", 7.0, above["theirs"] / above["tlfast"])
    )


def measure(model: Any, steps: dict[str, Callable[[], object]], rounds: int) -> Any:
    """Time all variants in turn; gradients are forgotten before each call, in every variant."""

    def fresh(step: Callable[[], object]) -> None:
        model.zero_grad()
        step()

    calls = {name: partial(fresh, step) for name, step in steps.items()}
    n_calls = calls_for(calls["plain"], 0.05)
    return interleave({name: partial(repeat, call, n_calls) for name, call in calls.items()}, rounds)


def table(title: str, measured: Any) -> Table:
    """Medians, and how many times the plain step each is."""
    rows = cost_rows(measured, "plain", unit=1e3)
    for row in rows:
        row["ratio"] = measured[str(row["variant"])]["total"].ratio(measured["plain"]["total"])
        row["ratio_cpu"] = measured[str(row["variant"])]["cpu"].ratio(measured["plain"]["cpu"])
    return Table(title, "plain", ["variant", "median", "min", "ratio", "ratio_cpu"], rows)


def run(quick: bool = False) -> Result:
    """Measure all of them."""
    import warnings

    warnings.simplefilter("ignore")  # TransformerLens says at every norm which path it takes
    found = version("transformer-lens")
    rounds = 3 if quick else 21
    result = Result(f"lens-{found}", PREDICTION, {"transformer_lens": found, "rounds": rounds, "quick": quick})
    dispatch_bound(result, rounds)
    users_hooks(result, rounds)
    one_point(result, rounds, 20 if quick else 200)
    gpt2_width(result, 3 if quick else 7, *((2, 16) if quick else (8, 128)))
    return result
