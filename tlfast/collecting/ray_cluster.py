"""`tlfast collect --engine ray`: workers on a Ray cluster, each with the model loaded once, and one task per unit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..dataset import open_dataset
from ..dataset.errors import extra
from ..errors import broken_rule
from .checks import check_peaceful
from .from_text import Collection
from .huggingface import check_model_name
from .progress import Progress, Report
from .settings import RAY, CollectSettings
from .unit_queue import share_of, units_in

RETRIES = 3  # of a task whose process died: Ray's own default
_LOOK_EVERY_S = 1.0  # for the progress
COPIES = 2  # processes at one unit at the end, when others have nothing to do and its first may be lost


class Worker:
    """What runs in a process of the cluster. Of a unit nothing but its number and a report travels through Ray.

    Any of its processes may die at any time: Ray starts another and asks it again.
    """

    def __init__(self, settings: CollectSettings, made_by: str) -> None:
        self._settings, self._made_by = replace(settings, engine="local", **RAY), made_by
        self._loaded: Collection | None = None

    def prepare(self) -> tuple[int, dict[int, int]]:
        """Load the model and begin the dataset; return the rows asked for, and number -> rows of each missing unit."""
        self._collect("0:0")
        there = open_dataset(self._settings.out, partial=True)
        done = {unit.name for unit in there.units}
        asked = [(k, there.plan.unit(k)) for k in units_in(self._settings.units, there.plan.n_units)]
        return sum(len(u) for _, u in asked), {k: len(unit) for k, unit in asked if unit.name not in done}

    def collect(self, number: int) -> Report:
        """Make one unit; none of its rows is in the report."""
        return self._collect(f"{number}:{number + 1}")

    def _collect(self, units: str) -> Report:
        if self._loaded is None:
            self._loaded = Collection(self._settings)
        return self._loaded.collect(replace(self._settings, units=units), self._made_by, progress=False)


def collect_with_ray(settings: CollectSettings, made_by: str) -> Report:
    """As `collect_text`, in workers of the Ray cluster at RAY_ADDRESS, or of one that is started on this machine.

    All nodes must see the model, the text and ``out`` under the same names. This process loads nothing.

    Raises:
        ValueError: for bad settings, and for what a worker refuses.
        RuntimeError: for a unit whose workers die again and again.
        KeyboardInterrupt: as `collect`.
    """
    settings.check()
    check_peaceful(settings.overwrite, settings.resume)
    check_model_name(settings.model)
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
        cluster = Cluster(ray, settings, made_by)
        try:
            return cluster.run()
        finally:
            if not ours:
                cluster.close()
    finally:
        if ours:
            ray.shutdown()  # which ends the workers too


def start(ray: Any) -> None:
    """Connect to the cluster at RAY_ADDRESS, or start one of this machine alone, which tells nobody of it."""
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="warning", log_to_driver=False)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(address="local", include_dashboard=False, logging_level="warning", log_to_driver=False)


class Cluster:
    """The workers of one run, and which unit each of them is at."""

    def __init__(self, ray: Any, settings: CollectSettings, made_by: str) -> None:
        self._ray, self._settings = ray, settings
        room = ray.cluster_resources()
        self._gpus = settings.ray_gpus
        if self._gpus < 0:
            self._gpus = int(settings.device != "cpu" and room.get("GPU", 0) >= 1)
        for name, kind, wanted in (("ray_cpus", "CPU", settings.ray_cpus), ("ray_gpus", "GPU", self._gpus)):
            there = int(room.get(kind, 0))
            if wanted > there and not os.environ.get("RAY_ADDRESS"):  # a cluster elsewhere may grow
                remedy = "No worker could ever start."
                raise ValueError(broken_rule("collect", name, f"be at most {there}, what is here", wanted, remedy))
        self._room = max(1, int(room.get("CPU", 1)) // settings.ray_cpus)
        if self._gpus:
            self._room = max(1, min(self._room, int(room.get("GPU", 0)) // self._gpus))
        self._make = ray.remote(Worker).options(
            num_cpus=settings.ray_cpus, num_gpus=self._gpus, max_restarts=-1, max_task_retries=RETRIES
        )
        self._arguments = (settings, made_by)
        self._workers: list[Any] = []
        self._at: dict[Any, tuple[Any, int | None]] = {}  # a task: its worker, and its unit; None prepares

    def run(self) -> Report:
        """Make all missing units."""
        self._add_workers(1)
        (task,) = self._at
        n_asked, rows = self._result(task)  # the first begins the dataset, before others find it
        first, _ = self._at.pop(task)
        self._add_workers(min(self._settings.ray_workers or self._room, len(rows)) - 1)
        n_before, reports = n_asked - sum(rows.values()), dict[int, Report]()
        try:
            with Progress(n_asked, n_before) as shown:
                self._take(first, rows, reports, shown)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{len(reports)} more units are kept in {self._settings.out}") from None
        return _total(self._settings.out, n_before, sum(rows.values()), list(reports.values()), shown.time_s)

    def close(self) -> None:
        """End the workers, also those that are at a copy of a unit, or wait for room."""
        for worker in self._workers:
            self._ray.kill(worker)

    def _add_workers(self, n: int) -> None:
        for _ in range(n):
            worker = self._make.remote(*self._arguments)
            self._workers.append(worker)
            self._at[worker.prepare.remote()] = (worker, None)

    def _take(self, first: Any, rows: dict[int, int], reports: dict[int, Report], shown: Progress) -> None:
        queue = iter(rows)
        self._next(first, queue, reports)
        while len(reports) < len(rows):
            done, _ = self._ray.wait(list(self._at), num_returns=1, timeout=_LOOK_EVERY_S)
            shown.step(0, 0)
            for task in done:
                result = self._result(task)
                worker, number = self._at.pop(task)
                if number is not None and number not in reports:
                    reports[number] = result
                    shown.n_bytes += result.n_bytes
                    shown.n_nonfinite += result.n_nonfinite_rows
                    shown.n_saturated += result.n_saturated
                    shown.step(rows[number], result.n_tokens)
                self._next(worker, queue, reports)

    def _next(self, worker: Any, queue: Iterator[int], reports: dict[int, Report]) -> None:
        """Give a worker a unit: the next one, else one of another worker, whose node may be gone for good."""
        number = next(queue, None)
        if number is None:
            at = Counter(unit for _, unit in self._at.values() if unit is not None and unit not in reports)
            number = next((unit for unit, n in at.items() if n < COPIES), None)
        if number is not None:
            self._at[worker.collect.remote(number)] = (worker, number)

    def _result(self, task: Any) -> Any:
        """What a task returned; else an error that names its unit."""
        _, number = self._at[task]
        what = "" if number is None else f"unit u{number:06d}: "
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayTaskError as error:
            # As without Ray, so that the command line says it in a line, and with the same exit code.
            for kind in (OSError, FloatingPointError, ValueError, TypeError, ImportError):
                if isinstance(error.cause, kind):
                    raise kind(f"{what}{error.cause}") from error
            raise RuntimeError(f"{what}{error.cause!r}") from error
        except self._ray.exceptions.RayActorError as error:
            got = f"one that died {RETRIES + 1} times: {' '.join(str(error).split())}"
            remedy = "See the logs of Ray; what is finished is kept."
            text = broken_rule("collect", "the worker of a unit", "live until it is done", got, remedy)
            raise OSError(f"{what}{text}") from error


def _total(out: str, n_before: int, n_missing: int, reports: Sequence[Report], time_s: float) -> Report:
    """The reports of all units as that of one run.

    A worker may die when its unit is committed and its report isn't given yet: whoever is asked next finds the unit
    there. All rows that were missing are there at the end, so those that no report has were made by another process.
    """

    def add(name: str) -> Any:
        return sum(getattr(report, name) for report in reports)

    return Report(
        out=out, n_rows=add("n_rows"), n_rows_before=n_before, n_units=add("n_units"), n_tokens=add("n_tokens"),
        n_bytes=add("n_bytes"), n_nonfinite_rows=add("n_nonfinite_rows"), n_saturated=add("n_saturated"),
        time_s=time_s, waited_s=add("waited_s"), n_rows_elsewhere=n_missing - add("n_rows"),
        n_skipped=max((report.n_skipped for report in reports), default=0),
        non_finite=tuple(row for report in reports for row in report.non_finite)[:5],
    )  # fmt: skip
