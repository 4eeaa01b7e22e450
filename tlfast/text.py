"""Text files and folders of them, cut into examples: sequences of tokens that know where they came from."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from .bad_examples import BadExamples
from .dataset.plan import Example
from .errors import broken_rule


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
        >>> from tlfast.text import find_text_files
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
    if seq_len < len(first) + 2:
        got = f"{seq_len} with {len(first)} tokens put before each"
        raise ValueError(broken_rule("collect", "seq_len", "hold 2 tokens of text or more", got, "Give a larger one."))
    step = seq_len - len(first)
    bad = BadExamples("stop") if bad is None else bad
    examples: list[Example] = []
    n_files = 0
    for file in files:
        n_files += 1
        text = read_text(file.path) if _is_utf8(file.source) else None
        if text is None:
            error = broken_rule("collect", "text", "be UTF-8 text", f"{str(file.path)!r}", "Leave this file out.")
            source = file.source.encode(errors="backslashreplace").decode()
            bad.leave_out(source, 0, "no UTF-8 text", error if file.named else None)
            continue
        tokens = array("i", encode(text) if text else ())
        if len(tokens) < 2:
            bad.leave_out(file.source, 0, f"{len(tokens)} token{'s' * (not tokens)}, less than 2")
        for start in range(0, len(tokens) - 1, step):
            ids = array("i", first) + tokens[start : start + step]
            examples.append(Example(len(examples), ids, file.source, start, len(ids)))
            if len(examples) == max_examples:
                return examples
    if not examples:
        got = f"{n_files} file{'s' * (n_files != 1)} without; {bad}"
        raise ValueError(broken_rule("collect", "text", "hold text", got, "Give files with more in them."))
    return examples


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
