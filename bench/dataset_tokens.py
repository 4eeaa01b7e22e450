"""What rows of tokens and low-bit rows cost on their way from the capture's memory to the disk, beside padded ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import tlfast
from tlfast.collecting.drain import N_COUNTERS, DirectStreams, Drain
from tlfast.collecting.pack import Tokens
from tlfast.dataset import Column, DatasetWriter, Example, Plan
from tlfast.dataset.format.encodings import BLOCKS, STOCHASTIC, decode, encode
from tlfast.dataset.format.rounding import rounding_of
from tlfast.dataset.write import native

from .collect import SCRATCH, file_system
from .measure import Measured, Sections, WrongResult, interleave
from .report import Cell, Claim, Result, Table

PREDICTION = (
    "a unit of padded rows goes to the disk at the disk's rate; half of it is half of the bytes and 0.55 of the time, "
    "as one sync and one row table stay; int8 is half of bfloat16's bytes again, and encoding (a maximum, a division "
    "and a rounding a value, in vectors) with the norms of decoded rows costs what the other half of the bytes did: "
    "0.9 of the time of bfloat16 ones where the disk is fast; float8 1.0 (more steps to round and to decode), int4 0.8"
)
PADDED, TOKENS, COPY = "padded, bfloat16", "tokens, bfloat16", "copy the padded rows"
WIDTH, POSITIONS, N_POINTS = 768, 128, 4


@dataclass(frozen=True)
class Ring:
    """Padded rows as a capture holds them, half of whose positions are padding."""

    rows: dict[str, torch.Tensor]  # bfloat16 [examples, POSITIONS, WIDTH]
    tokens: Tokens
    examples: list[Example]


def make_ring(n_bytes: int) -> Ring:
    """Rows of examples whose lengths are even from 1 to all but one position: together half of them."""
    n = max(2, n_bytes // (N_POINTS * POSITIONS * WIDTH * 2))
    lengths = [1 + (k * (POSITIONS - 2)) // (n - 1) for k in range(n)]
    real = torch.arange(POSITIONS)[None] < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(0)
    rows = {}
    for k in range(N_POINTS):
        values = torch.randn(n, POSITIONS, WIDTH, generator=generator)
        rows[f"h.{k}"] = (values * real[..., None]).bfloat16()
    examples = [Example(k, list(range(length)), "text", 0, length) for k, length in enumerate(lengths)]
    return Ring(rows, Tokens(lengths), examples)


def column(encoding: str | None, per: str) -> Column:
    """What a variant stores."""
    if per == "example":
        return Column(torch.bfloat16, (POSITIONS, WIDTH))
    return Column(torch.float32 if encoding else torch.bfloat16, (WIDTH,), per="token", encoding=encoding)


def variants() -> dict[str, Column]:
    """By name."""
    low = {f"tokens, {encoding}": column(encoding, "token") for encoding in BLOCKS}
    return {PADDED: column(None, "example"), TOKENS: column(None, "token"), **low}


def store(ring: Ring, kind: Column, out: Path, drain: Drain) -> None:
    """Gather, encode, write, sync: until the unit is durable."""
    n = len(ring.examples)
    columns = dict.fromkeys(ring.rows, kind)
    writer = DatasetWriter(out, header={}, columns=columns, plan=Plan(n, n))
    tokens = ring.tokens if kind.per == "token" else None
    counters = [torch.zeros(N_COUNTERS, dtype=torch.int64)] * len(columns)
    arrived = drain.drain(ring.rows, counters, torch.arange(n), lambda: None, tokens, 0)
    block, _ = arrived()
    writer.write_unit(writer.plan.unit(0), drain.pack.contents(block), ring.examples)


def drain_for(ring: Ring, kind: Column) -> Drain:
    """Memory that is there before the time is taken, as in a run."""
    columns, n = dict.fromkeys(ring.rows, kind), len(ring.examples)
    return Drain(DirectStreams(), columns, n, ring.tokens.total, native.loaded())


def check(ring: Ring) -> None:
    """What is read back must be the ring's rows; of encoded ones their codes' values, to the bit."""
    for name, kind in variants().items():
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            store(ring, kind, Path(folder), drain_for(ring, kind))
            found = tlfast.open_dataset(folder)
            if not found.verify().ok:
                raise WrongResult(f"{name}: the dataset must verify")
            for point, rows in ring.rows.items():
                for i in (0, len(rows) // 2, len(rows) - 1):
                    true = rows[i] if kind.per == "example" else rows[i, : ring.tokens.lengths[i]]
                    if kind.encoding is not None:
                        rounding = rounding_of(point, i, [len(true)]) if kind.encoding in STOCHASTIC else None
                        stored = encode(true, kind.encoding, rounding=rounding)
                        true = decode(*stored, kind.encoding, kind.row_shape)
                    if not torch.equal(found[point][i], true):
                        raise WrongResult(f"{name}: example {i} must have the ring's rows at {point}")


def sampler(ring: Ring, kind: Column) -> Callable[[], Sections]:
    """What stores the unit once."""
    drain = drain_for(ring, kind)

    def sample() -> Sections:
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            cpu, start = time.process_time(), time.perf_counter()
            store(ring, kind, Path(folder), drain)
            return {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    return sample


def copier(ring: Ring) -> Callable[[], Sections]:
    """The floor: every byte of the ring read and written once, in memory."""
    out = {name: torch.empty_like(rows) for name, rows in ring.rows.items()}

    def sample() -> Sections:
        cpu, start = time.process_time(), time.perf_counter()
        for name, rows in ring.rows.items():
            out[name].copy_(rows)
        return {"total": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    return sample


def table(ring: Ring, measured: Measured) -> Table:
    """Bytes and times of each way."""
    lines: list[dict[str, Cell]] = []
    padded = measured[PADDED]["total"]
    for name, kind in ({COPY: column(None, "example")} | variants()).items():
        n = ring.tokens.total if kind.per == "token" else len(ring.examples)
        lines.append(
            {"variant": name, "MB": n * kind.row_bytes * N_POINTS / 1e6, "ms": measured[name]["total"].median * 1e3,
             "cpu_ms": measured[name]["cpu"].median * 1e3, "ratio_to_padded": measured[name]["total"].ratio(padded)}
        )  # fmt: skip
    return Table("store a unit, durable", COPY, ["variant", "MB", "ms", "cpu_ms", "ratio_to_padded"], lines)


def run(quick: bool = False) -> Result:
    """Store the same rows in every way."""
    SCRATCH.mkdir(parents=True, exist_ok=True)
    n_bytes, rounds = (2 << 20, 2) if quick else (256 << 20, 7)
    check(make_ring(4 << 20))
    ring = make_ring(n_bytes)
    samplers = {COPY: copier(ring)} | {name: sampler(ring, kind) for name, kind in variants().items()}
    measured = interleave(samplers, rounds)
    tokens = measured[TOKENS]["total"]
    share = ring.tokens.total / (len(ring.examples) * POSITIONS)
    claims = [
        Claim("bytes, rows of tokens / padded ones, half of which is padding", "at most", 0.51, share),
        Claim("time to store, rows of tokens / padded ones", "at most", 0.75, tokens.ratio(measured[PADDED]["total"])),
        Claim("time to store, int8 / bfloat16 rows", "at most", 1.3, measured["tokens, int8"]["total"].ratio(tokens)),
    ]
    settings: dict[str, object] = {
        "rows": f"{WIDTH} values at {N_POINTS} points, {POSITIONS} positions", "ring_bytes": n_bytes, "rounds": rounds,
        "disk": file_system(SCRATCH), "quick": quick,
    }  # fmt: skip
    return Result("dataset_tokens", PREDICTION, settings, [table(ring, measured)], claims)
