"""`tlfast export`: a dataset in the form that somebody else reads."""

from __future__ import annotations

from ..dataset import export_dataset, open_dataset
from ..dataset.export_formats import FORMATS
from ..points import match_names
from .arguments import OK, Arguments
from .bar import bar


def export(args: list[str]) -> int:
    """Write a dataset in another format."""
    arguments = Arguments("export", "Write a dataset in another format.", "a dataset folder and --to FORMAT")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    arguments.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    arguments.add_argument("--out", metavar="PATH", help="the new file or folder; without it, beside DIR")
    arguments.add_argument("--points", nargs="+", metavar="GLOB", help="the points to export; without it, all")
    arguments.add_argument("--partial", action="store_true", help="the units that are there, although some are missing")
    wanted = arguments.read(args)
    points, n_rows = None, 0
    if wanted.to in FORMATS:  # else export_dataset says it
        dataset = open_dataset(wanted.dir, partial=wanted.partial)
        n_rows = len(dataset)
        if wanted.points is not None:
            points = match_names("tlfast export", dataset.points, wanted.points)
    with bar("export", n_rows, "rows") as progress:
        options = {"to": wanted.to, "points": points, "partial": wanted.partial}
        made = export_dataset(wanted.dir, wanted.out, **options, progress=progress)
    print(f"{n_rows} rows: {made}")
    return OK
