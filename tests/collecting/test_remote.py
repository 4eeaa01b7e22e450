"""`tlfast collect` to a URL: the same bytes as into a folder, continued, replayed, shown by info and verify."""

import re

import pytest
import torch
from shared_filesystem import SharedFileSystem, failing
from tiny_models import collect, collect_words, complaint_of, save_model, save_text, sequences, tiny_model, unit_bytes

import tlfast
from tlfast.cli import main
from tlfast.dataset import DatasetError
from tlfast.dataset.write import upload

EXAMPLES = sequences(20)


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A URL at which nothing lies: its objects are files in ``tmp_path/store``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(lambda call, path: None))
    monkeypatch.setattr(upload, "_PAUSES_S", (0.001,) * 3)
    return f"shared:/{tmp_path}/store"


def test_the_bytes_are_those_of_a_folder(url, tmp_path):
    report = collect(tiny_model(), url, EXAMPLES, rows_per_unit=8)
    assert (report.n_rows, report.n_units, report.out, report.waits_for) == (20, 3, url, "the upload")
    collect(tiny_model(), tmp_path / "local", EXAMPLES, rows_per_unit=8)
    assert unit_bytes(tmp_path / "store") == unit_bytes(tmp_path / "local")
    assert tlfast.open_dataset(url).verify().ok
    assert collect(tiny_model(), url, EXAMPLES, rows_per_unit=8).n_units == 0


def test_a_store_that_fails_and_the_same_call_again(url, tmp_path, monkeypatch):
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(failing("put", 99, "u000001")))
    with pytest.raises(upload.UploadError, match="must take unit u000001"):
        collect(tiny_model(), url, EXAMPLES, rows_per_unit=2)
    there = {path.stem for path in (tmp_path / "store/commits").iterdir()}
    assert there == {"u000000"}
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(lambda call, path: None))
    report = collect(tiny_model(), url, EXAMPLES, rows_per_unit=2)
    assert report.n_units < 9, "what was staged must not be computed again"
    collect(tiny_model(), tmp_path / "local", EXAMPLES, rows_per_unit=2)
    assert unit_bytes(tmp_path / "store") == unit_bytes(tmp_path / "local")


def test_waiting_for_the_upload_is_shown(url, tmp_path, monkeypatch, capsys):
    released, waited = [], []

    def slow(call, path):
        if call == "put" and not released:
            waited.append(path)
            released.append(torch.empty(0))
            upload.threading.Event().wait(0.2)

    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(slow))
    report = collect(tiny_model(), url, EXAMPLES[:4], rows_per_unit=4, progress=True)
    assert waited
    assert re.search(r", \d\.\d s of them waiting for the upload \(", str(report))


def test_a_strangers_place_is_refused_before_anything_runs(url, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "notes.txt").write_text("x")
    with pytest.raises(DatasetError, match="collect: out must be an empty place, or a tlfast dataset"):
        collect(tiny_model(), url, EXAMPLES)


def test_the_command_line_with_a_url(url, tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text")
    staging = str(tmp_path / "here")
    assert main(["collect", *collect_words(tmp_path, out=url, staging=staging)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f": {url}")
    assert main(["info", url]) == 0
    assert capsys.readouterr().out.startswith(f"{url}: 24 of 24 rows in 3 units")
    assert main(["verify", url]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["report", url]) == 0
    assert (tmp_path / "store-report.html").stat().st_size
    assert main(["export", url, "--to", "npy", "--out", "exported"]) == 0
    (tmp_path / "store/commits/u000001.json").unlink()
    assert main(["collect", f"{url}/config.yaml"]) == 0
    assert "10 rows beside 14 that were there in 1 units" in capsys.readouterr().out
    assert complaint_of(capsys, ["collect", f"{url}/none.yaml"]).startswith("collect: config must be a readable YAML")
