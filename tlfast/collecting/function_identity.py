"""What a function is, as JSON: its code, its defaults, what it closes over and which globals it reads."""

from __future__ import annotations

import ast
import dis
import functools
import hashlib
import inspect
import io
import json
import linecache
import re
import sys
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from .fingerprint import model_fingerprint

UNKNOWN = "unknown: "
_SHORT = 80  # characters of a value that is told as it is; of a longer one its SHA-256 is
_MOST = 100_000  # values: more are data that a function works on, not settings
# What stands for itself in a line, the same in every process.
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), range, slice, Enum, PurePath, re.Pattern)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
_OURS = str(Path(__file__).parents[1])
# What an identity calls a module of ours: as it was called when the first datasets were written, wherever it lies now.
_CALLED = {
    "tlfast.backends.choice": "tlfast.ops",
    "tlfast.backends.reference": "tlfast.reference",
    "tlfast.collecting.batches": "tlfast.batches",
    "tlfast.collecting.loss": "tlfast.loss",
    "tlfast.collecting.run": "tlfast.collect",
    "tlfast.dataset.read.reader": "tlfast.dataset.reader",
    "tlfast.hooks.capture": "tlfast.public",
    "tlfast.hooks.captured": "tlfast.hooks",
    "tlfast.hooks.freeze": "tlfast.freeze",
    "tlfast.hooks.graph_step": "tlfast.graphs",
}


def describe_function(function: Any) -> tuple[Any, list[str]]:
    """Describe a function, or another callable, so that it is equal in each process that has the same one.

    A function is told by its source without comments (by its bytecode where there is no source, which differs between
    versions of Python), by its defaults, and by the values that it closes over or reads from its module. Those that
    are functions or objects themselves are told alike, those of libraries by their names. What it reaches through
    modules isn't seen.

    Returns:
        The description, and where in it a value can't be told, such as a file or a lock: it says "unknown: " there.
    """
    describer = _Describer(_top(getattr(function, "__module__", None) or type(function).__module__))
    return describer.tell(function, ""), describer.unknown


def what_stays(before: Any, after: Any) -> Any:
    """Of two descriptions of a function, before and after it was called, what is equal; a counter or a log isn't."""
    if before == after:
        return before
    if type(before) is type(after) is dict and set(before) == set(after):
        return {key: what_stays(part, after[key]) for key, part in before.items()}
    if type(before) is type(after) is list and len(before) == len(after):
        return [what_stays(*parts) for parts in zip(before, after, strict=True)]
    return "changes when it is called"


class _Describer:
    def __init__(self, own: str) -> None:
        self.unknown: list[str] = []
        self._own = own  # the package of the function, whose other functions are told by their code too
        self._above: set[int] = set()  # what is being told: it may refer to itself
        self._n = 0

    def tell(self, value: Any, path: str) -> Any:
        self._n += 1
        if isinstance(value, _PLAIN + _TORCH):
            return _short(repr(value))
        if self._n > _MOST:
            return self._cannot(value, path)
        if id(value) in self._above:
            return "itself"
        self._above.add(id(value))
        try:
            return self._tell(value, path)
        except Exception:  # whatever the objects of others raise when they are looked at
            return self._cannot(value, path)
        finally:
            self._above.remove(id(value))

    def _cannot(self, value: Any, path: str) -> str:
        self.unknown.append(path.lstrip("."))
        return f"{UNKNOWN}{type(value).__qualname__}"

    def _tell(self, value: Any, path: str) -> Any:
        if isinstance(value, (torch.Tensor, np.ndarray)) and type(value) in (torch.Tensor, nn.Parameter, np.ndarray):
            return _tensor(torch.as_tensor(value))
        if isinstance(value, nn.Module):
            return self._module(value, path)
        if type(value) in (list, tuple):
            return [self.tell(part, f"{path}[{k}]") for k, part in enumerate(value)]
        if type(value) in (set, frozenset):
            return sorted((self.tell(part, path) for part in value), key=json.dumps)
        if type(value) is dict:
            if not all(isinstance(key, _PLAIN) for key in value):
                return [[self.tell(key, path), self.tell(part, path)] for key, part in value.items()]
            named = {_short(key if isinstance(key, str) else repr(key)): part for key, part in value.items()}
            return {key: self.tell(part, f"{path}.{key}") for key, part in named.items()}
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, type):
            return self._class(value, path)
        if isinstance(value, FunctionType):
            return self._function(value, path)
        if isinstance(value, MethodType):
            return {"method": self.tell(value.__func__, path), "self": self.tell(value.__self__, f"{path}.self")}
        if isinstance(value, functools.partial):
            parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
            return {name: self.tell(part, f"{path}.{name}") for name, part in parts.items()}
        if isinstance(value, torch.jit.ScriptFunction):
            return _short(str(value.code))
        if hasattr(value, "__wrapped__"):  # such as functools.lru_cache makes
            return {"class": _name(type(value)), "wraps": self.tell(value.__wrapped__, path)}
        if isinstance(value, BuiltinFunctionType):
            if isinstance(value.__self__, (ModuleType, type, type(None))):
                return f"{value.__module__}.{value.__qualname__}"
            return {"method": value.__qualname__, "self": self.tell(value.__self__, f"{path}.self")}
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> Any:
        # How it would be pickled says what it consists of; an object that can't be has something of this process.
        made = value.__reduce_ex__(2)
        if isinstance(made, str):
            return f"{value.__module__}.{made}"
        make, args, state, *items = (*made, None, None, None)[:5]
        parts = {"class": type(value), "args": [part for part in args if part is not type(value)], "state": state}
        parts |= {"items": [list(part) for part in items if part is not None]} if any(items) else {}
        told = {name: self.tell(part, f"{path}.{name}".removesuffix(".state")) for name, part in parts.items() if part}
        return told if "copyreg" in str(make.__module__) else told | {"make": self.tell(make, path)}

    def _module(self, module: nn.Module, path: str) -> Any:
        own = {name: part for name, part in vars(module).items() if not name.startswith("_") and name != "training"}
        kinds = {_name(type(part)): type(part) for part in module.modules()}
        return {
            "classes": {name: self.tell(kind, f"{path}.{name}") for name, kind in sorted(kinds.items())},
            "layers": _short(re.sub(r" at 0x[0-9a-f]+", "", repr(module))),
            "weights": model_fingerprint(module),
            "state": self.tell(own, path),
        }

    def _class(self, kind: type, path: str) -> Any:
        if self._is_library(getattr(sys.modules.get(kind.__module__), "__file__", None) or "<>", kind.__module__):
            return _name(kind)
        members = {}
        for name, member in vars(kind).items():
            plain = not name.startswith("__") or name in ("__call__", "__init__", "__new__", "__getattr__")
            generated = getattr(getattr(member, "__code__", None), "co_filename", "") == "<string>"  # of a dataclass
            if plain and not generated and name != "_abc_impl" and not inspect.ismemberdescriptor(member):
                if isinstance(member, property):
                    member = member.fget
                members[name] = self.tell(getattr(member, "__func__", member), f"{path}.{name}")
        bases = [self.tell(base, path) for base in kind.__bases__ if base is not object]
        return {"name": _name(kind), "members": members} | ({"bases": bases} if bases else {})

    def _function(self, function: FunctionType, path: str) -> Any:
        home = function.__globals__.get("__name__", "")  # functools.wraps gives a wrapper the module of what it wraps
        home = called(home)
        if self._is_library(function.__code__.co_filename, home):
            if hasattr(function, "__wrapped__"):
                return {"name": f"{home}.{function.__code__.co_name}", "wraps": self.tell(function.__wrapped__, path)}
            return f"{home}.{function.__qualname__}"
        closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        parts: dict[str, Any] = {
            "defaults": list(function.__defaults__ or ()) + sorted((function.__kwdefaults__ or {}).items()),
            "closure": {key: cell.cell_contents for key, cell in closure.items() if _is_set(cell)},
            "globals": {
                key: function.__globals__[key]
                for key in sorted(_read(function.__code__))
                if key in function.__globals__
            },
        }
        told = {key: self.tell(part, f"{path}.{key}") for key, part in parts.items() if part}
        return {"name": f"{home}.{function.__qualname__}", "code": _code(function)} | told

    def _is_library(self, file: str, module: str | None) -> bool:
        if file.startswith((_OURS, "<frozen")) or module in sys.builtin_module_names:
            return True
        return (file.startswith(_LIBRARIES) or "dist-packages" in file) and _top(module) != self._own


def called(module: str) -> str:
    """The name of a module in an identity."""
    return _CALLED.get(module, module)


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _name(kind: type) -> str:
    return f"{called(kind.__module__)}.{kind.__qualname__}"


def _short(text: str) -> str:
    return text if len(text) <= _SHORT else hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _tensor(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _is_set(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (asks)
    except ValueError:
        return False
    return True


def _read(code: CodeType) -> set[str]:
    """The names of globals that code reads, and the functions within it."""
    names = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_read(part) for part in code.co_consts if isinstance(part, CodeType)))


def _code(function: FunctionType) -> str:
    """SHA-256 of the source, else of the bytecode, which then says of which Python it is."""
    source = _source(function)
    if source is not None:
        return hashlib.sha256(source.encode(errors="surrogatepass")).hexdigest()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return f"{hashlib.sha256(_bytecode(function.__code__)).hexdigest()} (bytecode of Python {version})"


def _bytecode(code: CodeType) -> bytes:
    consts = [_bytecode(part) if isinstance(part, CodeType) else repr(part).encode() for part in code.co_consts]
    return b"\0".join([code.co_code, repr((code.co_names, code.co_varnames)).encode(), *consts])


def _source(function: FunctionType) -> str | None:
    """The text of a function without comments and its indentation; None where it can't be found for sure."""
    code = function.__code__
    text = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        found = list(_nodes(ast.parse(text), code))
    except (SyntaxError, ValueError):
        return None
    parts = {ast.get_source_segment(text, node, padded=True) for node in found}
    part = parts.pop() if len(parts) == 1 else None
    return None if part is None else _without_comments(textwrap.dedent(part))


def _nodes(tree: ast.AST, code: CodeType) -> Iterator[ast.AST]:
    """The functions that begin in the line in which this code does; of several lambdas there the one that it is."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            begins = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if node.name == code.co_name and begins == code.co_firstlineno:
                yield node
        elif (
            isinstance(node, ast.Lambda)
            and (code.co_name, code.co_firstlineno) == ("<lambda>", node.lineno)
            and _covers(node.body, code)
        ):
            yield node


def _covers(body: ast.expr, code: Any) -> bool:
    """Whether instructions of ``code`` stand for a whole expression; True before Python 3.11, which doesn't say."""
    if not hasattr(code, "co_positions"):
        return True
    whole = (body.lineno, body.end_lineno, body.col_offset, body.end_col_offset)
    return whole in set(code.co_positions())


def _without_comments(source: str) -> str:
    lines = source.splitlines()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                row, column = token.start
                lines[row - 1] = lines[row - 1][:column]
    except (tokenize.TokenError, SyntaxError):
        pass  # a lambda between brackets: they aren't part of it
    return "\n".join(line.rstrip() for line in lines if line.strip())
