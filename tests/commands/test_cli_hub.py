"""`tlfast collect --dataset NAME`: a data set of the hub, by the real client against a stand-in for the hub's API."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_stand_in import Hub
from record_files import FLAT, N, save_chat_model
from tiny_models import unit_bytes

import tlfast

NAME = "me/records"


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    hub.repos[NAME] = {"private": False, "branches": {}, "commits": {}}
    files = {"data/train-00000-of-00001.parquet": parquet(FLAT), "data/test-00000-of-00001.parquet": parquet(FLAT[:2])}
    hub.add_commit(NAME, "main", {"README.md": b"---\nlicense: mit\n---\nRecords.\n", **files})
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_chat_model(tmp_path_factory.mktemp("model"))


def collect(hub, home, model, out, name, *more, **environment):
    """`tlfast collect` in a process that knows no other hub, and no cache but that in ``home``."""
    words = [
        "collect", "--model", str(model), "--dataset", name, "--split", "train", "--column", "text", "--points",
        "transformer.h.*", "--rows-per-unit", "5", "--batch-tokens", "64", "--out", str(out), *more,
    ]  # fmt: skip
    given = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-m", "tlfast", *words], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | given | environment,
    )  # fmt: skip


@pytest.mark.long
def test_there_offline_and_not_there(hub, model, tmp_path):
    home, whole, resumed = tmp_path / "home", tmp_path / "whole", tmp_path / "resumed"
    done = collect(hub, home, model, whole, NAME)
    assert done.returncode == 0, done.stderr
    dataset = tlfast.open_dataset(whole)
    assert len(dataset) == N
    assert (dataset.examples[3]["source"], dataset.examples[3]["start"]) == (f"{NAME}/train", 3)
    got = [path for method, path in hub.log if method == "GET" and path.endswith(".parquet")]
    assert got
    assert all("train" in path for path in got), "the other split isn't fetched"

    done = collect(hub, home, model, resumed, NAME, "--units", "0:1")
    assert done.returncode == 0, done.stderr
    n = len(hub.log)
    done = collect(hub, home, model, resumed, NAME, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "beside 5 that were there" in done.stdout
    assert len(hub.log) == n, "what is cached needs no network"
    assert unit_bytes(resumed) == unit_bytes(whole)
    assert json.loads((resumed / "dataset.json").read_text())["header"]["text"]["split"] == "train"

    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = collect(hub, home, model, tmp_path / "none", "me/nothing", **environment)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(
            "collect: dataset must be a file, a folder or a name on the hub, got 'me/nothing': "
        ), done.stderr
        assert not (tmp_path / "none").exists()
