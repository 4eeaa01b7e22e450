"""A reader of the command line's output that leaves early, as `head` does, is no error worth a traceback."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


# With a buffer the pipe breaks at the last flush, without one at a print (that of argparse is silent by itself).
@pytest.mark.parametrize("command, unbuffered", [("doctor", ""), ("doctor", "1"), ("info --help", "")])
def test_a_reader_that_leaves_is_met_in_silence(command, unbuffered):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tlfast", *command.split()],
            stdout=writing, stderr=subprocess.PIPE, env=environment, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
