"""README.md of a dataset: the card that people and the Hugging Face hub read."""

from __future__ import annotations

import re

from .description import Description
from .layout import DTYPE_NAMES, WEIGHT

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_SIZES_ABOVE = ((10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))
_SIZES_OF_BILLIONS = ((10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T"))

_COUNTS = re.compile(r"^\d+ examples, \d+ points, written by tlfast\.$", re.MULTILINE)

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

# {title}

{n} examples, {points} points, written by tlfast.

```python
import tlfast

ds = tlfast.open_dataset("path/to/this/folder")
ds.points                # the points below
ds[ds.points[0]][:10]    # {rows} of ten examples, {made}
ds.examples[0]           # the first example: input_ids, source, start, length, flags, norms
```

`rows/*.parquet` holds the examples and the norm of each {row}; `data/*.safetensors` holds the {rows}, row r of
`data/<unit>` belonging to row r of `rows/<unit>`. Only units with a file in `commits/` exist. `tlfast verify` re-reads
every byte against its checksum. How it was made stands in `dataset.json` and `config.yaml`.

{more}| point | dtype | shape of a row | holds |
|---|---|---|---|
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
        f"| {_cell(name)} | {DTYPE_NAMES[column.dtype]}{_plain(column.notes)} | {list(column.row_shape)} "
        f"| {_words(description.holds(name))} |"
        for name, column in description.columns.items()
    )
    more = _PER_TOKEN * description.has_tokens + _ENCODED * any(c.encoding for c in description.columns.values())
    said = {"size": size, "n": n, "points": len(description.columns), "more": more, "table": table}
    return _CARD.format(**said, **_heading(description))


def recounted(text: str, before: str, after: str) -> str:
    """Return a card that was ``before``, by this or another version, with the numbers of ``after``.

    What says how many examples there are is changed in a card of whatever else; one without that line stays.
    """
    if text == before:
        return after
    old, new = _COUNTS.findall(before), _COUNTS.findall(after)
    return _COUNTS.sub(lambda _: new[0], text) if old and new and _COUNTS.findall(text) == old else text


def _heading(description: Description) -> dict[str, str]:
    """The words of a card that depend on what its columns are: gradients alone, or other things too."""
    first = next(iter(description.columns.values()))
    kinds = {column.of for column in description.columns.values()}
    row = "gradient" if kinds <= {"grad", WEIGHT} else "row"
    pers = {column.per for column in description.columns.values()}
    each = "one row per " + " or ".join(per for per in ("example", "token") if per in pers)
    title = "Gradients" if row == "gradient" else "Gradients and more" if "grad" in kinds else "Rows of a model"
    made = "a list of tensors" if first.per == "token" else "a torch tensor"
    return {"title": f"{title}, {each}", "row": row, "rows": f"{row}s", "made": made}


def _cell(name: str) -> str:
    plain = _plain(name)
    return f"`{plain}`" if plain else "(the model itself)"


def _words(text: str) -> str:
    """Words that may quote a header: the star of a glob is no emphasis, and nothing is a tag."""
    return _plain(text).replace("*", r"\*").replace("<", "&lt;")


def _plain(text: str) -> str:
    # A name may hold any character; in a Markdown table a bar, a backquote or a line break must not act.
    plain = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return plain.replace("|", chr(92) + "|").replace("`", chr(39))
