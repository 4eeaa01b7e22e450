"""Writes the tables of README.md and docs/numbers.md from the results of one machine and one commit.

`python -m bench.numbers [MACHINE]`: MACHINE is how the names of the results end; the default is this processor's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from tlfast.errors import broken_rule

from .measure import CHANGED, cpu_model, slug
from .quoted import QUOTED, Results, Unquotable, lines
from .report import RESULTS

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "numbers.md"
BEGIN, END = "<!-- numbers -->", "<!-- /numbers -->"
SAME = ("cpu", "cores", "simd", "threads", "python", "torch", "commit")  # of one machine and one commit


def origin(result: dict) -> tuple:
    """The machine and the commit of a result; None where it says nothing."""
    return tuple(result["machine"].get(fact) for fact in SAME)


def origins(results: Results) -> dict[tuple, list[str]]:
    """Each machine and commit, with the benches that were run there."""
    found: dict[tuple, list[str]] = {}
    for name in QUOTED:
        found.setdefault(origin(results[name]), []).append(name)
    return found


def load(paths: dict[str, Path]) -> Results:
    """The results of the quoted benches."""
    missing = [path.name for path in paths.values() if not path.exists()]
    if missing:
        raise Unquotable(broken_rule(
            "bench.numbers", "bench/results", "have a file for each quoted bench of this machine",
            f"none called {', '.join(missing)}", "`make numbers` measures all of them."
        ))  # fmt: skip
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}


def check(results: Results) -> None:
    """Refuse figures that don't belong together, or that no commit makes again."""
    found = origins(results)
    commits = [dict(zip(SAME, facts, strict=True))["commit"] or "" for facts in found]
    if len(found) != 1 or not commits[0] or commits[0].endswith(CHANGED):
        raise Unquotable(broken_rule(
            "bench.numbers", "results", "come from one machine and one commit",
            "; ".join(f"{', '.join(names)}: {_told(facts)}" for facts, names in found.items()),
            "Run `make numbers` in a clean checkout."
        ))  # fmt: skip


def _told(facts: tuple) -> str:
    cpu, cores, simd, threads, python, torch, commit = facts
    made = (
        f"commit {commit[:12]}{CHANGED if commit.endswith(CHANGED) else ''}" if commit else "a commit that wasn't noted"
    )
    return f"{cpu}, {cores} cores, {simd}, threads: {threads}, Python {python}, torch {torch}, {made}"


def _where(results: Results) -> list[str]:
    found = origins(results)
    if len(found) == 1:
        return [f"All of these are from one machine and one commit: {_told(next(iter(found)))}."]
    return [
        "**These figures are from more than one machine and from older code; they are to be measured again.**",
        "",
        *(f"- {', '.join(f'`{name}`' for name in names)}: {_told(facts)}." for facts, names in found.items()),
    ]


def _table(*rows: tuple[str, ...]) -> list[str]:
    head, *others = rows
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *others)]


def _missed(results: Results) -> list[str]:
    missed = [(name, claim) for name in QUOTED for claim in results[name]["claims"] if not claim["met"]]
    said = [f"- `{name}`: {claim['what']}: {claim['figure']:.4g}{claim['unit']}, target {claim['sense']} "
            f"{claim['target']:g}{claim['unit']}" for name, claim in missed]  # fmt: skip
    return ["Targets that were missed:", "", *said] if said else ["No target was missed."]


def tables(results: Results, paths: dict[str, Path]) -> dict[Path, str]:
    """What each page shows between its marks."""
    found = lines(results)
    few = _table(
        ("what is measured: without tlfast", "without", "with tlfast"),
        *((line.readme, line.beside, line.tlfast) for line in found if line.readme),
    )
    all_ = _table(
        ("bench", "what is measured: beside it", "beside it", "tlfast"),
        *((f"`{line.bench}`", line.what, line.beside or "-", line.tlfast) for line in found),
    )
    files = ", ".join(f"[{name}]({os.path.relpath(paths[name], PAGE.parent)})" for name in QUOTED)
    return {
        README: "\n".join([*few, "", *_where(results)]),
        PAGE: "\n".join([*all_, "", *_where(results), "", f"The files: {files}.", "", *_missed(results)]),
    }


def between(text: str) -> tuple[str, str, str]:
    """A page before its numbers, the numbers, and what follows."""
    before, begin, rest = text.partition(f"{BEGIN}\n")
    shown, end, after = rest.partition(f"\n{END}")
    if not begin or not end or BEGIN in after:
        raise Unquotable(broken_rule(
            "bench.numbers", "a page", f"have its numbers between one {BEGIN} and one {END}, each in a line of its own",
            "others", "Put the marks back."
        ))  # fmt: skip
    return before + begin, shown, end + after


def write(results: Results, paths: dict[str, Path]) -> None:
    """Put the tables into the pages."""
    for page, shown in tables(results, paths).items():
        before, _, after = between(page.read_text(encoding="utf-8"))
        page.write_text(before + shown + after, encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Write both tables, or say in a line why not, with status 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.numbers", description=__doc__)
    parser.add_argument("machine", nargs="?", default=slug(cpu_model()), metavar="MACHINE")
    machine = parser.parse_args(arguments).machine
    paths = {name: RESULTS / f"{name}-{machine}.json" for name in QUOTED}
    try:
        results = load(paths)
        check(results)
        write(results, paths)
    except Unquotable as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    print(f"written: {', '.join(str(page.relative_to(ROOT)) for page in (README, PAGE))}")


if __name__ == "__main__":
    main()
