"""The lines of figures that README.md and docs/numbers.md show, each found in a result by title, variant and column."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tlfast.errors import broken_rule

from .kernel import COPY_MEAN, TLFAST
from .kernel import FLOOR as READING
from .rivals import AUTO, FULL_HOOK, TENSOR_HOOK
from .storing import COLLECT, MEMMAP, SAVE
from .writing import PYTHON, RAW, SAVE_FILE, WHOLE

LENS = ("4.3.0", "2.18.0")  # the versions of TransformerLens that CI runs
QUOTED = ("hooks", "kernel", "step", "collect", "dataset", *(f"lens-{version}" for version in LENS))
HOOKS = (FULL_HOOK, TENSOR_HOOK)

Results = Mapping[str, Mapping[str, Any]]  # bench -> what its file holds
Show = Callable[[float], str]


class Unquotable(ValueError):
    """Results that the pages must not quote."""


@dataclass(frozen=True)
class Line:
    """One line of a table; README shows those with a name of their own there, ``readme``."""

    bench: str
    what: str
    beside: str
    tlfast: str
    readme: str = ""


def short(value: float) -> str:
    """Two digits, or all that stand before the point: 0.56, 4.0, 12, 884."""
    return f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}" if abs(value) < 9.95 else f"{value:.0f}"


def times(value: float) -> str:
    """A ratio: 0.62x, 1.4x, 28x."""
    return f"{short(value)}x"


def percent(value: float) -> str:
    """A share: 0.6 %, 95 %."""
    return f"{value:.1f} %" if abs(value) < 9.95 else f"{value:.0f} %"


def figure(result: Mapping[str, Any], title: str, variant: str, column: str) -> float:
    """The value of a variant in a column of the one table whose title has the pattern."""
    tables = [table for table in result["tables"] if re.search(title, table["title"])]
    found = [row.get(column) for table in tables for row in table["rows"] if row["variant"] == variant]
    if len(found) != 1 or found[0] is None:
        raise Unquotable(broken_rule(
            "bench.numbers", f"results of {result['bench']}", f"have one {column!r} of {variant!r} in {title!r}", found,
            "bench/quoted.py goes with the titles that the bench gives its tables."
        ))  # fmt: skip
    return float(found[0])


def lines(results: Results) -> list[Line]:
    """All lines, those of one bench together."""
    made = (hooks_lines, kernel_lines, step_lines, collect_lines, dataset_lines)
    found = [line for make in made for line in make(results[make.__name__.removesuffix("_lines")])]
    return found + lens_lines([results[f"lens-{version}"] for version in LENS])


def several(result: Mapping[str, Any], title: str, column: str, variants: tuple[str, ...], show: Show = short) -> str:
    """One figure for each variant, with commas between them."""
    return ", ".join(show(figure(result, title, variant, column)) for variant in variants)


def hooks_lines(result: Mapping[str, Any]) -> list[Line]:
    """The cost of a point alone, and of all of them beside a busy thread."""

    def cost(kind: str, *variants: str) -> str:
        return several(result, f"^{kind} modules: ", "total_above_floor", variants) + " µs"

    def busy(*variants: str) -> str:
        titles = (f"^{kind} modules beside a busy thread" for kind in ("identity", "fresh"))
        return ", ".join(several(result, title, "ratio_less_bare_wait", variants, times) for title in titles)

    return [
        Line("hooks", "cost of a point, modules with fresh outputs: Python full hook, Python tensor hook",
             cost("fresh", *HOOKS), cost("fresh", AUTO), "one point in a step: Python full hook, Python tensor hook"),
        Line("hooks", "the same, identity modules", cost("identity", *HOOKS), cost("identity", AUTO)),
        Line("hooks", "backward beside a busy Python thread / alone, identity and fresh: Python full hook",
             busy(FULL_HOOK), busy(AUTO),
             "backward beside a busy Python thread, over backward alone, two kinds of modules: Python full hook"),
    ]  # fmt: skip


def kernel_lines(result: Mapping[str, Any]) -> list[Line]:
    """A mean over positions beside PyTorch's and beside reading alone, at two sizes."""

    def call(title: str, *variants: str) -> str:
        return f"{several(result, title, 'median', variants)} µs; minima {several(result, title, 'min', variants)}"

    return [
        Line("kernel", f"{shape} {dtype} to bfloat16: `{COPY_MEAN}`, reading alone by `g.sum()`",
             call(f"^{re.escape(shape)} {dtype} hot", COPY_MEAN, READING),
             call(f"^{re.escape(shape)} {dtype} hot", TLFAST))
        for dtype in ("float32", "bfloat16") for shape in ("[4,512,2048]", "[8,128,768]")
    ]  # fmt: skip


def step_lines(result: Mapping[str, Any]) -> list[Line]:
    """What a training step pays."""

    def cost(*variants: str) -> str:
        median = several(result, "^one step", "overhead_percent", variants, percent)
        return f"{median}; minima {several(result, '^one step', 'overhead_percent_min', variants, percent)}"

    what = "48 points in a step of a 12-layer GPT-2 shape, above the step without hooks: Python full, tensor hook"
    return [Line("step", what, cost(*HOOKS), cost(AUTO), "48 points in a step of a 12-layer GPT-2 shape: the same two")]


def collect_lines(result: Mapping[str, Any]) -> list[Line]:
    """A dataset on disk, beside the same passes alone."""

    def share(kept: str, *variants: str) -> str:
        return several(result, f"^{kept}: ", "percent_of_floor", variants, percent)

    (memory,) = (claim["figure"] for claim in result["claims"] if claim["what"].startswith("none: peak memory"))
    return [
        Line("collect", "examples/s into a dataset, fsync included / forward and backward alone, all positions kept: "
             "full hooks with `torch.save`, tensor hooks with `memmap`",
             share("none", SAVE, MEMMAP), share("none", COLLECT),
             "examples/s into a dataset, over forward and backward alone: hooks with `torch.save`, with `memmap`"),
        Line("collect", "the same, the mean over positions kept", share("mean", SAVE, MEMMAP), share("mean", COLLECT)),
        Line("collect", "peak memory above the floor / (ring + two blocks), all positions kept", "", times(memory)),
    ]  # fmt: skip


def dataset_lines(result: Mapping[str, Any]) -> list[Line]:
    """Writing, checking and reading rows."""

    def both(title: str, column: str, variant: str, show: Show) -> str:
        return ", ".join(
            show(figure(result, f"^{title}.*{dtype}", variant, column)) for dtype in ("bfloat16", "float32")
        )

    def speed(variant: str) -> str:
        return both("write", "MB/s", variant, lambda value: f"{value / 1e3:.2f}")

    def cpu(variant: str) -> str:
        return both("write", "cpu_s_per_GB", variant, short)

    def random_rows(where: str, variant: str) -> str:
        return f"{short(figure(result, f'^10000 random rows.*, {where}$', variant, 'ms'))} ms"

    def batches(*variants: str) -> str:
        rate = several(result, "^batches of", "rows/s", variants, lambda value: short(value / 1e3))
        return f"{rate} thousand rows/s"

    def seconds(variant: str) -> str:
        return f"{short(figure(result, '^10000 units', variant, 'median_s'))} s"

    return [
        Line("dataset", f"write a unit durably, bfloat16, float32: `{SAVE_FILE}`; raw `O_DIRECT`",
             f"{speed(SAVE_FILE)}; {speed(RAW)} GB/s", f"{speed(WHOLE)} GB/s",
             "a unit of a dataset to the disk, bfloat16, float32: `safetensors`; the raw disk"),
        Line("dataset", "the same in pure Python", "", f"{speed(PYTHON)} GB/s"),
        Line("dataset", f"CPU time of it, with checksum and norms: `{SAVE_FILE}`; raw `O_DIRECT`",
             f"{cpu(SAVE_FILE)}; {cpu(RAW)} s/GB", f"{cpu(WHOLE)} s/GB"),
        Line("dataset", "verify, as a share of reading by raw `O_DIRECT`: bfloat16, float32", "",
             both("read every byte", "percent_of_floor", "tlfast verify", percent)),
        Line("dataset", "10,000 random rows of 1.5 kB, not in memory: `numpy.memmap`",
             random_rows("not in memory", "numpy.memmap"), random_rows("not in memory", "tlfast, mmap")),
        Line("dataset", "the same in memory", random_rows("in memory", "numpy.memmap"),
             random_rows("in memory", "tlfast, mmap")),
        Line("dataset", "shuffled batches, not in memory: Lance, Hugging Face `Array2D`, the disk read in order",
             batches("Lance", "HF Array2D", "disk in order, O_DIRECT"), batches("tlfast")),
        Line("dataset", "open 10,000 units; then to the first batch of a resumed run, its model loaded", "",
             f"{seconds('open_dataset')}; {seconds('collect to its first forward')}"),
    ]  # fmt: skip


def lens_lines(results: list[Mapping[str, Any]]) -> list[Line]:
    """TransformerLens with and without tlfast, one figure for each version."""

    def each(title: str, column: str, variant: str, show: Show = times) -> str:
        return ", ".join(show(figure(result, title, variant, column)) for result in results)

    def small(variant: str) -> str:
        return each("d 64", "ratio", variant)

    def chain(variant: str) -> str:
        return each("^a chain", "total_above_floor", variant, short) + " µs"

    def wide(variant: str) -> str:
        return each("d 768", "ratio", variant)

    named = " and ".join(LENS)
    return [
        Line("lens", f"cache the gradients of all points of a small model / a plain step: TransformerLens {named}",
             small("theirs, all"), small("tlfast, all"),
             f"a step that caches all gradients, over a plain step: TransformerLens {named}"),
        Line("lens", "the same with parameter gradients, as the plain step computes them", small("theirs, all"),
             small("tlfast, all, params")),
        Line("lens", "the same at `resid_post` alone, without parameter gradients", small("theirs, resid_post"),
             small("tlfast, resid_post")),
        Line("lens", "cost of a point", chain("theirs"), chain("tlfast")),
        Line("lens", "`cache_fwd_and_bwd` at the width of GPT-2 / a plain step: the function of notebooks",
             wide("retyped"), wide("tlfast")),
    ]  # fmt: skip
