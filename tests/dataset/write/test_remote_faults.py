"""Writing to a store that stutters, fails, is slow, and writers that are killed: nothing is lost, nothing is wrong."""

import re
import signal
import subprocess
import threading

import pytest
from checkout import SUPPORT
from dataset_cases import PLAN, check_rows, examples, rows_of, run_python, truth, write_units
from remote_cases import fault, local_content, make_remote, objects, remote_writer, staged
from remote_kills import FEW
from shared_filesystem import failing

from tlfast.dataset import open_dataset
from tlfast.dataset.places.remote_store import RemoteStore
from tlfast.dataset.write import upload
from tlfast.dataset.write.upload import UploadError


def test_a_store_that_stutters(url, monkeypatch, tmp_path, capsys):
    with remote_writer(url) as writer:
        fault(monkeypatch, failing("put", 3))
        write_units(writer)
    assert objects(url) == local_content(tmp_path / "local")
    assert capsys.readouterr().err.count("upload: u000000 is tried again in 0.001 s: [Errno 5] the store stutters") == 3


@pytest.mark.parametrize("call", ["exists", "pipe", "ls"])
def test_any_request_that_stutters(url, monkeypatch, tmp_path, call):
    with remote_writer(url) as writer:
        fault(monkeypatch, failing(call, 3))
        write_units(writer)
        assert writer.committed() == {unit.name for unit in PLAN.units}
    fault(monkeypatch, lambda call, path: None)
    assert objects(url) == local_content(tmp_path / "local")


@pytest.mark.parametrize("times, error, tries", [(99, None, 4), (1, PermissionError(13, "expired token"), 1)])
def test_a_store_that_fails_for_good(url, monkeypatch, tmp_path, times, error, tries):
    seen = []

    fail = failing("put", times, "u000001", error)

    def counting(call, path):
        seen.append(call == "put" and "u000001" in path)
        fail(call, path)

    tensors = truth()
    fault(monkeypatch, counting)
    with pytest.raises(UploadError) as raised:
        make_remote(url, tensors)
    assert sum(seen) == tries
    kind = type(error or OSError()).__name__
    assert re.fullmatch(
        rf"upload: {re.escape(url)} must take unit u000001, got <{kind}: .*>\. What is committed stays; "
        r"\d units wait in .*/cache/tlfast/staging/\w{16} for the same command again\.",
        str(raised.value),
    )
    fault(monkeypatch, lambda call, path: None)
    check_rows(open_dataset(url, partial=True), tensors)
    assert "u000001.json" in staged(tmp_path)
    with remote_writer(url) as writer:  # what is staged is whole: it isn't made again
        assert "u000001" in writer.done
        write_units(writer, tensors)
    assert objects(url) == local_content(tmp_path / "local")


def test_a_failed_upload_is_heard_of_at_the_next_unit(url, monkeypatch):
    fault(monkeypatch, failing("put", 99))
    writer = remote_writer(url)
    unit = PLAN.unit(0)
    writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    with pytest.raises(UploadError):
        writer.flush()
    with pytest.raises(UploadError):
        writer.write_unit(PLAN.unit(1), rows_of(PLAN.unit(1), truth()), examples(PLAN.unit(1)))
    with pytest.raises(UploadError):
        writer.close()


def test_the_staging_folder_holds_only_so_many_units(url, monkeypatch, tmp_path):
    released = threading.Event()
    fault(monkeypatch, lambda call, path: released.wait(30) if call == "put" else None)
    with remote_writer(url, max_units=2) as writer:
        for unit in PLAN.units[:2]:
            writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
        third = threading.Thread(target=write_units, args=(writer,))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        assert len(staged(tmp_path)) == 2 * 3
        released.set()
        third.join()
        waited_s = writer.waited_s
    assert writer.waited_s > waited_s == 0
    assert objects(url) == local_content(tmp_path / "local")


def test_an_interrupted_run_says_what_is_left(url, monkeypatch):
    fault(monkeypatch, failing("put", 2, "u000000"))
    monkeypatch.setattr(upload, "_PAUSES_S", (60.0,))
    writer = remote_writer(url)
    for unit in PLAN.units[:2]:
        writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    assert re.fullmatch(r", 2 of them in .* still to be uploaded", writer.still_to_do())
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    fault(monkeypatch, lambda call, path: None)
    with remote_writer(url) as writer:
        assert writer.done == {"u000000", "u000001"}
    check_rows(open_dataset(url, partial=True), truth())


def test_a_staged_unit_that_is_damaged_is_made_again(url, monkeypatch, tmp_path):
    fault(monkeypatch, failing("put", 99))
    writer, unit = remote_writer(url), PLAN.unit(0)
    writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    with pytest.raises(UploadError):
        writer.close()
    fault(monkeypatch, lambda call, path: None)
    [file] = (tmp_path / "cache").rglob("u000000.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with remote_writer(url) as writer:
        assert not writer.done
        write_units(writer)
    assert objects(url) == local_content(tmp_path / "local")


def test_the_staged_units_of_several_dead_processes(url, monkeypatch, tmp_path):
    fault(monkeypatch, failing("put", 99))
    writers = [remote_writer(url), remote_writer(url)]
    for writer, unit in zip(writers, PLAN.units, strict=False):
        writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
    for writer in writers:
        with pytest.raises(UploadError):
            writer.close()
    fault(monkeypatch, lambda call, path: None)
    with remote_writer(url) as writer:
        assert writer.done == {"u000000", "u000001"}
        write_units(writer)
    assert objects(url) == local_content(tmp_path / "local")
    assert not staged(tmp_path)


@pytest.mark.long
def test_a_process_killed_before_each_request(url, tmp_path):
    """Wherever a run dies: what lies in the store is right, and the next run makes the same bytes of it."""
    expected, tensors = local_content(tmp_path / "local", plan=FEW), truth(plan=FEW)
    with run_python(SUPPORT / "remote_kills.py", "requests", url, stdout=subprocess.PIPE) as process:
        lines = process.stdout.read().splitlines()
    *killed, end = [line.split(maxsplit=2) for line in lines]
    assert process.returncode == 0
    assert end[1:] == ["0", "end"]
    assert len(killed) > 30
    assert {"put data/u000001.safetensors", "pipe commits/u000001.json", "unlink data/u000001.safetensors"} <= {
        call for _, _, call in killed
    }
    for k, status, call in killed:
        assert int(status) == -signal.SIGKILL
        place = f"{url}/{k}"
        if RemoteStore(place).folder.exists("dataset.json"):
            check_rows(open_dataset(place, partial=True), tensors)
        with remote_writer(place, plan=FEW, staging=tmp_path / "cache" / k / "tlfast" / "staging") as writer:
            write_units(writer, tensors)
        found = objects(place)
        assert {name: data for name, data in found.items() if not name.endswith(".tmp")} == expected, call
        assert not list((tmp_path / "cache" / k).rglob("u00*")), call
