"""Search: the rows with the highest scores for each query, each row read once, in memory that doesn't grow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ...errors import broken_rule
from .ahead import read_ahead
from .columns import read_stretches
from .found import SearchResult

METRICS = ("dot", "cosine")
BLOCK_BYTES = 8 << 20  # of rows that are read at once: a disk's rate, and some blocks fit a cache
_SCORE_BYTES = 8 << 20  # of scores at once
_MOST_ROWS = 1 << 16  # of a block: of single values each
_EXAMPLES = 256  # of a point per token, whose lengths are asked for at once
_SAFE = 2.0**-60, 2.0**60  # norms of which neither squares nor products leave the range of float32
_WHO = "search"


class Queries(NamedTuple):
    """The queries of one point: [Q, values of a row], as rows are scored."""

    point: str
    values: torch.Tensor


class Block(NamedTuple):
    """Some rows that were read: of each point [rows, values of a row]; which rows, and which tokens of them."""

    values: dict[str, torch.Tensor]
    rows: torch.Tensor  # int64
    positions: torch.Tensor | None
    n_rows: int  # of the dataset


def search(
    ds: Any, queries: Any, k: int, *, point: str | None, metric: str, progress: Callable[[int], None] | None
) -> SearchResult:
    """Return the best rows; see Readable.search."""
    if metric not in METRICS:
        raise ValueError(broken_rule(_WHO, "metric", f"be one of {', '.join(METRICS)}", repr(metric), "Choose one."))
    if type(k) is not int or k < 1:
        raise ValueError(broken_rule(_WHO, "k", "be an int of at least 1", repr(k), "Say how many rows are wanted."))
    per_token, given = _checked(ds, queries, point, metric)
    columns = [ds[q.point] for q in given]
    n_queries, n_rows = len(given[0].values), int(columns[0].lengths().sum()) if per_token else len(ds)
    step = max(1, min(_MOST_ROWS, BLOCK_BYTES // max(1, *(ds.column(q.point).row_bytes for q in given))))
    blocks = _token_blocks(columns[0], ds, step) if per_token else row_blocks(columns, len(ds), step)
    best = Best(n_queries, min(k, n_rows), given[0].values)
    take_scores(blocks, step, Scorer(given, metric, step), [best], progress)
    positions = best.positions.cpu() if per_token else None
    return SearchResult(ds, best.rows.cpu(), best.scores.cpu(), positions, metric, [q.point for q in given])


class Scoring(Protocol):
    """What makes scores of the rows of a block."""

    n_queries: int
    itemsize: int  # bytes of a score

    def take(self, block: Block) -> Any:
        """Return the rows as they are multiplied with queries."""
        ...

    def scores(self, rows: Any, which: slice) -> torch.Tensor:
        """Return the scores of some queries: [queries, rows]."""
        ...


class Taker(Protocol):
    """What keeps scores."""

    def add(self, which: slice, scores: torch.Tensor, block: Block) -> None:
        """Take ``scores``, [queries of ``which``, rows of the block], the next rows in order."""
        ...


def take_scores(
    blocks: Iterator[Block],
    step: int,
    scoring: Scoring,
    takers: Sequence[Taker],
    progress: Callable[[int], None] | None,
) -> None:
    """Give all takers the scores of all blocks, at most ``step`` rows, and 8 MiB of scores, at a time."""
    some = max(1, _SCORE_BYTES // (step * scoring.itemsize))
    for block in blocks:
        for part in _parts(block, step):
            rows = scoring.take(part)
            for at in range(0, scoring.n_queries, some):
                which = slice(at, min(scoring.n_queries, at + some))
                scores = scoring.scores(rows, which)
                for taker in takers:
                    taker.add(which, scores, part)
        if progress is not None:
            progress(block.n_rows)


def _checked(ds: Any, queries: Any, point: str | None, metric: str) -> tuple[bool, list[Queries]]:
    """Return whether rows are tokens, and the queries of each point as rows are scored; an error for a bad one."""
    if isinstance(queries, Mapping):
        if point is not None or not queries:
            got = f"{point!r} with a dict" if queries else "an empty dict"
            remedy = "Give a dict of tensors by point, or a tensor and point=."
            raise ValueError(broken_rule(_WHO, "point" if queries else "queries", "say it once", got, remedy))
        named = dict(queries)
    else:
        named = {_only(ds) if point is None else point: queries}
    kinds = {ds.column(name).per for name in named}
    if len(kinds) > 1 or (kinds == {"token"} and len(named) > 1):
        rule, remedy = "have a row for each example", "Search a point per token alone."
        raise ValueError(broken_rule(_WHO, "points", rule, f"{', '.join(map(repr, named))}, per token", remedy))
    check_vectors(_WHO, ds, named)
    check_alike(_WHO, named)
    wide = any(ds.column(name).dtype == torch.float64 for name in named)
    dtype = torch.float64 if wide else torch.float32
    return kinds == {"token"}, [Queries(name, _prepared(ds, name, q, dtype, metric)) for name, q in named.items()]


def check_alike(who: str, named: Mapping[str, Any]) -> None:
    """ValueError unless the queries of all points are equally many, on one device."""
    sizes = {name: len(q) for name, q in named.items() if isinstance(q, torch.Tensor) and q.dim()}
    if len(set(sizes.values())) > 1:
        raise ValueError(broken_rule(who, "queries", "be equally many for all points", sizes, "Give one row each."))
    device = {q.device for q in named.values() if isinstance(q, torch.Tensor)}
    if len(device) > 1:
        raise ValueError(broken_rule(who, "queries", "be on one device", sorted(map(str, device)), "Move them."))


def check_vectors(who: str, ds: Any, names: Iterable[str]) -> None:
    """ValueError for rows of two factors, whose dot product is a sum of two where that of gradients is a product."""
    for name in names:
        sizes = ds.factor_sizes(name)
        if sizes is not None:
            rule = "have rows whose dot products are those of gradients"
            got = f"the two factors of each token side by side, {sizes[0]} numbers and {sizes[1]}"
            remedy = f"Multiply the dot products of both: g, a = ds[{name!r}][row].split({list(sizes)}, 1)."
            raise ValueError(broken_rule(who, f"point {name!r}", rule, got, remedy))


def _only(ds: Any) -> str:
    if len(ds.points) != 1:
        known = ", ".join(map(repr, ds.points[:5])) + ", ..." * (len(ds.points) > 5)
        raise ValueError(broken_rule(_WHO, "point", f"be one of {known}", "none", "Say whose rows the queries score."))
    return str(ds.points[0])


def _prepared(ds: Any, name: str, queries: Any, dtype: torch.dtype, metric: str) -> torch.Tensor:
    flat = flat_queries(_WHO, name, ds.column(name).row_shape, queries)
    if metric == "cosine":
        norms = flat.norm(dim=1)
        if not bool((norms > 0).all()):
            got = f"zeros alone in query {int((norms == 0).nonzero()[0])}"
            raise ValueError(broken_rule(_WHO, "queries", "have a direction", got, "Leave it out."))
        flat = flat / norms[:, None]
    return narrowed(_WHO, flat, dtype)


def flat_queries(who: str, name: str, shape: Sequence[int], queries: Any) -> torch.Tensor:
    """Return queries of a point as float64 [Q, values of a row]; an error for what they can't be."""
    width = prod(shape)
    if not isinstance(queries, torch.Tensor) or not queries.is_floating_point():
        got = str(queries.dtype) if isinstance(queries, torch.Tensor) else type(queries).__name__
        raise TypeError(broken_rule(who, "queries", "be a tensor of floats", got, "Convert it: torch.as_tensor(x)."))
    if queries.dim() < 1 or tuple(queries.shape[1:]) not in {(width,), tuple(shape)}:
        wanted = " or ".join(dict.fromkeys(str(["Q", *s]).replace("'", "") for s in (tuple(shape), (width,))))
        remedy = f"A row of {name!r} has the shape {list(shape)}; give one query as queries[None]."
        raise ValueError(broken_rule(who, "queries", f"have the shape {wanted}", list(queries.shape), remedy))
    flat = queries.detach().reshape(len(queries), width).to(torch.float64)
    finite = flat.isfinite().all(1)
    if not bool(finite.all()):
        got = f"NaN or infinity in query {int((~finite).nonzero()[0])}"
        raise ValueError(broken_rule(who, "queries", "be finite", got, "Leave it out."))
    return flat


def narrowed(who: str, queries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return finite queries in the dtype of the arithmetic; ValueError where that can't hold them."""
    made = queries.to(dtype)
    if not bool(made.isfinite().all()):
        raise ValueError(broken_rule(who, "queries", "be within the range of float32", "larger ones", "Scale them."))
    return made


def row_blocks(columns: Sequence[Any], n_rows: int, step: int) -> Iterator[Block]:
    """Yield the rows of some points in order; a block's memory is read into again once the next is asked for."""
    free = SimpleQueue[dict[str, torch.Tensor]]()

    def read(start: int) -> tuple[Block, dict[str, torch.Tensor]]:
        stop, memory = min(n_rows, start + step), None
        with suppress(Empty):  # new memory costs as much as copying into it
            memory = free.get_nowait()
        found = read_stretches(columns, [(start, stop)], memory)
        values = {name: rows.reshape(stop - start, prod(rows.shape[1:])) for name, rows in found.items()}
        return Block(values, torch.arange(start, stop), None, stop - start), found

    for block, memory in read_ahead(range(0, n_rows, step), read):
        yield block
        free.put(memory)


def _token_blocks(column: Any, ds: Any, step: int) -> Iterator[Block]:
    """Yield the rows of a point per token, those of whole examples: more than ``step`` only where one has more."""

    def bounds() -> Iterator[tuple[int, int]]:
        for first in range(0, len(ds), _EXAMPLES):
            rows = np.arange(first, min(len(ds), first + _EXAMPLES))
            lengths = ds.examples.arrow(rows, ["length"]).column("length").to_numpy()
            begin, n = first, 0
            for row, length in zip(rows.tolist(), lengths.tolist(), strict=True):
                if n and n + length > step:
                    yield begin, row
                    begin, n = row, 0
                n += length
            yield begin, int(rows[-1]) + 1

    def read(part: tuple[int, int]) -> Block:
        values, lengths = column.joined(np.arange(*part))
        rows = torch.arange(*part).repeat_interleave(lengths)
        first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        flat = values.reshape(len(rows), prod(values.shape[1:]))
        return Block({column.name: flat}, rows, torch.arange(len(rows)) - first, part[1] - part[0])

    yield from read_ahead(bounds(), read)


def _parts(block: Block, step: int) -> Iterator[Block]:
    """Cut what one long example has of tokens."""
    for start in range(0, len(block.rows), step):
        at = slice(start, start + step)
        values = {name: rows[at] for name, rows in block.values.items()}
        yield Block(values, block.rows[at], None if block.positions is None else block.positions[at], 0)


class Scorer:
    """The queries, and memory for rows as they are scored: new memory for each block would cost four times as much."""

    def __init__(self, given: Sequence[Queries], metric: str, step: int) -> None:
        self._given, self._metric = given, metric
        self.n_queries, self.itemsize = len(given[0].values), given[0].values.element_size()
        widest = max((q.values.shape[1] for q in given), default=0)
        self._memory = torch.empty((step * widest,), dtype=given[0].values.dtype, device=given[0].values.device)

    def take(self, block: Block) -> list[torch.Tensor]:
        """Return the scores' other factor of each point: the rows, [rows, values], or their directions."""
        return [self._as_scored(block.values[point], queries) for point, queries in self._given]

    def _as_scored(self, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        if rows.dtype != queries.dtype or rows.device != queries.device:
            memory = self._memory if len(self._given) == 1 else torch.empty_like(self._memory)
            rows = memory[: rows.numel()].view(rows.shape).copy_(rows)
        return rows if self._metric == "dot" else directions(rows)

    def scores(self, rows: Sequence[torch.Tensor], which: slice) -> torch.Tensor:
        """Return the scores of some queries: [queries, rows]."""
        total = self._given[0].values[which] @ rows[0].T
        for (_, queries), more in zip(self._given[1:], rows[1:], strict=True):
            total.addmm_(queries[which], more.T)
        return total


def directions(rows: torch.Tensor) -> torch.Tensor:
    """Return rows divided by their norms: zeros stay zeros, and what isn't finite becomes NaN."""
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    odd = ~((norms > _SAFE[0]) & (norms < _SAFE[1]))[:, 0]
    found: torch.Tensor = rows / norms
    if bool(odd.any()):  # a square of theirs may be 0 or infinite
        wide = rows[odd].to(torch.float64)
        largest = wide.abs().amax(1, keepdim=True) if wide.shape[1] else wide.sum(1, keepdim=True)
        scaled = wide / torch.where(largest > 0, largest, torch.ones_like(largest))
        lengths = scaled.norm(dim=1, keepdim=True)
        found[odd] = (scaled / torch.where(lengths > 0, lengths, torch.ones_like(lengths))).to(rows.dtype)
        found[(~rows.isfinite()).any(1) & odd] = torch.nan
    return found


class Best:
    """The highest scores so far of each query, highest first; of equal ones the row that came first."""

    def __init__(self, n_queries: int, k: int, like: torch.Tensor) -> None:
        self.scores = torch.full((n_queries, k), torch.nan, dtype=like.dtype, device=like.device)
        self.rows = torch.full((n_queries, k), -1, dtype=torch.int64, device=like.device)  # -1: none yet
        self.positions = torch.full_like(self.rows, -1)

    def add(self, which: slice, scores: torch.Tensor, block: Block) -> None:
        """Take what is better of ``scores``, [queries of ``which``, rows of the block], the next rows in order."""
        k = self.rows.shape[1]
        if not k:
            return
        old, full = self.scores[which], self.rows[which, -1:] >= 0
        better = scores > old[:, -1:]  # of NaN never
        if not bool(full.all()):
            better = torch.where(full, better, ~scores.isnan())
        if scores.shape[1] > 4 * k and int(better.sum(1).max()) > 4 * k:  # the k-th best of the block is a floor too
            floor = scores.masked_fill(~better, -torch.inf).topk(k, dim=1).values[:, -1:]
            better &= scores >= floor
        query, column = better.nonzero(as_tuple=True)  # of a query by rising row
        if not len(query):
            return
        counts = better.sum(1)
        slot = k + torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
        more = int(counts.max())
        candidates = torch.cat([old, old.new_full((len(old), more), torch.nan)], 1)
        rows = torch.cat([self.rows[which], self.rows.new_full((len(old), more), -1)], 1)
        positions = torch.cat([self.positions[which], self.rows.new_full((len(old), more), -1)], 1)
        candidates[query, slot] = scores[query, column]
        rows[query, slot] = block.rows.to(rows.device)[column]
        if block.positions is not None:
            positions[query, slot] = block.positions.to(rows.device)[column]
        # What isn't there last, whatever its score; then by score. Both stable: rows before later ones.
        absent = rows < 0
        order = candidates.masked_fill(absent, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, absent.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))[:, :k]
        self.scores[which], self.rows[which] = candidates.gather(1, order), rows.gather(1, order)
        self.positions[which] = positions.gather(1, order)
