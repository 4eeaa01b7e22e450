"""The backend in plain Python: what `tlfast._C` is natively, class for class and error for error."""

from .backwards import Backwards
from .column import Column
from .factor_sums import FactorSums
from .keepers import CacheKeeper, ColumnsKeeper, Keeper, SinkKeeper
from .ledger import Ledger
from .taps import Tap
from .tensor_cache import TensorCache, waiting
from .weight import Weight
from .whole import Whole

NAME = "python"
__all__ = [
    "NAME", "Backwards", "CacheKeeper", "Column", "ColumnsKeeper", "FactorSums", "Keeper", "Ledger", "SinkKeeper",
    "Tap", "TensorCache", "Weight", "Whole", "waiting",
]  # fmt: skip
