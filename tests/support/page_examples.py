"""The examples of a page, run as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from checkout import ROOT


def code_blocks(text: str, language: str) -> list[tuple[int, str]]:
    """(line number, code) of each fenced block of one language."""
    found = re.finditer(rf"^```{language}[ \t]*\n(.*?)^```[ \t]*$", text, flags=re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n") + 1, block[1]) for block in found]


def run_block(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block as a user would: in a new interpreter and an empty folder; a warning is a failure."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Without native code its one warning is right; TLFAST_REQUIRE_NATIVE=1 makes it an error.
    expected = "warnings.filterwarnings('ignore', message='tlfast runs in pure Python')\n"
    # On one core torch's DataLoader warns of two workers.
    expected += "warnings.filterwarnings('ignore', message='This DataLoader will create')"
    source = f"import tlfast, torch, warnings\nwarnings.simplefilter('error')\n{expected}\n"
    source += "del tlfast, torch, warnings\n" + code
    return subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
