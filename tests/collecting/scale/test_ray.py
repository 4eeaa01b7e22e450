"""`tlfast collect --engine ray`: a worker is killed in the middle, and the bytes are those of one process."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import N_UNITS, WAIT_S, arguments, check_equal, n_commits, pids_with, started
from processes import wait_for_units as wait_for
from tiny_models import collect_words, complaint_of

import tlfast
from tlfast.cli import main
from tlfast.collecting import progress, ray_cluster
from tlfast.collecting.progress import Report
from tlfast.collecting.ray_cluster import work
from tlfast.collecting.settings import CollectSettings, load_settings
from tlfast.collecting.unit_queue import Share
from tlfast.dataset import DatasetWriter, Example, Plan

SETTINGS = CollectSettings("model", ("text",), ("h.*",), "out", engine="ray")


def is_at_work(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::work")
    except OSError:  # gone
        return False


@pytest.mark.long
def test_a_worker_is_killed_and_ray_tries_again(undisturbed, tmp_path):
    out = tmp_path / "out"
    command = ["-m", "tlfast", *arguments(undisturbed, out, "--engine", "ray")]
    with started(*command, TLFAST_TEST=str(tmp_path), RAY_ADDRESS="") as process:
        wait_for(process, out, 5)
        while not (at_work := [pid for pid in pids_with(TLFAST_TEST=tmp_path) if is_at_work(pid)]):
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


class Gone(Exception):
    """What Ray raises for a task whose processes died, and the base of what it raises."""


class Failure(Gone):
    """What Ray raises for a task that raised."""

    def __init__(self, cause):
        super().__init__(cause)
        self.cause = cause


class FakeRay:
    """A cluster of one thread: each `wait` lets one task make one unit, the one that ``choose`` takes.

    ``fails`` says what a task raises when it is at a unit. When one has found nothing left, those ``late`` answer too,
    and all but those ``stuck`` end when they are told.
    """

    exceptions = SimpleNamespace(RayTaskError=Failure, RayError=Gone)

    def __init__(self, out, n_units=6, resources=None, choose=min, fails=None, late=(), stuck=()):
        self.out, self.plan = out, Plan(10 * n_units, 10)
        self.resources, self.choose, self.fails = resources or {"CPU": 4.0}, choose, fails or {}
        self.late, self.stuck = late, stuck
        self.options_given, self.shares, self.cancelled, self.raised = {}, [], [], {}

    def cluster_resources(self):
        return self.resources

    def remote(self, function):
        def options(**given):
            self.options_given = given
            return SimpleNamespace(remote=self.new_task)

        assert function is work
        return SimpleNamespace(options=options)

    def new_task(self, settings, made_by, share):
        assert (settings.engine, settings.ray_workers) == ("local", 0), "config.yaml says how to go on without Ray"
        self.shares.append(share)
        return len(self.shares) - 1

    def make(self, *names):
        """Commit these units."""
        writer = DatasetWriter(self.out, header={}, columns={"loss": (torch.float32, ())}, plan=self.plan)
        for unit in self.plan.units:
            if unit.name in names:
                values = torch.arange(unit.start, unit.stop, dtype=torch.float32)
                values[:2] = torch.nan
                ids = range(unit.start, unit.stop)
                writer.write_unit(unit, {"loss": values}, [Example(i, [1, 2], "", 0, 2) for i in ids])

    def wait(self, tasks, num_returns, timeout):
        assert tasks, "Ray refuses to wait for nothing"
        if timeout == ray_cluster.GRACE_S:
            ended = [t for t in tasks if t in self.late or ((t, False) in self.cancelled and t not in self.stuck)]
        else:
            task = self.choose(tasks)
            if task is None:
                return [], tasks
            committed = {path.stem for path in Path(self.out).glob("commits/*")}
            order = [unit.name for unit in Share(*self.shares[task]).ordered(self.plan.units)]
            name = next((name for name in order if name not in committed), None)
            if name in self.fails:
                self.raised[task] = self.fails[name]
            elif name is not None:
                self.make(name)
            ended = [task] if name is None or task in self.raised else []
        return ended, [task for task in tasks if task not in ended]

    def get(self, task):
        if task in self.raised:
            raise self.raised[task]
        report = Report(Path("out"), 10, 0, 1, 100, 1000, 0, 7, 1.0, 0.5, 0, 2, ())
        return report, {unit.name: 20 for unit in self.plan.units}

    def cancel(self, task, force=False):
        self.cancelled.append((task, force))


def run(ray, **changes):
    return ray_cluster.run(ray, replace(SETTINGS, out=str(ray.out), **changes), "tlfast")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def in_turn():
    """Chooses one task after the other."""
    turns = count()
    return lambda tasks: tasks[next(turns) % len(tasks)]


def test_tasks_share_the_units(out):
    ray = FakeRay(out, choose=in_turn())
    report = run(ray)
    assert ray.shares == [(index, 4) for index in range(4)]
    assert (report.n_rows, report.n_rows_before, report.n_units, report.n_tokens) == (60, 0, 6, 120)
    commits = [json.loads(path.read_text()) for path in out.glob("commits/*")]
    assert report.n_bytes == sum(file["bytes"] for commit in commits for file in commit["files"])
    assert (report.n_nonfinite_rows, report.n_skipped) == (12, 2)
    assert [force for _, force in ray.cancelled] == [False] * 3, "the others"


def test_the_reports_of_others_are_added_where_they_come(out):
    report = run(FakeRay(out, choose=in_turn(), late=(1, 3)))
    assert (report.n_saturated, report.waited_s) == (21, 1.5)
    assert report.n_rows == 60, "rows are counted by their commits"


def test_what_was_there_is_not_counted(out):
    ray = FakeRay(out)
    ray.make("u000001", "u000004")
    report = run(ray, units="1:4")
    assert len(ray.shares) == 2, "no more than units are missing"
    assert (report.n_rows, report.n_rows_before, report.n_units, report.n_tokens) == (20, 10, 2, 40)


def test_a_task_that_never_answers_holds_nothing_up(out):
    ray = FakeRay(out, choose=lambda tasks: tasks[0] if tasks[0] != 2 else tasks[1])
    assert run(ray).n_units == 6


def test_tasks_that_get_no_room_are_not_waited_for(out):
    ray = FakeRay(out)
    assert run(ray, ray_workers=50).n_units == 6
    assert ray.cancelled == [(task, False) for task in range(1, 50)], "no force for what hasn't begun"


def test_a_task_that_does_not_end_is_ended(out):
    ray = FakeRay(out)
    ray.late, late = (), ray.wait
    ray.wait = lambda tasks, num_returns, timeout: (
        late(tasks, num_returns, timeout) if num_returns == 1 else ([], tasks)
    )
    run(ray)
    assert ray.cancelled == [(task, force) for force in (False, True) for task in (1, 2, 3)]


def test_nothing_to_do(out):
    ray = FakeRay(out, n_units=2)
    ray.make("u000000", "u000001")
    assert (run(ray).n_rows, len(ray.shares)) == (0, 1)


def test_progress_counts_commits(out, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", -1.0)
    turns = count()
    ray = FakeRay(out, choose=lambda tasks: None if next(turns) < 3 else tasks[0])
    ray.make("u000003")
    run(ray)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["20/60", "30/60", "40/60", "50/60", "60/60", "60/60"]
    assert "10 non-finite rows" in lines[-1]
    assert "tokens/s" not in lines[-1], "nobody has counted them"


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
def test_tasks_ask_for_what_they_need(out, monkeypatch, resources, changes, cpus, gpus, workers):
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster that may grow
    ray = FakeRay(out, 1, resources)
    run(ray, **changes)
    given = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": ray_cluster.RETRIES}
    assert (ray.options_given, len(ray.shares)) == (given, workers)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"ray_cpus": 5}, "ray_cpus must be at most 4, what is here, got 5. No worker could ever start."),
        ({"ray_gpus": 1}, "ray_gpus must be at most 0, what is here, got 1. No worker could ever start."),
    ],
)
def test_a_task_that_can_never_start_is_refused(out, changes, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        run(FakeRay(out), **changes)


@pytest.mark.parametrize(
    "failure, kind, text",
    [
        (OSError("disk: broken"), OSError, "^disk: broken$"),
        (ValueError("collect: a must b"), ValueError, "^collect: a must b$"),
        (FloatingPointError("NaN in u000003"), FloatingPointError, "^NaN in u000003$"),
        (RuntimeError("odd"), RuntimeError, r"^RuntimeError\('odd'\)$"),
    ],
)
def test_a_failure_is_said_as_without_ray(out, failure, kind, text):
    ray = FakeRay(out, fails={"u000003": Failure(failure)})
    with pytest.raises(kind, match=text):
        run(ray)
    assert [task for task, _ in ray.cancelled] == [1, 2, 3], "the others are ended"


def test_who_dies_is_started_again_as_long_as_units_are_made(out):
    ray = FakeRay(out, choose=in_turn(), fails={"u000005": Gone("out of\nmemory")})
    text = (
        "collect: a worker must live until no unit is left, got one that died 4 times with u000005 left: out of memory"
    )
    with pytest.raises(OSError, match=text):
        run(ray)
    assert len(list(out.glob("commits/*"))) == 5
    assert (1, 4) in ray.shares[4:], "its share is another task's"


def test_ctrl_c_says_what_is_kept(out):
    def choose(tasks):
        if len(list(out.glob("commits/*"))) == 3:
            raise KeyboardInterrupt
        return tasks[0]

    ray = FakeRay(out, choose=choose)
    with pytest.raises(KeyboardInterrupt, match=re.escape(f"3 more units are kept in {out}")):
        run(ray)
    assert [task for task, _ in ray.cancelled] == [0, 1, 2, 3]


def test_a_task_works_as_a_rank_does(undisturbed, out):
    words = arguments(undisturbed, out)
    settings = dict(zip((word[2:].replace("-", "_") for word in words[1::2]), words[2::2], strict=True))
    numbers = {name: int(value) for name, value in settings.items() if value.isdecimal()}
    lists = {name: (settings[name],) for name in ("text", "points")}
    report, tokens = work(CollectSettings(**settings | numbers | lists, units="2:5"), "tlfast", (1, 2))
    assert (report.n_rows, report.n_units) == (12, 3)
    there = tlfast.open_dataset(out, partial=True)
    assert [unit.name for unit in there.units] == ["u000002", "u000003", "u000004"]
    assert len(tokens) == N_UNITS
    assert report.n_tokens == sum(tokens[unit.name] for unit in there.units)


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
