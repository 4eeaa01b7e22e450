"""TransformerLens is an extra: nothing imports it until it is asked for, and then its absence has a name."""

from __future__ import annotations

import subprocess
import sys

import pytest

# A finder that hides the library, so that the test says the same where it is installed.
HIDDEN = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformer_lens":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import tlfast
assert "transformer_lens" not in sys.modules and "tlfast.transformer_lens" not in sys.modules
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", HIDDEN + code], capture_output=True, text=True, check=False
    )


@pytest.mark.long
def test_the_error_names_the_extra():
    for asked in ("tlfast.transformer_lens", "import tlfast.transformer_lens"):
        failed = run(asked)
        assert failed.returncode == 1
        assert failed.stderr.strip().splitlines()[-1] == (
            "ImportError: tlfast.transformer_lens: transformer_lens must be importable, got No module named "
            "'transformer_lens'. Run pip install \"tlfast[transformer-lens]\"."
        )


def test_other_attributes_are_still_missing():
    failed = run("tlfast.transformer_lense")
    assert "AttributeError: module 'tlfast' has no attribute 'transformer_lense'" in failed.stderr
