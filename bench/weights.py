"""Projected weight gradients for each example, to disk and durable, beside the frozen step and bergson's collection."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import tlfast
from tlfast.collecting.loss import next_token_loss

from . import weight_factors, weight_norms, weight_queries
from .collect import SCRATCH, file_system, make_work
from .measure import Measured, check_close
from .report import Cell, Claim, Findings, Result, Table
from .rivals import first_tensor
from .turns import Way as Turn
from .turns import keep_memory, silent, take_turns
from .weight_ways import BERGSON, FLOOR, INTO, PRODUCTS, PYTHON, WAYS, Way, Work

# Beside the floor: of the smaller p of a model all ways, of others what their targets and rivals are about.
FEW, SKETCHED = (PRODUCTS, PYTHON, BERGSON, INTO), (INTO,)

PREDICTION = (
    "the products of p=16 are 7 % of the frozen step at d=128 and 0.8 % at d=768, those of p=64 30 % and 3.2 %; tlfast "
    "adds a call a layer and the bytes of the rows: +9 %, +3 %, +36 %, +6 %; Python hooks +14 % and +31 % at d=128, "
    "theirs being one write without a checksum; bergson +40 % and +56 %: full hooks, a copy a layer, a cat a batch. "
    "Sketches at p=64 +8 %: additions in the place of products. "
    "Norms: opacus 2 of ours, for it makes the weight gradients of the batch, too; Python hooks as much as ours. "
    "Factors: of both symmetric sums ours computes 0.63 to 1 of what kronfluence does, by panels of 128 rows; the rest "
    "of the step is the same: 0.6 of its time above the floor, 0.75 of all. Queries that fill "
    "their matrices: G is half the step's products, (1 + Q / S) / 2 = 56 % with the products, +60 %, and 25 % is out "
    "of reach; of 16 tokens each: 8 * 16 * (O + I) / (2 O I) = 8 to 17 %, +20 %; Python hooks +80 % for both"
)
SIGNS = "rademacher"
LENGTH = 64  # tokens of an example
PARTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@dataclass(frozen=True)
class Model:
    """A GPT-2 and how many examples of it.

    ``most`` is what rows on disk may cost above the floor, in percent, by p and the kind of the projection; ``ways``
    are those that are measured of one, where they aren't FEW, or of a sketch SKETCHED.
    """

    name: str
    shape: dict[str, int]
    most: dict[tuple[int, str], float]
    ways: dict[tuple[int, str], tuple[str, ...]] = field(default_factory=dict)

    @property
    def steps_of_unit(self) -> int:
        """Batches whose rows are one unit on the disk: a sample."""
        return self.shape["rows_per_unit"] // self.shape["batch"]

    @property
    def rounds(self) -> int:
        """Samples: all units but the first one; one more batch is the last."""
        return (self.shape["n_examples"] // self.shape["batch"] - 1) // self.steps_of_unit - 1

    def measures(self, work: Work, way: str) -> bool:
        """Whether a way is measured; one that isn't known by its name always is."""
        few = FEW if work.kind == SIGNS else SKETCHED
        return way not in WAYS or way in (FLOOR, *self.ways.get((work.dim, work.kind), few))


MODELS = (
    Model("d 128", {"n_layers": 6, "width": 128, "batch": 16, "n_examples": 1168, "rows_per_unit": 64},
          {(16, SIGNS): 9.0, (64, SIGNS): 36.0, (64, "hadamard"): 8.0, (64, "count-sketch"): 8.0},
          {(16, SIGNS): tuple(WAYS)}),
    Model("d 768", {"n_layers": 2, "width": 768, "batch": 8, "n_examples": 264, "rows_per_unit": 16},
          {(16, SIGNS): 3.0, (64, SIGNS): 6.0},
          {(64, SIGNS): (PRODUCTS, PYTHON, INTO)}),
)  # fmt: skip
QUICK = Model(
    "d 32",
    {"n_layers": 1, "width": 32, "length": 8, "batch": 4, "n_examples": 16, "rows_per_unit": 4},
    {(4, SIGNS): 9.0},
    {(4, SIGNS): tuple(WAYS)},
)


def works(model: Model) -> list[Work]:
    """What is done with a model, for each p and kind."""
    base = make_work("mean", **{"length": LENGTH} | model.shape)
    n_layers = model.shape["n_layers"]
    points = tuple(f"transformer.h.{layer}.{part}" for layer in range(n_layers) for part in PARTS)
    return [Work(base.model, base.batches, points, dim, base.rows_per_unit, kind) for dim, kind in model.most]


def factors(work: Work) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The gradient at the output of each layer [B, S, O], and its input [B, S, I], of the first batch."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def watch(module: object, args: Any, output: Any) -> None:
        inputs.append(args[0].detach())
        outputs.append(first_tensor(output))

    handles = [work.model.get_submodule(point).register_forward_hook(watch) for point in work.points]
    with tlfast.freeze(work.model):
        loss = next_token_loss(work.model, work.batches[0])
        for handle in handles:
            handle.remove()
        grads = torch.autograd.grad(loss, outputs)
    return {point: both for point, *both in zip(work.points, grads, inputs, strict=True)}  # type: ignore[misc]


def check_ways(work: Work, ways: dict[str, Way]) -> None:
    """Let each way do the first batch, and compare its rows with L G R^T in float64."""
    first, true = replace(work, batches=work.batches[:1]), factors(work)
    for name, way in ways.items():
        if way.read is None or way.matrices is None:
            continue
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            with silent():
                found = way.run(first, Path(out))
            for point, (grad, given) in true.items():
                left, right = (matrix.double() for matrix in way.matrices(work, point))
                grad, given = grad.double(), given.double()
                # Each number is a sum of so many products, in float32 and in any order.
                terms = grad.shape[1] + grad.shape[2] + given.shape[2]
                rows = (grad @ left.T).mT @ (given @ right.T)
                sizes = (grad.abs() @ left.abs().T).mT @ (given.abs() @ right.abs().T)
                bound = terms * torch.finfo(torch.float32).eps * sizes
                check_close(f"{name} at {point}", way.read(found, first, point), rows, bound)


def turn_of(work: Work, way: Way, out: Path) -> Turn:
    """The whole work, into a new folder, by the copy of the model that it is given."""
    return lambda model, begin: way.run(replace(work, model=model, begin=begin), out)


def installed(library: str) -> str:
    """The version of a library; "" where it isn't here."""
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def run(quick: bool = False, ways: dict[str, Way] | None = None) -> Result:
    """Measure every way of each model and p; norms, factors and queries only where no ways are given."""
    theirs, others = installed("bergson"), ways is None
    if ways is None:
        ways = {name: way for name, way in WAYS.items() if theirs or name != BERGSON}
    models = (QUICK,) if quick else MODELS
    if not quick:
        keep_memory()
    SCRATCH.mkdir(parents=True, exist_ok=True)
    result = Result(
        "weights", PREDICTION,
        {"models": {model.name: model.shape for model in models}, "length": LENGTH,
         "layers": "4 a block", "stored": "float32", "rounds": min(model.rounds for model in models),
         "disk": file_system(SCRATCH), "quick": quick}
        | {name: installed(name) or "not installed" for name in ("bergson", "opacus", "kronfluence")},
    )  # fmt: skip
    for model in models:
        for work, measured in measure(model, ways):
            result.tables.append(_table(model, work, measured))
            result.claims += _claims(model, work, measured)
    if others:
        for found in (weight_norms.findings(quick), weight_factors.findings(quick), _queries(models[-1], quick)):
            result.tables += found.tables
            result.claims += found.claims
    return result


def measure(model: Model, ways: dict[str, Way]) -> Iterator[tuple[Work, Measured]]:
    """Check each way of a model's works, and measure all of them in turn; the works share the floor."""
    turns: dict[str, Turn] = {}
    names: dict[str, dict[str, str]] = {}  # of each work: the way -> its name among all turns
    made = {_name(model, work): work for work in works(model)}
    with ExitStack() as folders:
        for what, work in made.items():
            ours = {name: way for name, way in ways.items() if model.measures(work, name)}
            check_ways(work, ours)
            names[what] = {name: name if name == FLOOR else f"{what}: {name}" for name in ours}
            for name, way in ours.items():
                out = Path(folders.enter_context(tempfile.TemporaryDirectory(dir=SCRATCH)))
                turns[names[what][name]] = turn_of(work, way, out)
        (work, *_) = made.values()
        measured = take_turns(work.model, turns, len(work.batches), model.steps_of_unit)
    for what, work in made.items():
        yield work, {name: measured[among] for name, among in names[what].items()}


def _queries(model: Model, quick: bool) -> Findings:
    """Of the last model, the widest, whose arithmetic is most of its time."""
    work = works(model)[0]
    return weight_queries.findings(quick, replace(work, batches=work.batches[: weight_queries.STEPS]), factors)


def _percent(measured: Measured, name: str) -> float:
    """What a way costs above the floor, in percent of the floor's CPU time."""
    return (measured[name]["cpu"].ratio(measured[FLOOR]["cpu"]) - 1) * 100


def _name(model: Model, work: Work) -> str:
    return f"{model.name}, p={work.dim}" + (f", {work.kind}" if work.kind != SIGNS else "")


def _claims(model: Model, work: Work, measured: Measured) -> list[Claim]:
    if INTO not in measured:
        return []
    what = _name(model, work)
    most, above = model.most[work.dim, work.kind], _percent(measured, INTO)
    claims = [Claim(f"{what}: {INTO} above the floor", "at most", most, above, " %")]
    for name in (PYTHON, BERGSON):
        if name in measured:
            ratio = measured[name]["cpu"].ratio(measured[INTO]["cpu"])
            claims.append(Claim(f"{what}: CPU time, {name} / {INTO}", "at least", 1.0, ratio))
    return claims


def _table(model: Model, work: Work, measured: Measured) -> Table:
    rows: list[dict[str, Cell]] = []
    base, bound = measured[FLOOR], measured[PRODUCTS]["cpu"].median if PRODUCTS in measured else None
    n = model.shape["batch"]
    for name, times in measured.items():
        above = None if name in (FLOOR, PRODUCTS) else times["cpu"].above(base["cpu"])
        rows.append(
            {"variant": name, "examples/s_cpu": n / times["cpu"].median,
             "percent_of_floor_cpu": times["cpu"].ratio(base["cpu"]) * 100,
             "overhead_percent_cpu": None if above is None else _percent(measured, name),
             "times_the_products": None if above is None or bound is None else above / bound,
             "set_up_s": times["set_up"].median, "close_s": times["close"].median}
        )  # fmt: skip
    n_bytes = 4 * n * len(work.points) * work.dim**2
    of_rows = f"{n} examples a step, {len(work.points)} layers, {n_bytes / 1e6:.1f} MB of rows"
    note = (
        "overhead: of a step, above the floor; times_the_products: that, beside the arithmetic alone; set_up, close: "
        "CPU time before the first step, and of the last one with the end"
    )
    return Table(f"{_name(model, work)}: {of_rows}", FLOOR, list(rows[0]), rows, note)
