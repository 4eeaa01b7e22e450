"""Stands in for the library google-crc32c on a machine that may install nothing; gpu_check.sh puts it on the path.

Only what tlfast calls is here, and it is compiled at the first import, into build/. Anywhere else install the library.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import numpy as np

_MADE = Path(__file__).resolve().parents[2] / "build" / "stand_ins" / "crc32c.so"
# A table of one byte at a time, for the reflected polynomial of CRC32C: 0x82F63B78 (RFC 3720, appendix B.4). The
# instruction of x86-64 does eight at once.
_SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <string.h>
uint32_t extend(uint32_t crc, const uint8_t* p, size_t n) {
  crc = ~crc;
#if defined(__SSE4_2__) && defined(__x86_64__)
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t eight;
    memcpy(&eight, p, 8);
    crc = (uint32_t)__builtin_ia32_crc32di(crc, eight);
  }
  for (; n; --n) crc = __builtin_ia32_crc32qi(crc, *p++);
#else
  uint32_t table[256];
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t c = i;
    for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (c & 1 ? 0x82F63B78u : 0);
    table[i] = c;
  }
  for (; n; --n) crc = table[(crc ^ *p++) & 255] ^ (crc >> 8);
#endif
  return ~crc;
}
"""


def _compile() -> None:
    _MADE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_MADE.parent) as folder:
        source, made = Path(folder) / "crc32c.c", Path(folder) / "crc32c.so"
        source.write_text(_SOURCE, encoding="utf-8")
        subprocess.run(["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(made)], check=True)
        os.replace(made, _MADE)  # two processes may do this at once: the last one wins, and both are whole


if not _MADE.is_file() or _MADE.stat().st_mtime < Path(__file__).stat().st_mtime:
    _compile()
_extend = ctypes.CDLL(str(_MADE)).extend
_extend.argtypes, _extend.restype = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32


def extend(crc: int, chunk: object) -> int:
    """Continue a CRC32C with the bytes of a buffer."""
    held = np.frombuffer(chunk, dtype=np.uint8)  # type: ignore[call-overload]
    return int(_extend(crc, held.ctypes.data, held.nbytes))
