"""The main job, to disk and durable, against the same forward and backward without any capture."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tlfast
from tlfast.collecting.batches import Batch
from tlfast.collecting.loss import next_token_loss

from .measure import Measured, Sections, WrongResult, check_close, interleave, reduction_bound
from .memory import ROOT, measure
from .report import Cell, Claim, Result, Table
from .rivals import first_tensor
from .storing import COLLECT, FLOOR, VARIANTS, Variant, Work

PREDICTION = (
    "the taps cost under 1 %, the writer runs on another core beside the model, what is left is the set-up (hashing "
    "the model, the folder, a few fsyncs: 50 ms): 97-99 % of the floor's examples a second; full hooks with torch.save "
    "90 %, tensor hooks with memmap 96 %; memory: the ring and two blocks, to the megabyte"
)
SCRATCH = ROOT / "build" / "bench"  # on a disk: the system's temporary folder may lie in memory, where fsync is free


def make_work(
    reduce: str, n_layers: int, width: int, length: int, batch: int, n_examples: int, rows_per_unit: int
) -> Work:
    """A small GPT-2 with random weights, and bytes of the standard library's source as its text."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layers, n_embd=width, n_head=4, n_positions=length, vocab_size=256, bos_token_id=0, eos_token_id=0
    )
    sources = sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))
    text = b"".join(path.read_bytes() for path in sources)
    n_tokens = n_examples * length
    text *= -(-n_tokens // len(text))
    tokens = torch.frombuffer(bytearray(text[:n_tokens]), dtype=torch.uint8).long().view(n_examples, length)
    names = tuple(f"transformer.h.{layer}" for layer in range(n_layers))
    model = GPT2LMHeadModel(config).eval()
    return Work(model, [Batch(ids, None) for ids in tokens.split(batch)], names, reduce, rows_per_unit)


def true_rows(work: Work) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What must be stored of each point, in float64, and how far it may be off: from `torch.autograd.grad`."""
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in work.points}
    with tlfast.freeze(work.model):
        for batch in work.batches:
            outputs: list[torch.Tensor] = []
            handles = [
                work.model.get_submodule(name).register_forward_hook(
                    lambda module, args, output, held=outputs: held.append(first_tensor(output))
                )
                for name in work.points
            ]
            loss = next_token_loss(work.model, batch)
            for handle in handles:
                handle.remove()
            for name, grad in zip(work.points, torch.autograd.grad(loss, outputs), strict=True):
                if work.reduce == "mean":
                    parts[name].append(reduction_bound(grad, 1, "mean", torch.bfloat16))
                else:
                    parts[name].append((grad.double(), torch.finfo(torch.bfloat16).eps * grad.double().abs()))
    return {name: (torch.cat([t for t, _ in both]), torch.cat([b for _, b in both])) for name, both in parts.items()}


def check_variants(work: Work, variants: dict[str, Variant]) -> None:
    """Let each variant do the first unit, and compare what it reads back with autograd."""
    n_batches = max(1, work.rows_per_unit // len(work.batches[0].input_ids))
    first = Work(work.model, work.batches[:n_batches], work.points, work.reduce, work.rows_per_unit)
    expected = true_rows(first)
    for name, variant in variants.items():
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            variant.run(first, Path(out))
            if variant.read is not None:
                for point, (truth, bound) in expected.items():
                    check_close(f"{name} at {point}", variant.read(first, Path(out), point), truth, bound)
            if name == COLLECT and (problems := tlfast.open_dataset(out).verify().problems):
                raise WrongResult(f"{name}: the dataset must verify, got {problems}")


def sampler(work: Work, variant: Variant) -> Callable[[], Sections]:
    """What runs the whole job once, into a new folder; the folder's making and removal aren't timed."""

    def sample() -> Sections:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as out:
            cpu, start = time.process_time(), time.perf_counter()
            variant.run(work, Path(out))
            stop, cpu_stop = time.perf_counter(), time.process_time()
        return {"total": stop - start, "cpu": cpu_stop - cpu}

    return sample


def file_system(folder: Path) -> str:
    """The type of the file system that holds a folder."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return "unknown"
    holding = [mount for mount in mounts if folder.is_relative_to(mount[1])]
    return max(holding, key=lambda mount: len(mount[1]))[2] if holding else "unknown"


def run(quick: bool = False, variants: dict[str, Variant] | None = None) -> Result:
    """Measure rows of one vector (mean over positions) and rows of every position (none)."""
    variants = VARIANTS if variants is None else variants
    SCRATCH.mkdir(parents=True, exist_ok=True)
    shape = {"n_layers": 4, "width": 128, "length": 128, "batch": 16, "n_examples": 512, "rows_per_unit": 128}
    rounds = 7
    if quick:
        shape = {"n_layers": 1, "width": 32, "length": 16, "batch": 4, "n_examples": 16, "rows_per_unit": 8}
        rounds = 2
    result = Result(
        "collect", PREDICTION,
        {"model": f"GPT-2, vocabulary 256, {shape}", "points": "every block", "stored": "bfloat16", "rounds": rounds,
         "disk": file_system(SCRATCH), "quick": quick},
    )  # fmt: skip
    for reduce in ("mean", "none"):
        work = make_work(reduce, **shape)
        check_variants(work, variants)
        measured = interleave({name: sampler(work, variant) for name, variant in variants.items()}, rounds)
        peaks = _peaks({"reduce": reduce, **shape}, variants, quick) if reduce == "none" else {}
        result.tables.append(_table(work, measured, peaks))
        share = measured[FLOOR]["total"].ratio(measured[COLLECT]["total"]) * 100
        result.claims.append(Claim(f"{reduce}: examples/s, tlfast.collect / floor", "at least", 95, share, " %"))
        if FLOOR in peaks:
            held = 3 * work.rows_per_unit * work.row_bytes
            above = (peaks[COLLECT] - peaks[FLOOR]) / held
            result.settings["ring_and_two_blocks_bytes"] = held
            what = f"{reduce}: peak memory above the floor / (ring + two blocks, {held / 1e6:.1f} MB)"
            result.claims.append(Claim(what, "at most", 1, above))
    return result


def _peaks(arguments: dict[str, object], variants: dict[str, Variant], quick: bool) -> dict[str, int]:
    """The peak of each variant that a process of its own can name; under --quick of `collect` alone."""
    if not sys.platform.startswith("linux"):
        return {}
    wanted = [name for name in variants if name in VARIANTS and (not quick or name == COLLECT)]
    return {name: measure(arguments, name, SCRATCH) for name in wanted}


def _table(work: Work, measured: Measured, peaks: dict[str, int]) -> Table:
    rows: list[dict[str, Cell]] = []
    n_bytes, base = work.n_examples * work.row_bytes, measured[FLOOR]
    for name, times in measured.items():
        rows.append(
            {"variant": name, "examples/s": work.n_examples / times["total"].median,
             "best_examples/s": work.n_examples / times["total"].min,
             "percent_of_floor": base["total"].ratio(times["total"]) * 100,
             "ratio_to_floor": times["total"].ratio(base["total"]),
             "cpu_ratio_to_floor": times["cpu"].ratio(base["cpu"]),
             "above_floor_ms": times["total"].above(base["total"]) * 1e3,
             "cpu_above_floor_ms": times["cpu"].above(base["cpu"]) * 1e3,
             "peak_MB": peaks[name] / 1e6 if name in peaks else None,
             "peak_above_floor_MB": (peaks[name] - peaks[FLOOR]) / 1e6 if {name, FLOOR} <= peaks.keys() else None}
        )  # fmt: skip
    return Table(
        f"{work.reduce}: {work.n_examples} examples, {n_bytes / 1e6:.1f} MB of rows, durable on disk", FLOOR,
        ["variant", "examples/s", "best_examples/s", "percent_of_floor", "ratio_to_floor", "cpu_ratio_to_floor",
         "above_floor_ms", "cpu_above_floor_ms"] + (["peak_MB", "peak_above_floor_MB"] if peaks else []),
        rows,
    )  # fmt: skip
