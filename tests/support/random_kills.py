"""Run as a program: ``python random_kills.py FOLDER N`` makes N datasets and kills each run at a random instant.

Run k is killed a random few milliseconds after its unit k % 4 is committed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import google_crc32c  # noqa: F401 (imported here, once, instead of in every child)
import pyarrow as pa
import pyarrow.parquet
import torch
from dataset_cases import examples, make_writer, rows_of, truth

from tlfast.dataset import BackgroundWriter, Plan

COLUMNS = {"a": (torch.bfloat16, (256,)), "b": (torch.float32, (3, 100))}
PLAN = Plan(n_examples=2000, rows_per_unit=50)


def main(folder: Path, n: int) -> None:
    torch.set_num_threads(1)
    pa.array([1])
    tensors = truth(COLUMNS, PLAN)
    instants = random.Random(0)
    for k in range(n):
        child = os.fork()
        if child == 0:
            try:
                writer = make_writer(folder / str(k), columns=COLUMNS, plan=PLAN)
                with BackgroundWriter(writer) as background:
                    for unit in PLAN.units:
                        background.submit(unit, rows_of(unit, tensors), examples(unit))
                signal.pause()
            finally:
                os._exit(1)
        while len(list((folder / str(k)).glob("commits/*.json"))) < k % 4:
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit(f"run {k} ended by itself")
            time.sleep(0.001)
        time.sleep(instants.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
