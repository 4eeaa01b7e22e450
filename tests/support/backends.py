"""The backends and attachments that tests run over, and what to do where one can't be used."""

import os

import pytest

import tlfast

FULL_WARNS = "ignore:Full backward hook is firing when gradients are computed with respect to module outputs"
ATTACHMENTS = ["tensor", pytest.param("full", marks=pytest.mark.filterwarnings(FULL_WARNS))]


def usable(backend):
    """``backend``; skips if the native code can't be used here, and fails if it must be."""
    if backend == "native" and not tlfast.backend().startswith("native"):
        if os.environ.get("TLFAST_REQUIRE_NATIVE") == "1":
            pytest.fail(f"TLFAST_REQUIRE_NATIVE=1, but tlfast runs {tlfast.backend()}")
        pytest.skip(tlfast.backend())
    return backend
