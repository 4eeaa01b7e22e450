"""Attribution patching and its edges: TransformerLens' tool, the code of notebooks, EAP's usual code, and the recipes.

Needs TransformerLens, whose version is part of the bench's name: run it in an environment of `make test-lens`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import memory
from .lens import build
from .measure import WrongResult, interleave, repeat
from .report import Claim, Result, Table

PREDICTION = (
    "all of it is arithmetic at this width: notebook 1.5 of ours, for it makes parameter gradients; the tool of "
    "TransformerLens 3, for it takes one pair at a time; the usual EAP 4, for it splits the stream by heads; of memory "
    "beside the bare runs a thirtieth"
)
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 768, 12, 512
PAIRS, LENGTH = 32, 16
BATCH, EAP_BATCH = 16, 8  # the recipes' own
NODES = [f"blocks.{layer}.hook_{kind}" for layer in range(LAYERS) for kind in ("attn_out", "mlp_out", "resid_post")]
Z = [f"blocks.{layer}.attn.hook_z" for layer in range(LAYERS)]

AT_ONCE = "bare, all pairs at once"
WEIGHED = (
    "bare", "bare, 8 pairs", AT_ONCE, "notebook, node", "tlfast, node", "tlfast, node, all pairs at once", "usual EAP",
    "tlfast, eap",
)  # fmt: skip


def prompts(pairs: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [pairs, length], and the same with other ones at two positions."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(VOCABULARY, (pairs, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2:4] = torch.randint(VOCABULARY, (pairs, 2), generator=generator)
    return clean, corrupted


def of_pairs(logits: Any, pairs: Any = None) -> Any:
    """A difference of logits, [pairs]."""
    return logits[:, -1, 3] - logits[:, -1, 7]


def bare(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, batch: int) -> None:
    """The floor: both forwards and the backward to the embedding, without a hook that keeps anything."""
    import tlfast

    with tlfast.freeze(model):
        for start in range(0, len(clean), batch):
            rows = slice(start, start + batch)
            with torch.no_grad():
                model(clean[rows])
            of_pairs(model(corrupted[rows])).sum().backward()


def notebook(model: Any, clean: Any, corrupted: Any, names: list[str], params: bool = True) -> dict[str, torch.Tensor]:
    """What notebooks write: two caches of activations, one of gradients, and an einsum for each point."""
    caches: list[dict[str, Any]] = [{}, {}, {}]

    def keep(value: Any, hook: Any, cache: dict[str, Any], name: str) -> None:
        cache[name] = value.detach()

    def hooks(cache: dict[str, Any]) -> list[Any]:
        return [(name, partial(keep, cache=cache, name=name)) for name in names]

    for parameter in model.parameters():
        parameter.requires_grad_(params)
    model.embed.weight.requires_grad_(True)  # a graph needs a beginning
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=hooks(caches[0])):
            model(clean)
        with model.hooks(fwd_hooks=hooks(caches[1]), bwd_hooks=hooks(caches[2])):
            of_pairs(model(corrupted)).sum().backward()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.zero_grad()
    letters = {3: "bpd,bpd->b", 4: "bphd,bphd->bh"}
    return {
        name: torch.einsum(letters[caches[0][name].dim()], caches[2][name], caches[0][name] - caches[1][name])
        for name in names
    }


def usual_eap(model: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> torch.Tensor:
    """Edges as EAP's and EAP-IG's code has them: split inputs, a buffer [pairs, P, writers, d], an einsum a reader."""
    n_writers = 1 + LAYERS * (HEADS + 1)
    buffer = torch.zeros(*clean.shape, n_writers, WIDTH)
    scores = torch.zeros(n_writers, LAYERS * (3 * HEADS + 1) + 1)
    forward: dict[bool, list[Any]] = {True: [], False: []}
    backward: list[Any] = []

    def write(value: Any, hook: Any, place: slice, sign: float) -> None:
        buffer[:, :, place] += sign * (value if value.dim() == 4 else value.unsqueeze(2)).detach()

    def read(grad: Any, hook: Any, place: slice, seen: int) -> None:
        grads = grad if grad.dim() == 4 else grad.unsqueeze(2)
        scores[:seen, place] += torch.einsum("bpwd,bprd->wr", buffer[:, :, :seen], grads)

    def writer(name: str, first: int, count: int) -> None:
        for sign in (True, False):
            hook = partial(write, place=slice(first, first + count), sign=1.0 if sign else -1.0)
            forward[sign].append((name, hook))

    def reader(name: str, first: int, count: int, seen: int) -> None:
        backward.append((name, partial(read, place=slice(first, first + count), seen=seen)))

    writer("blocks.0.hook_resid_pre", 0, 1)
    seen, column = 1, 0
    for layer in range(LAYERS):
        for kind in "qkv":
            reader(f"blocks.{layer}.hook_{kind}_input", column, HEADS, seen)
            column += HEADS
        writer(f"blocks.{layer}.attn.hook_result", seen, HEADS)
        seen += HEADS
        reader(f"blocks.{layer}.hook_mlp_in", column, 1, seen)
        writer(f"blocks.{layer}.hook_mlp_out", seen, 1)
        seen, column = seen + 1, column + 1
    reader(f"blocks.{LAYERS - 1}.hook_resid_post", column, 1, seen)
    flags = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in")
    for flag in flags:
        getattr(model, f"set_{flag}")(True)
    try:
        with torch.no_grad(), model.hooks(fwd_hooks=forward[True]):
            model(clean)
        with model.hooks(fwd_hooks=forward[False], bwd_hooks=backward):
            of_pairs(model(corrupted)).mean().backward()
    finally:
        for flag in flags:
            getattr(model, f"set_{flag}")(False)
        model.zero_grad()
    return scores


def tool(model: Any, clean: torch.Tensor, corrupted: torch.Tensor, edges: bool, installed: bool) -> Any:
    """TransformerLens' `attribution_patch`, alone or inside `install`."""
    import tlfast.transformer_lens as lens

    analysis = import_module("transformer_lens.tools.analysis.attribution_patching")
    config = analysis.EdgeAttributionConfig(granularity="edge" if edges else "node")

    def metric(logits: Any) -> Any:
        return of_pairs(logits)[0]

    if not installed:
        return analysis.attribution_patch(model, clean, corrupted, metric, config)
    lens.install()
    try:
        return analysis.attribution_patch(model, clean, corrupted, metric, config)
    finally:
        lens.uninstall()


def variants(model: Any, clean: Any, corrupted: Any) -> dict[str, Callable[[], Any]]:
    """All that is timed."""
    from tlfast.recipes import attribution_patching, eap

    given = (model, clean, corrupted)
    found: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare(*given, BATCH),
        "bare, 8 pairs": lambda: bare(*given, EAP_BATCH),
        AT_ONCE: lambda: bare(*given, len(clean)),
        "notebook, node": lambda: notebook(*given, NODES),
        "notebook, node, frozen": lambda: notebook(*given, NODES, params=False),
        "tlfast, node": lambda: attribution_patching(*given, of_pairs, NODES, batch_size=BATCH),
        "tlfast, node, all pairs at once": lambda: attribution_patching(*given, of_pairs, NODES, batch_size=None),
        "notebook, head": lambda: notebook(*given, Z),
        "tlfast, head": lambda: attribution_patching(*given, of_pairs, Z, "head", batch_size=BATCH),
        "usual EAP": lambda: usual_eap(*given),
        "tlfast, eap": lambda: eap(*given, of_pairs, batch_size=EAP_BATCH),
    }
    if int(version("transformer-lens").split(".")[0]) >= 4:
        found["tool, node"] = lambda: tool(*given, edges=False, installed=False)
        found["tool, node, installed"] = lambda: tool(*given, edges=False, installed=True)
    return found


def check(model: Any, clean: torch.Tensor, corrupted: torch.Tensor) -> None:
    """Ours and the notebook's are one, up to the rounding of float32 sums; WrongResult where they aren't."""
    from tlfast.recipes import attribution_patching, eap

    def close(what: str, got: torch.Tensor, truth: torch.Tensor) -> None:
        # Sums of up to LENGTH * WIDTH terms in another order, of gradients that batches of other sizes have rounded.
        bound = 64 * torch.finfo(torch.float32).eps * float(truth.abs().max()) * (LENGTH * WIDTH) ** 0.5
        if got.shape != truth.shape or not float((got - truth).abs().max()) <= bound:
            raise WrongResult(f"{what}: scores must be those of the usual code, within {bound:.2g}")

    for granularity, names in (("node", NODES), ("head", Z)):
        ours: Any = attribution_patching(model, clean, corrupted, of_pairs, names, granularity)  # type: ignore[arg-type]
        for name, truth in notebook(model, clean, corrupted, names).items():
            close(f"{granularity} at {name}", ours[name], truth)
    close("edges", eap(model, clean, corrupted, of_pairs).scores, usual_eap(model, clean, corrupted))
    if "tool, node" in variants(model, clean, corrupted):
        theirs, ours = (tool(model, clean, corrupted, False, installed) for installed in (False, True))
        values = [torch.tensor(list(found.node_scores.values())) for found in (ours, theirs)]
        close("the tool's nodes", *values)


def _table(title: str, measured: Any, floor: str, peaks: dict[str, int]) -> Table:
    rows: list[dict[str, Any]] = []
    for name, times in measured.items():
        rows.append(
            {
                "variant": name, "median": times["total"].median * 1e3, "min": times["total"].min * 1e3,
                "cpu": times["cpu"].median * 1e3, "ratio_to_floor": times["cpu"].ratio(measured[floor]["cpu"]),
                "peak_MB": peaks[name] / 1e6 if name in peaks else None,
            }
        )  # fmt: skip
    note = "ratio: of CPU time; peak: resident memory above that of model and inputs, in a process of its own"
    return Table(title, floor, list(rows[0]), rows, note)


def run(quick: bool = False) -> Result:
    """Measure all of them."""
    warnings.simplefilter("ignore")  # TransformerLens says at every norm which path it takes
    found = version("transformer-lens")
    rounds, pairs = (2, 4) if quick else (7, PAIRS)
    settings = {"transformer_lens": found, "rounds": rounds, "pairs": pairs, "length": LENGTH, "batch": BATCH}
    result = Result(f"recipes-{found}", PREDICTION, settings | {"quick": quick})
    model, (clean, corrupted) = build(LAYERS, WIDTH, HEADS, LENGTH).eval(), prompts(pairs, LENGTH)
    check(model, clean, corrupted)
    calls = variants(model, clean, corrupted)
    measured = interleave({name: partial(repeat, call, 1) for name, call in calls.items()}, rounds)
    with tempfile.TemporaryDirectory() as folder:
        peaks = {name: memory.measure({"pairs": pairs}, name, Path(folder), "bench.recipes") for name in WEIGHED}
    title = f"{LAYERS} layers, d {WIDTH}, {pairs} pairs of {LENGTH} tokens: ms"
    result.tables.append(_table(title, measured, "bare", peaks))

    def ratio(slow: str, fast: str) -> float:
        return float(measured[slow]["cpu"].ratio(measured[fast]["cpu"]))  # other processes disturb it less

    def extra(name: str, floor: str) -> int:
        return max(peaks[name] - peaks[floor], 1_000_000)  # less than that isn't told from nothing

    result.claims += [
        Claim("notebook / tlfast, node", "at least", 1.3, ratio("notebook, node", "tlfast, node")),
        Claim("notebook / tlfast, head", "at least", 1.3, ratio("notebook, head", "tlfast, head")),
        Claim("memory beside the bare runs, notebook's / tlfast's, node", "at least", 20.0,
              extra("notebook, node", AT_ONCE) / extra("tlfast, node", "bare")),
        Claim("usual EAP / tlfast", "at least", 3.0, ratio("usual EAP", "tlfast, eap")),
        Claim("memory beside the bare runs, usual EAP's / tlfast's", "at least", 10.0,
              extra("usual EAP", AT_ONCE) / extra("tlfast, eap", "bare, 8 pairs")),
    ]  # fmt: skip
    if "tool, node" in calls:
        result.claims += [
            Claim("TransformerLens' tool / tlfast, head", "at least", 10.0, ratio("tool, node", "tlfast, head")),
            Claim("TransformerLens' tool / the same installed", "at least", 3.0,
                  ratio("tool, node", "tool, node, installed")),
        ]  # fmt: skip
    return result


def main() -> None:
    """What `bench.memory` asks a process of its own: the peak of one variant above what lies there before it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    arguments, variant, _ = json.loads(sys.argv[1])
    model, (clean, corrupted) = build(LAYERS, WIDTH, HEADS, LENGTH).eval(), prompts(arguments["pairs"], LENGTH)
    variants(model, clean[:1], corrupted[:1])[variant]()  # what is imported and allocated once
    print(memory.peak_above(variants(model, clean, corrupted)[variant]))


if __name__ == "__main__":
    main()
