"""`tlfast export`, `import-bergson`, `push`, `pull`, `report`: a dataset in the form, or at the place, of others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from ..dataset import MergedDataset, export_dataset, open_dataset
from ..dataset import import_bergson as bring
from ..dataset.errors import dataset_error
from ..dataset.export.bergson_store import read_index
from ..dataset.export.formats import FORMATS
from ..dataset.read.hub import download
from ..hooks.points import match_names
from ..report import write_report
from .arguments import OK, Arguments
from .bar import bar

_HTTP_LIBRARIES = {"httpcore", "httpx", "httpx2", "requests"}  # of the versions of huggingface_hub


def export(args: list[str]) -> int:
    """Write a dataset in another format."""
    arguments = Arguments("export", "Write a dataset in another format.", "a dataset folder and --to FORMAT")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    arguments.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    arguments.add_argument("--out", metavar="PATH", help="the new file or folder; without it, beside DIR")
    arguments.add_argument("--points", nargs="+", metavar="GLOB", help="the points to export; without it, all")
    arguments.add_argument("--partial", action="store_true", help="the units that are there, although some are missing")
    wanted = arguments.read(args)
    points, n_examples, unit = None, 0, "rows"
    if wanted.to in FORMATS:  # else export_dataset says it
        dataset = open_dataset(wanted.dir, partial=wanted.partial)
        n_examples = len(dataset)
        if wanted.points is not None:
            points = match_names("tlfast export", dataset.points, wanted.points)
        if any(dataset.column(point).per == "token" for point in points or dataset.points):
            unit = "examples"  # which have a row for each token
    with bar("export", n_examples, unit) as progress:
        options = {"to": wanted.to, "points": points, "partial": wanted.partial}
        made = export_dataset(wanted.dir, wanted.out, **options, progress=progress)
    print(f"{n_examples} {unit}: {made}")
    return OK


def import_bergson(args: list[str]) -> int:
    """Make a dataset of an index of bergson."""
    arguments = Arguments(
        "import-bergson", "Make a dataset of an index that bergson built.", "an index and a new folder"
    )
    arguments.add_argument("index", metavar="INDEX", help="the folder of a build of bergson")
    arguments.add_argument("dir", metavar="DIR", help="the dataset; one that was cut short is continued")
    arguments.add_argument("--base", default="", metavar="NAME", help="of the base model, before the names of modules")
    arguments.add_argument("--rows-per-unit", type=int, metavar="N", help="examples of a unit; without it, of 64 MiB")
    wanted = arguments.read(args)
    with bar("import", read_index(wanted.index).n_items, "rows") as progress:
        settings = {"base": wanted.base, "rows_per_unit": wanted.rows_per_unit}
        made = bring(wanted.index, wanted.dir, **settings, progress=progress)
    print(f"{len(open_dataset(made))} rows: {made}")
    return OK


def push(args: list[str]) -> int:
    """Upload a dataset to the Hugging Face hub."""
    arguments = Arguments("push", "Upload a dataset to the Hugging Face hub.", "a dataset folder and a repository")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    arguments.add_argument("repo", metavar="REPO", help="user/name; made if it isn't there")
    arguments.add_argument("--private", action="store_true", default=None, help="a new repository is private")
    arguments.add_argument("--revision", metavar="BRANCH", help="the branch; without it, main")
    arguments.add_argument("--partial", action="store_true", help="the units that are there, although some are missing")
    wanted = arguments.read(args)
    dataset = open_dataset(wanted.dir, partial=wanted.partial)
    if isinstance(dataset, MergedDataset):
        got, remedy = f"{len(dataset.sources)} that were merged in {wanted.dir}", "Push each of them, or export them."
        raise dataset_error("push", "DIR", "be the folder of one dataset", got, remedy)
    with _connected():
        url = dataset.push_to_hub(wanted.repo, private=wanted.private, revision=wanted.revision)
    print(f"{len(dataset)} rows: {url}")
    return OK


def pull(args: list[str]) -> int:
    """Download a dataset from the Hugging Face hub into a folder."""
    arguments = Arguments("pull", "Download a dataset from the Hugging Face hub.", "a repository and a new folder")
    arguments.add_argument("repo", metavar="REPO", help="user/name")
    arguments.add_argument("dir", metavar="DIR", help="the folder; one from a pull that was cut short is continued")
    arguments.add_argument("--revision", metavar="REVISION", help="a branch, a tag or a commit; without it, main")
    wanted = arguments.read(args)
    with _connected():
        download(wanted.repo, wanted.revision, to=wanted.dir)
    dataset = open_dataset(wanted.dir, partial=True)
    missing = dataset.plan.n_units - len(dataset.units)
    print(f"{len(dataset)} rows{f', {missing} units are missing' if missing else ''}: {wanted.dir}")
    return OK


@contextmanager
def _connected() -> Iterator[None]:
    """Make an OSError, which ends a command in one line, of what the hub's HTTP library raises without a network."""
    try:
        with redirect_stdout(sys.stderr):  # nothing but the answer goes to stdout
            yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES and not isinstance(error, OSError):
            raise ConnectionError(f"the hub can't be reached: {error}") from error
        raise


def report(args: list[str]) -> int:
    """Write a page about a dataset."""
    arguments = Arguments("report", "Write an HTML page about a dataset, complete or not.")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    arguments.add_argument("--out", metavar="PAGE", help="the page; without it, DIR-report.html")
    arguments.add_argument("--tokenizer", metavar="NAME", help="a folder or a name on the hub; to decode texts")
    arguments.add_argument("--found", metavar="FILE", help="of tlfast score --out FILE.parquet: shown with their text")
    wanted = arguments.read(args)
    n_rows = len(open_dataset(wanted.dir, partial=True))
    with bar("report", n_rows, "rows") as progress:
        options = {"tokenizer": wanted.tokenizer, "found": wanted.found}
        made = write_report(wanted.dir, wanted.out, **options, progress=progress)
    print(f"{n_rows} rows: {made}")
    return OK
