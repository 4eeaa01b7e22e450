"""The dataset on disk: written unit by unit, each whole or absent; read by memory mapping. See docs/format.md."""

from .check.repair import Repair, repair_dataset
from .check.verify import Problem, Report, verify_dataset
from .errors import DatasetError
from .export.bergson_import import import_bergson
from .export.export import export_dataset
from .format.encodings import Encoded
from .format.layout import Column
from .format.plan import (
    FLAG_MISSING,
    FLAG_NON_FINITE,
    FLAG_SATURATED,
    Example,
    FieldExample,
    Plan,
    Unit,
)
from .read.columns import GradientColumn, RawColumn
from .read.found import SearchResult
from .read.joined import Join, join_datasets
from .read.merged import MergedDataset
from .read.reader import GradientDataset, open_dataset
from .read.row_dataset import RowDataset
from .read.shuffled_batches import ShuffledBatches
from .read.token_columns import TokenColumn
from .read.views import DatasetView, concat_datasets
from .write.background import BackgroundWriter
from .write.folder import check_disk_space
from .write.merge import merge_datasets
from .write.writer import DatasetWriter, estimate_bytes

__all__ = [
    "FLAG_MISSING",
    "FLAG_NON_FINITE",
    "FLAG_SATURATED",
    "BackgroundWriter",
    "Column",
    "DatasetError",
    "DatasetView",
    "DatasetWriter",
    "Encoded",
    "Example",
    "FieldExample",
    "GradientColumn",
    "GradientDataset",
    "Join",
    "MergedDataset",
    "Plan",
    "Problem",
    "RawColumn",
    "Repair",
    "Report",
    "RowDataset",
    "SearchResult",
    "ShuffledBatches",
    "TokenColumn",
    "Unit",
    "check_disk_space",
    "concat_datasets",
    "estimate_bytes",
    "export_dataset",
    "import_bergson",
    "join_datasets",
    "merge_datasets",
    "open_dataset",
    "repair_dataset",
    "verify_dataset",
]
