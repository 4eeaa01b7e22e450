"""Text files and folders of them, cut into examples: sequences of tokens that know where they came from."""

from __future__ import annotations

import codecs
import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from ..dataset.format.plan import Example
from ..errors import broken_rule
from .skipped import BadExamples

# Endings of files that hold text among other things, and what parts the columns of those that are tables of text.
_DATA = {
    ".json": "", ".jsonl": "", ".ndjson": "", ".csv": ",", ".tsv": "\t", ".parquet": "", ".arrow": "", ".feather": "",
}  # fmt: skip
# The first bytes of Parquet, and of the two forms of Arrow: its file, and its stream, which save_to_disk writes.
_MAGIC = {b"PAR1": "Parquet", b"ARROW1": "Arrow", b"\xff\xff\xff\xff": "Arrow"}
_JSON = "JSON"
_RECORDS = re.compile(r'\[\s*\{\s*"|\{.*?"\s*:\s*\[\s*\{\s*"', re.DOTALL)
_HEAD_BYTES = 1 << 20  # a record is seldom longer


class TextFile(NamedTuple):
    """One file to read, and the name by which its examples remember it."""

    path: Path
    source: str
    named: bool  # given by name, not found in a folder: then it must be text


def find_text_files(paths: Sequence[str | os.PathLike[str]], pattern: str = "*") -> list[TextFile]:
    """List the files that ``paths`` mean: each file, and in each folder all files whose name fits ``pattern``.

    The order is that of ``paths``, sorted within a folder. Hidden files and folders are left out. A source is the path
    below the closest common parent of all ``paths``: the same wherever the text lies.

    Raises:
        ValueError: for no paths, a path that does not exist, or a folder without a fitting file.

    Example:
        >>> import pathlib, tempfile
        >>> from tlfast.collecting.text import find_text_files
        >>> folder = pathlib.Path(tempfile.mkdtemp(), "books")
        >>> folder.mkdir()
        >>> _ = (folder / "a.txt").write_text("Call me Ishmael.")
        >>> find_text_files([folder])[0].source
        'books/a.txt'
    """
    roots = [Path(os.path.abspath(os.path.expanduser(path))) for path in paths]
    if not roots:
        raise ValueError(broken_rule("collect", "text", "name a file or a folder", "nothing", "Give text files."))
    for root, path in zip(roots, paths, strict=True):
        if not root.exists() or not str(path):
            raise ValueError(
                broken_rule("collect", "text", "be an existing file or folder", f"{str(path)!r}", "Check the path.")
            )
    above = os.path.commonpath([root.parent for root in roots])
    found: dict[Path, TextFile] = {}
    for root in roots:
        inside = [root] if root.is_file() else list(_walk(root, pattern))
        if not inside:
            remedy = "Check the folder and the pattern."
            raise ValueError(broken_rule("collect", "text", f"hold files like {pattern!r}", f"{str(root)!r}", remedy))
        for path in inside:
            found.setdefault(path, TextFile(path, path.relative_to(above).as_posix(), root.is_file()))
    return list(found.values())


def _walk(root: Path, pattern: str) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and fnmatch(name, pattern) and path.is_file():
                yield path


def check_plain(files: Sequence[TextFile], pattern: str = "*") -> None:
    """Refuse files that hold text among other things: tables and records, of which the keys would be cut up too.

    What is called so, or was given by name, is looked at. JSON that is no list of records is taken where it lies in a
    folder beside text, as settings lie among source code. A ``pattern`` with the ending, such as ``*.jsonl``, takes
    every file of that ending as the text that it is.

    Raises:
        ValueError: for the first such file; it says what the file looks like.
    """
    beside_text: bool | None = None
    for file in files:
        suffix = file.path.suffix.lower()
        if (suffix not in _DATA and not file.named) or _names(pattern, suffix):
            continue
        looks = _looks_like(file.path, suffix)
        if looks == _JSON and not file.named:
            if beside_text is None:
                beside_text = any(f.path.suffix.lower() not in _DATA and _begins_with_text(f.path) for f in files)
            if beside_text:
                continue
        if looks:
            saved = (file.path.parent / "dataset_info.json").is_file() and (file.path.parent / "state.json").is_file()
            got = f"{str(file.path)!r}, {'part of what save_to_disk wrote' if saved else f'which looks like {looks}'}"
            remedy = "Write the texts into files, or pass their tokens to tlfast.collect"
            if looks not in _MAGIC.values():
                remedy += f"; --pattern '*{suffix}' takes it as it is" if suffix else ""
            raise ValueError(broken_rule("collect", "text", "be plain text", got, f"{remedy}."))


def _names(pattern: str, suffix: str) -> bool:
    """Whether a pattern was written with an ending that is this one: ``*.json*``, and not ``*`` or ``*.*``."""
    _, dot, ending = pattern.lower().rpartition(".")
    return bool(dot) and bool(ending.strip("*")) and fnmatch(suffix, f".{ending}")


def _looks_like(path: Path, suffix: str) -> str:
    """What a file holds in place of text; "" for text, and for what can't be told from it."""
    head = _head(path)
    for magic, looks in _MAGIC.items():
        if head.startswith(magic):
            return looks
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    lines = [line for line in text.splitlines()[:3] if line.strip()]
    if suffix in (".csv", ".tsv"):
        return "a table" if lines and _DATA[suffix] in lines[0] else ""
    if not text.startswith(("{", "[")):
        return ""
    if suffix in (".jsonl", ".ndjson") or (len(lines) > 1 and all(_is_record(line) for line in lines[:2])):
        return "JSON lines"
    if _RECORDS.match(text) and (suffix == ".json" or _is_json(text)):
        return "JSON with a list of records"
    return _JSON if suffix == ".json" or _is_json(text) else ""


def _is_record(line: str) -> bool:
    try:
        return bool(line.startswith("{") and json.loads(line))
    except ValueError:
        return False


def _is_json(text: str) -> bool:
    try:
        return bool(json.loads(text))
    except ValueError:
        return False


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _begins_with_text(path: Path) -> bool:
    head = _head(path)
    try:
        return bool(head) and b"\0" not in head and bool(codecs.getincrementaldecoder("utf-8")().decode(head))
    except UnicodeDecodeError:
        return False


def read_text(path: Path) -> str | None:
    """Return the file's text, or None where it is not text (a NUL byte, or not UTF-8)."""
    data = path.read_bytes()
    try:
        return None if b"\0" in data else data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def cut_texts(
    files: Iterable[TextFile],
    encode: Callable[[str], Sequence[int]],
    seq_len: int,
    *,
    max_examples: int | None = None,
    first: Sequence[int] = (),
    bad: BadExamples | None = None,
) -> list[Example]:
    """Cut files into examples of at most ``seq_len`` tokens; none spans two files.

    Args:
        files: what find_text_files returned.
        encode: text -> its tokens, without special ones.
        seq_len: tokens per example; the rest at the end of a file is shorter, a single token is dropped.
        max_examples: stop at so many.
        first: tokens put before each example (the tokenizer's beginning of text), counted in ``seq_len``. ``start``
            counts the tokens of the text alone.
        bad: takes the files that are not UTF-8 text or have less than 2 tokens; None: a named file that is not text
            is an error.

    Raises:
        ValueError: where no file holds text.
    """
    return list(texts(files, encode, seq_len, max_examples=max_examples, first=first, bad=bad))


def texts(
    files: Iterable[TextFile],
    encode: Callable[[str], Sequence[int]],
    seq_len: int,
    *,
    max_examples: int | None = None,
    first: Sequence[int] = (),
    bad: BadExamples | None = None,
) -> Iterator[Example]:
    """Yield what `cut_texts` lists; one file at a time is held."""
    if seq_len < len(first) + 2:
        got = f"{seq_len} with {len(first)} tokens put before each"
        raise ValueError(broken_rule("collect", "seq_len", "hold 2 tokens of text or more", got, "Give a larger one."))
    bad = BadExamples("stop") if bad is None else bad
    n = n_files = 0
    for file in files:
        n_files += 1
        for start, tokens in _pieces(file, encode, seq_len - len(first), bad):
            ids = array("i", first) + tokens
            yield Example(n, ids, file.source, start, len(ids))
            n += 1
            if n == max_examples:
                return
    if not n:
        got = f"{n_files} file{'s' * (n_files != 1)} without; {bad}"
        raise ValueError(broken_rule("collect", "text", "hold text", got, "Give files with more in them."))


def _pieces(
    file: TextFile, encode: Callable[[str], Sequence[int]], n: int, bad: BadExamples
) -> Iterator[tuple[int, array[int]]]:
    """The tokens of a file, ``n`` at a time, each piece with the number of its first; one alone at the end is left."""
    text = read_text(file.path) if _is_utf8(file.source) else None
    if text is None:
        error = broken_rule("collect", "text", "be UTF-8 text", f"{str(file.path)!r}", "Leave this file out.")
        source = file.source.encode(errors="backslashreplace").decode()
        bad.leave_out(source, 0, "no UTF-8 text", error if file.named else None)
        return
    tokens = array("i", encode(text) if text else ())
    if len(tokens) < 2:
        bad.leave_out(file.source, 0, f"{len(tokens)} token{'s' * (not tokens)}, less than 2")
    for start in range(0, len(tokens) - 1, n):
        yield start, tokens[start : start + n]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
