"""`tlfast score` and `tlfast search`: the examples of a dataset that are nearest to queries, or to a text."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Any

from ..attribution import scores as scoring
from ..attribution.every_score import check_out
from ..attribution.methods import METHODS
from ..attribution.result import Scores
from ..attribution.scores import DAMPING
from ..attribution.text_query import text_query
from ..dataset import open_dataset
from ..dataset.read.decoding import text_of
from ..hooks.points import match_names
from ..markup import shortened
from .arguments import OK, Arguments
from .bar import bar

_SHOWN_QUERIES, _TEXT_WIDTH = 20, 100


def score(args: list[str]) -> int:
    """Score the rows of a dataset against those of another."""
    arguments = Arguments("score", "The rows nearest to queries.", "a dataset folder and --queries DIR")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder, or its URL")
    arguments.add_argument("--queries", required=True, metavar="DIR", help="a dataset, whose rows are the queries")
    _add_shared(arguments, "dot")
    arguments.add_argument("--out", metavar="FILE", help="a new .parquet of the rows found, or .npy of all scores")
    wanted = arguments.read(args)
    if wanted.out is not None:
        check_out(wanted.out, (".npy", ".parquet"))
    ds = _opened(wanted)
    found = _scored(wanted, ds, open_dataset(wanted.queries, partial=wanted.partial))
    if wanted.out is not None and wanted.out.endswith(".parquet"):
        found.to_parquet(wanted.out)
    _show(found)
    if wanted.out is not None:
        print(wanted.out)
    return OK


def search(args: list[str]) -> int:
    """Find the examples of a dataset that are nearest to a text."""
    arguments = Arguments("search", "The examples nearest to a text.", "a dataset folder and a text")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder, or its URL")
    arguments.add_argument("text", metavar="TEXT", help="a text, or the prompt before --response")
    arguments.add_argument("--response", default="", metavar="TEXT", help="what the loss is of, where examples have it")
    arguments.add_argument(
        "--model", default="", metavar="M", help="the model, where the dataset doesn't say its place"
    )
    arguments.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside the model")
    _add_shared(arguments, "cosine")
    wanted = arguments.read(args)
    wanted.out = None
    ds, source = _opened(wanted), open_dataset(wanted.dir, partial=wanted.partial)
    more = {"response": wanted.response, "model": wanted.model, "trust": wanted.trust_remote_code}
    # What a model prints is not the answer.
    with redirect_stdout(sys.stderr), text_query(source, wanted.text, **more) as query:
        found = _scored(wanted, ds, query)
    found.queries = None  # its folder is gone, and its text was given
    _show(found, wanted.text)
    return OK


def _add_shared(arguments: Arguments, method: str) -> None:
    arguments.add_argument(
        "--method", default=method, metavar="NAME", help=f"{', '.join(METHODS)}; without it {method}"
    )
    arguments.add_argument("--points", nargs="+", metavar="GLOB", help="the columns; without it, all that both have")
    arguments.add_argument(
        "--top", type=int, default=10, metavar="K", help="how many rows of each query; without it 10"
    )
    arguments.add_argument("--where", metavar="CONDITION", help='take some rows alone: "length > 10"')
    arguments.add_argument(
        "--moments", metavar="FILE", help="trackstar: saved RunningSums, without it those of the rows; ekfac: factors"
    )
    arguments.add_argument(
        "--damping", type=float, default=DAMPING, metavar="X", help="trackstar, ekfac: of the mean eigenvalue"
    )
    arguments.add_argument(
        "--mix", type=float, default=0.0, metavar="X", help="trackstar: part of the queries' moments"
    )
    arguments.add_argument("--partial", action="store_true", help="the units that are there, although some are missing")


def _opened(wanted: Any) -> Any:
    """The rows that are scored; ValueError for words that can be seen to be wrong, before a model runs."""
    given = {name: getattr(wanted, name) for name in ("moments", "damping", "mix")}
    scoring.check_arguments(wanted.method, wanted.top, given)
    ds = open_dataset(wanted.dir, partial=wanted.partial)
    if wanted.points is not None:
        match_names("tlfast score", ds.points, wanted.points)
    return ds if wanted.where is None else ds.filter(wanted.where)


def _scored(wanted: Any, ds: Any, queries: Any) -> Scores:
    more = {name: getattr(wanted, name) for name in ("points", "moments", "damping", "mix")}
    out = wanted.out if wanted.out is not None and wanted.out.endswith(".npy") else None
    n_passes = 2 if "moments" in METHODS[wanted.method].takes and wanted.moments is None else 1
    with bar("score", n_passes * len(ds), "rows") as progress:
        return scoring.score(ds, queries, wanted.method, k=wanted.top, out=out, progress=progress, **more)


def _show(found: Scores, text: str = "") -> None:
    """Print the rows of each query, a line each, with their text."""
    columns = found.to_dict(texts=True)
    lines = list(zip(*(columns[name] for name in ("query", "score", "id", "source", "start", "text")), strict=True))
    tokenizer = None if found.queries is None else found.queries.tokenizer()
    width = max((len(str(line[2])) for line in lines), default=1)
    for query in range(min(len(found), _SHOWN_QUERIES)):
        asked = text if found.queries is None else _text_of(found.queries, query, tokenizer)
        print(f"query {query}: {shortened(asked, _TEXT_WIDTH)}")
        for _, value, number, source, start, hit in (line for line in lines if line[0] == query):
            place = shortened(f"{source}:{start}", 40)
            print(f"  {value:<12.6g} example {number:<{width}}  {place}  {shortened(hit, _TEXT_WIDTH)}")
    if len(found) > _SHOWN_QUERIES:
        print(f"and {len(found) - _SHOWN_QUERIES} more queries: --out FILE.parquet has all")
    skipped = f", {found.n_skipped} rows left out, which aren't finite" if found.n_skipped else ""
    shown = ", ".join(found.points[:3]) + ", ..." * (len(found.points) > 3)
    print(f"{found.metric} over {len(found.points)} columns ({shown}){skipped}")


def _text_of(queries: Any, row: int, tokenizer: Any) -> str:
    return text_of(tokenizer, queries.examples[row]["input_ids"])
