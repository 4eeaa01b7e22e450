"""What kind of filesystem a folder lies on, from the kernel's table of mounts: a network's or not."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

# As /proc/self/mountinfo names them. Every "fuse.<program>" counts too, but for these that are local.
_NETWORK = {
    "9p", "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "gpfs", "lustre", "nfs",
    "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs", "pvfs2", "smb3", "smbfs", "vboxsf", "wekafs",
}  # fmt: skip
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.ntfs-3g"}


def is_network(kind: str) -> bool:
    """Whether a filesystem of this type reads over a network, or from a program that may."""
    return kind in _NETWORK or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)


def filesystem(path: str, table: str) -> str:
    """Return the type of the filesystem that holds an absolute path, by a table as in /proc/self/mountinfo; or ""."""
    best, kind = "", ""
    for line in table.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if not dash or len(fields) < 5:
            continue
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = path == mount or path.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # of two mounts at one place the later hides the earlier
            best, kind = mount, after.split(" ")[0]
    return kind


@lru_cache(maxsize=64)
def on_network(folder: Path) -> bool:
    """Whether the folder lies on a network filesystem; False where the system has no table of mounts."""
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return False
    return is_network(filesystem(os.path.realpath(folder), table))
