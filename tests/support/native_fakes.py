"""A native module that answers questions about CUDA as some machine would: for tests of what is said about it."""

from types import ModuleType


def native(built=True, simt=False, error=0, message="", driver=13000, runtime=13000, gpus=((9, 0),)):
    """A module with the part of tlfast._C that tells what CUDA finds."""
    module = ModuleType("tlfast._C")
    status = dict(built=built, simt=simt, error=error, message=message, driver=driver, runtime=runtime)
    module.cuda_status = lambda: {**status, "n_devices": 0 if error else len(gpus)}
    module.cuda_capability = lambda index: gpus[index]
    module.describe = lambda: "cpu, avx2"
    return module


def built_with(monkeypatch, **values):
    """Let the note of the build say this, whatever was built here."""
    info = ModuleType("tlfast._build_info")
    defaults = dict(BUILT=True, REASON="", TORCH=None, SANITIZE=False, SIMT=False, CUDA="13.0", CUDA_REASON="")
    defaults["CUDA_ARCHS"] = ("sm_80", "sm_90", "compute_90")
    vars(info).update(defaults | values)
    import tlfast

    monkeypatch.setitem(__import__("sys").modules, "tlfast._build_info", info)
    monkeypatch.setattr(tlfast, "_build_info", info, raising=False)
