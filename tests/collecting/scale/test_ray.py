"""`tlfast collect --engine ray`: a worker is killed in the middle, and the bytes are those of one process."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import N_UNITS, WAIT_S, arguments, check_equal, n_commits, pids_with, started
from processes import wait_for_units as wait_for
from tiny_models import collect_words, complaint_of

import tlfast
from tlfast.cli import main
from tlfast.collecting import ray_cluster
from tlfast.collecting.from_text import Collection
from tlfast.collecting.progress import Report
from tlfast.collecting.ray_cluster import COPIES, Cluster, Worker
from tlfast.collecting.settings import CollectSettings, load_settings

SETTINGS = CollectSettings("model", ("text",), ("h.*",), "out", engine="ray")


def is_at_a_unit(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::Worker.collect")
    except OSError:  # gone
        return False


def test_a_worker_is_killed_and_ray_tries_again(undisturbed, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "tlfast", *arguments(undisturbed, out, "--engine", "ray")]
    with started(*command, TLFAST_TEST=str(tmp_path), RAY_ADDRESS="") as process:
        wait_for(process, out, 5)
        while not (at_work := [pid for pid in pids_with(TLFAST_TEST=tmp_path) if is_at_a_unit(pid)]):
            wait_for(process, out, 5)
        os.kill(at_work[0], signal.SIGKILL)
        assert n_commits(out) < N_UNITS, "the signal came too late to prove anything"
        shown, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    said = shown.splitlines()[-1]
    counts = re.match(r"(\d+) rows in \d+ units(?:, (\d+) by other processes)?,", said)
    assert counts is not None, said
    assert sum(int(n or 0) for n in counts.groups()) == 4 * N_UNITS, said
    check_equal(undisturbed, out)
    assert load_settings(out / "config.yaml").engine == "local", "another engine may go on"


class Failure(Exception):
    """What Ray raises for a task that raised."""

    def __init__(self, cause):
        super().__init__(cause)
        self.cause = cause


class Died(Exception):
    """What Ray raises for a worker that died too often."""


class FakeRay:
    """A cluster of one thread: `wait` ends the task that `choose` takes out of those that were asked for."""

    exceptions = SimpleNamespace(RayTaskError=Failure, RayActorError=Died)

    def __init__(self, n_units, resources=None, choose=lambda tasks: tasks[0], fails=None, lost=()):
        self.missing = dict.fromkeys(range(n_units), 10)
        self.resources, self.choose, self.fails = resources or {"CPU": 4.0}, choose, fails or {}
        self.lost = lost  # units that were committed, and their reports not given
        self.options_given, self.workers, self.started, self.killed = {}, [], [], []

    def cluster_resources(self):
        return self.resources

    def remote(self, kind):
        def options(**given):
            self.options_given = given
            return SimpleNamespace(remote=self.new_worker)

        assert kind is Worker
        return SimpleNamespace(options=options)

    def new_worker(self, settings, made_by):
        number = len(self.workers)
        worker = SimpleNamespace(
            prepare=SimpleNamespace(remote=lambda: self.task(number, None)),
            collect=SimpleNamespace(remote=lambda unit: self.task(number, unit)),
        )
        self.workers.append(worker)
        return worker

    def task(self, worker, unit):
        assert unit is None or type(unit) is int, "only numbers travel"
        self.started.append((worker, unit))
        return len(self.started) - 1

    def wait(self, tasks, num_returns, timeout):
        chosen = self.choose([(task, *self.started[task]) for task in tasks])
        return [chosen[0]], [task for task in tasks if task != chosen[0]]

    def get(self, task):
        unit = self.started[task][1]
        if unit in self.fails:
            raise self.fails[unit]
        if unit is None:
            return 10 * len(self.missing) + 5, dict(self.missing)
        if unit in self.lost:
            return Report(Path("out"), 0, 10, 0, 0, 0, 0, 0, 1.0, 0.0, 0, 2, ())
        return Report(Path("out"), 10, 0, 1, 100, 1000, 0, 0, 1.0, 0.0, 0, 2, ())

    def kill(self, worker):
        self.killed.append(worker)


def run(ray, **changes):
    return Cluster(ray, replace(SETTINGS, **changes), "tlfast").run()


def test_every_unit_is_one_task(capsys):
    ray = FakeRay(20)
    report = run(ray)
    units = [unit for _, unit in ray.started if unit is not None]
    assert sorted(set(units)) == list(range(20))
    assert len(units) <= 20 + len(ray.workers), "but for copies at the end"
    assert len(ray.workers) == 4
    assert (report.n_rows, report.n_rows_before, report.n_units, report.n_tokens) == (200, 5, 20, 2000)
    assert (report.n_bytes, report.n_skipped) == (20_000, 2)


def test_a_report_that_died_with_its_worker_is_counted():
    report = run(FakeRay(20, lost=(3, 7)))
    assert (report.n_rows, report.n_units, report.n_rows_elsewhere) == (180, 18, 20)


def test_a_worker_that_never_answers_holds_nothing_up():
    ray = FakeRay(12, choose=lambda tasks: next(task for task in tasks if task[1] != 2))
    assert run(ray).n_units == 12
    units = [unit for worker, unit in ray.started if unit is not None]
    assert max(map(units.count, units)) <= COPIES


def test_workers_that_get_no_room_are_not_waited_for():
    ray = FakeRay(6, choose=lambda tasks: next(task for task in tasks if task[1] == 0))
    assert run(ray, ray_workers=50).n_units == 6
    assert len(ray.workers) == 6, "no more than units"


def test_nothing_to_do():
    ray = FakeRay(0)
    assert (run(ray).n_rows, len(ray.workers)) == (0, 1)


@pytest.mark.parametrize(
    "resources, changes, cpus, gpus, workers",
    [
        ({"CPU": 8.0}, {}, 1, 0, 8),
        ({"CPU": 8.0}, {"ray_cpus": 3}, 3, 0, 2),
        ({"CPU": 8.0, "GPU": 2.0}, {}, 1, 1, 2),
        ({"CPU": 8.0, "GPU": 2.0}, {"device": "cpu"}, 1, 0, 8),
        ({"CPU": 8.0, "GPU": 4.0}, {"ray_gpus": 2}, 1, 2, 2),
        ({"CPU": 1.0}, {"ray_cpus": 4}, 4, 0, 1),
        ({"node": 1.0}, {"ray_workers": 3}, 1, 0, 3),
    ],
)
def test_workers_ask_for_what_they_need(monkeypatch, resources, changes, cpus, gpus, workers):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster that may grow
    ray = FakeRay(20, resources)
    run(ray, **changes)
    given = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": ray_cluster.RETRIES}
    assert (ray.options_given, len(ray.workers)) == (given, workers)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"ray_cpus": 5}, "ray_cpus must be at most 4, what is here, got 5. No worker could ever start."),
        ({"ray_gpus": 1}, "ray_gpus must be at most 0, what is here, got 1. No worker could ever start."),
    ],
)
def test_a_worker_that_can_never_start_is_refused(monkeypatch, changes, text):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=re.escape(text)):
        run(FakeRay(20), **changes)


@pytest.mark.parametrize(
    "failure, kind, text",
    [
        (Failure(OSError("disk: broken")), OSError, "unit u000003: disk: broken"),
        (Failure(ValueError("collect: a must b")), ValueError, "unit u000003: collect: a must b"),
        (Failure(RuntimeError("odd")), RuntimeError, r"unit u000003: RuntimeError\('odd'\)"),
        (Died("gone"), OSError, "unit u000003: collect: the worker of a unit must live until it is done, got one that"),
    ],
)
def test_a_failure_names_its_unit(failure, kind, text):
    with pytest.raises(kind, match=text):
        run(FakeRay(6, fails={3: failure}))


def test_what_is_refused_at_the_start_is_said_as_it_is():
    with pytest.raises(ValueError, match=r"^collect: points must match"):
        run(FakeRay(6, fails={None: Failure(ValueError("collect: points must match"))}))


def test_ctrl_c_says_what_is_kept():
    def choose(tasks):
        if any(unit == 3 for _, _, unit in tasks):
            raise KeyboardInterrupt
        return tasks[0]

    with pytest.raises(KeyboardInterrupt, match="more units are kept in out"):
        run(FakeRay(6, choose=choose))


def test_a_worker_loads_once_and_begins_the_dataset(undisturbed, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(ray_cluster, "Collection", lambda settings: loaded.append(1) or Collection(settings))
    words = arguments(undisturbed, tmp_path / "out")
    settings = dict(zip((word[2:].replace("-", "_") for word in words[1::2]), words[2::2], strict=True))
    numbers = {name: int(value) for name, value in settings.items() if value.isdecimal()}
    lists = {name: (settings[name],) for name in ("text", "points")}
    worker = Worker(CollectSettings(**settings | numbers | lists, units="2:5", engine="ray"), "tlfast")
    assert worker.prepare() == (12, {2: 4, 3: 4, 4: 4})
    assert worker.collect(3).n_rows == 4
    assert worker.prepare() == (12, {2: 4, 4: 4})
    assert loaded == [1]
    assert [unit.name for unit in tlfast.open_dataset(tmp_path / "out", partial=True).units] == ["u000003"]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"device": "cuda:1"}, "device must be auto, cpu or cuda under Ray, got cuda:1. Ray gives each worker GPUs of"),
        ({"engine": "slurm"}, "engine must be one of local, ray, got 'slurm'"),
        ({"ray_cpus": "0"}, "ray_cpus must be at least 1, got 0"),
        ({"model": "/nowhere/model"}, "model must be a folder or a name on the hub"),
        ({"resume": "never"}, 'resume must be "auto" or "must" where several processes collect, got "never"'),
    ],
)
def test_bad_settings_start_no_cluster(undisturbed, tmp_path, capsys, monkeypatch, change, text):
    monkeypatch.setattr(ray_cluster, "start", lambda ray: pytest.fail("a cluster is started"))
    words = collect_words(undisturbed, **{"engine": "ray", "out": str(tmp_path / "out")} | change)
    assert text in complaint_of(capsys, ["collect", *words])
    assert main(["collect", *words, "--overwrite"]) == 2


def test_ranks_start_no_cluster(undisturbed, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["collect", *collect_words(undisturbed, engine="ray", out=str(tmp_path / "out"))]) == 2
    assert "engine must be local under torchrun, got 'ray'. Start one process; Ray" in capsys.readouterr().err


def test_where_ray_is_found(monkeypatch):
    given = []
    fake = SimpleNamespace(init=lambda **settings: given.append(settings))
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "ray-head:6379")
    ray_cluster.start(fake)
    assert "RAY_USAGE_STATS_ENABLED" not in os.environ, "another's cluster is left as it is"
    monkeypatch.setenv("RAY_ADDRESS", "")
    ray_cluster.start(fake)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert [settings.get("address") for settings in given] == [None, "local"]
    assert given[1]["include_dashboard"] is False
