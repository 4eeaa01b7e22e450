"""Where the tests of datasets at URLs write: a store of their own, a staging folder of their own."""

import pytest
from shared_filesystem import SharedFileSystem

from tlfast.dataset.write import upload


@pytest.fixture
def url(tmp_path, monkeypatch):
    """A URL at which nothing lies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(SharedFileSystem, "before", staticmethod(lambda call, path: None))
    monkeypatch.setattr(upload, "_PAUSES_S", (0.001,) * 3)
    return f"shared:/{tmp_path}/store/dataset"
