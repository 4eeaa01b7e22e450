"""Run as a program: ``python fuzz_dataset.py TARGET [options of libFuzzer]``; see tools/fuzz.sh.

Targets are those of `hostile_inputs`. An input that isn't safe ends the run, and libFuzzer keeps it.
"""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["tlfast.dataset"]):
    import tlfast.dataset  # noqa: F401

import hostile_inputs
import torch
from hostile_dataset import HostileDataset

HEADROOM_BYTES = 4 << 30  # of address space: a hostile size must not take the machine with it


def main() -> None:
    target = sys.argv.pop(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        ds = HostileDataset(Path(folder) / "d")
        corpus = Path(sys.argv[1])
        corpus.mkdir(parents=True, exist_ok=True)
        for k, seed in enumerate(hostile_inputs.seeds(ds, target)):
            (corpus / f"seed_{k}").write_bytes(seed)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + HEADROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        atheris.Setup(sys.argv, lambda data: hostile_inputs.check(ds, target, data) and None)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
