"""Units for a writing thread, and a writer that waits to be let through."""

import threading

from dataset_cases import PLAN, examples, rows_of, truth
from threads import SECONDS


def submit(background, k, tensors=None):
    """Hand over unit ``k``."""
    unit = PLAN.unit(k)
    background.submit(unit, rows_of(unit, truth() if tensors is None else tensors), examples(unit))


class Gate:
    """A stand-in for DatasetWriter that waits to be let through, and fails on request."""

    def __init__(self, error=None):
        self.open = threading.Event()
        self.error = error
        self.written = []
        self.bytes_written = 0

    def write_unit(self, unit, tensors, examples, flags=None):
        assert self.open.wait(SECONDS)
        if self.error is not None:
            raise self.error
        self.written.append(unit.name)
        self.bytes_written += 100
        return True
