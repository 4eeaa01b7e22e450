"""How this copy of tlfast was built; the module is written by setup.py and absent in a clean checkout."""

BUILT: bool
REASON: str
TORCH: str | None
SANITIZE: bool
CUDA: str | None  # the version of the toolkit, "13.0"; None: no CUDA, and CUDA_REASON says why
CUDA_ARCHS: tuple[str, ...]  # sm_90 is machine code, compute_90 is PTX
CUDA_REASON: str
SIMT: bool
