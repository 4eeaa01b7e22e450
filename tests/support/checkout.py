"""Where the checkout lies that is tested, and which files are the repository's."""

from __future__ import annotations

import subprocess
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, relative to its root; without git, all that lie there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        found = (path.relative_to(ROOT) for pattern in patterns for path in ROOT.rglob(pattern))
        return sorted(path for path in found if path.parts[0] not in ("build", ".venv"))
    return sorted(Path(line) for line in listing.stdout.splitlines() if (ROOT / line).is_file())
