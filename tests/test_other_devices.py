"""On a device that the native code doesn't know, Python does the work, and says so."""

import pytest

from tlfast import ops


@pytest.fixture(autouse=True)
def _forget_what_was_told():
    ops._tell.cache_clear()
    yield
    ops._tell.cache_clear()


def test_the_fallback_is_told_once(monkeypatch):
    monkeypatch.delenv("TLFAST_REQUIRE_NATIVE", raising=False)
    with pytest.warns(UserWarning, match="pure Python.*native code runs on cpu, and capture is on cuda"):
        assert ops.pick_native("capture", "auto", {"cpu", "cuda"}) is None
    assert ops.pick_native("capture", "auto", {"cpu", "cuda"}) is None, "a second warning would be an error"


def test_the_fallback_can_be_forbidden(monkeypatch):
    monkeypatch.setenv("TLFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"TLFAST_REQUIRE_NATIVE=1.*capture is on cuda"):
        ops.pick_native("capture", "auto", {"cuda"})


def test_native_on_request_is_refused():
    with pytest.raises(RuntimeError, match='capture: backend must be "python" for these devices'):
        ops.pick_native("capture", "native", {"cuda"})


def test_python_on_request_is_silent():
    assert ops.pick_native("capture", "python", {"cuda"}) is None
