"""The two backends have the same classes, methods and parameters: what a test says of one can be said of the other."""

import ast
import inspect
from pathlib import Path

import pytest

import tlfast
from tlfast.backends import python

STUB = {node.name: node for node in ast.parse((Path(tlfast.__file__).parent / "_C.pyi").read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)}  # fmt: skip
# What only native code needs: about the module itself, hooks that are called natively, recorded steps. The twin of a
# sketch is in tlfast/projections/applying.py.
NATIVE_ONLY = {
    "describe", "cuda_status", "cuda_capability", "call_natively", "call_modules_natively",
    "choose_natively", "choose_for", "ModuleCall", "PointHooks",
    "learn_outputs", "reduce_at_once", "Sketcher", "Recording", "Ledger.cursor",
    "Ledger.start_trial", "Ledger.stop_trial", "Ledger.start_recording", "Ledger.stop_recording", "Ledger.replay",
    "Ledger.take_back", "Tap.learn_references",
}  # fmt: skip


def stubbed():
    """``Class.member``, or ``function``, of everything in the stub, with its parameters where it has some."""
    for name, node in STUB.items():
        if isinstance(node, ast.FunctionDef):
            yield name, [a.arg for a in node.args.args]
            continue
        yield name, None
        for member in node.body:
            if isinstance(member, ast.FunctionDef):
                is_property = any(ast.unparse(d) == "property" for d in member.decorator_list)
                yield f"{name}.{member.name}", None if is_property else [a.arg for a in member.args.args]
            elif isinstance(member, ast.AnnAssign):
                yield f"{name}.{member.target.id}", None


def twins():
    """All of it that isn't native alone."""
    return [(name, given) for name, given in stubbed() if not {name, name.split(".")[0]} & NATIVE_ONLY]


@pytest.mark.parametrize("name, parameters", twins())
def test_the_python_backend_has_it(name, parameters):
    owner, _, member = name.partition(".")
    found = getattr(python, owner)
    if not member:
        return
    made = inspect.getsource(found)
    assert hasattr(found, member) or f"self.{member}" in made, f"backends.python has no {name}"
    if parameters is not None:
        assert list(inspect.signature(getattr(found, member)).parameters)[: len(parameters)] == parameters


def test_what_is_native_only_is_there():
    assert {name for name, _ in stubbed()} >= NATIVE_ONLY


def test_the_names_of_the_backends():
    assert python.NAME == "python"
    assert "NAME: str" in (Path(tlfast.__file__).parent / "_C.pyi").read_text()
