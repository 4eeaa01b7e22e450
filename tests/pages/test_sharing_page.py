"""The examples of docs/sharing.md run one after the other."""

from __future__ import annotations

import pytest
from checkout import ROOT
from page_examples import code_blocks, run_block


@pytest.mark.long
def test_the_examples_of_the_page_run(tmp_path):
    blocks = [code for _, code in code_blocks((ROOT / "docs" / "sharing.md").read_text(encoding="utf-8"), "python")]
    assert len(blocks) == 5
    done = run_block("\n".join(blocks), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "True ['u000001']" in done.stdout
    assert (tmp_path / "gradients-report.html").exists()
