"""An fsspec filesystem ``shared://``: a folder that many processes use as an object store, with faults to order."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

import fsspec
from fsspec.spec import AbstractFileSystem


class SharedFileSystem(AbstractFileSystem):
    """Objects are whole or absent; ``before(call, path)`` is called before each request and may raise, wait or kill."""

    protocol = "shared"
    root_marker = "/"
    before = staticmethod(lambda call, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("shared://").strip("/")

    def _asked(self, call, path):
        type(self).before(call, path)
        return Path(self._strip_protocol(path))

    def ls(self, path, detail=True, **kwargs):
        folder = self._asked("ls", path)
        if not folder.is_dir():
            raise FileNotFoundError(path)
        entries = [self._entry(child) for child in sorted(folder.iterdir())]
        return entries if detail else [entry["name"] for entry in entries]

    @staticmethod
    def _entry(path):
        kind = "directory" if path.is_dir() else "file"
        return {"name": str(path), "size": path.stat().st_size, "type": kind}

    def info(self, path, **kwargs):
        return self._entry(self._asked("info", path))

    def exists(self, path, **kwargs):
        return self._asked("exists", path).exists()

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self._asked("cat", path).read_bytes()[start:end]

    def makedirs(self, path, exist_ok=False):
        Path(self._strip_protocol(path)).mkdir(parents=True, exist_ok=True)

    def rm_file(self, path):
        self._asked("rm", path).unlink()

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        target = self._asked("pipe", path)
        temporary = target.parent.parent / f"{secrets.token_hex(8)}.part"
        temporary.write_bytes(value)
        try:
            if mode == "create":
                os.link(temporary, target)
            else:
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        type(self).before("put", rpath)
        self.pipe_file(rpath, Path(lpath).read_bytes(), mode=mode)


def failing(call, times, part="", error=None):
    """A ``before`` that fails the first ``times`` requests of this kind whose path holds ``part``."""
    left = [times]

    def before(name, path):
        if name == call and part in str(path) and left[0]:
            left[0] -= 1
            raise error or OSError(errno.EIO, "the store stutters")

    return before


fsspec.register_implementation("shared", SharedFileSystem, clobber=True)
