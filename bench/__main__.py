"""`python -m bench [hooks kernel step collect lens] [--quick] [--out FILE]`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch

from .report import save, show

BENCHES = ("hooks", "kernel", "step", "collect")
ON_REQUEST = ("lens",)  # needs TransformerLens


def main(arguments: list[str] | None = None) -> None:
    """Run the named benches (all by default), print them, keep them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"some of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="few rounds of small cases: does it run and is it right")
    parser.add_argument(
        "--out", type=Path, help="JSON file for all results (default: bench/results/<bench>-<cpu>.json)"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.benches if name not in BENCHES + ON_REQUEST]
    if unknown:
        parser.error(f"bench: the name must be one of {', '.join(BENCHES + ON_REQUEST)}, got {unknown[0]!r}. Check the spelling.")
    # One thread: the ratios then tell of work done, not of how the threads were scheduled.
    torch.set_num_threads(1)
    results = []
    for name in options.benches or BENCHES:
        results.append(importlib.import_module(f".{name}", __package__).run(quick=options.quick))
        print(show(results[-1]), flush=True)
    if options.out is None and options.quick:
        print("\nnot kept: --quick is a check that the benches run (give --out to keep it)")
        return
    for path in save(results, options.out):
        print(f"\nwritten to {path}")


if __name__ == "__main__":
    main()
