"""The records of a data set on the command line: rows of files, of what save_to_disk wrote, or of one on the hub."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..dataset.errors import extra
from ..errors import broken_rule
from .csv_table import CsvTable
from .json_parts import Decoder
from .skipped import BadExamples

_WHO = "collect"
_AT_ONCE = 1024  # rows of a table made into Python's values together
_SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test", "eval")  # as hub and files call them
_NOT_HERE = "Check the path, or the name on the hub."


class Record(NamedTuple):
    """One row: its values by column, the file (or data set) it is of, and its number there."""

    values: Mapping[str, Any]
    source: str
    start: int


def read_records(
    place: str,
    bad: BadExamples,
    name: str = "",
    split: str = "",
    texts: Collection[str] = (),
    wanted: Collection[str] | None = None,
) -> Iterator[Record]:
    """Yield the rows of a data set, in its order; those of several files by rising path.

    All are read part by part, but for JSON that is an object around its list, and what `CsvTable` holds.

    Args:
        place: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .txt), a folder of such, one that
            ``save_to_disk`` of Hugging Face's datasets wrote, or a name on the hub.
        bad: takes the lines that can't be read.
        name: of a configuration on the hub.
        split: which part: of the hub, of what save_to_disk wrote, or of a folder with files called so.
        texts: columns that are text, whatever a CSV file makes one think.
        wanted: the columns that are asked for; None: all. Rows may have others, too, the first one has all.

    Raises:
        ValueError: for a place without records, a file that isn't what its ending says, or a ``split`` that there isn't
            or that must be said.
    """
    path = Path(place).expanduser()
    if path.is_dir() and not _is_saved(path):
        if name:
            raise _refused("name", "be left out for files", repr(name), "It is one of the hub's.")
        files = _in_folder(path, split)
        return chain.from_iterable(
            _of_file(file, file.relative_to(path).as_posix(), bad, texts, wanted) for file in files
        )
    if path.is_file():
        for argument, value in (("name", name), ("split", split)):
            if value:
                raise _refused(argument, "be left out for a file", repr(value), "The file is taken whole.")
        return _of_file(path, path.name, bad, texts, wanted)
    return _of_datasets(place, path, name, split, wanted)


def files_of(place: str, split: str = "") -> list[tuple[str, Path]] | None:
    """All files that `read_records` reads, with names that tell them apart; None for a data set of the hub.

    Raises:
        ValueError: as `read_records`, for a folder.
    """
    path = Path(place).expanduser()
    if _is_saved(path):
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    elif path.is_dir():
        found = _in_folder(path, split)
    else:
        return [(path.name, path)] if path.is_file() else None
    return [(file.relative_to(path).as_posix(), file) for file in found]


def _is_saved(path: Path) -> bool:
    """Whether it is a folder that ``save_to_disk`` made."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _refused(argument: str, rule: str, got: str, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, argument, rule, got, remedy))


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, or those of a split, which their names begin with or their folder is called by."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _READERS and path.is_file()]
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not found:
        raise _refused("dataset", f"hold files like {', '.join(_READERS)}", repr(str(folder)), _NOT_HERE)
    splits: dict[str, list[Path]] = {}
    for path in found:
        words = {re.split(r"[-._]", part)[0].lower() for part in path.relative_to(folder).parts}
        for word in sorted(words):
            splits.setdefault(word, []).append(path)
    known = [word for word in splits if word in _SPLITS or len(splits) > 1]
    if split and split.lower() not in splits:
        raise _refused("split", f"be one of {', '.join(known) or 'none'}", repr(split), "Or leave it out.")
    several = [word for word in splits if word in _SPLITS]
    if not split and len(several) > 1:
        raise _refused("split", f"be one of {', '.join(several)}", "none", "Say --split, or name one file.")
    return splits[split.lower()] if split else found


def _is_path(place: str, path: Path) -> bool:
    """Whether what isn't there was meant to be here: asking the hub for it would take half a minute."""
    named = path.suffix.lower() in _READERS or place.startswith((".", "~", "/")) or place.count("/") > 1
    return named or (len(path.parts) > 1 and path.parent.is_dir())


def _of_datasets(place: str, path: Path, name: str, split: str, wanted: Collection[str] | None) -> Iterator[Record]:
    if not path.is_dir() and _is_path(place, path):
        raise _refused("dataset", "be a file, a folder or a name on the hub", f"{place!r}, no such file", _NOT_HERE)
    datasets = extra("datasets", _WHO, "hub")
    try:
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(place, name or None)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        got = f"{place!r}: {' '.join(str(error).split())[:300]}"
        raise _refused("dataset", "be a file, a folder or a name on the hub", got, _NOT_HERE) from error
    if isinstance(found, Mapping):
        splits = list(found)
        if split not in found and (split or len(splits) > 1):
            raise _refused("split", f"be one of {', '.join(splits)}", repr(split) if split else "none", "Say --split.")
        split = split or splits[0]
        found = found[split]
    elif split:
        raise _refused("split", "be left out for a data set of one", repr(split), "It is taken whole.")
    source = split if path.is_dir() else f"{place}/{split}"
    return _of_table_rows(found.with_format("arrow").iter(batch_size=_AT_ONCE), source or path.name, wanted)


def _of_table_rows(parts: Iterable[Any], source: str, wanted: Collection[str] | None) -> Iterator[Record]:
    """The rows of a table that comes in parts; of the first one with all columns, so that it is known what there is."""
    start = 0
    for part in parts:
        part.validate(full=True)  # offsets that lead out of its memory would end the process
        names = part.schema.names
        twice = next((name for name in names if names.count(name) > 1 and (wanted is None or name in wanted)), None)
        if twice is not None:
            rule = "have one column of each name that is asked for"
            raise _refused("dataset", rule, f"{twice!r} twice in {source!r}", "Rename it.")
        if start and wanted is not None:
            part = part.select([k for k, column in enumerate(part.schema.names) if column in wanted])
        for k, values in enumerate(part.to_pylist()):
            yield Record(values, source, start + k)
        start += len(part)


def _of_file(
    path: Path, source: str, bad: BadExamples, texts: Collection[str], wanted: Collection[str] | None
) -> Iterator[Record]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        rule = f"end in {', '.join(_READERS)}"
        raise _refused("dataset", rule, repr(str(path)), "Name the file as what it is; --text takes text of any name.")
    try:
        if reader in (_parquet, _arrow):
            yield from _of_table_rows(reader(path), source, wanted)
        elif reader is _csv:
            yield from _csv(path, source, bad, texts, wanted)
        else:
            yield from reader(path, source, bad, texts)
    except (OSError, UnicodeError, ValueError, TypeError, KeyError, RecursionError) as error:
        if str(error).startswith(f"{_WHO}: "):
            raise
        got = f"{str(path)!r}: {' '.join(str(error).split())[:200]}"
        kind = path.suffix.lower().lstrip(".")
        raise _refused("dataset", f"be a readable {kind} file", got, "Write it anew, or leave it out.") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            data = line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
            if data.strip():
                yield number, data


def _jsonl(path: Path, source: str, bad: BadExamples, texts: Collection[str]) -> Iterator[Record]:
    decoder = Decoder()
    for number, line in _lines(path):
        try:
            values = decoder.one(line.decode())
            reason = None if isinstance(values, dict) else f"a {type(values).__name__}, no JSON object"
        except (ValueError, RecursionError) as error:
            reason = f"no JSON ({' '.join(str(error).split())[:80]})"
        if reason is None and decoder.twice:
            reason = _twice(decoder)
        if reason is None:
            yield Record(values, source, number)
        else:
            got, remedy = f"{reason}, in line {number + 1} of {str(path)!r}", "Correct that line, or leave it out."
            error_text = broken_rule(_WHO, "dataset", "hold a JSON object in each line", got, remedy)
            bad.leave_out(source, number, reason, error_text)


def _twice(decoder: Decoder) -> str:
    return f"the key {decoder.twice[:40]!r} twice, with two values"


def _json(path: Path, source: str, bad: BadExamples, texts: Collection[str]) -> Iterator[Record]:
    decoder, number = Decoder(), -1
    with open(path, encoding="utf-8-sig") as file:
        is_list = file.read(1 << 16).lstrip()[:1] == "["
    with open(path, encoding="utf-8-sig") as file:
        for number, one in enumerate(decoder.items(file) if is_list else _of_object(path)):
            if not isinstance(one, dict):
                raise _no_records(path)
            if not decoder.twice:
                yield Record(one, source, number)
                continue
            got, remedy = f"{_twice(decoder)}, in record {number} of {str(path)!r}", "Correct it, or leave it out."
            error_text = broken_rule(_WHO, "dataset", "hold JSON objects with different keys", got, remedy)
            bad.leave_out(source, number, _twice(decoder), error_text)
    if number < 0:
        raise _no_records(path)


def _no_records(path: Path) -> ValueError:
    remedy = "JSON lines end in .jsonl."
    return _refused("dataset", "hold one list of JSON objects", f"other JSON in {str(path)!r}", remedy)


def _of_object(path: Path) -> list[Any]:
    """The one list of records in an object, which is read whole."""
    values = Decoder().one(path.read_bytes().decode("utf-8-sig"))
    lists = [value for value in values.values() if _is_records(value)] if isinstance(values, dict) else []
    return lists[0] if len(lists) == 1 else [None]


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _text(path: Path, source: str, bad: BadExamples, texts: Collection[str]) -> Iterator[Record]:
    for number, line in _lines(path):
        text = line.decode(errors="replace")
        if text.encode() == line:
            yield Record({"text": text.rstrip("\r\n")}, source, number)
        else:
            got, remedy = f"line {number + 1} of {str(path)!r}", "Correct that line, or leave it out."
            bad.leave_out(source, number, "no UTF-8 text", broken_rule(_WHO, "dataset", "be UTF-8 text", got, remedy))


def _csv(path: Path, source: str, bad: BadExamples, texts: Collection[str], wanted: Any) -> Iterator[Record]:
    table = CsvTable(path, source, bad, texts, wanted)
    records = _of_table_rows(table.parts(), source, None)
    for first in records:
        yield first._replace(values=dict.fromkeys(table.names) | dict(first.values))  # all of them
        break
    yield from records


def _parquet(path: Path) -> Iterator[Any]:
    yield from extra("pyarrow.parquet", _WHO).ParquetFile(path).iter_batches(_AT_ONCE)


def _arrow(path: Path) -> Iterator[Any]:
    pa = extra("pyarrow", _WHO)
    with pa.memory_map(str(path)) as memory:
        if memory.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(memory)
            yield from map(opened.get_batch, range(opened.num_record_batches))
        else:
            memory.seek(0)
            yield from pa.ipc.open_stream(memory)


_READERS: dict[str, Callable[..., Iterator[Any]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow, ".feather": _arrow, ".txt": _text,
}  # fmt: skip
