"""`tlfast collect --engine ray`: tasks on a Ray cluster that each collect for themselves, as torchrun's ranks do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..dataset.errors import DatasetError, extra
from ..dataset.format.commits import Commit, committed_names, read_commit, read_folder
from ..dataset.format.description import read_description
from ..dataset.format.plan import Unit
from ..dataset.places.remote import url_of
from ..dataset.write.unit_folder import sweep
from ..errors import broken_rule
from .checks import check_peaceful
from .from_text import Collection
from .huggingface import base_and_adapter, check_model_name
from .progress import Progress, Report
from .resume import has_units
from .settings import RAY, CollectSettings
from .unit_queue import share_of, units_in

RETRIES = 3  # of a task whose process died: Ray's own default
LOOK_EVERY_S = 1.0  # for new commits
GRACE_S = 2.0  # for the reports of the other tasks when the first finds nothing left, and for them to end

Share = tuple[int, int]  # (index, count)
Done = tuple[Report, dict[str, int]]  # and the tokens of each unit


def work(settings: CollectSettings, made_by: str, share: Share) -> Done:
    """What one task does: its share of the units, then whatever is left.

    Gradients go from here to ``out``. The process may die at any time: Ray starts the task again in another one.
    """
    loaded = Collection(settings)
    run = loaded.run(settings, made_by, progress=False, share=share)
    report = run.collect()
    units = read_description(settings.out, "collect").plan.units
    return report, {unit.name: sum(e.length for e in run.examples[unit.start : unit.stop]) for unit in units}


def collect_with_ray(settings: CollectSettings, made_by: str) -> Report:
    """As `collect_text`, in tasks on the Ray cluster at RAY_ADDRESS, or on one that is started on this machine.

    All nodes must see the model, the text and ``out`` under the same names. This process loads nothing: it counts
    commits. So what other processes commit to ``out`` meanwhile stands in the report as if it were Ray's; tokens are
    those of the committed units, and saturated values, seconds of waiting and the first non-finite rows those of the
    tasks that were done when the first found nothing left.

    Raises:
        ValueError: for bad settings, and for what a task refuses.
        OSError: where a process dies again and again.
        KeyboardInterrupt: as `collect`.
    """
    settings.check()
    check_peaceful(settings.overwrite, settings.resume)
    check_model_name(base_and_adapter(settings.model, settings.adapter)[0])
    if share_of().count > 1:
        remedy = "Start one process; Ray starts the others."
        raise ValueError(broken_rule("collect", "engine", "be local under torchrun", "'ray'", remedy))
    if settings.device.startswith("cuda:"):
        remedy = "Ray gives each worker GPUs of its own."
        raise ValueError(broken_rule("collect", "device", "be auto, cpu or cuda under Ray", settings.device, remedy))
    ray = extra("ray", "collect", "ray")
    ours = not ray.is_initialized()
    if ours:
        start(ray)
    try:
        return run(ray, settings, made_by)
    finally:
        if ours:
            ray.shutdown()  # which ends the tasks too
        if url_of(settings.out) is None:
            sweep(Path(settings.out))  # one that was ended by force may have left a part of a unit


def start(ray: Any) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one of this machine alone, which tells nobody of it."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning", log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, logging_level="warning", log_to_driver=False)


class Log:
    """The units asked for that have got a commit since this was made, whoever made it."""

    def __init__(self, out: str, units: str) -> None:
        self._out, self._range = out, units
        self._seen = set[str]()
        self._before = self._seen = self._names()
        self._asked: dict[str, Unit] = {}
        self.new: dict[str, Commit] = {}
        if self._before:
            self._read()

    @property
    def n_rows(self) -> int:
        """The rows asked for."""
        return sum(map(len, self._asked.values()))

    @property
    def n_rows_before(self) -> int:
        """Those of them that were there when this was made."""
        return sum(len(unit) for name, unit in self._asked.items() if name in self._before)

    @property
    def left(self) -> list[str]:
        """The units asked for that have no commit."""
        return [name for name in self._asked if name not in self._seen]

    def look(self) -> list[Commit]:
        """Read the commits that are new since the last look."""
        return [] if self._names() <= self._seen else self._read()

    def _names(self) -> set[str]:
        return set(committed_names(self._out, "collect")) if self._seen or has_units(self._out) else set()

    def _read(self) -> list[Commit]:
        description, names = read_folder(self._out, "collect")
        plan = description.plan
        self._asked = {unit.name: unit for unit in map(plan.unit, units_in(self._range, plan.n_units))}
        new = [name for name in names if name in self._asked and name not in self._seen]
        commits = [read_commit(self._out, name, description, "collect") for name in new]
        self.new.update(zip(new, commits, strict=True))
        self._seen = self._seen.union(names)
        return commits


class Died(OSError):
    """The process of a task died as often as Ray starts it."""


def run(ray: Any, settings: CollectSettings, made_by: str) -> Report:
    """Start the tasks, wait until one of them finds nothing left, and end the others."""
    log, begun = Log(settings.out, settings.units), time.monotonic()
    task_with, count = _room(ray, settings)
    if log.n_rows and not settings.extend:
        count = min(count, max(1, len(log.left)))
    new_task = partial(task_with.remote, replace(settings, engine="local", **RAY), made_by)
    tasks = {new_task((index, count)): (index, count) for index in range(count)}
    try:
        done = [_first(ray, tasks, new_task, log)]
        others = list(tasks)
        for task in ray.wait(others, num_returns=len(others), timeout=GRACE_S)[0] if others else ():
            with suppress(ray.exceptions.RayError):  # all is there that was asked for
                done.append(ray.get(task))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(log.new)} more units are kept in {settings.out}") from None
    finally:
        _end(ray, list(tasks))
    log.look()
    return _report(settings.out, log, done, time.monotonic() - begun)


def _room(ray: Any, settings: CollectSettings) -> tuple[Any, int]:
    """What starts a task, and how many are wanted: those for which the cluster has room now, unless it is said."""
    room = ray.cluster_resources()
    gpus = settings.ray_gpus
    if gpus < 0:
        gpus = int(settings.device != "cpu" and room.get("GPU", 0) >= 1)
    for name, kind, wanted in (("ray_cpus", "CPU", settings.ray_cpus), ("ray_gpus", "GPU", gpus)):
        there = int(room.get(kind, 0))
        if wanted > there and not os.environ.get("RAY_ADDRESS"):  # a cluster elsewhere may grow
            remedy = "No worker could ever start."
            raise ValueError(broken_rule("collect", name, f"be at most {there}, what is here", wanted, remedy))
    n = int(room.get("CPU", 1)) // settings.ray_cpus
    n = min(n, int(room.get("GPU", 0)) // gpus) if gpus else n
    task_with = ray.remote(work).options(num_cpus=settings.ray_cpus, num_gpus=gpus, max_retries=RETRIES)
    return task_with, settings.ray_workers or max(1, n)


def _first(ray: Any, tasks: dict[Any, Share], new_task: Callable[[Share], Any], log: Log) -> Done:
    """What the first task that ends returns; it finds nothing left. ``tasks`` are the others then."""
    n_then = 0
    with ExitStack() as stack:
        shown = Progress(0)
        while True:
            ended, _ = ray.wait(list(tasks), num_returns=1, timeout=LOOK_EVERY_S)
            with suppress(OSError, DatasetError):  # as long as it is begun, or can't be reached: the tasks will say
                _show(shown, log, stack)
            for task in ended:
                share = tasks.pop(task)
                try:
                    return _result(ray, task, log)
                except Died:
                    if len(log.new) == n_then:
                        raise
                n_then = len(log.new)  # all get on, with this one's share too: what kills may be the machines
                tasks[new_task(share)] = share


def _show(shown: Progress, log: Log, stack: ExitStack) -> None:
    commits = log.look()
    if not commits and not shown.n_examples:  # the tasks load the model
        return
    if not shown.n_examples:
        shown.n_examples, shown.n_before, shown.n_done = log.n_rows, log.n_rows_before, log.n_rows_before
        stack.enter_context(shown)
    shown.n_bytes += sum(commit.n_bytes for commit in commits)
    shown.n_nonfinite += sum(commit.non_finite for commit in commits)
    shown.step(sum(len(commit.unit) for commit in commits), 0)


def _result(ray: Any, task: Any, log: Log) -> Done:
    """What a task returned; its error as that of a run without Ray, so that the command line says it in a line."""
    try:
        result: Done = ray.get(task)
        return result
    except ray.exceptions.RayTaskError as error:
        for kind in (OSError, FloatingPointError, ValueError, TypeError, ImportError):
            if isinstance(error.cause, kind):
                raise kind(str(error.cause)) from error
        raise RuntimeError(repr(error.cause)) from error
    except ray.exceptions.RayError as error:
        left = f" with {', '.join(log.left[:3])} left" if log.left else ""
        got = f"one that died {RETRIES + 1} times{left}: {' '.join(str(error).split())}"
        remedy = "See the logs of Ray; what is finished is kept."
        raise Died(broken_rule("collect", "a worker", "live until no unit is left", got, remedy)) from error


def _end(ray: Any, tasks: list[Any]) -> None:
    """End tasks: one without room at once, one at work between two batches, or by force."""
    for task in tasks:
        ray.cancel(task)
    _, stuck = ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_S) if tasks else ([], [])
    for task in stuck:
        ray.cancel(task, force=True)


def _report(out: str, log: Log, done: list[Done], time_s: float) -> Report:
    reports, (_, tokens) = [report for report, _ in done], done[0]
    commits = log.new.values()
    return Report(
        out=out, n_rows=sum(len(commit.unit) for commit in commits), n_rows_before=log.n_rows_before,
        n_units=len(commits), n_tokens=sum(tokens[name] for name in log.new),
        n_bytes=sum(commit.n_bytes for commit in commits),
        n_nonfinite_rows=sum(commit.non_finite for commit in commits),
        n_saturated=sum(report.n_saturated for report in reports), time_s=time_s,
        waited_s=sum(report.waited_s for report in reports), n_rows_elsewhere=0, n_skipped=reports[0].n_skipped,
        non_finite=tuple(row for report in reports for row in report.non_finite)[:5], waits_for=reports[0].waits_for,
    )  # fmt: skip
