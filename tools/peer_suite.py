"""Run somebody's own tests without and with tlfast's hooks, and compare the outcomes test by test.

    python tools/peer_suite.py --install hooks -- path/to/captum/tests/attr -k gradcam

What follows `--` is pytest's. `--install` is what one more run has in force from its beginning on: `hooks` is
`tlfast.install_hooks()`, `transformer_lens` is `tlfast.transformer_lens.install()`. It fails where a test has another
outcome, where only one of two runs reached it, and where no test registered a full backward hook.

The file is a plugin of pytest as well, which each run loads.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

INSTALL, OUT = "TLFAST_PEER_SUITE_INSTALL", "TLFAST_PEER_SUITE_OUT"
CHOICES = ("hooks", "transformer_lens")
WORST = ("passed", "xpassed", "skipped", "xfailed", "failed", "error")

# ---- in each of the runs -----------------------------------------------------------------------------------------

registered = 0  # full backward hooks, since this process began


def _count_registrations() -> None:
    from torch import nn

    def counting(register: Any) -> Any:
        @wraps(register)
        def call(*args: Any, **kwargs: Any) -> Any:
            global registered
            registered += 1
            return register(*args, **kwargs)

        return call

    for name in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        setattr(nn.Module, name, counting(getattr(nn.Module, name)))


@pytest.hookimpl(trylast=True)
def pytest_sessionstart() -> None:
    """Install what was asked for, once the suite's own plugins are there."""
    _count_registrations()
    if os.environ[INSTALL] == "hooks":
        import tlfast

        tlfast.install_hooks()
    elif os.environ[INSTALL] == "transformer_lens":
        from tlfast import transformer_lens

        transformer_lens.install()


def _in_force() -> bool:
    from torch.nn.modules import module
    from torch.utils.hooks import BackwardHook

    return not os.environ[INSTALL] or module.BackwardHook is not BackwardHook


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Hooks that a test registers, and whether what was installed is still there behind it."""
    before = registered
    try:
        return (yield)
    finally:
        item.user_properties += [("hooks", registered - before), ("in_force", _in_force())]


def _told(report: Any) -> dict[str, Any]:
    outcome = report.outcome
    if hasattr(report, "wasxfail"):
        outcome = "xfailed" if outcome == "skipped" else "xpassed"
    if outcome == "failed" and report.when != "call":
        outcome = "error"
    properties = dict(report.user_properties) if report.when == "call" else {}
    text = _first_line(report.longrepr) if outcome in ("failed", "error") else ""
    return {"test": report.nodeid, "outcome": outcome, "text": text, **properties}


def _first_line(failure: Any) -> str:
    crash = getattr(failure, "reprcrash", None)  # a traceback's; a file that can't be imported has text alone
    lines = (crash.message if crash else str(failure)).strip().splitlines()
    return (lines[0] if crash else lines[-1]) if lines else ""


def _write(line: dict[str, Any]) -> None:
    with open(os.environ[OUT], "a") as out:  # a line at a time: a run that dies has told what it reached
        out.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: Any) -> None:
    """One line for each of a test's set-up, call and tear-down."""
    _write(_told(report))


def pytest_collectreport(report: Any) -> None:
    """A file that can't be imported is an outcome as well."""
    if report.failed:
        _write({"test": report.nodeid, "outcome": "error", "text": _first_line(report.longrepr)})


# ---- around all of them ------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The worst outcome of each test's parts."""
    tests: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        part = json.loads(line)
        known = tests.setdefault(part["test"], part)
        if WORST.index(part["outcome"]) < WORST.index(known["outcome"]):
            part = {**part, "outcome": known["outcome"], "text": known["text"]}
        tests[part["test"]] = {**known, **part}
    return tests


def compare(plain: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """What differs, a line each, and what fails in both runs by other words: these may hold numbers and addresses."""
    missing = {"outcome": "not reached", "text": ""}
    differ, otherwise = [], []
    for test in sorted({*plain, *ours}):
        one, other = plain.get(test, missing), ours.get(test, missing)
        if one["outcome"] != other["outcome"]:
            differ.append(f"{test}: {one['outcome']} without, {other['outcome']} with. {other['text'] or one['text']}")
        elif _without_addresses(one["text"]) != _without_addresses(other["text"]):
            otherwise.append(f"{test}: {one['text']!r} without, {other['text']!r} with")
        if not other.get("in_force", True):
            differ.append(f"{test}: what was installed is gone behind it")
    return differ, otherwise


def _without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def _run(install: str, arguments: list[str], out: Path) -> dict[str, dict[str, Any]]:
    here = str(Path(__file__).parent)
    paths = [here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, INSTALL: install, OUT: str(out), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peer_suite", "-p", "no:cacheprovider", *arguments]
    code = subprocess.run(command, env=environment).returncode
    tests = read(out)
    totals = Counter(test["outcome"] for test in tests.values())
    hooks = [test["hooks"] for test in tests.values() if test.get("hooks")]
    print(
        f"peer_suite: {f'with {install}' if install else 'without'}: {len(tests)} tests,",
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(totals.items())),
        f"(pytest's status {code}); {sum(hooks)} full backward hooks registered in {len(hooks)} tests",
        flush=True,
    )
    return tests


def main() -> int:
    """All runs, and how they differ: 0 where they don't."""
    usage = "%(prog)s --install WHAT [--install WHAT] -- ARGUMENTS"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    parser.add_argument("--install", choices=CHOICES, required=True, action="append", help="for one more run")
    parser.add_argument("arguments", nargs="+", help="pytest's: the tests, and its options")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = _run("", given.arguments, Path(folder, "without"))
        found = [_say(plain, _run(install, given.arguments, Path(folder, install))) for install in given.install]
    return any(found)


def _say(plain: dict[str, dict[str, Any]], ours: dict[str, dict[str, Any]]) -> bool:
    differ, otherwise = compare(plain, ours)
    for line in otherwise:
        print("peer_suite: fails in both, by other words:", line)
    for line in differ:
        print("peer_suite: differs:", line)
    if not any(test.get("hooks") for test in ours.values()):
        differ.append("nothing was compared")
        print("peer_suite: no test registered a full backward hook: nothing was compared")
    print(f"peer_suite: {len(differ)} of {len({*plain, *ours})} differ", flush=True)
    return bool(differ)


if __name__ == "__main__":
    sys.exit(main())
