"""Which filesystem holds a folder, by made-up tables of mounts."""

from pathlib import Path

import pytest

from tlfast.dataset.places.mounts import filesystem, is_network, on_network

MOUNTS = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:26 / /data rw,relatime shared:2 - nfs4 server:/data rw,vers=4.2
31 30 0:27 / /data/scratch rw - xfs /dev/nvme0n1 rw
32 22 0:28 / /with\040space rw - cifs //server/share rw
33 22 0:29 / /bucket rw - fuse.s3fs s3fs rw
34 22 0:30 / /over rw - nfs4 server:/a rw
35 22 0:31 / /over rw - tmpfs tmpfs rw
36 22 0:32 / /overlay rw - fuse.fuse-overlayfs fuse-overlayfs rw
damaged line
37 22 0:33 / /lustre rw master:3 - lustre 10.0.0.1@tcp:/fs rw
"""


@pytest.mark.parametrize(
    "path, kind, network",
    [
        ("/home", "ext4", False), ("/", "ext4", False), ("/data", "nfs4", True), ("/data/a/b", "nfs4", True),
        ("/database", "ext4", False), ("/data/scratch/x", "xfs", False), ("/with space/x", "cifs", True),
        ("/bucket/x", "fuse.s3fs", True), ("/over/x", "tmpfs", False), ("/overlay/x", "fuse.fuse-overlayfs", False),
        ("/lustre", "lustre", True),
    ],
)  # fmt: skip
def test_the_mount_that_holds_a_path(path, kind, network):
    assert filesystem(path, MOUNTS) == kind
    assert is_network(kind) is network


def test_without_a_table_a_folder_counts_as_local(monkeypatch):
    def no_table(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", no_table)
    assert filesystem("/x", "") == ""
    assert on_network(Path("/no/table/was/found")) is False
