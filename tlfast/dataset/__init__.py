"""The dataset on disk: written unit by unit, each whole or absent; read by memory mapping. See docs/format.md."""

from .background import BackgroundWriter
from .columns import GradientColumn
from .errors import DatasetError
from .export import export_dataset
from .folder import check_disk_space
from .joined import Join, join_datasets
from .layout import Column
from .plan import FLAG_MISSING, FLAG_NON_FINITE, FLAG_SATURATED, Example, Plan, Unit
from .reader import GradientDataset, open_dataset
from .repair import Repair, repair_dataset
from .row_dataset import RowDataset
from .shuffled_batches import ShuffledBatches
from .verify import Problem, Report, verify_dataset
from .writer import DatasetWriter, estimate_bytes

__all__ = [
    "FLAG_MISSING",
    "FLAG_NON_FINITE",
    "FLAG_SATURATED",
    "BackgroundWriter",
    "Column",
    "DatasetError",
    "DatasetWriter",
    "Example",
    "GradientColumn",
    "GradientDataset",
    "Join",
    "Plan",
    "Problem",
    "Repair",
    "Report",
    "RowDataset",
    "ShuffledBatches",
    "Unit",
    "check_disk_space",
    "estimate_bytes",
    "export_dataset",
    "join_datasets",
    "open_dataset",
    "repair_dataset",
    "verify_dataset",
]
