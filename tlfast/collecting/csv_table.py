"""A table of text, CSV or TSV, read in parts; the type of a column is decided by all of its cells."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from ..dataset.errors import extra
from ..errors import broken_rule
from .skipped import BadExamples

_WHO = "collect"
_BLOCKS = (1 << 20, 1 << 25, 1 << 30)  # bytes that are parsed together: a row must fit; the first is pyarrow's own
_LONG = "^ *[+-]?[0-9]{16,} *$"  # whole numbers that a float64 may not hold
_TOO_LONG = "straddl"  # of what pyarrow says of a row that doesn't fit


class CsvTable:
    """The columns of a file, their types, and its rows.

    Two passes: the first finds rows with too few or too many cells, and the types of columns that aren't text, of which
    all is held meanwhile; the second reads.

    Args:
        path: of the file.
        source: its name, for what is left out.
        bad: takes the rows that have other cells than the first.
        texts: columns that are text, whatever one may think.
        wanted: columns that are asked for; None: all.
        strict: refuse what `read_records` does; else take it as it was before.

    Raises:
        ValueError: for a file that isn't such a table; of pyarrow, or of the wrong encoding, where that found it.
    """

    def __init__(
        self, path: Path, source: str, bad: BadExamples, texts: Collection[str], wanted: Collection[str] | None,
        strict: bool = True,
    ) -> None:  # fmt: skip
        self._csv, self._path = extra("pyarrow.csv", _WHO), path
        string = extra("pyarrow", _WHO).string()
        _check_utf8(path)
        self._texts, self._strict = dict.fromkeys(texts, string), strict
        for self._block in _BLOCKS:
            try:
                broken = self._first_pass(wanted)
                break
            except ValueError as error:  # pyarrow's are such
                if _TOO_LONG not in str(error) or self._block == _BLOCKS[-1]:
                    raise
        for row in broken:
            _leave_out(row, path, source, bad, strict)

    def _first_pass(self, wanted: Collection[str] | None) -> list[Any]:
        """Names and types of the columns; the rows that have other cells."""
        broken: list[Any] = []
        self._types: dict[str, Any] = dict(self._texts)
        self.names: list[str] = self._parts([]).schema.names
        self._wanted = [name for name in self.names if wanted is None or name in wanted]
        twice = next((name for name in self._wanted if self.names.count(name) > 1), None)
        if twice is not None and self._strict:
            rule = "have one column of each name that is asked for"
            raise _refused(rule, f"{twice!r} twice, in the first row", self._path, "Rename it.")
        if twice is not None:
            self._wanted = []  # which is all of them: the last of one name counts
        others = [name for name in self._wanted if name not in self._texts]
        if not others and self._wanted:
            for _ in self._parts(broken, self._wanted[:1]):
                pass
            return broken
        # One thread: with several, rows have no numbers.
        table = self._csv.read_csv(self._path, *self._settings(broken, others))
        self._types |= dict(zip(table.schema.names, table.schema.types, strict=True))
        floats = [name for name in others if str(self._types[name]) == "double"]
        if floats and self._strict:
            self._check_whole_numbers(floats)
        return broken

    def _check_whole_numbers(self, names: list[str]) -> None:
        """ValueError for a whole number that would be rounded: it is too large, or others of its column are floats."""
        string, compute = extra("pyarrow", _WHO).string(), extra("pyarrow.compute", _WHO)
        start = 1
        for part in self._parts([], names, dict.fromkeys(names, string)):
            for name, column in zip(names, part.columns, strict=True):
                long = compute.match_substring_regex(column, _LONG)
                for k in compute.indices_nonzero(long).to_pylist():
                    cell = column[k].as_py().strip()
                    if int(cell) != float(cell):
                        got = f"{cell[:40]} in column {name!r}, record {start + k}"
                        remedy = "A letter before each makes texts of them."
                        raise _refused("have whole numbers that a float64 holds", got, self._path, remedy)
            start += len(part)

    def parts(self) -> Iterator[Any]:
        """The rows, some at a time."""
        yield from self._parts([], self._wanted)

    def _parts(self, broken: list[Any], names: list[str] | None = None, types: dict[str, Any] | None = None) -> Any:
        return self._csv.open_csv(self._path, *self._settings(broken, names or [], types))

    def _settings(
        self, broken: list[Any], names: list[str], types: dict[str, Any] | None = None
    ) -> tuple[Any, Any, Any]:
        def odd(row: Any) -> str:
            broken.append(row)
            return "skip"

        delimiter = "\t" if self._path.suffix.lower() == ".tsv" else ","
        return (
            self._csv.ReadOptions(use_threads=False, block_size=self._block),
            self._csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=odd),
            self._csv.ConvertOptions(column_types=types or self._types, include_columns=names),
        )


def _check_utf8(path: Path) -> None:
    with open(path, encoding="utf-8") as file:
        while file.read(1 << 20):  # what isn't UTF-8 ends here, and not in the middle of a row
            pass


def _leave_out(row: Any, path: Path, source: str, bad: BadExamples, strict: bool) -> None:
    number, reason = row.number or 0, f"{row.actual_columns} cells, not {row.expected_columns}"
    if strict and row.text.count('"') % 2 and "\n" in row.text:
        raise _refused("close each quote", f"one that is open to the end, from row {number} on", path, "Close it.")
    got, remedy = f"{reason}, in row {number} of {str(path)!r}", "Quote what has the delimiter in it."
    error = broken_rule(_WHO, "dataset", "have a cell for each column", got, remedy)
    bad.leave_out(source, number, reason, error)


def _refused(rule: str, got: str, path: Path, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, "dataset", rule, f"{got} of {str(path)!r}", remedy))
