"""Every trap of the table that a CPU can show has a test that carries its number."""

import re
from pathlib import Path

TRAPS = [*(f"{n:02}" for n in (*range(1, 31), *range(40, 46))), "05b", "10b", "23b"]

# Traps of numbers that are proven on the op itself, beside the table of cases.
ELSEWHERE = {"test_reduce.py", "test_threads.py", "test_fallback.py", "test_compile.py"}

# And those of a whole collection.
TRAPS += ["46", "50"]
ELSEWHERE |= {"collect/test_collect_padding.py", "collect/test_collect_dimensions.py"}


def test_every_trap_has_a_test():
    here = Path(__file__).parent
    files = [*here.glob("test_*.py"), *(here.parent / name for name in ELSEWHERE)]
    found = set()
    for file in files:
        for name in re.findall(r"^def test_trap_(\w+)", file.read_text(), re.MULTILINE):
            found |= set(re.findall(r"(?<![a-z0-9])\d\db?(?![a-z0-9])", name.replace("_", " ")))
    assert sorted(set(TRAPS) - found) == []
    assert sorted(found - set(TRAPS)) == []
