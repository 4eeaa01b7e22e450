"""On a device that the native code can't run on, Python does the work, and says which part is missing."""

import pytest
import torch
from native_fakes import built_with, native

import tlfast
from tlfast.backends import choice


@pytest.fixture(autouse=True)
def _forget_what_was_told(monkeypatch):
    monkeypatch.delenv("TLFAST_REQUIRE_NATIVE", raising=False)
    choice.tell.cache_clear()
    choice._lacks_cuda.cache_clear()
    yield
    choice.tell.cache_clear()
    choice._lacks_cuda.cache_clear()


@pytest.fixture
def without_cuda(monkeypatch):
    """A native module that was built without CUDA."""
    built_with(monkeypatch, CUDA=None, CUDA_ARCHS=(), CUDA_REASON="no nvcc on the PATH")
    monkeypatch.setattr(choice, "_load", lambda: (native(built=False), ""))


@pytest.fixture
def with_cuda(monkeypatch):
    """A native module with CUDA, on a machine with an H100; the tests get the module."""
    module = native()
    built_with(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(choice, "_load", lambda: (module, ""))
    return module


def test_cuda_is_native_where_it_can_be(with_cuda):
    for wanted in ("auto", "native"):
        assert choice.pick_native("capture", wanted, {"cpu", "cuda"}) is with_cuda
    assert choice.pick_native("capture", "python", {"cuda"}) is None


def test_the_driver_is_asked_only_for_cuda(with_cuda):
    def asked():
        raise AssertionError("nobody has a tensor on a GPU")

    with_cuda.cuda_status = asked
    assert choice.pick_native("capture", "auto", {"cpu"}) is with_cuda


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_devices_stay_in_python(with_cuda, device):
    with pytest.warns(UserWarning, match=f"the native code runs on cpu and cuda, and capture is on {device}"):
        assert choice.pick_native("capture", "auto", {"cpu", "cuda", device}) is None


@pytest.mark.usefixtures("without_cuda")
def test_the_fallback_is_told_once():
    text = "pure Python.*capture is on cuda, and the native code can't: built without CUDA: no nvcc on the PATH"
    with pytest.warns(UserWarning, match=text):
        assert choice.pick_native("capture", "auto", {"cpu", "cuda"}) is None
    assert choice.pick_native("capture", "auto", {"cpu", "cuda"}) is None, "a second warning would be an error"


def test_an_old_driver_is_told(monkeypatch):
    old = native(error=35, driver=12020)
    monkeypatch.setattr(choice, "_load", lambda: (old, ""))
    with pytest.warns(
        UserWarning, match=r"native code can't: driver .*CUDA 12\.2.* found, 13\.0 \(driver 580 or newer\)"
    ):
        assert choice.pick_native("capture", "auto", {"cuda"}) is None


@pytest.mark.usefixtures("without_cuda")
def test_the_fallback_can_be_forbidden(monkeypatch):
    monkeypatch.setenv("TLFAST_REQUIRE_NATIVE", "1")
    with pytest.raises(RuntimeError, match=r"TLFAST_REQUIRE_NATIVE=1.*capture is on cuda.*no nvcc on the PATH"):
        choice.pick_native("capture", "auto", {"cuda"})


@pytest.mark.usefixtures("without_cuda")
def test_native_on_request_is_refused():
    with pytest.raises(RuntimeError) as error:
        choice.pick_native("capture", "native", {"cuda"})
    assert str(error.value) == (
        "capture: backend must be usable, got native: capture is on cuda, and the native code can't: built without "
        'CUDA: no nvcc on the PATH. Pass backend="python" or "auto".'
    )


@pytest.mark.usefixtures("without_cuda")
def test_python_on_request_is_silent():
    assert choice.pick_native("capture", "python", {"cuda"}) is None


def test_no_native_code_at_all_is_told_as_on_the_cpu(monkeypatch):
    monkeypatch.setattr(choice, "_load", lambda: (None, "no compiler"))
    choice.native.cache_clear()
    with pytest.warns(UserWarning, match="the same results: no compiler"):
        assert choice.pick_native("capture", "auto", {"cuda"}) is None
    choice.native.cache_clear()


@pytest.mark.parametrize("usable", [True, False])
def test_reduce_into_follows_the_same_rule(monkeypatch, usable):
    """What is chosen for a tensor on a GPU: without one, the tensor only says that it is there."""

    class OnGpu(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    asked = []
    chosen = native() if usable else None
    monkeypatch.setattr(choice, "pick_native", lambda *words: asked.append(words) or chosen)
    done = []
    monkeypatch.setattr(torch.ops.tlfast, "capture", lambda *a: done.append("native"), raising=False)
    monkeypatch.setattr(choice.reference, "capture", lambda *a: done.append("python"))
    tlfast.reduce_into(torch.empty(2, 4).as_subclass(OnGpu), torch.ones(2, 3, 4))
    assert asked == [("reduce_into", "auto", {"cuda"})]
    assert done == ["native" if usable else "python"]
