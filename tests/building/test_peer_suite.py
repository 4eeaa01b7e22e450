"""tools/peer_suite.py: what differs between somebody's tests without and with native hooks is said, and fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from peer_suite import compare, read

SUITE = """
import pytest, torch
from torch import nn

class Doubles(nn.Module):
    def forward(self, x):
        return x.mul_(2)

def run(module):
    module.register_full_backward_hook(lambda *_: None)
    module(torch.ones(2, requires_grad=True) * 1).sum().backward()

def test_alike(): run(nn.Tanh())
def test_in_place():
    with pytest.raises(RuntimeError, match="modified inplace"): run(Doubles())
"""


def kept(path: Path, *lines: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_test_has_the_worst_outcome_of_its_parts(tmp_path: Path) -> None:
    parts = [
        {"test": "a", "outcome": "passed", "text": ""},
        {"test": "a", "outcome": "failed", "text": "no", "hooks": 2, "in_force": True},
        {"test": "a", "outcome": "passed", "text": ""},
        {"test": "b", "outcome": "skipped", "text": ""},
    ]
    found = read(kept(tmp_path / "out", *parts))
    assert found["a"] == {"test": "a", "outcome": "failed", "text": "no", "hooks": 2, "in_force": True}
    assert found["b"]["outcome"] == "skipped"
    assert read(tmp_path / "nothing was written") == {}


def test_what_differs_is_named(tmp_path: Path) -> None:
    names = ("same", "breaks", "dies", "fails at an address", "fails otherwise", "takes ours away")
    outcomes = ("passed", "passed", "passed", "failed", "failed", "passed")
    plain = [
        {"test": name, "outcome": outcome, "text": "at 0xab" if outcome == "failed" else ""}
        for name, outcome in zip(names, outcomes, strict=True)
    ]
    ours = [dict(one) for one in plain if one["test"] != "dies"]
    ours[1] |= {"outcome": "failed", "text": "RuntimeError: no"}
    ours[2] |= {"text": "at 0xcd"}
    ours[3] |= {"text": "elsewhere"}
    ours[4] |= {"in_force": False}
    differ, otherwise = compare(read(kept(tmp_path / "plain", *plain)), read(kept(tmp_path / "ours", *ours)))
    assert differ == [
        "breaks: passed without, failed with. RuntimeError: no",
        "dies: passed without, not reached with. ",
        "takes ours away: what was installed is gone behind it",
    ]
    assert otherwise == ["fails otherwise: 'at 0xab' without, 'elsewhere' with"]


@pytest.mark.long
def test_a_suite_that_differs_and_one_that_registers_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_of_theirs.py").write_text(SUITE)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "tools" / "peer_suite.py"), "--install", "hooks", "--", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=tmp_path,
            env=os.environ | {"TLFAST_REQUIRE_NATIVE": "1"},
        )  # fmt: skip
        return done.returncode, done.stdout

    code, said = run("test_of_theirs.py")
    assert "without: 2 tests, 2 passed (pytest's status 0); 2 full backward hooks registered in 2 tests" in said
    assert "differs: test_of_theirs.py::test_in_place: passed without, failed with." in said
    assert "1 of 2 differ" in said
    assert code == 1
    code, said = run("test_of_theirs.py", "-k", "alike")
    assert "0 of 1 differ" in said
    assert code == 0
    code, said = run("test_of_theirs.py", "-k", "nothing")
    assert "nothing was compared" in said
    assert code == 1
