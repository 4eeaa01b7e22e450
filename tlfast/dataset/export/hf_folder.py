"""A folder that `datasets.load_from_disk` reads, and small JSON files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import extra
from ..format.strict_json import sha256_of
from ..read.arrow_rows import Rows

_WHO = "export_dataset"
_ONE_ARROW_FILE = "data-00000-of-00001.arrow"


def save_to_disk(rows: Rows, folder: Path, schema: Any, batches: Iterable[Any] | None = None) -> None:
    """Write what `datasets.load_from_disk` reads; its own save_to_disk wants the data in its cache first.

    ``batches`` are record batches of ``schema``; None: those of ``rows``.
    """
    pa, datasets = extra("pyarrow", _WHO), extra("datasets", _WHO, "hub")
    features = datasets.Features.from_arrow_schema(schema)
    stored = features.arrow_schema
    with pa.OSFile(str(folder / _ONE_ARROW_FILE), "wb") as sink, pa.ipc.new_stream(sink, stored) as file:
        for batch in rows.batches(schema) if batches is None else batches:
            file.write_table(pa.Table.from_batches([batch]).cast(stored))
    said = rows.provenance()
    datasets.DatasetInfo(description=json.dumps(said), features=features).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": _ONE_ARROW_FILE}],
        # By it datasets keeps what it has computed: other points, and rows that came later, are other data.
        "_fingerprint": sha256_of([said["config_hash"], len(rows), list(rows.columns)])[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    say(folder / "state.json", state)


def say(path: Path, value: Any) -> None:
    """Write a small JSON file for people and programs."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
