"""A row table out of bytes that may be hostile: what it would unpack to is bounded before it is unpacked.

Three hundred bytes of Parquet can hold a text of megabytes once and name it in every row, or a list of a billion equal
tokens. What Arrow does not bound itself: one page unpacks to at most 2 GiB, the largest length that a page can have.
"""

from __future__ import annotations

from typing import Any

from ..errors import extra

# Far above any real table (a unit of 2048 examples of 32,768 equal tokens is 256 MiB), and nothing for a machine that
# holds gradients. A larger table may unpack to so many times its own size: tokens pack some ten times at the best.
MOST_BYTES = 1 << 30
_MOST_TIMES = 256
_WHO = "tlfast.dataset"


def check_unpacked(n_bytes: int, n_packed: int) -> None:
    """Raise ValueError where a table of ``n_packed`` bytes would unpack to too many."""
    most = max(MOST_BYTES, _MOST_TIMES * n_packed)
    if not 0 <= n_bytes <= most:
        raise ValueError(f"it unpacks to {n_bytes} bytes, {most} are the most")


def unpack(data: bytes, schema: Any, n_rows: int) -> Any:
    """Return a Parquet file as a pyarrow Table with this schema; an exception of whatever kind where it isn't one."""
    pa, compute, parquet = (extra(name, _WHO) for name in ("pyarrow", "pyarrow.compute", "pyarrow.parquet"))
    # Text is read as numbers of a dictionary, and so not once for each row.
    texts = [field.name for field in schema if field.type == pa.string()]
    stored = parquet.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
    found, wanted = stored.schema_arrow, list(schema.types)
    for name in texts:
        wanted[schema.get_field_index(name)] = pa.dictionary(pa.int32(), pa.string())
    if stored.metadata.num_rows != n_rows or found.names != schema.names or found.types != wanted:
        raise ValueError(f"{stored.metadata.num_rows} rows of {found.to_string()[:300]}")
    check_unpacked(_unpacked(stored.metadata), len(data))
    table = stored.read(use_threads=False)
    parts = [part for name in texts for part in table.column(name).chunks]
    lengths = [compute.binary_length(part.dictionary).take(part.indices) for part in parts]
    check_unpacked(sum(compute.sum(part).as_py() or 0 for part in lengths), len(data))
    for name in texts:
        at = schema.get_field_index(name)
        table = table.set_column(at, schema.field(at), table.column(name).cast(pa.string()))
    return table.replace_schema_metadata(None)


def _unpacked(metadata: Any) -> int:
    """The bytes of the values and pages that a file says it has: a reader believes it no further than this."""
    groups = (metadata.row_group(k) for k in range(metadata.num_row_groups))
    columns = [group.column(k) for group in groups for k in range(group.num_columns)]
    return sum(abs(column.total_uncompressed_size) + 4 * abs(column.num_values) for column in columns)
