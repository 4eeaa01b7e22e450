"""README.md of a dataset: the card that people and the Hugging Face hub read."""

from __future__ import annotations

from .description import Description
from .layout import DTYPE_NAMES

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_SIZES_ABOVE = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
_SIZES_OF_BILLIONS = ((10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))

_CARD = """---
configs:
- config_name: rows
  data_files: rows/*.parquet
size_categories:
- {size}
tags:
- gradients
- interpretability
- tlfast
---

# Gradients, one row per example

{n} examples, {points} points, written by tlfast.

```python
import tlfast

ds = tlfast.open_dataset("path/to/this/folder")
ds.points                # the points below
ds[ds.points[0]][:10]    # gradients of ten examples, a torch tensor
ds.examples[0]           # the first example: input_ids, source, start, length, flags, norms
```

`rows/*.parquet` holds the examples and the norm of each gradient; `data/*.safetensors` holds the gradients, row r of
`data/<unit>` belonging to row r of `rows/<unit>`. Only units with a file in `commits/` exist. `tlfast verify` re-reads
every byte against its checksum. How it was made stands in `dataset.json` and `config.yaml`.

{more}| point | dtype | shape of a row |
|---|---|---|
{table}
"""

_PER_TOKEN = """\
Of a point per token `ds[point][i]` is [length, *shape]: a row for each token of example i. Its `length` stands in
the row table; in the unit's file these rows lie behind each other.

"""
_ENCODED = """\
An encoded point is stored as `<point>:codes` and `<point>:scales`. `ds[point]` decodes, `ds.raw(point)` doesn't.

"""


def dataset_card(description: Description) -> str:
    """Return the Markdown of the card, with the front matter that the hub's viewer needs."""
    n = description.plan.n_examples
    size = next((name for limit, name in (*_SIZES, *_SIZES_ABOVE, *_SIZES_OF_BILLIONS) if n < limit), "n>1T")
    table = "\n".join(
        f"| {_cell(name)} | {DTYPE_NAMES[column.dtype]}{_plain(column.notes)} | {list(column.row_shape)} |"
        for name, column in description.columns.items()
    )
    more = _PER_TOKEN * description.has_tokens + _ENCODED * any(c.encoding for c in description.columns.values())
    return _CARD.format(size=size, n=n, points=len(description.columns), more=more, table=table)


def _cell(name: str) -> str:
    plain = _plain(name)
    return f"`{plain}`" if plain else "(the model itself)"


def _plain(text: str) -> str:
    # A name may hold any character; in a Markdown table a bar, a backquote or a line break must not act.
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return plain.replace("|", chr(92) + "|").replace("`", chr(39))
