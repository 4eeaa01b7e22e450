"""Views of datasets: some of their rows and points, or several of them behind each other; nothing is copied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from ...errors import broken_rule
from ..errors import dataset_error
from ..format.layout import DTYPE_NAMES, Column
from ..format.row_table import NORM, as_examples
from ..format.strict_json import sha256_of
from .columns import RawColumn, integers, row_numbers
from .conditions import Condition
from .converting import from_faiss, to_faiss, to_hf, to_numpy, to_pandas
from .decoding import given_tokenizer
from .found import SearchResult
from .row_fields import NORMS, arrays, blocks
from .search import search
from .selection import Selection, TokenSelection, ViewColumn, ViewExamples, ViewTokenColumn
from .showing import Sample, described, take_sample
from .token_columns import TokenColumn

Array = np.ndarray[Any, Any]
MAY_DIFFER = ("examples", "text", "batching")  # keys of headers that say which examples, and in which batches
_BLOCK_ROWS = 4096  # whose values are compared at once


class Readable(ABC):
    """What a dataset and a view of datasets have in common: rows by point, examples, and views of them."""

    examples: Any
    loaded: tuple[str, ...] = ()  # the fields that batches carry beside points: see with_fields

    @property
    @abstractmethod
    def points(self) -> list[str]:
        """The names of the points."""

    @property
    @abstractmethod
    def sources(self) -> list[Any]:
        """The datasets whose rows these are, each a GradientDataset; of a dataset itself alone."""

    @property
    @abstractmethod
    def unit_bounds(self) -> tuple[Array, Array]:
        """Where stretches that may lie behind each other start, and where they stop; int64 [stretches] each."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, point: str) -> Any: ...

    @abstractmethod
    def column(self, point: str) -> Column:
        """Return what ``point`` is; KeyError where there is none of that name."""

    @abstractmethod
    def holds(self, point: str) -> str:
        """Return in words what ``point`` holds: which form of which place, how reduced, projected and stored."""

    @abstractmethod
    def factor_sizes(self, point: str) -> tuple[int, int] | None:
        """Return how many numbers g and a have, where a token's row is these two factors side by side; else None.

        Their outer product, g at the outputs, is the token's share of the weight gradient.
        """

    @abstractmethod
    def ids_of(self, rows: Any) -> torch.Tensor:
        """Return the ids of the examples in these rows: int64, of the shape of ``rows``."""

    @abstractmethod
    def rows_of(self, ids: Any) -> torch.Tensor:
        """Return the rows of these examples: int64, of the shape of ``ids``."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """Return the tokenizer that the examples were cut with; None where it isn't here."""

    @abstractmethod
    def verify_rows(self, start: int, stop: int) -> None:
        """Re-read the units of these rows against their checksums; DatasetError where something is wrong."""

    @abstractmethod
    def info(self) -> dict[str, Any]:
        """Return what is inside, as JSON-able values."""

    @property
    def fields(self) -> list[str]:
        """What is known of an example beside its norms: "id", "input_ids", ..., and what was kept with it."""
        found: list[str] = self.examples.names
        return found

    def _selection(self) -> Selection:
        return Selection([len(self)])

    def _offsets(self) -> list[int]:
        return [0] * len(self.sources)

    def __contains__(self, point: object) -> bool:
        return point in self.points

    @property
    def ids(self) -> torch.Tensor:
        """The example's id of every row: int64 [rows]. In a complete dataset row r is example r."""
        return self.ids_of(np.arange(len(self)))

    def rows(self, index: Any, points: Iterable[str] | None = None) -> dict[str, Any]:
        """Return the indexed rows of several points (all by default): ``{point: ds[point][index]}``."""
        return {point: self[point][index] for point in (self.points if points is None else points)}

    def norms(self, point: str) -> torch.Tensor:
        """Return the float32 L2 norm of every row of ``point`` from the row tables: shape [rows]."""
        self.column(point)
        found: torch.Tensor = self.examples.norms(point)
        return found

    def sample(
        self, n: int = 5, *, seed: int = 0, tokenizer: Any = None, points: Iterable[str] | None = None
    ) -> Sample:
        """Return ``n`` examples picked at random, with their text and the norms of their rows; it prints as a table.

        Args:
            n: how many; all where there are fewer.
            seed: the same examples for the same seed.
            tokenizer: anything with a method ``decode``, or the name or folder of one. By default the one that the
                dataset names, if it is on this machine; otherwise the text is the tokens as numbers.
            points: whose norms are shown; all by default.
        """
        shown = self.points if points is None else [self[point].name for point in points]
        used = self.tokenizer() if tokenizer is None else given_tokenizer(tokenizer)
        return take_sample(self.examples, shown, n, seed, used)

    def select(self, indices: Any) -> DatasetView:
        """Return a view of some rows, in this order, a row as often as it is named; it reads nothing.

        Args:
            indices: a list, int tensor or array of row numbers, a slice, a range, or a bool mask of all rows.

        Raises:
            IndexError: for a row that there isn't, or a mask of another length.
            TypeError: for whatever else.

        Example:
            >>> import tempfile, torch
            >>> from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
            >>> out, plan = tempfile.mkdtemp(), Plan(3, 3)
            >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, ())}, plan=plan)
            >>> examples = [Example(i, [i] * i, "a", 0, i) for i in range(3)]
            >>> writer.write_unit(plan.unit(0), {"h": torch.tensor([7.0, 8.0, 9.0])}, examples)
            True
            >>> ds = open_dataset(out)
            >>> ds.select([2, 0])["h"][:], ds.filter("length > 0").ids
            (tensor([9., 7.]), tensor([1, 2]))
        """
        if isinstance(indices, slice):
            rows = np.arange(len(self))[indices]
        else:
            rows = row_numbers(indices, len(self))
        if rows.ndim != 1:
            got = "one number" if rows.ndim == 0 else f"shape {list(rows.shape)}"
            raise TypeError(broken_rule("select", "indices", "be a list of rows", got, "Give [row], or flatten it."))
        return self._view(self._selection().among_all(rows))

    def filter(self, condition: Any) -> DatasetView:
        """Return a view of the rows for which a condition holds, in their order; it reads the row tables.

        Args:
            condition: a text as ``"length > 10 and norm['late'] < 3"``, see Condition; or a function that is called
                with each row, a dict as of ``ds.examples[row]``, and returns True or False.

        Raises:
            ValueError: for a text that is no condition, or asks for what rows don't have.
            TypeError: where the function returns anything but a bool.
        """
        if isinstance(condition, str):
            test = Condition(condition)
            names = sorted(test.names)
            test.check_names([*self.fields, *(NORM + point for point in self.points)])
            kept = [np.flatnonzero(test(arrays(t))) + start for start, t in blocks(self.examples, names, _BLOCK_ROWS)]
        elif callable(condition):
            found = blocks(self.examples, None, _BLOCK_ROWS)
            kept = [
                start + np.flatnonzero([_truth(condition(row)) for row in as_examples(table, self.points)])
                for start, table in found
            ]
        else:
            remedy = 'Write "length > 10", or give a function of a row.'
            raise TypeError(broken_rule("filter", "condition", "be a text or a function", repr(condition)[:80], remedy))
        return self.select(np.concatenate([np.empty(0, np.int64), *kept]))

    def with_fields(self, *names: str) -> DatasetView:
        """Return a view with some points alone, whose batches carry some fields of the examples beside them.

        Args:
            names: of points; and of `fields`: "input_ids", "length", "source", "start", "flags", what was kept with
                the examples; and "norms", those of the view's points, each called "norm:<point>" in a batch. Without a
                point among them all points stay.

        Raises:
            KeyError: for a name of neither.
            ValueError: without names, or for one that is both.
        """
        if not names or not all(isinstance(name, str) for name in names):
            rule, remedy = "be names of points or fields", 'Write ds.with_fields("late", "length").'
            raise ValueError(broken_rule("with_fields", "names", rule, repr(names)[:80], remedy))
        there = [*self.fields, NORMS]
        both = [name for name in names if name in self and name in there]
        if both:
            rule, remedy = "be of a point or of a field", "Read the point by ds[point], the field by ds.examples."
            raise ValueError(broken_rule("with_fields", "name", rule, f"{both[0]!r}, which is both", remedy))
        points = [name for name in dict.fromkeys(names) if name in self] or self.points
        others = [name for name in dict.fromkeys(names) if name not in self]
        unknown = next((name for name in others if name not in there), None)
        if unknown is not None:
            rule = f"be one of {', '.join([*self.points[:5], *there])}"
            raise KeyError(broken_rule("with_fields", "name", rule, repr(unknown), "See ds.points and ds.fields."))
        return self._view(self._selection().rows, points, tuple(others))

    def search(
        self,
        queries: torch.Tensor | dict[str, torch.Tensor],
        k: int = 10,
        *,
        point: str | None = None,
        metric: str = "dot",
        progress: Callable[[int], None] | None = None,
    ) -> SearchResult:
        """Return the ``k`` rows with the highest scores for each query; every row is read, once, in order.

        Memory holds some blocks of rows of 8 MiB and the results, whatever the number of rows. The arithmetic is that
        of float32 (float64 where a point is), on the device of the queries.

        Args:
            queries: [Q, *shape of a row] or [Q, values of a row]; or such a tensor for each of several points, whose
                scores are added up.
            k: how many rows for each query.
            point: which point ``queries`` is of; by default the only one.
            metric: "dot", or "cosine": a row of zeros has the cosine 0, and of several points the cosines are added.
            progress: called with the number of rows just read.

        Returns:
            A SearchResult: ``indices`` and ``scores`` [Q, min(k, rows)], highest first; of equal scores the row that
            comes first. A row with a NaN score is in no result; where fewer rows than that have scores, the rest has
            index -1 and score NaN. Of a point per token each token is a row of its own: ``positions`` says which.

        Raises:
            ValueError: for queries of another shape, or with values that aren't finite; a point that isn't named.
            KeyError: for a point that there isn't.

        Example:
            >>> import tempfile, torch
            >>> from tlfast.dataset import DatasetWriter, Example, Plan, open_dataset
            >>> out, plan = tempfile.mkdtemp(), Plan(2, 2)
            >>> writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, (2,))}, plan=plan)
            >>> rows = {"h": torch.tensor([[3.0, 4.0], [1.0, 0.0]])}
            >>> writer.write_unit(plan.unit(0), rows, [Example(i, [i], "a", i, 1) for i in range(2)])
            True
            >>> found = open_dataset(out).search(torch.tensor([[1.0, 0.0]]), k=1, metric="cosine")
            >>> found.indices, found.scores
            (tensor([[1]]), tensor([[1.]]))
        """
        return search(self, queries, k, point=point, metric=metric, progress=progress)

    def to_numpy(self, points: Iterable[str] | None = None) -> dict[str, Array]:
        """Return the rows of points (all by default) as arrays [rows, *shape of a row], all of them in memory.

        bfloat16 becomes float32, which holds it exactly; an encoded point is decoded. Of points per token the rows are
        those of all real tokens behind each other, [tokens, *shape of a row]; "id" and "position", int64 [tokens], say
        which example each is of, and which of its tokens.

        Raises:
            KeyError: for a point that there isn't.
            DatasetError: for points per token beside others, or one whose rows have no values.
        """
        return to_numpy(self, points)

    def to_pandas(self, points: Iterable[str] = ()) -> Any:
        """Return the row tables as a pandas data frame: id, input_ids, source, ..., ``norm:<point>``, in memory.

        Of each of ``points`` it has the rows too: a column ``grad:<point>`` of arrays, as of `to_numpy`; and
        ``frame.attrs["tlfast"]`` says what each holds. Of points per token each real token is a record, with its
        "position", and beside it what is neither a list nor a norm of its example. Needs the extra ``hub``.
        """
        return to_pandas(self, points)

    def to_hf(self, points: Iterable[str] | None = None) -> Any:
        """Return a Hugging Face `datasets.Dataset` in memory: the row tables, and ``grad:<point>`` of points.

        Rows are flat lists of fixed size, all points by default; of points per token each real token is one, with its
        "position". ``info.description`` says how they were made, and what they hold, as JSON. What doesn't fit memory
        is exported: ``export_dataset(ds, out, to="hf")``. Needs the extra ``hub``.
        """
        return to_hf(self, points)

    def to_faiss(self, index: Any = None, *, point: str | Iterable[str] | None = None, metric: str = "dot") -> Any:
        """Add all rows of a point to a FAISS index, as float32, in blocks of 32 MiB; return it.

        Number i in the index is row i. ``point`` is by default the only one; of several the values are laid behind each
        other. Of a point per token number i is row i of ``ds[point].flat``. `from_faiss` says which examples, and which
        of their tokens, a search in the index has found. Needs the extra ``faiss``.

        Args:
            index: an empty, trained one; by default an IndexFlatIP, which holds all rows in memory.
            point: whose rows: a point, or a list of some.
            metric: "dot": the rows as they are; "cosine": divided by their norms, of all these points together. Divide
                the queries too.

        Raises:
            ValueError: for an index that isn't empty or trained, or is of another size; for a row that isn't finite;
                for the two factors of a token's weight gradient, whose dot products are no gradients'.
            DatasetError: for points per token beside others, or one whose rows have no values.
        """
        return to_faiss(self, index, point, metric)

    def from_faiss(self, scores: Any, numbers: Any, *, point: str | Iterable[str] | None = None) -> SearchResult:
        """Return what a search in an index of `to_faiss` has found: ``ds.from_faiss(*index.search(queries, k))``.

        Args:
            scores: [Q, k], as the index has returned them.
            numbers: int64 [Q, k], which of its rows; -1 where it has found no more.
            point: whose rows the index got, as `to_faiss` was told.

        Returns:
            A SearchResult, as of `search`: ``indices`` are rows of this dataset, ``scores`` those of the index, NaN
            where the index is -1; of points per token ``positions`` say which token of the example each is.

        Raises:
            IndexError: for a number that the index can't have.
            ValueError: for arrays of other shapes or dtypes.
        """
        return from_faiss(self, scores, numbers, point)

    def _view(
        self, rows: Array | None, points: Sequence[str] | None = None, loaded: tuple[str, ...] | None = None
    ) -> DatasetView:
        points = self.points if points is None else points
        return DatasetView(
            self.sources, rows, points, self.loaded if loaded is None else loaded, offsets=self._offsets()
        )


def _truth(found: Any) -> bool:
    if not isinstance(found, (bool, np.bool_)) and not (isinstance(found, torch.Tensor) and found.dtype == torch.bool):
        remedy = "Return a comparison."
        raise TypeError(broken_rule("filter", "condition", "return True or False", repr(found)[:80], remedy))
    return bool(found)


class DatasetView(Readable):
    """Rows of one dataset or of several: made by ``ds.select``, ``ds.filter``, ``ds.with_fields``, concat_datasets.

    It is read as a dataset is: by points, in loaders, in batches, by search, and exported. ``view.sources`` are its
    datasets, and `where` says which row of which of them a row is. It takes 8 bytes for each selected row.

    Raises:
        AttributeError: for what belongs to a dataset on disk alone, as its plan and its header.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        rows: Array | None,
        points: Sequence[str],
        loaded: tuple[str, ...] = (),
        offsets: Sequence[int] | None = None,
    ) -> None:
        self._sources = list(sources)
        self._chosen = Selection([len(source) for source in sources], rows)
        self._tokens = TokenSelection([source.spans for source in sources], self._chosen)
        self._points = list(points)
        self.loaded = loaded
        self._id_offsets = [0] * len(self._sources) if offsets is None else list(offsets)
        tables = [source.examples for source in self._sources]
        self.examples = ViewExamples(tables, self._chosen, self._points, self._id_offsets)

    def _selection(self) -> Selection:
        return self._chosen

    def _offsets(self) -> list[int]:
        return self._id_offsets

    @property
    def sources(self) -> list[Any]:
        """The datasets whose rows these are, each a GradientDataset."""
        return list(self._sources)

    @property
    def points(self) -> list[str]:
        """The names of the points."""
        return list(self._points)

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, point: str) -> Any:
        """Return the rows of ``point``, lazily; KeyError where the view has no such point."""
        self.column(point)
        columns = [source[point] for source in self._sources]
        if len(columns) == 1 and self._chosen.rows is None:
            return columns[0]
        return self._chosen_of(columns)

    def _chosen_of(self, columns: Sequence[Any]) -> Any:
        """The rows of the view, of the same column of each dataset."""
        if isinstance(columns[0], TokenColumn):
            return ViewTokenColumn(columns, self._chosen, self._tokens)
        return ViewColumn(columns, self._chosen)

    def column(self, point: str) -> Column:
        """Return what ``point`` is; KeyError where the view has none of that name."""
        if point not in self._points:
            known = ", ".join(self._points[:5]) + (", ..." if len(self._points) > 5 else "")
            raise KeyError(broken_rule("DatasetView", "point", f"be one of {known}", repr(point), "See view.points."))
        found: Column = self._sources[0].column(point)
        return found

    def holds(self, point: str) -> str:
        """Return in words what ``point`` holds, as a dataset does; of datasets that differ in it what each does."""
        self.column(point)
        texts: list[str] = [source.holds(point) for source in self._sources]
        if all(text == texts[0] for text in texts):
            return texts[0]
        return " | ".join(f"of dataset {k}: {text}" for k, text in enumerate(texts, 1))

    def factor_sizes(self, point: str) -> tuple[int, int] | None:
        """Return how many numbers the two factors of a token's row have, as a dataset does.

        Raises:
            DatasetError: where those of its datasets differ: rows as long as each other, of layers that aren't.
        """
        self.column(point)
        found: dict[tuple[int, int], int] = {}
        for number, source in enumerate(self._sources, 1):
            sizes = source.factor_sizes(point)
            if sizes is not None:  # the first versions didn't note it
                found.setdefault(sizes, number)
        if len(found) > 1:
            got = " and ".join(f"{list(sizes)} in dataset {number}" for sizes, number in list(found.items())[:2])
            rule, remedy = "have factors of the same sizes in all datasets", "Read each of view.sources by itself."
            raise dataset_error("DatasetView", f"point {point!r}", rule, got, remedy)
        return next(iter(found), None)

    def raw(self, point: str) -> RawColumn:
        """Return the codes and scales of an encoded ``point``, as a dataset does."""
        self.column(point)
        parts = [source.raw(point) for source in self._sources]
        sides = [[part.codes for part in parts], [part.scales for part in parts]]
        return RawColumn(*(self._chosen_of(side) for side in sides))

    def where(self, rows: Any = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which of ``sources`` each row is of, and which row of it: int64 each, of the shape of ``rows``."""
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else row_numbers(rows, len(self))
        which, local = self._chosen.locate(numbers)
        return torch.from_numpy(np.asarray(which)), torch.from_numpy(np.asarray(local))

    def ids_of(self, rows: Any) -> torch.Tensor:
        """Return the ids of the examples in these rows: int64, of the shape of ``rows``."""
        numbers = row_numbers(rows, len(self))
        found = np.empty(numbers.size, np.int64)
        for k, where, local in self._chosen.by_dataset(numbers.reshape(-1)):
            found[where] = self._sources[k].ids_of(local).numpy() + self._id_offsets[k]
        return torch.from_numpy(found.reshape(numbers.shape))

    def rows_of(self, ids: Any) -> torch.Tensor:
        """Return in which rows the examples with these ids are: int64, of the shape of ``ids``.

        KeyError where the view has no example with one, or several: those of different datasets, or one taken twice.
        """
        wanted, own = integers("DatasetView", "ids", ids), self.ids.numpy()
        order = np.argsort(own, kind="stable")
        first, last = (np.searchsorted(own, wanted.reshape(-1), side, sorter=order) for side in ("left", "right"))
        if (first == last).any():
            got = str(wanted.reshape(-1)[first == last][0])
            raise KeyError(broken_rule("DatasetView", "id", "be of a row of the view", got, "See view.ids."))
        if (last - first > 1).any():
            got = f"{wanted.reshape(-1)[last - first > 1][0]}, which several rows have"
            raise KeyError(broken_rule("DatasetView", "id", "be of one row", got, "See view.ids and view.where()."))
        return torch.from_numpy(order[first].reshape(wanted.shape))

    @property
    def unit_bounds(self) -> tuple[Array, Array]:
        """Where stretches that lie behind each other start, and where they stop: int64 [stretches] each.

        They are the units of the datasets; selected rows are one stretch.
        """
        return self._chosen.unit_bounds([source.unit_bounds for source in self._sources])

    def verify_rows(self, start: int, stop: int) -> None:
        """Re-read the units of these rows against their checksums; DatasetError where something is wrong."""
        for k, _, local in self._chosen.by_dataset(np.arange(start, stop)):
            starts = self._sources[k].unit_bounds[0]
            for number in np.unique(np.searchsorted(starts, local, side="right") - 1).tolist():
                self._sources[k].verify_unit(self._sources[k].units[number])

    def tokenizer(self) -> Any:
        """Return the tokenizer that the examples were cut with, where all datasets name one; else None."""
        named = [source.header.get("tokenizer") for source in self._sources]
        return self._sources[0].tokenizer() if all(name == named[0] for name in named) else None

    def info(self) -> dict[str, Any]:
        """Return what is inside, as JSON-able values: of each dataset, and of the view."""
        infos = [source.info() for source in self._sources]
        headers = [info["header"] for info in infos]
        rows = self._chosen.rows
        chosen = "all" if rows is None else sha256_of(rows.tolist())
        return {
            "rows": len(self),
            "planned_rows": len(self),
            "points": {point: infos[0]["points"][point] for point in self._points},
            "holds": {point: self.holds(point) for point in self._points},
            "sources": [info["path"] for info in infos],
            "header": headers[0] if all(header == headers[0] for header in headers) else {"sources": headers},
            "config_hash": sha256_of([*(info["config_hash"] for info in infos), chosen]),
        }

    def _title(self) -> str:
        places = ", ".join(str(source.path) for source in self._sources[:3]) + ", ..." * (len(self._sources) > 3)
        return f"{type(self).__name__} of {places}: {len(self)} of {sum(map(len, self._sources))} rows"

    def __repr__(self) -> str:
        lines = [self._title(), *(f"  {self[name]!r}" for name in self._points[:8])]
        return "\n".join(lines + ([f"  and {len(self._points) - 8} more points"] if len(self._points) > 8 else []))

    def _repr_html_(self) -> str:
        return described(self._title(), {point: (self.column(point), self.holds(point)) for point in self._points})

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a DataLoader open the files themselves.
        return DatasetView, (self._sources, self._chosen.rows, self._points, self.loaded, self._id_offsets)

    def __getattr__(self, name: str) -> NoReturn:
        # What a dataset has and a view can't: the remedy is to ask the dataset.
        if not name.startswith("_") and self.__dict__.get("_sources") and hasattr(type(self._sources[0]), name):
            got, remedy = f"a view of {len(self._sources)}", f"Ask one of view.sources: view.sources[0].{name}."
            raise AttributeError(broken_rule("DatasetView", name, "be asked of a dataset", got, remedy))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


def concat_datasets(datasets: Sequence[Readable], *, may_differ: Iterable[str] = ()) -> DatasetView:
    """Return a view of all rows of some datasets or views, behind each other; nothing is read or copied.

    Row numbers count on from one to the next; ids are those of the datasets themselves, so several rows may have one:
    ``view.where(rows)`` says which dataset a row is of. Of the fields that they keep of the examples the view has those
    that all of them keep.

    Args:
        datasets: open ones, and views.
        may_differ: which keys of their headers may differ, beside ``examples``, ``text`` and ``batching``: rows of
            another model, or of another loss, aren't comparable.

    Raises:
        DatasetError: where their points differ in name, dtype, shape or encoding, a kept field in type, their headers
            in the model, the loss or the like, or there are none.

    Example:
        >>> import tempfile, torch
        >>> from tlfast.dataset import DatasetWriter, Example, Plan, concat_datasets, open_dataset
        >>> plan, both = Plan(1, 1), []
        >>> for value in (1.0, 2.0):
        ...     out = tempfile.mkdtemp()
        ...     writer = DatasetWriter(out, header={}, columns={"h": (torch.float32, ())}, plan=plan)
        ...     assert writer.write_unit(plan.unit(0), {"h": torch.tensor([value])}, [Example(0, [1], "a", 0, 1)])
        ...     both.append(open_dataset(out))
        >>> concat_datasets(both)["h"][:]
        tensor([1., 2.])
    """
    who = "concat_datasets"
    parts: list[Any] = list(datasets)
    if not parts or not all(isinstance(part, Readable) for part in parts):
        got = next((type(part).__name__ for part in parts if not isinstance(part, Readable)), "none")
        raise dataset_error(who, "datasets", "be open datasets or views", got, "Open each by open_dataset.")
    check_same_columns(who, [{point: part.column(point) for point in part.points} for part in parts])
    sources = [source for part in parts for source in part.sources]
    check_same_types(who, [source.kept for source in sources])
    check_same_headers(who, [source.header for source in sources], [*MAY_DIFFER, *may_differ])
    selections = [part._selection() for part in parts]
    rows = None
    if any(selection.rows is not None for selection in selections):
        first = np.cumsum([0, *(sum(len(source) for source in part.sources) for part in parts)])
        among_all = [s.among_all(np.arange(len(s))) + at for s, at in zip(selections, first[:-1], strict=True)]
        rows = np.concatenate(among_all)
    loaded = tuple(name for name in parts[0].loaded if all(name in part.loaded for part in parts))
    offsets = [offset for part in parts for offset in part._offsets()]
    return DatasetView(sources, rows, parts[0].points, loaded, offsets=offsets)


def check_same_columns(who: str, columns: Sequence[dict[str, Column]]) -> None:
    """Raise DatasetError unless all have points of the same names, each of one kind; their order may differ."""
    for number, other in enumerate(columns[1:], 2):
        names = set(columns[0]) ^ set(other)
        name = next((n for n in [*columns[0], *other] if n in names or columns[0][n] != other[n]), None)
        if name is not None:
            texts = [_said(part[name]) if name in part else "no such point" for part in (columns[0], other)]
            got = f"{texts[0]} in dataset 1 and {texts[1]} in dataset {number}"
            share = "concat_datasets of ds.with_fields(...) reads the points that they share."
            remedy = share if name in names else "They can't be joined."
            raise dataset_error(who, f"point {name!r}", "be the same in all datasets", got, remedy)


def check_same_headers(who: str, headers: Sequence[dict[str, Any]], may_differ: Sequence[str]) -> None:
    """Raise DatasetError where another key of the headers than these differs: rows of two models, say."""
    for number, header in enumerate(headers[1:], 2):
        for key in [*headers[0], *header]:
            if key not in may_differ and headers[0].get(key) != header.get(key):
                got = f"{repr(headers[0].get(key))[:80]} in dataset 1 and {repr(header.get(key))[:80]} in {number}"
                remedy = f"Rows of different ones don't belong together; if these do: may_differ=[{key!r}]."
                raise dataset_error(who, f"header[{key!r}]", "be the same in all datasets", got, remedy)


def check_same_types(who: str, kept: Sequence[dict[str, str]]) -> None:
    """Raise DatasetError where a field that several datasets keep is of different types."""
    first: dict[str, tuple[int, str]] = {}
    for number, fields in enumerate(kept, 1):
        for name, kind in fields.items():
            before, its_kind = first.setdefault(name, (number, kind))
            if kind != its_kind:
                got = f"{its_kind} in dataset {before} and {kind} in dataset {number}"
                rule, remedy = "be of one type in all datasets", "They can't be joined; read one after the other."
                raise dataset_error(who, f"field {name!r}", rule, got, remedy)


def _said(column: Column) -> str:
    return f"{DTYPE_NAMES[column.dtype]} {list(column.row_shape)}{column.notes}"
