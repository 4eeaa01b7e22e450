"""Run as a program: write one dataset to many URLs, each run killed with SIGKILL at another instant.

``python remote_kills.py requests URL``: run k writes to URL/k (of `shared_filesystem`) and dies just before its k-th
request to the store or removal of a local file, until a run ends undisturbed.
``python remote_kills.py instants URL N``: N runs write to URL, each is killed at a random instant after a few commits.
Prints one line per run. Forking from one process saves importing torch a hundred times.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time

import google_crc32c  # noqa: F401 (imported here, once, instead of in every child)
import pyarrow as pa
import pyarrow.parquet
import s3fs
import torch
from dataset_cases import Plan, examples, rows_of, truth, write_units
from remote_cases import remote_writer
from shared_filesystem import SharedFileSystem

FEW, MANY = Plan(7, 4), Plan(32, 2)


def one_run(url: str, plan: Plan, max_staged: int = 4) -> None:
    """The run: unit 1 before unit 0, so that order can't stand in for commits."""
    tensors = truth(plan=plan)
    with remote_writer(url, plan=plan, max_units=max_staged) as writer:
        first = plan.unit(1)
        if first.name not in writer.done:
            writer.write_unit(first, rows_of(first, tensors), examples(first))
        write_units(writer, tensors)


def die_before(k: int, report: int) -> None:
    """Make the k-th request, or removal of a file, the last thing that this process does."""
    count, unlink = itertools.count(), os.unlink

    def before(call: str, path: str) -> None:
        if next(count) == k:
            os.write(report, f"{call} {'/'.join(str(path).split('/')[-2:])}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    def unlinking(path, *args, **kwargs):
        if "/cache/" in str(path):
            before("unlink", path)
        unlink(path, *args, **kwargs)

    SharedFileSystem.before = staticmethod(before)
    os.unlink = unlinking


def forked(work) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def at_requests(url: str) -> None:
    for k in range(1000):
        reading, writing = os.pipe()

        def run(k=k, writing=writing) -> None:
            os.environ["XDG_CACHE_HOME"] += f"/{k}"  # so that no run takes what another has staged
            die_before(k, writing)
            one_run(f"{url}/{k}", FEW, max_staged=1)  # one after the other, so that every run asks in one order

        _, status = os.waitpid(forked(run), 0)
        os.close(writing)
        print(k, os.waitstatus_to_exitcode(status), os.read(reading, 200).decode() or "end", flush=True)
        os.close(reading)
        if status == 0:
            return


def at_instants(url: str, n: int) -> None:
    instants = random.Random(0)
    for _ in range(n):
        reading, writing = os.pipe()

        def run(writing=writing) -> None:
            put = s3fs.S3FileSystem._pipe_file

            async def telling(self, path, data, **kwargs):
                out = await put(self, path, data, **kwargs)
                os.write(writing, b"." * ("/commits/" in path))
                return out

            s3fs.S3FileSystem._pipe_file = telling
            one_run(url, MANY)

        child = forked(run)
        for _ in range(3):
            if not os.read(reading, 1):
                sys.exit("a run ended by itself")
        time.sleep(instants.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        os.close(reading)
        os.close(writing)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pa.array([1])  # imports what pyarrow imports late: once, not in every child
    if sys.argv[1] == "requests":
        at_requests(sys.argv[2])
    else:
        at_instants(sys.argv[2], int(sys.argv[3]))
