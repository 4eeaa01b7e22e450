"""A plugin of pytest, `-p time_limit --time-limit SECONDS`: a test that takes longer ends its process with all stacks.

Only that stops what waits for a GPU: Python runs the handler of a signal when the call has returned. Under pytest-xdist
the test has failed and another process goes on with the others; without it they are lost.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Generator

import pytest

_TERMINAL = os.dup(2)  # a plugin that is named by -p is imported before pytest takes hold of the standard error


def pytest_addoption(parser: pytest.Parser) -> None:
    """The one setting."""
    parser.addoption("--time-limit", type=float, required=True, metavar="SECONDS", help="for each test")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Its set-up and what follows it are in the limit too."""
    faulthandler.dump_traceback_later(item.config.getoption("--time-limit"), file=_TERMINAL, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
