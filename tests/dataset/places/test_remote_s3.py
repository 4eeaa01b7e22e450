"""A dataset in a bucket, through s3fs, on a local S3 server: conditional puts, kills, reading back."""

import signal
import subprocess

import fsspec
import pytest
import torch
from checkout import SUPPORT
from dataset_cases import PLAN, check_rows, examples, rows_of, run_python, truth, write_units
from remote_cases import local_content, make_remote, objects, remote_writer
from remote_kills import MANY
from s3_server import s3_server

from tlfast.dataset import DatasetError, open_dataset, verify_dataset
from tlfast.dataset.places import remote as remote_module
from tlfast.dataset.places.remote_store import RemoteStore


class Rows(torch.utils.data.Dataset):
    """The rows of one point, one by one."""

    def __init__(self, ds):
        self.ds = ds

    def __len__(self):
        return len(self.ds)

    def __getitem__(self, k):
        return self.ds["blocks.1.attn"][k]


@pytest.fixture(scope="module")
def server():
    """A running server, and s3fs led to it."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        filesystem = fsspec.filesystem("s3", use_listings_cache=False)
        filesystem.mkdir("bucket")
        yield filesystem
        filesystem.clear_instance_cache()


@pytest.fixture
def url(server, tmp_path, monkeypatch):
    """A URL in the bucket at which nothing lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return f"s3://bucket/{tmp_path.name}/dataset"


def test_the_same_bytes_as_in_a_folder(url, tmp_path):
    make_remote(url)
    assert objects(url) == local_content(tmp_path / "local")
    ds = open_dataset(url)
    check_rows(ds, truth())
    assert (ds.info()["units"], ds.path) == (3, url)
    assert url in repr(ds)
    assert ds["loss"][[10, 0, 5]].equal(truth()["loss"][[10, 0, 5]])
    assert verify_dataset(url).ok


def test_a_conditional_put_refuses(url, monkeypatch):
    folder = RemoteStore(url).folder
    assert folder.refuses_to_replace()
    assert folder.create("a", b"first")
    assert not folder.create("a", b"other")
    assert folder.read("a", 0, 99) == b"first"
    assert folder.create("empty", b"")
    assert folder.read("empty", 0, 99) == b""


def test_a_conditional_put_in_parts_refuses(url, monkeypatch, tmp_path):
    monkeypatch.setattr(remote_module, "_PART_BYTES", 5 << 20)  # the least that S3 takes
    folder = RemoteStore(url).folder
    first, other = bytes(11 << 20), b"\1" * (11 << 20)
    for data, won in ((first, True), (other, False)):
        (tmp_path / "file").write_bytes(data)
        assert folder.create_from("big", tmp_path / "file") == won
    assert folder.holds("big", len(first), remote_module.crc32c(first))
    assert not folder.holds("big", len(first), remote_module.crc32c(other))


def test_a_server_that_ignores_the_condition_is_warned_of(url, monkeypatch):
    filesystem = type(RemoteStore(url).folder._fs)
    call = filesystem._call_s3

    async def without(self, method, *args, IfNoneMatch=None, **kwargs):
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(filesystem, "_call_s3", without)
    with pytest.warns(RuntimeWarning, match="has no conditional put"):
        remote_writer(url).close()


def test_two_writers_at_once(url, tmp_path):
    with remote_writer(url) as one, remote_writer(url) as two:
        won = [
            writer.write_unit(unit, rows_of(unit, truth()), examples(unit))
            for unit in PLAN.units
            for writer in (one, two)
        ]
    assert won.count(True) >= PLAN.n_units
    assert objects(url) == local_content(tmp_path / "local")


def test_a_bucket_that_is_not_there(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="bucket does not exist"):
        remote_writer("s3://no-such-bucket/dataset")
    assert not server.exists("no-such-bucket"), "a bucket must not be made in passing"
    with pytest.raises(DatasetError, match="no-such-bucket/dataset without"):
        open_dataset("s3://no-such-bucket/dataset")


@pytest.mark.long
def test_processes_killed_at_random_instants(url, tmp_path):
    """Each run is killed while it uploads, and the next goes on: whatever lies in the bucket is right."""
    tensors = truth(plan=MANY)
    with run_python(SUPPORT / "remote_kills.py", "instants", url, 3, stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            assert int(line) == -signal.SIGKILL
            check_rows(open_dataset(url, partial=True), tensors)
    assert process.returncode == 0
    assert verify_dataset(url, partial=True).ok
    assert len(open_dataset(url, partial=True).units) < MANY.n_units, "the kills came too late to prove anything"
    with remote_writer(url, plan=MANY) as writer:
        write_units(writer, tensors)
    assert objects(url) == local_content(tmp_path / "local", plan=MANY)


@pytest.mark.filterwarnings("ignore:lance is not fork-safe")  # it says so once another test has imported it
def test_workers_of_a_loader_read_it_too(url):
    """They are forked, and connections and threads don't survive that."""
    make_remote(url)
    ds = open_dataset(url)
    check_rows(ds, truth())
    loader = torch.utils.data.DataLoader(Rows(ds), batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert torch.stack(list(loader)).equal(truth()["blocks.1.attn"])
