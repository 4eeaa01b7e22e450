"""A dataset at a URL: the same bytes as in a folder, first commit wins, nothing is ever replaced."""

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from dataset_cases import COLUMNS, PLAN, check_rows, content, examples, make_dataset, rows_of, truth, write_units
from remote_cases import fault, local_content, make_remote, objects, remote_writer, staged
from shared_filesystem import SharedFileSystem, failing

from tlfast.dataset import DatasetError, DatasetWriter, open_dataset, verify_dataset
from tlfast.dataset.format import description
from tlfast.dataset.places.remote_store import RemoteStore
from tlfast.dataset.write.upload import UploadError


def test_the_same_bytes_as_in_a_folder(url, tmp_path):
    make_remote(url)
    assert objects(url) == local_content(tmp_path / "local")
    check_rows(open_dataset(url), truth())
    assert verify_dataset(url).ok
    assert not list((tmp_path / "cache").rglob("u00*"))


def test_a_local_url_is_a_folder(tmp_path):
    with DatasetWriter(f"file://{tmp_path}/d", header={}, columns=COLUMNS, plan=PLAN) as writer:
        assert writer.out == tmp_path / "d"
        write_units(writer)
    check_rows(open_dataset(f"file://{tmp_path}/d"), truth())


def test_a_run_goes_on_where_another_ended(url, tmp_path):
    tensors = truth()
    with remote_writer(url) as writer:
        writer.write_unit(PLAN.unit(1), rows_of(PLAN.unit(1), tensors), examples(PLAN.unit(1)))
    check_rows(open_dataset(url, partial=True), tensors)
    with pytest.raises(DatasetError, match="hold all 3 units"):
        open_dataset(url)
    with remote_writer(url) as writer:
        assert writer.done == {"u000001"}
        write_units(writer, tensors)
    assert objects(url) == local_content(tmp_path / "local")


def test_the_first_of_two_writers_wins(url):
    tensors, unit = truth(), PLAN.unit(0)
    with remote_writer(url) as one, remote_writer(url) as two:
        assert one.write_unit(unit, rows_of(unit, tensors), examples(unit))
        one.close()
        before = objects(url)
        assert not two.write_unit(unit, rows_of(unit, truth(seed=1)), examples(unit))
        assert two.done == {"u000000"}
    assert objects(url) == before


def test_two_writers_of_other_bytes_at_once(url, monkeypatch, tmp_path):
    """The second commits while the first has put its files and not yet its commit."""
    ours, theirs, unit = truth(seed=1), truth(), PLAN.unit(0)

    def commit_theirs(call, path):
        if call == "pipe" and path.endswith("commits/u000000.json"):
            fault(monkeypatch, lambda call, path: None)
            with remote_writer(url) as writer:
                assert writer.write_unit(unit, rows_of(unit, theirs), examples(unit))

    with remote_writer(url) as writer:
        fault(monkeypatch, commit_theirs)
        assert writer.write_unit(unit, rows_of(unit, ours), examples(unit))
    ds = open_dataset(url, partial=True)
    check_rows(ds, theirs)
    report = verify_dataset(url, partial=True)
    assert report.ok
    assert not report.unnamed, "what lost must be gone"
    assert [file for file in objects(url) if file.startswith("data")] != ["data/u000000.safetensors"]
    assert not staged(tmp_path)


@pytest.mark.parametrize("left", ["data/u000001.safetensors", "rows/u000001.parquet"])
@pytest.mark.parametrize("same_size", [True, False])
def test_what_a_dead_process_left_is_not_believed(url, left, same_size, tmp_path):
    expected = local_content(tmp_path / "local")
    remote_writer(url).close()
    RemoteStore(url).folder.create(left, b"\1" * (len(expected[left]) if same_size else 7))
    make_remote(url)
    ds = open_dataset(url)
    check_rows(ds, truth())
    report = verify_dataset(url)
    assert report.ok
    assert not report.unnamed
    stem, _, kind = left.partition(".")
    assert [name for name in objects(url) if name.startswith(stem)] != [left]
    assert re.search(rf"{stem}-[0-9a-f]{{8}}\.{kind}", str(list(objects(url))))
    assert ds.norms("loss").equal(make_dataset(tmp_path / "again").norms("loss"))


def test_what_a_dead_process_left_whole_is_used(url, tmp_path):
    expected = local_content(tmp_path / "local")
    remote_writer(url).close()
    for name in ("data/u000001.safetensors", "rows/u000001.parquet"):
        RemoteStore(url).folder.create(name, expected[name])
    make_remote(url)
    assert objects(url) == expected


def test_an_object_with_a_crc_in_its_name_and_other_bytes(url, tmp_path):
    expected = local_content(tmp_path / "local")
    remote_writer(url).close()
    crc = re.search(
        r'u000001\.safetensors",\s+"bytes": \d+,\s+"crc32c": "(\w+)"', expected["commits/u000001.json"].decode()
    )
    for name in ("data/u000001.safetensors", f"data/u000001-{crc[1]}.safetensors"):
        RemoteStore(url).folder.create(name, b"x")
    with pytest.raises(UploadError, match=r"must have the CRC32C \w{8} of its name, got other bytes"):
        make_remote(url)


def test_a_stranger_is_refused(url):
    store = RemoteStore(url)
    store.folder.create("thesis.tex", b"x")
    with pytest.raises(DatasetError, match=r"out must be an empty place, or a tlfast dataset, got .*'thesis\.tex'"):
        remote_writer(url)


def test_another_dataset_is_refused_and_overwritten_when_asked(url, tmp_path):
    make_remote(url, header={"reduce": "sum"})
    with pytest.raises(DatasetError, match=r"be the same dataset to continue it, got .*header.reduce: 'sum' there"):
        remote_writer(url)
    store = RemoteStore(url)
    store.folder.create("data/notes.txt", b"x")
    with pytest.raises(DatasetError, match=r"hold only a tlfast dataset to be overwritten, got 'data/notes\.txt'"):
        remote_writer(url, overwrite=True)
    store.folder.remove("data/notes.txt")
    make_remote(url, overwrite=True)
    assert objects(url) == local_content(tmp_path / "local")


def test_what_has_no_unit_is_said_to_have_none(url):
    remote_writer(url, header={"reduce": "sum"}).close()
    with pytest.raises(DatasetError, match=r"'sum' there, .*; it has no unit\. Use the same .* or overwrite it\."):
        remote_writer(url)
    remote_writer(url, overwrite=True).close()


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://", "url must be like s3://bucket/folder"),
        ("s3://key:secret@bucket/folder", r"url must hold no credentials, got 's3://\.\.\.@\.\.\.'|got s3://\.\.\.@"),
        ("zip://a::s3://b/c", "url must be like s3://bucket/folder"),
        ("nonsense://bucket/folder", "url must be one that fsspec knows, got Protocol not known: nonsense"),
    ],
)
def test_bad_urls(url, message):
    with pytest.raises(DatasetError, match=message) as raised:
        open_dataset(url)
    assert "secret" not in str(raised.value)


def test_a_folder_needs_no_staging(tmp_path):
    with pytest.raises(DatasetError) as error:
        remote_writer(tmp_path / "d", staging=tmp_path / "staging")
    rule = "staging must be left out unless out is a URL"
    assert str(error.value) == f"DatasetWriter: {rule}, got '{tmp_path / 'staging'}'. A folder needs none."
    assert not list(tmp_path.iterdir())


def test_a_store_that_replaces_objects_is_warned_of(url, monkeypatch):
    plain = SharedFileSystem.pipe_file
    monkeypatch.setattr(
        SharedFileSystem, "pipe_file", lambda self, path, value, mode="", **kw: plain(self, path, value)
    )
    with pytest.warns(RuntimeWarning, match="has no conditional put: give each unit one writer at a time"):
        remote_writer(url).close()


def test_staging_must_be_a_folder(url, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match=r"staging must be a folder that can be made, got .*file"):
        remote_writer(url, staging=tmp_path / "file")


def test_damage_at_a_url_is_found(url):
    make_remote(url)
    path = Path(url.removeprefix("shared:/"))
    data = bytearray((path / "data/u000001.safetensors").read_bytes())
    data[-3] ^= 4
    (path / "data/u000001.safetensors").write_bytes(data)
    assert [problem.unit for problem in verify_dataset(url).problems] == ["u000001"]
    (path / "rows/u000002.parquet").unlink()
    with pytest.raises(DatasetError, match=r"rows/u000002\.parquet must exist, its commit names it"):
        open_dataset(url)
    (path / "dataset.json").unlink()
    with pytest.raises(DatasetError) as error:
        open_dataset(url)
    text = f"open_dataset: path must be the folder of a dataset, got {url} without dataset.json. Check the URL."
    assert str(error.value) == text


def test_many_rows_are_read_by_few_requests(url, monkeypatch):
    make_remote(url, columns={"a": (torch.float32, (64,))}, tensors=truth({"a": (torch.float32, (64,))}))
    ds, reads = open_dataset(url), []
    fault(monkeypatch, lambda call, path: reads.append(path) if call == "cat" else None)
    expected = truth({"a": (torch.float32, (64,))})["a"]
    rows = [10, 0, 3, 3, 7, 9, 1]
    assert ds["a"][rows].equal(expected[rows])
    assert len(reads) <= 2 * PLAN.n_units  # a header and one stretch of each unit


def added(folder_or_url, make):
    """A complete dataset, extended by three examples."""
    with make(folder_or_url) as writer:
        write_units(writer)
        writer.extend(3, {"tokens": 6}, "reduce: sum\n")
        unit, tensors = writer.plan.units[-1], {name: rows[:3] for name, rows in truth().items()}
        assert writer.write_unit(unit, tensors, examples(unit))
        return writer.description


def test_an_extension_is_that_of_a_folder(url, tmp_path):
    extended = added(url, remote_writer)
    added(tmp_path / "local", remote_writer)
    local = {name: data for name, data in content(tmp_path / "local").items() if name != ".lock"}
    assert local.pop("plan/x000001.json") == RemoteStore(url).read("plan/x000001.json", "test", 1 << 20)
    assert objects(url) == local
    assert open_dataset(url).plan == extended.plan
    with remote_writer(url) as writer:
        assert len(writer.done) == 4
        with pytest.raises(DatasetError, match="must be free for this extension"):
            type(writer).extend(_before(writer), 5, {"tokens": 9})


def _before(writer):
    """The writer as one that hasn't seen the extension."""
    writer.description = replace(writer.description, plan=PLAN, extensions=())
    return writer


def test_what_was_staged_for_a_dataset_that_is_overwritten_is_gone(url, monkeypatch, tmp_path):
    fault(monkeypatch, failing("put", 99))
    writer, unit = remote_writer(url), PLAN.unit(0)
    writer.write_unit(unit, rows_of(unit, truth(seed=1)), examples(unit))
    with pytest.raises(UploadError):
        writer.close()
    assert staged(tmp_path)
    fault(monkeypatch, lambda call, path: None)
    monkeypatch.setattr(description, "datetime", Later)
    with remote_writer(url, overwrite=True) as writer:
        assert not writer.done
        write_units(writer)
    assert objects(url) == local_content(tmp_path / "local")


class Later(description.datetime):
    """A clock that shows another day: dataset.json says when it was made."""

    @classmethod
    def now(cls, zone):
        return super().now(zone) + timedelta(days=1)
