"""The records of a data set on the command line: rows of files, of what save_to_disk wrote, or of one on the hub."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from ..dataset.errors import extra
from ..errors import broken_rule
from .csv_table import CsvTable
from .hub_data import hub_data, saved_data
from .json_parts import TWO_VALUES, Decoder
from .media import SUFFIXES
from .skipped import BadExamples

_WHO = "collect"
_AT_ONCE = 1024  # rows of a table made into Python's values together
_SPLITS = ("train", "training", "valid", "validation", "val", "dev", "test", "eval")  # as hub and files call them
_NOT_HERE = "Check the path, or the name on the hub."


class _How(NamedTuple):
    """How files are read: as `read_records` says."""

    texts: Collection[str]
    wanted: Collection[str] | None
    strict: bool


class HubRecords(NamedTuple):
    """The rows of a data set of the hub, a ``datasets.Dataset``, and the name by which they remember it."""

    rows: Any
    source: str

    @property
    def files(self) -> list[tuple[str, Path]] | None:
        """Where the client keeps them, with names that tell them apart; None where they lie in memory alone."""
        paths = [Path(file["filename"]) for file in self.rows.cache_files]
        return [(path.name, path) for path in paths] or None


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
    kind: str = "text",
    strict: bool = True,
    hub: HubRecords | None = None,
) -> Iterator[Record]:
    """Yield the rows of a data set, in its order; those of several files by rising path.

    All are read part by part, but for what `CsvTable` holds.

    Args:
        place: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather, .txt), a folder of such, one that
            ``save_to_disk`` of Hugging Face's datasets wrote, or a name on the hub.
        bad: takes the lines that can't be read.
        name: of a configuration on the hub.
        split: which part: of the hub, of what save_to_disk wrote, or of a folder with files called so.
        texts: columns that are text, whatever a CSV file makes one think.
        wanted: the columns that are asked for; None: all. Rows may have others, too, the first one has all.
        kind: "image" or "audio" takes a folder without such files for one of images or sounds: each is a row with its
            path, in the column called by the kind, and the name of the folder that it lies in, ``label``.
        strict: leave out, or refuse, what a key or a column has two values for, numbers that would be rounded, and
            a quote that is open to the end; else take them as the first version did, for a dataset that has them.
        hub: what `on_hub` found at this place.

    Raises:
        ValueError: for a place without records, a file that isn't what its ending says, or a ``split`` that there isn't
            or that must be said.
    """
    path, how = Path(place).expanduser(), _How(texts, wanted, strict)
    if hub is not None:
        return _of_rows(hub.rows, hub.source, how)
    if path.is_dir() and not _is_saved(path):
        if name:
            raise _refused("name", "be left out for files", repr(name), "It is one of the hub's.")
        if kind != "text" and not _files_below(path, _TABLES):
            return _of_media(path, kind, split)
        files = _in_folder(path, split)
        return chain.from_iterable(_of_file(file, file.relative_to(path).as_posix(), bad, how) for file in files)
    if path.is_file():
        for argument, value in (("name", name), ("split", split)):
            if value:
                raise _refused(argument, "be left out for a file", repr(value), "The file is taken whole.")
        return _of_file(path, path.name, bad, how)
    if path.is_dir():
        rows, split = saved_data(path, split)
        return _of_rows(rows, split or path.name, how)
    found = on_hub(place, name, split)
    assert found is not None  # a name is all that is left
    return _of_rows(found.rows, found.source, how)


def on_hub(place: str, name: str = "", split: str = "") -> HubRecords | None:
    """The data set of the hub that a place names, fetched unless it lies in the client's cache; None for a path.

    Raises:
        ValueError: for a name that the hub hasn't, or a ``split`` that there isn't or that must be said.
    """
    path = Path(place).expanduser()
    if path.is_dir() or path.is_file():
        return None
    if _is_path(place, path):
        raise _refused("dataset", "be a file, a folder or a name on the hub", f"{place!r}, no such file", _NOT_HERE)
    rows, split = hub_data(place, name, split)
    return HubRecords(rows, f"{place}/{split}")


def files_of(place: str, split: str = "", hub: HubRecords | None = None) -> list[tuple[str, Path]] | None:
    """All files that `read_records` reads of texts, with names that tell them apart; None where that can't be known.

    Raises:
        ValueError: as `read_records`, for a folder.
    """
    path = Path(place).expanduser()
    if hub is not None:
        return hub.files
    if _is_saved(path):
        found = [file for file in sorted(path.rglob("*")) if file.is_file()]
    elif path.is_dir():
        found = _in_folder(path, split)
    else:
        return [(path.name, path)] if path.is_file() else None
    return [(file.relative_to(path).as_posix(), file) for file in found]


def media_of(place: str, kind: str, split: str = "") -> list[str] | None:
    """The names of all files that `read_records` takes for rows of their own; None where rows are those of tables.

    Raises:
        ValueError: as `read_records`, for a folder.
    """
    path = Path(place).expanduser()
    if not path.is_dir() or _is_saved(path) or kind == "text" or _files_below(path, _TABLES):
        return None
    return [record.source for record in _of_media(path, kind, split)]


def _is_saved(path: Path) -> bool:
    """Whether it is a folder that ``save_to_disk`` made."""
    return any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _refused(argument: str, rule: str, got: str, remedy: str) -> ValueError:
    return ValueError(broken_rule(_WHO, argument, rule, got, remedy))


def _files_below(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of a folder that end so, by rising path, without hidden ones."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _in_folder(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, or those of a split, which their names begin with or their folder is called by."""
    found = _files_below(folder, _READERS)
    if not found:
        raise _refused("dataset", f"hold files like {', '.join(_READERS)}", repr(str(folder)), _NOT_HERE)
    words = [{re.split(r"[-._]", part)[0].lower() for part in path.relative_to(folder).parts} for path in found]
    return _of_split(found, words, split)


def _of_split(found: list[Path], words: Sequence[Collection[str]], split: str) -> list[Path]:
    """The files of a split, by the words that each is called by; ValueError where there is none, or it must be said."""
    splits: dict[str, list[Path]] = {}
    for path, called in zip(found, words, strict=True):
        for word in sorted(called):
            splits.setdefault(word, []).append(path)
    known = [word for word in splits if word in _SPLITS or len(splits) > 1]
    if split and split.lower() not in splits:
        raise _refused("split", f"be one of {', '.join(known) or 'none'}", repr(split), "Or leave it out.")
    several = [word for word in splits if word in _SPLITS]
    if not split and len(several) > 1:
        raise _refused("split", f"be one of {', '.join(several)}", "none", "Say --split, or name one file.")
    return splits[split.lower()] if split else found


def _of_media(folder: Path, kind: str, split: str) -> Iterator[Record]:
    """The images or sounds of a folder; the folders above that of a label may be called by the splits."""
    suffixes = SUFFIXES[kind]
    found = _files_below(folder, suffixes)
    if not found:
        rule = f"hold files like {', '.join((*suffixes, *_TABLES))}"
        raise _refused("dataset", rule, repr(str(folder)), _NOT_HERE)
    words = [{part.lower() for part in path.relative_to(folder).parts[:1] if part != path.name} for path in found]
    for path in _of_split(found, words, split):
        label = path.parent.name if path.parent != folder else None
        yield Record({kind: path.name, "label": label}, path.relative_to(folder).as_posix(), 0)


def _is_path(place: str, path: Path) -> bool:
    """Whether what isn't there was meant to be here: asking the hub for it would take half a minute."""
    named = path.suffix.lower() in _READERS or place.startswith((".", "~", "/")) or place.count("/") > 1
    return named or (len(path.parts) > 1 and path.parent.is_dir())


def _of_rows(rows: Any, source: str, how: _How) -> Iterator[Record]:
    """The rows of a ``datasets.Dataset``."""
    return _of_table_rows(rows.with_format("arrow").iter(batch_size=_AT_ONCE), source, how)


def _of_table_rows(parts: Iterable[Any], source: str, how: _How) -> Iterator[Record]:
    """The rows of a table that comes in parts; of the first one with all columns, so that it is known what there is."""
    start, wanted = 0, how.wanted
    for part in parts:
        part.validate(full=True)  # offsets that lead out of its memory would end the process
        names = part.schema.names
        twice = next((name for name in names if names.count(name) > 1 and (wanted is None or name in wanted)), None)
        if twice is not None and how.strict:
            rule = "have one column of each name that is asked for"
            raise _refused("dataset", rule, f"{twice!r} twice in {source!r}", "Rename it.")
        if start and wanted is not None:
            part = part.select([k for k, column in enumerate(part.schema.names) if column in wanted])
        for k, values in enumerate(part.to_pylist()):
            yield Record(values, source, start + k)
        start += len(part)


def _of_file(path: Path, source: str, bad: BadExamples, how: _How) -> Iterator[Record]:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        rule = f"end in {', '.join(_READERS)}"
        raise _refused("dataset", rule, repr(str(path)), "Name the file as what it is; --text takes text of any name.")
    try:
        if reader in (_parquet, _arrow):
            yield from _of_table_rows(reader(path), source, how)
        else:
            yield from reader(path, source, bad, how)
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


def _jsonl(path: Path, source: str, bad: BadExamples, how: _How) -> Iterator[Record]:
    decoder = Decoder(how.strict)
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
    return f"the key {decoder.twice[:40]!r}{TWO_VALUES}"


def _json(path: Path, source: str, bad: BadExamples, how: _How) -> Iterator[Record]:
    decoder, number = Decoder(how.strict), -1
    with open(path, encoding="utf-8-sig") as file:
        for number, one in enumerate(decoder.records(file)):
            if one is None:
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


def _text(path: Path, source: str, bad: BadExamples, how: _How) -> Iterator[Record]:
    for number, line in _lines(path):
        text = line.decode(errors="replace")
        if text.encode() == line:
            yield Record({"text": text.rstrip("\r\n")}, source, number)
        else:
            got, remedy = f"line {number + 1} of {str(path)!r}", "Correct that line, or leave it out."
            bad.leave_out(source, number, "no UTF-8 text", broken_rule(_WHO, "dataset", "be UTF-8 text", got, remedy))


def _csv(path: Path, source: str, bad: BadExamples, how: _How) -> Iterator[Record]:
    table = CsvTable(path, source, bad, how.texts, how.wanted, how.strict)
    records = _of_table_rows(table.parts(), source, how._replace(wanted=None))
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


_TABLES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"}
_READERS: dict[str, Callable[..., Iterator[Any]]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
    ".arrow": _arrow, ".feather": _arrow, ".txt": _text,
}  # fmt: skip
