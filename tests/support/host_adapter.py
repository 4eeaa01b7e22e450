"""The adapter of docs/hosts.md, and other libraries with the changes that the page makes to them."""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from importlib import import_module
from types import ModuleType
from typing import Any

from checkout import ROOT
from page_examples import code_blocks

PAGE = (ROOT / "docs" / "hosts.md").read_text(encoding="utf-8")
BLOCKS = [code for _, code in code_blocks(PAGE, "python")]


def adapter(**instead: Any) -> ModuleType:
    """A new adapter, as a library would have it; ``instead`` stands for modules that it finds: None for missing."""
    made = ModuleType("adapter")
    exec(compile(BLOCKS[0], "docs/hosts.md", "exec"), vars(made))
    if instead:
        made.import_module = lambda name: found(instead[name], name)
    return made


def found(module: Any, name: str) -> Any:
    if module is None:
        raise ModuleNotFoundError(f"No module named '{name}'")
    return module


def changes(library: str) -> list[tuple[str, str, str]]:
    """What the page changes in a library: the function, and its text before and behind."""
    rows = re.findall(r"^\|[^|]*\| `([\w.]+)` \| `(.*?) ?` \| `(.*?) ?` \|$", PAGE, flags=re.MULTILINE)
    return [row for row in rows if row[0].split(".")[0] == library]


def adopt(monkeypatch: Any, library: str, made: ModuleType) -> None:
    """Let an installed library call the adapter, as the page says."""
    (where, before, behind), *more = changes(library)
    assert not more
    path, name = where.rsplit(".", 1)
    try:
        owner: Any = import_module(path)
    except ModuleNotFoundError:
        path, class_name = path.rsplit(".", 1)
        owner = getattr(import_module(path), class_name)
    if isinstance(owner, type):
        owner = next(cls for cls in owner.__mro__ if name in vars(cls))
    function = vars(owner)[name]
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(before) == 1, f"{where} has other text than docs/hosts.md says"
    names = dict(vars(sys.modules[function.__module__]), register_full_backward_hook=made.register_full_backward_hook)
    exec(compile(source.replace(before, behind), f"{where}, changed", "exec"), names)
    monkeypatch.setattr(owner, name, names[name])


def counting(made: ModuleType) -> list[Any]:
    """The modules that get hooks by the adapter from now on."""
    seen: list[Any] = []
    register = made.register_full_backward_hook

    def register_full_backward_hook(module: Any, hook: Any, prepend: bool = False) -> Any:
        seen.append(module)
        return register(module, hook, prepend)

    made.register_full_backward_hook = register_full_backward_hook
    return seen
