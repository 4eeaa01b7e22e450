"""`tlfast collect --dataset`: many short records of a Parquet file, beside the bare steps; and going on with them."""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tlfast
from tlfast.collecting.batches import Batch, Batching
from tlfast.collecting.from_text import Collection
from tlfast.collecting.losses import LOSSES
from tlfast.collecting.settings import CollectSettings

from .collect import SCRATCH, file_system
from .measure import Sections, Times, WrongResult, check_close, interleave, reduction_bound
from .memory import measure, peak_above
from .report import Cell, Claim, Result, Table
from .rivals import first_tensor

PREDICTION = (
    "a text is read, tokenized, spooled and hashed in 40 us, which is 4 s for all, an answer in 65 us, 6.5 s, most of"
    " it the tokenizer's; their part in a step, a list and a tensor of tokens, takes 10 us of 1 ms: 98 % of the bare"
    " steps' examples/s once they begin; memory grows by 40 bytes an example; a run that goes on hashes the file, and"
    " the examples that lie beside the units: 0.5 s"
)
FLOOR = "forward and backward of the same batches (floor)"
TEXTS, ANSWERS = "tlfast collect --column", "tlfast collect --prompt-column --response-column"
KINDS = {
    TEXTS: ("next_token", {"column": "text"}),
    ANSWERS: ("response", {"prompt_column": "prompt", "response_column": "response"}),
}
VOCABULARY, ROWS_PER_UNIT, BATCH_TOKENS, CHECKED = 1024, 512, 2048, 16
UNITS = 2  # that are computed of those that are planned: a step costs the same in each
ROUNDS, PLANNED = 7, 3  # of steps, whose result is a ratio; of planning and of going on, whose results are seconds
WARM = 4096  # records that show what a run needs, however many there are
HELD = 5, 20  # units that are computed where memory is measured, of few and of all: three lie in memory at once
RUN = {
    "planned": "all records, in each round of planning and of going on",
    "steps": f"of the first {UNITS} units, again and again of one plan of all records, in turn with the floor",
    "reckoned": "percent_with_planning: as many steps for each of the units that were not computed",
    "memory": f"a tenth of all records planned and {HELD[0]} units computed, then all planned and {HELD[1]} computed",
}


@dataclass(frozen=True)
class Source:
    """A model with its tokenizer, and records, in a folder."""

    folder: Path
    n: int

    def settings(self, kind: str, out: Path, **more: Any) -> CollectSettings:
        """Those of the command."""
        shape = {"rows_per_unit": ROWS_PER_UNIT, "batch_tokens": BATCH_TOKENS, "units": f":{UNITS}"}
        given = KINDS[kind][1] | shape | more
        return CollectSettings(
            model=str(self.folder / "model"), dataset=str(self.folder / f"{self.n}.parquet"),
            points=("transformer.h.*",), out=str(out), device="cpu", **given,
        )  # fmt: skip


def _lines() -> Iterator[str]:
    """Lines of the standard library, again and again."""
    while True:
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            yield from (line for line in path.read_text(encoding="utf-8").splitlines() if 20 <= len(line) <= 80)


def write_records(folder: Path, n: int) -> list[str]:
    """Write so many records, and return their texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [line for line, _ in zip(_lines(), range(n), strict=False)]
    columns: dict[str, list[Any]] = {"id": list(range(n)), "text": lines}
    columns["prompt"] = [line[: len(line) // 2] for line in lines]
    columns["response"] = [line[len(line) // 2 :] for line in lines]
    pq.write_table(pa.table(columns), folder / f"{n}.parquet", row_group_size=10_000)
    return lines


def make_source(folder: Path, n: int, n_layers: int, width: int) -> Source:
    """Write the model, a small GPT-2 with random weights, its tokenizer, trained on the records, and the records."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    lines = write_records(folder, n)
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(lines[:10_000], VOCABULARY, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layers, n_embd=width, n_head=4, n_positions=128, vocab_size=VOCABULARY, bos_token_id=None,
        eos_token_id=None, initializer_range=0.1,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    return Source(folder, n)


class Timed(Collection):
    """A collection that knows when its model was loaded, and when each forward began."""

    def __init__(self, settings: CollectSettings) -> None:
        self.loaded = 0.0
        self.forwards: list[float] = []
        super().__init__(settings)
        self.model.register_forward_pre_hook(lambda *_: self.forwards.append(time.perf_counter()))

    def _records(self, settings: CollectSettings, earlier: bool = False) -> Any:
        self.loaded = self.loaded or time.perf_counter()
        return super()._records(settings, earlier)


def planning(settings: CollectSettings, n_steps: int) -> float:
    """Seconds of one run of the command from the loaded model to the first of its steps, of which it makes so many."""
    timed = Timed(settings)
    timed.collect(settings, "bench", progress=False)
    return timed.forwards[-n_steps] - timed.loaded


def steps(timed: Timed, run: Any, n_steps: int) -> Sections:
    """The steps of a run that has planned, once more: from the first of them until all is durable."""
    for commit in (Path(run.out) / "commits").iterdir():
        commit.unlink()
    run.stored = None  # its examples lie there already
    run.collect()
    return {"steps": time.perf_counter() - timed.forwards[-n_steps]}


def computed(run: Any) -> int:
    """The examples of which rows are made."""
    return min(len(run.examples), UNITS * ROWS_PER_UNIT)


def batches_of(run: Any) -> list[list[Batch]]:
    """The batches of each unit of a run, ready in memory."""
    made: list[list[Batch]] = []
    batching: Batching = run.batching
    for start in range(0, computed(run), ROWS_PER_UNIT):
        part = list(run.examples[start : start + ROWS_PER_UNIT])
        made.append([batch for _, batch in batching.batches(part, batching.order(part))])
    return made


def bare_steps(kind: str, model: Any, batches: list[Batch]) -> Sections:
    """The frozen forward and backward of each batch; nothing is captured."""
    loss = LOSSES[KINDS[kind][0]]
    start = time.perf_counter()
    with tlfast.freeze(model):
        for batch in batches:
            loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    return {"steps": time.perf_counter() - start}


def check(kind: str, model: Any, run: Any, out: Path) -> None:
    """Compare some rows with `torch.autograd.grad` of their example alone; the dataset must verify, too."""
    ds = tlfast.open_dataset(out, partial=True)
    if len(ds) != computed(run) or ds.verify().problems:
        raise WrongResult(f"{kind}: there must be a sound row for each of {computed(run)} records, got {len(ds)}")
    loss = LOSSES[KINDS[kind][0]]
    for k in range(0, len(ds), -(-len(ds) // CHECKED)):
        example = run.examples[k]
        outputs: list[torch.Tensor] = []
        handles = [
            model.get_submodule(point).register_forward_hook(
                lambda module, args, output, held=outputs: held.append(first_tensor(output))
            )
            for point in ds.points
        ]
        with tlfast.freeze(model):
            total = loss(model, run.batching.batch([example], example.length)).sum()
        for handle in handles:
            handle.remove()
        for point, grad in zip(ds.points, torch.autograd.grad(total, outputs), strict=True):
            truth, bound = reduction_bound(grad[0], 0, "mean", torch.bfloat16)
            # In a batch the model's own sums are made in another order: so many terms, each rounded once.
            n_terms = len(ds.points) * (12 * grad.shape[-1] + 2 * example.length) + VOCABULARY
            moved = n_terms * torch.finfo(torch.float32).eps * grad.double().abs().mean(0).norm()
            check_close(f"{kind}, row {k} at {point}", ds[point][k], truth, bound + moved)


def anew(source: Source, kind: str, scratch: Path, n_first: int) -> float:
    """Seconds from a loaded model to the first step of a run from the beginning, which then makes one unit."""
    with tempfile.TemporaryDirectory(dir=scratch) as out:
        return planning(source.settings(kind, Path(out), units=":1"), n_first)


def resumed(source: Source, kind: str, out: Path, n_last: int) -> float:
    """Seconds from a loaded model to the first step of a run that goes on; the last unit of ``out`` is made anew."""
    last = max((out / "commits").iterdir())
    last.unlink()
    return planning(source.settings(kind, out), n_last)


def main() -> None:
    """Print how far memory rises in one run; a small one before it has brought all libraries."""
    torch.set_num_threads(1)
    arguments, kind, folder = json.loads(sys.argv[1])

    def collect_of(n: int, n_units: int = HELD[0]) -> None:
        with tempfile.TemporaryDirectory(dir=folder) as out:
            settings = Source(Path(folder), n).settings(kind, Path(out), units=f":{n_units}")
            Collection(settings).collect(settings, "bench", progress=False)

    collect_of(WARM)
    print(peak_above(lambda: collect_of(arguments["n"], arguments["units"])))


def _memory(folder: Path, n: int, kind: str) -> tuple[Table, Claim]:
    """What a run of all records holds above one of a tenth of them, or in a quick run of a few less."""
    sizes = (max(n // 10, WARM + 100), max(n, WARM + 200))
    for size in (WARM, *sizes):
        write_records(folder, size)
    wanted = [{"n": size, "units": held} for size, held in zip(sizes, HELD, strict=True)]
    peaks = [measure(arguments, kind, folder, "bench.data") for arguments in wanted]
    rows: list[dict[str, Cell]] = [
        {"variant": f"{size} records", "units": min(held, -(-size // ROWS_PER_UNIT)), "rise_MB": peak / 1e6}
        for size, held, peak in zip(sizes, HELD, peaks, strict=True)
    ]
    title = f"memory of a process for each, above what it was, with a model of one layer, {kind}"
    claim = Claim(
        f"{kind}: peak memory of {sizes[1]} records above that of {sizes[0]}", "at most", 16,
        (peaks[1] - peaks[0]) / 1e6, " MB",
    )  # fmt: skip
    return Table(title, rows[0]["variant"], list(rows[0]), rows, "units: that are computed of those planned"), claim


def _samplers(kind: str, timed: Timed, planned: Any, batches: list[Batch]) -> dict[str, Callable[[], Sections]]:
    return {FLOOR: lambda: bare_steps(kind, timed.model, batches), kind: lambda: steps(timed, planned, len(batches))}


def _timed(source: Source, kind: str, rounds: int) -> tuple[Table, list[Claim]]:
    with tempfile.TemporaryDirectory(dir=SCRATCH) as scratch:
        out = Path(scratch) / "checked"
        settings = source.settings(kind, out)
        timed = Timed(settings)
        planned = timed.run(settings, "bench", progress=False)
        planned.collect()
        check(kind, timed.model, planned, out)
        units = batches_of(planned)
        measured = interleave(_samplers(kind, timed, planned, [batch for unit in units for batch in unit]), rounds)
        rounds = min(rounds, PLANNED)
        begun = Times([anew(source, kind, Path(scratch), len(units[0])) for _ in range(rounds)])
        going_on = Times([resumed(source, kind, out, len(units[-1])) for _ in range(rounds)])
        check(kind, timed.model, planned, out)
    base, ours = measured[FLOOR]["steps"], measured[kind]["steps"]
    n, of_all = computed(planned), source.n / computed(planned)
    rows: list[dict[str, Cell]] = [
        {"variant": name, "examples/s": n / times.median, "planning_s": before,
         "percent_of_floor": base.ratio(times) * 100,
         "percent_with_planning": base.median * of_all * 100 / (before + times.median * of_all)}
        for name, times, before in ((FLOOR, base, 0.0), (kind, ours, begun.median))
    ]  # fmt: skip
    tokens = sum(planned.examples.lengths()) / source.n
    title = f"{source.n} records planned, {tokens:.0f} tokens each, the rows of {n} computed, {kind}"
    claims = [
        Claim(f"{kind}: examples/s of its steps / floor", "at least", 95, base.ratio(ours) * 100, " %"),
        Claim(f"{kind}: planning", "at most", 5, begun.median, " s"),
        Claim(f"{kind}: going on, from a loaded model to computing", "at most", 3, going_on.median, " s"),
    ]
    return Table(title, FLOOR, list(rows[0]), rows, "steps: from the first one until all is durable"), claims


def run(quick: bool = False) -> Result:
    """Make the records, and measure texts, and prompts with their answers."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    shape, rounds = {"n": 100_000, "n_layers": 4, "width": 128}, ROUNDS
    if quick:
        shape, rounds = {"n": 300, "n_layers": 1, "width": 32}, 1
    result = Result(
        "data", PREDICTION,
        {"model": f"GPT-2, vocabulary {VOCABULARY}, {shape}", "points": "every block", "stored": "bfloat16, mean",
         "rows_per_unit": ROWS_PER_UNIT, "batch_tokens": BATCH_TOKENS, "rounds": rounds,
         "rounds_of_planning": min(rounds, PLANNED), "run": RUN, "disk": file_system(SCRATCH), "quick": quick},
    )  # fmt: skip
    kinds = list(KINDS) if sys.platform.startswith("linux") else []
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder, tempfile.TemporaryDirectory(dir=SCRATCH) as small:
        source = make_source(Path(folder), **shape)
        make_source(Path(small), WARM, n_layers=1, width=16)
        for kind in KINDS:
            table, claims = _timed(source, kind, rounds)
            result.tables.append(table)
            result.claims += claims
        for kind in kinds[:1] if quick else kinds:
            table, claim = _memory(Path(small), source.n, kind)
            result.tables.append(table)
            result.claims.append(claim)
    return result


if __name__ == "__main__":
    main()
