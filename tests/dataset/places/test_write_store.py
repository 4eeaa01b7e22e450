"""What a writer asks of a place, of a folder and of a URL alike."""

import pytest

from tlfast.dataset.errors import DatasetError
from tlfast.dataset.places.write_store import WriteFolder, WriteUrl, as_write_store


@pytest.fixture(params=["folder", "URL"])
def store(request, tmp_path, url):
    return as_write_store(tmp_path / "d" if request.param == "folder" else url)


def test_of_small_files_the_first_wins_unless_it_is_to_be_replaced(store):
    store.make_folders(["", "data"])
    assert store.create("data/a", b"first")
    assert not store.create("data/a", b"other")
    assert store.read("data/a", "test", 9) == b"first"
    store.replace("data/a", b"other")
    assert store.read("data/a", "test", 9) == b"other"
    store.sync()


def test_what_is_there(store):
    assert store.entries() == store.entries("data") == {}
    assert not store.exists("data/a")
    store.make_folders(["", "data"])
    store.create("data/a", b"x")
    store.create("b", b"")
    assert store.entries() == {"data": True, "b": False}
    assert store.entries("data") == {"a": False}
    assert store.exists("data/a")
    assert store.exists("b")


def test_what_is_removed_is_gone_and_what_is_not_there_stays_so(store):
    store.make_folders(["", "data"])
    store.create("data/a", b"x")
    for _ in range(2):
        store.remove("data/a")
        assert not store.exists("data/a")
    store.remove_folders(["data", "rows"])
    assert not [name for name, is_folder in store.entries().items() if not is_folder]
    with pytest.raises(DatasetError, match=r"data/a must be a readable file, not a link"):
        store.read("data/a", "test", 9)


def test_a_link_is_an_entry_and_no_folder(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "data").symlink_to(tmp_path)
    (tmp_path / "d" / "gone").symlink_to(tmp_path / "nowhere")
    store = as_write_store(tmp_path / "d")
    assert store.entries() == {"data": False, "gone": False}
    assert store.exists("gone")
    assert not store.create("gone", b"x")


def test_a_place_is_a_folder_or_a_url(tmp_path, url):
    folder = as_write_store(f"file://{tmp_path}/d")
    assert isinstance(folder, WriteFolder)
    assert folder == as_write_store(tmp_path / "d") == as_write_store(folder)
    assert isinstance(as_write_store(url), WriteUrl)
