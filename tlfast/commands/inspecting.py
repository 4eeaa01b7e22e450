"""`tlfast info`, `tlfast verify` and `tlfast doctor`: what is there, and whether it is right."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

from ..collecting.settings import load_settings
from ..dataset import DatasetError, Repair, open_dataset, repair_dataset, verify_dataset
from ..dataset.errors import NoDataset
from ..dataset.format.commits import file_sizes
from ..dataset.format.coverage import Part, completeness
from ..dataset.format.description import CONFIG
from ..dataset.format.layout import notes_of
from ..dataset.format.merged import stores_of
from .arguments import FAILED, OK, Arguments
from .bar import bar
from .doctor import diagnose


def info(args: list[str]) -> int:
    """Print what is inside a dataset."""
    arguments = Arguments("info", "What is inside a dataset.")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder, or its URL")
    arguments.add_argument("--json", action="store_true", help="one JSON object, for programs")
    wanted = arguments.read(args)
    ds = open_dataset(wanted.dir, partial=True)
    info = ds.info()
    # The list of those left out can be long; they are counted below.
    info["header"] = info["header"] | ({"examples": info["examples"]} if info["examples"] else {})
    reasons = Counter(reason for _, _, reason in ds.skipped)
    parts = [part for source in ds.sources for part in completeness(source.plan, source.units)]
    if wanted.json:
        info = {"parts": [part._asdict() for part in parts]} | info | {"skipped": dict(reasons)}
        print(json.dumps(info, indent=1, allow_nan=False))
    else:
        _show(info, reasons, parts)
    return OK


def _command_for(path: str) -> str | None:
    """The command that completes a dataset, where `tlfast collect` began it; None where a program of a user's did."""
    config = f"{path.rstrip('/')}/{CONFIG}"
    try:
        load_settings(config)
    except (ImportError, OSError, ValueError):  # empty, or what another program kept there
        return None
    return f"tlfast collect {shlex.quote(config)}"


def _show(info: dict[str, Any], reasons: Counter[str], parts: list[Part]) -> None:
    header, absent = info["header"], info["planned_units"] - info["units"]
    print(f"{info['path']}: {info['rows']} of {info['planned_rows']} rows in {info['units']} units")
    print(f"size          {info['bytes'] / 1e6:.1f} MB, {info['non_finite_rows']} rows with non-finite values")
    for part in info.get("parts", []):
        print(f"{_plain(part['path'])}: {part['rows']} of {part['planned_rows']} rows in {part['units']} units")
    for number, rows, planned_rows, units, planned_units in parts if len(parts) > 1 and "parts" not in info else []:
        name = f"extension {number}" if number else "first plan"
        print(f"{name:<13} {rows} of {planned_rows} rows in {units} of {planned_units} units")
    if reasons:
        print(f"skipped       {_reasons(reasons)}")
    if absent:
        command = _command_for(info["path"])
        maker = f"`{command}`" if command else "the program that wrote it, run again,"
        print(f"incomplete    {absent} units are missing; {maker} makes them")
    for part in ("model", "tokenizer", "specs", "loss", "batching", "text", "examples", "grad_scale"):
        if part in header:
            print(f"{part:<13} {_line(header[part])}")
    if "kept" in info:
        print(f"kept          {_line(info['kept'])}")
    print(f"made          {_line(info['about'])}")
    shapes = [(_plain(name), _stored(point, info), name) for name, point in info["points"].items()]
    widths = [max(len(shape[k]) for shape in shapes) for k in (0, 1)]
    for plain, shape, name in shapes:
        print(f"  {plain:<{widths[0]}}  {shape:<{widths[1]}}  {_plain(info['holds'][name])}")


def _stored(point: dict[str, Any], info: dict[str, Any]) -> str:
    kind = {key: point[key] for key in ("of", "per", "encoding") if key in point}
    n_rows = info["tokens"] if kind.get("per") == "token" else info["rows"]
    return f"{point['dtype']} {[n_rows, *point['shape']]}{_plain(notes_of(**kind))}"


def _reasons(reasons: Counter[str], most: int = 3) -> str:
    counts = reasons.most_common()
    named = [f"{n} {_short(reason)}" for reason, n in counts[:most]]
    return ", ".join(named + ([f"{sum(n for _, n in counts[most:])} for other reasons"] if len(counts) > most else []))


def _short(reason: str) -> str:
    plain = _plain(reason)
    return plain if len(plain) <= 60 else f"{plain[:59]}\u2026"


def _plain(text: str) -> str:
    # What a dataset says is shown; what would move the cursor or colour the terminal is not.
    return "".join(c if c.isprintable() else "?" for c in text)


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_plain(key)} {_line(part)}" for key, part in value.items() if part is not None)
    if isinstance(value, list):
        return " ".join(_line(part) for part in value)
    text = str(value)
    return text[:12] if len(text) == 64 else _plain(text)  # a fingerprint


def verify(args: list[str]) -> int:
    """Re-read every byte of a dataset; with --repair, drop what is damaged."""
    arguments = Arguments("verify", "Re-read every byte of a dataset against its checksum.")
    arguments.add_argument("dir", metavar="DIR", help="the dataset's folder")
    arguments.add_argument("--repair", action="store_true", help="drop damaged units, so that the next run makes them")
    wanted = arguments.read(args)
    try:
        stores_of(wanted.dir, "tlfast verify")
    except NoDataset:
        raise
    except DatasetError:
        pass  # which is what verify is for
    with bar("verify", _n_bytes(wanted.dir), "B") as progress:
        report = (repair_dataset if wanted.repair else verify_dataset)(wanted.dir, progress=progress)
    print(report)
    if isinstance(report, Repair) and report.dropped:
        print(f"to make them again: {_command_for(wanted.dir) or 'run the program that wrote it again'}")
    return OK if report.ok else FAILED


def _n_bytes(place: str) -> int:
    """The bytes to read, as far as the folder tells; what is wrong with it, verify says."""
    try:
        stores = stores_of(place, "verify")
        return sum(size or 0 for store in stores for size in file_sizes(store, "verify").values())
    except (DatasetError, OSError):
        return 0


def doctor(args: list[str]) -> int:
    """Print what runs on this machine."""
    Arguments("doctor", "What runs here, and what is missing.", "left out").read(args)
    for line in diagnose():
        print(line)
    return OK
