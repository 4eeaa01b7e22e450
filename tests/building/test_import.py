"""What an import of tlfast brings with it, and that all names are there."""

from __future__ import annotations

import pytest
from fresh_python import run

import tlfast

HEAVY = "{'torch', 'numpy', 'tlfast.dataset', 'tlfast.collecting'}"


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"], ["colect"]])
def test_the_command_line_answers_without_torch(words):
    program = (
        f"from tlfast.cli import main; import sys; main({words!r}); print({HEAVY} & set(sys.modules), file=sys.stderr)"
    )
    done = run("-c", program)
    heavy = "set()" if words != ["colect"] else "tlfast.collecting"  # a complaint asks for the rank
    assert heavy in done.stderr.splitlines()[-1]


def test_an_import_is_of_nothing_else():
    done = run(
        "-c", f"import sys, tlfast; print({HEAVY} & set(sys.modules)); tlfast.capture; print('torch' in sys.modules)"
    )
    assert done.stdout.split("\n")[:2] == ["set()", "True"]


def test_names_are_found_and_listed():
    assert set(tlfast.__all__) <= set(dir(tlfast))
    assert all(getattr(tlfast, name) is getattr(tlfast, name) for name in tlfast.__all__)
    assert tlfast.dataset.open_dataset is tlfast.open_dataset
    with pytest.raises(AttributeError, match="module 'tlfast' has no attribute 'captur'"):
        tlfast.captur  # noqa: B018


def test_functions_are_not_hidden_by_modules():
    program = """
import importlib, tlfast
for room in ("backends.choice", "collecting.run", "hooks.capture", "hooks.freeze", "hooks.graph_step", "loss"):
    importlib.import_module(f"tlfast.{room}")
print([callable(getattr(tlfast, name)) for name in tlfast.__all__].count(False))
"""
    assert run("-c", program).stdout.strip() == "0"
