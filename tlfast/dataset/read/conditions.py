"""Conditions on rows as text, ``"length > 10 and norm['late'] < 3"``: the part of Python that compares, no more."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...errors import broken_rule
from ..format.plan import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED
from ..format.row_table import NORM

FLAGS = {"non_finite": FLAG_NON_FINITE, "missing": FLAG_MISSING, "saturated": FLAG_SATURATED}
_MOST_CHARACTERS = 4096  # a text of any length could be nested more deeply than Python's stack
_MOST_DEPTH = 50

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.In: lambda a, b: _is_in(a, b), ast.NotIn: lambda a, b: ~_is_in(a, b),
}  # fmt: skip
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: np.true_divide,
    ast.Mod: np.remainder, ast.FloorDiv: np.floor_divide,
}  # fmt: skip


class Condition:
    """A condition on the values of rows: made of its text, called with the values, each an array or one value.

    Args:
        text: comparisons (``<``, ``<=``, ``>``, ``>=``, ``==``, ``!=``, ``in``, ``not in``) of names, numbers, texts,
            lists and sums, joined by ``and``, ``or`` and ``not``. A name is a value of a row: ``length``, ``id``,
            ``source``, one of its kept fields. ``norm['point']`` is a row's norm there; ``non_finite``, ``missing``
            and ``saturated`` are its flags.
        who: who speaks in an error.

    Raises:
        ValueError: for a text that is no such condition.

    Example:
        >>> import numpy as np
        >>> from tlfast.dataset.read.conditions import Condition
        >>> Condition("10 < length <= 20 and source != 'a.txt'")({"length": np.array([5, 15]), "source": "b.txt"})
        array([False,  True])
    """

    def __init__(self, text: str, who: str = "filter") -> None:
        self.text, self._who = text, who
        self.names: set[str] = set()  # of the values that it needs: those of points are called "norm:<point>"
        try:
            if len(text) > _MOST_CHARACTERS:
                raise ValueError(f"it has more than {_MOST_CHARACTERS} characters")
            self._tree = ast.parse(text.strip(), mode="eval").body
            self._check(self._tree, 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            why = error.msg if isinstance(error, SyntaxError) else str(error)
            raise self._broken(f"{text[:200]!r}: {why}") from None
        if not self.names:
            raise self._broken(f"{text[:200]!r}: it asks for no value of a row")

    def _broken(self, got: str) -> ValueError:
        rule = "compare values of a row"
        return ValueError(broken_rule(self._who, "condition", rule, got, 'Write "length > 10", or give a function.'))

    def check_names(self, known: list[str]) -> None:
        """Raise ValueError where it needs a value that is none of ``known``."""
        for name in sorted(self.names - set(known)):
            shown = f"norm[{name.removeprefix(NORM)!r}]" if name.startswith(NORM) else name
            there = ", ".join(sorted(n for n in known if not n.startswith(NORM)))
            points = [n.removeprefix(NORM) for n in known if n.startswith(NORM)]
            more = f", norm[...] of {', '.join(map(repr, points[:3]))}{', ...' * (len(points) > 3)}" if points else ""
            remedy = f"There are {there}, {', '.join(FLAGS)}{more}."
            if name == "skipped":
                remedy += " Skipped examples have no row: see ds.skipped."
            raise ValueError(broken_rule(self._who, "condition", "name values that rows have", shown, remedy))

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Return whether the condition holds: a bool array, or one bool where all values are single ones."""
        try:
            with np.errstate(all="ignore"):
                found = self._value(self._tree, values)
        except (TypeError, ValueError, ArithmeticError) as error:
            raise self._broken(f"{self.text!r}: {error}") from error
        if not isinstance(found, (bool, np.bool_, np.ndarray)) or np.asarray(found).dtype != np.bool_:
            raise self._broken(f"{self.text!r}, which is no truth")
        return found

    def _check(self, node: ast.AST, depth: int) -> None:
        """Raise ValueError for whatever else Python has."""
        if depth > _MOST_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(node, ast.Name):
            self.names.add("flags" if node.id in FLAGS else node.id)
            return
        if isinstance(node, ast.Subscript):
            if not (isinstance(node.value, ast.Name) and node.value.id == "norm"):
                raise ValueError("only norm['point'] has brackets")
            if not (isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str)):
                raise ValueError("norm[...] takes the name of a point in quotes")
            self.names.add(NORM + node.slice.value)
            return
        if isinstance(node, ast.Constant):
            if not isinstance(node.value, (bool, int, float, str)):
                raise ValueError(f"{node.value!r} is no number and no text")
            return
        fine = isinstance(node, (ast.BoolOp, ast.Compare, ast.List, ast.Tuple))
        fine |= isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.UAdd))
        fine |= isinstance(node, ast.BinOp) and type(node.op) in _BINARY
        if isinstance(node, ast.Compare):
            fine &= all(type(op) in _COMPARE for op in node.ops)
        if not fine:
            raise ValueError(f"{ast.unparse(node)[:80]} is more than it can say")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child, depth + 1)

    def _value(self, node: ast.AST, values: Mapping[str, Any]) -> Any:
        match node:
            case ast.Name(id=name):
                return (values["flags"] & FLAGS[name]) != 0 if name in FLAGS else values[name]
            case ast.Subscript(slice=ast.Constant(value=str(point))):
                return values[NORM + point]
            case ast.Constant(value=value):
                return value
            case ast.List(elts=parts) | ast.Tuple(elts=parts):
                return [self._value(part, values) for part in parts]
            case ast.UnaryOp(op=ast.Not(), operand=part):
                return ~_truth(self._value(part, values))
            case ast.UnaryOp(op=sign, operand=part):
                value = self._value(part, values)
                return -value if isinstance(sign, ast.USub) else value
            case ast.BinOp(left=left, op=op, right=right):
                return _BINARY[type(op)](self._value(left, values), self._value(right, values))
            case ast.BoolOp(op=op, values=parts):
                join = operator.and_ if isinstance(op, ast.And) else operator.or_
                truths = [_truth(self._value(part, values)) for part in parts]
                found = truths[0]
                for truth in truths[1:]:
                    found = join(found, truth)
                return found
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [self._value(part, values) for part in (left, *others)]
                return _chain(sides, [_COMPARE[type(op)] for op in ops])
        raise ValueError(f"{ast.unparse(node)[:80]} is more than it can say")


def _chain(sides: list[Any], compare: list[Callable[[Any, Any], Any]]) -> Any:
    found: Any = np.True_
    for k, test in enumerate(compare):
        kinds = _kinds(sides[k]) | _kinds(sides[k + 1])
        if len(kinds) > 1:  # equal they never are: numpy would say False of all rows
            raise ValueError(f"{' and '.join(sorted(kinds))} can't be compared")
        found = found & _truth(test(sides[k], sides[k + 1]))
    return found


def _kinds(value: Any) -> set[str]:
    if isinstance(value, list):
        return {kind for part in value for kind in _kinds(part)}
    if isinstance(value, np.ndarray) and value.dtype == object:
        return {"text" if isinstance(part, str) else type(part).__name__ for part in value.tolist()}
    return {"text" if isinstance(value, str) else "a number"}


def _truth(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype == object:  # what numpy makes of comparing texts
        array = array.astype(np.bool_) if all(isinstance(v, (bool, np.bool_)) for v in array.flat) else array
    if array.dtype != np.bool_:
        raise ValueError(f"{str(value)[:80]} is neither true nor false")
    return array if array.ndim else np.bool_(array)


def _is_in(value: Any, among: Any) -> Any:
    if isinstance(among, list):
        if isinstance(value, np.ndarray):
            return np.fromiter((v in among for v in value.tolist()), np.bool_, len(value))
        return np.bool_(value in among)
    if isinstance(value, str) and isinstance(among, str):
        return np.bool_(value in among)
    if isinstance(value, str) and isinstance(among, np.ndarray) and among.dtype == object:
        return np.fromiter((value in text for text in among.tolist()), np.bool_, len(among))
    raise ValueError("`in` takes a list, or a text in a text")
