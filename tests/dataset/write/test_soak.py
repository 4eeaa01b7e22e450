"""The soak, small: memory and open files after each of twenty units; and that a leak would be seen."""

import os

import pytest
import soak
import torch


def test_memory_and_files_stay_flat(tmp_path):
    usage = soak.soak_writer(tmp_path / "d", 20_000, 1000)
    assert len(usage.rss_bytes) == 20
    assert usage.flat, usage


def test_a_collection_stays_flat(tmp_path):
    usage = soak.soak_collect(tmp_path / "d", 8000, 500)
    assert len(usage.rss_bytes) == 16
    assert usage.flat, usage


@pytest.mark.parametrize("leak", ["memory", "files"])
def test_a_leak_is_seen(tmp_path, monkeypatch, leak):
    kept, descriptors, write_unit = [], [], soak.DatasetWriter.write_unit

    def leaking(self, *args):
        if leak == "memory":
            kept.append(torch.ones(1 << 22))  # 16 MiB that are touched
        else:
            descriptors.append(os.dup(0))
        return write_unit(self, *args)

    monkeypatch.setattr(soak.DatasetWriter, "write_unit", leaking)
    try:
        usage = soak.soak_writer(tmp_path / "d", 1000, 20)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    assert not usage.flat
