"""How this copy of tlfast was built; the module is written by setup.py and absent in a clean checkout."""

BUILT: bool
REASON: str
TORCH: str | None
SANITIZE: bool
