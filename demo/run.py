"""The demo: train a small model, collect its gradients with the command line, verify them, draw them."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

# On a shared machine, threads that spin while they wait for one another make all of this several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import plot
import train

import tlfast
from tlfast.dataset import GradientDataset

HERE = Path(__file__).resolve().parent


# Seconds of training, examples, examples per unit.
FULL, QUICK = (60.0, 2560, 512), (12.0, 384, 128)


def short(path: Path) -> str:
    """The path from here, or the whole of it where that goes up."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def tlfast_command(*arguments: str | Path) -> None:
    """Show a command and run it; a failure ends the demo."""
    words = [short(word) if isinstance(word, Path) else word for word in arguments]
    print(f"\n$ tlfast {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "tlfast", *words], check=True)


def main(arguments: list[str] | None = None) -> None:
    """Run all of it; everything that it writes lies beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter training, fewer examples: for CI")
    parser.add_argument("--into", type=Path, default=HERE, help="the folder to write to")
    options = parser.parse_args(arguments)
    model, gradients, picture = (options.into / name for name in ("model", "gradients", "gradient_norms.png"))
    time_s, n_examples, rows_per_unit = QUICK if options.quick else FULL
    start = time.monotonic()
    first, last = train.train(model, time_s)
    tlfast_command(
        "collect", "--model", model, "--text", *(train.STDLIB / name for name in train.HELD_OUT), "--pattern", "*.py",
        "--points", "transformer.h.*", "--reduce", "mean", "--over", "pos", "--dtype", "bfloat16",
        "--seq-len", str(train.SEQ_LEN), "--max-examples", str(n_examples), "--rows-per-unit", str(rows_per_unit),
        "--out", gradients, "--overwrite",
    )  # fmt: skip
    tlfast_command("verify", gradients)
    dataset = tlfast.open_dataset(gradients)
    plot.draw(model, dataset, picture)
    summarize(dataset, first, last, picture, time.monotonic() - start)


def summarize(dataset: GradientDataset, first: float, last: float, picture: Path, time_s: float) -> None:
    """What there is now, and how to read it."""
    info = dataset.info()
    where = short(dataset.path)
    row = dataset[dataset.points[0]]
    print(
        f"\nloss            {first:.2f} -> {last:.2f} nats per byte"
        f"\nexamples        {len(dataset)} in {info['units']} units, {info['bytes'] / 1e6:.1f} MB,"
        f" {info['non_finite_rows']} with non-finite values"
        f"\npoints          {dataset.points[0]} ... {dataset.points[-1]}, each {row.dtype} {list(row.shape)}"
        f"\npicture         {short(picture)}"
        f"\nread it         python -c \"import tlfast; print(tlfast.open_dataset('{where}'))\""
        f"\nfinished in     {time_s:.0f} s, {tlfast.backend()}"
    )


if __name__ == "__main__":
    main()
