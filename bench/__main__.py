"""`python -m bench [NAME ...] [--quick] [--rows N] [--out FILE]`: the benches, by name."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

from tlfast.errors import broken_rule

from . import gpu
from .clock import NoGpu, gpu_clock
from .report import Result, save, show

BENCHES = ("hooks", "kernel", "step", "collect", "dataset", "gpu")
GPU_PARTS = {f"gpu_{name}": name for name in gpu.PARTS}  # each in a process of its own: a GPU that failed stays failed
ON_REQUEST = (
    "lens",
    "recipes",
    "recipes_lens",
    "search",
    "scores",
    "data",
    "weights",
    "dataset_read",
    "dataset_resume",
    "dataset_tokens",
    *GPU_PARTS,
)  # the first two need TransformerLens; parts of dataset, of gpu


def lacks_gpu() -> str:
    """Why the bench of a GPU can't run here, or ""."""
    try:
        gpu_clock()
    except NoGpu as error:
        return str(error)
    return ""


def main(arguments: list[str] | None = None) -> None:
    """Run the named benches (all by default), print them, keep them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"some of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few rounds of small cases: does it run and is it right")
    parser.add_argument(
        "--out", type=Path, help="JSON file for all results, or a folder for one each (default: bench/results)"
    )
    parser.add_argument("--rehearse", action="store_true", help="gpu: run its code on the CPU, to see that it does")
    parser.add_argument("--rows", type=int, metavar="N", help="search, scores: of how many rows (default: 1,000,000)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.benches if name not in BENCHES + ON_REQUEST]
    if unknown:
        known = ", ".join(BENCHES + ON_REQUEST)
        parser.error(f"bench: the name must be one of {known}, got {unknown[0]!r}. Check the spelling.")
    if options.rehearse and not options.quick:
        parser.error("bench: --rehearse must come with --quick, got none. Its figures say nothing of a GPU.")
    if options.rows is not None and (options.benches not in (["search"], ["scores"]) or options.rows < 1):
        rule = "be a number of rows, with search or scores alone"
        parser.error(f"bench: --rows must {rule}, got {options.rows}. See bench/README.md.")
    lacks = "" if options.rehearse else lacks_gpu()
    asked = next((name for name in options.benches if name.startswith("gpu")), "")
    if asked and lacks:
        print(
            broken_rule("bench", asked, "run on a CUDA device with the native code", lacks, "See tlfast doctor."),
            file=sys.stderr,
        )
        raise SystemExit(2)
    # One thread: the ratios then tell of work done, not of how the threads were scheduled.
    torch.set_num_threads(1)
    results: list[Result] = []
    for name in options.benches or [name for name in BENCHES if name != "gpu" or not lacks]:
        on_gpu, settings = name.startswith("gpu"), {"quick": options.quick}
        module = gpu if on_gpu else importlib.import_module(f".{name}", __package__)
        if on_gpu:
            settings |= {"rehearse": options.rehearse, "only": GPU_PARTS.get(name, "")}
            if options.out is not None and options.out.is_dir():
                settings["part_done"] = lambda result: save([result], options.out)
        if options.rows is not None:
            settings |= {"rows": options.rows}
        results.append(module.run(**settings))
        print(show(results[-1]), flush=True)
    if lacks and not options.benches:
        print(f"\nleft out: gpu ({lacks})")
    if options.out is None and options.quick:
        print("\nnot kept: --quick is a check that the benches run (give --out to keep it)")
    else:
        for path in save(results, options.out):
            print(f"\nwritten to {path}")
    if any(result.failures for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
