"""Every trap of docs/traps.md has a test that carries its number, or names the files that hold it."""

import re

from checkout import ROOT

PAGE = ROOT / "docs" / "traps.md"
# Tests of traps that are proven on the op itself, beside the table of cases, and of a whole collection.
ELSEWHERE = (
    "backends/test_fallback.py", "backends/test_reduce.py", "collecting/test_dimensions.py",
    "collecting/test_padding.py", "hooks/test_compile.py", "hooks/test_threads.py",
)  # fmt: skip


def rows() -> dict[str, str]:
    """The traps by their numbers, as tests carry them: ``"05b"``."""
    found = re.findall(r"^\| (\d+b?) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert len(found) == len({number for number, _ in found})
    return {number.zfill(3 if number.endswith("b") else 2): text for number, text in found}


def proven() -> set[str]:
    """The numbers that names of tests carry."""
    files = [*(ROOT / "tests" / "traps").glob("test_*.py"), *(ROOT / "tests" / name for name in ELSEWHERE)]
    names = [name for file in files for name in re.findall(r"^def test_trap_(\w+)", file.read_text(), re.MULTILINE)]
    return {n for name in names for n in re.findall(r"(?<![a-z0-9])\d\db?(?![a-z0-9])", name.replace("_", " "))}


def test_every_trap_has_a_test():
    named = {number for number, text in rows().items() if "`tests/" in text or "`csrc/" in text or "`tools/" in text}
    on_a_gpu = {"33", "36"}  # nothing on a CPU can show them
    built = {"28", "53"}  # a bench, and a check of the machine code
    assert sorted(rows().keys() - proven() - named - on_a_gpu - built) == []
    assert sorted(proven() - rows().keys()) == []


def test_the_files_that_rows_name_are_there():
    for text in rows().values():
        for name in re.findall(r"`((?:tests|csrc|tools)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), name
