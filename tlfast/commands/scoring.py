"""`tlfast score` and `tlfast search`: the examples of a dataset, or those given, that are nearest to queries."""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stdout
from typing import Any

from ..attribution import scores as scoring
from ..attribution.every_score import check_out
from ..attribution.example_scores import score_examples
from ..attribution.methods import DAMPING, METHODS, check_arguments
from ..attribution.result import Scores
from ..attribution.text_query import text_query
from ..dataset import open_dataset
from ..errors import SpeakingAs, broken_rule
from ..hooks.points import match_names
from ..markup import shortened
from .arguments import OK, Arguments
from .bar import bar
from .model_words import add_model_words, loaded, model_words

_SHOWN_QUERIES, _TEXT_WIDTH = 20, 100


def score(args: list[str]) -> int:
    """Score the rows of a dataset against those of another, or examples that go through a model."""
    needed = "a dataset folder, or a model with --text or --dataset, and --queries"
    arguments = Arguments("score", "The rows or examples nearest to queries.", needed)
    arguments.add_argument("dir", metavar="DIR", help="a dataset's folder or URL; or a model, with --text or --dataset")
    arguments.add_argument(
        "--queries", required=True, metavar="Q", help="a dataset, whose rows are the queries; of a model data as it has"
    )
    _add_shared(arguments, "dot")
    arguments.add_argument("--out", metavar="FILE", help="a new .parquet of the rows found, or .npy of all scores")
    arguments.add_argument("--project", type=int, metavar="P", help="of a model: score gradients projected to P x P")
    arguments.add_argument("--bias", action="store_true", help="of a model: with the gradients of biases")
    arguments.add_argument("--per", default="example", metavar="WHAT", help="of a model: example, or token")
    arguments.add_argument("--mean", action="store_true", help="of a model: one query, the mean of the query examples")
    add_model_words(arguments)
    wanted = arguments.read(args)
    if wanted.out is not None:
        check_out(wanted.out, (".npy", ".parquet"))
    if wanted.text or wanted.dataset:
        found = _of_model(wanted)
    else:
        _check_of_dataset(wanted)
        ds = _opened(wanted)
        found = _scored(wanted, ds, open_dataset(wanted.queries, partial=wanted.partial))
    if wanted.out is not None and wanted.out.endswith(".parquet"):
        found.to_parquet(wanted.out)
    _show(found)
    if wanted.out is not None:
        print(wanted.out)
    return OK


def _check_of_dataset(wanted: Any) -> None:
    """ValueError for words that mean something of a model alone."""
    if os.path.isfile(os.path.join(wanted.dir, "config.json")):
        got, remedy = f"none for the model {wanted.dir}", "Say --text FILE, or --dataset FILE."
        raise ValueError(broken_rule("tlfast score", "data", "be given where a model is scored", got, remedy))
    odd = {"--project": wanted.project, "--bias": wanted.bias, "--per": wanted.per != "example", "--mean": wanted.mean}
    flag = next((flag for flag, given in {**odd, **model_words(wanted)}.items() if given), None)
    if flag is not None:
        rule, remedy = (
            "be left out where a dataset is scored",
            "Leave it out; or give a model, and --text or --dataset.",
        )
        raise ValueError(broken_rule("tlfast score", flag, rule, "it", remedy))


def _of_model(wanted: Any) -> Scores:
    """Score examples that go through a model; no row is stored."""
    odd = {"--where": wanted.where, "--partial": wanted.partial}
    flag = next((flag for flag, given in odd.items() if given), None)
    if flag is not None:
        remedy = "Leave it out; --filter takes some of the examples."
        raise ValueError(broken_rule("tlfast score", flag, "be left out where a model is scored", "it", remedy))
    if wanted.points is None:
        rule, remedy = "name layers where a model is scored", "See tlfast points MODEL."
        raise ValueError(broken_rule("tlfast score", "--points", rule, "none", remedy))
    given = {name: getattr(wanted, name) for name in ("moments", "damping", "mix")}
    check_arguments(wanted.method, wanted.top, given)
    more = given | {name: getattr(wanted, name) for name in ("project", "bias", "per", "mean")}
    out = wanted.out if wanted.out is not None and wanted.out.endswith(".npy") else None
    wanted.model = wanted.dir
    # What a model prints is not the answer.
    with (
        SpeakingAs("tlfast score", "collect"), redirect_stdout(sys.stderr), loaded(wanted, wanted.points) as ours,
        bar("score", None, "examples") as progress,
    ):  # fmt: skip
        return score_examples(
            ours.model, ours.examples, ours.of_file(wanted.queries), wanted.method, points=wanted.points, k=wanted.top,
            out=out, tokenizer=ours.tokenizer, progress=progress, **more, **ours.options,
        )  # fmt: skip


def search(args: list[str]) -> int:
    """Find the examples of a dataset that are nearest to a text."""
    arguments = Arguments("search", "The examples nearest to a text.", "a dataset folder and a text")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder, or its URL")
    arguments.add_argument("text", metavar="TEXT", help="a text, or the prompt before --response")
    arguments.add_argument("--response", default="", metavar="TEXT", help="what the loss is of, where examples have it")
    arguments.add_argument(
        "--model", default="", metavar="M", help="the model, where the dataset doesn't say its place"
    )
    arguments.add_argument("--normalizer", default="", metavar="FILE", help="what rows were normalized with, likewise")
    arguments.add_argument("--trust-remote-code", action="store_true", help="run the code that lies beside the model")
    _add_shared(arguments, "cosine")
    wanted = arguments.read(args)
    wanted.out = None
    ds, source = _opened(wanted), open_dataset(wanted.dir, partial=wanted.partial)
    more = {name: getattr(wanted, name) for name in ("response", "model", "normalizer")}
    more |= {"trust": wanted.trust_remote_code}
    # What a model prints is not the answer.
    speaking = SpeakingAs("tlfast search", "collect")
    with speaking, redirect_stdout(sys.stderr), text_query(source, wanted.text, **more) as query:
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
    check_arguments(wanted.method, wanted.top, given)
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


def _show(found: Scores, text: str | None = None) -> None:
    """Print the rows of each query, a line each, with their text; ``text`` is that of the only query."""
    columns = found.to_dict(texts=True)
    positions = columns.get("position", [None] * len(columns["query"]))
    names = ("query", "score", "id", "source", "start", "text")
    lines = list(zip(*(columns[name] for name in names), positions, strict=True))
    asked = found.query_texts() if text is None else [text]
    width = max((len(str(line[2])) for line in lines), default=1)
    for query in range(min(len(found), _SHOWN_QUERIES)):
        print(f"query {query}:" if asked is None else f"query {query}: {shortened(asked[query], _TEXT_WIDTH)}")
        for _, value, number, source, start, hit, position in (line for line in lines if line[0] == query):
            place = shortened(f"{source}:{start}", 40)
            at = "" if position is None else f"token {position:<5} "
            print(f"  {value:<12.6g} example {number:<{width}}  {at}{place}  {shortened(hit, _TEXT_WIDTH)}")
    if len(found) > _SHOWN_QUERIES:
        print(f"and {len(found) - _SHOWN_QUERIES} more queries: --out FILE.parquet has all")
    skipped = f", {found.n_skipped} rows left out, which aren't finite" if found.n_skipped else ""
    shown = ", ".join(found.points[:3]) + ", ..." * (len(found.points) > 3)
    print(f"{found.metric} over {len(found.points)} columns ({shown}){skipped}")
