"""A unit's rows, written by either writer, and the checksums of a native module."""

import google_crc32c
import numpy as np

from tlfast.dataset.format.layout import PAGE_BYTES
from tlfast.dataset.places.durable import PendingFile
from tlfast.dataset.write import payload

HEADER = b"header".ljust(PAGE_BYTES)


def write(folder, tensors, writer, lengths=None):
    """Write tensors as a unit; return the file's bytes, its checksum, the norms, and which rows are odd."""
    n_bytes = len(HEADER) + sum(tensor.nbytes for tensor in tensors.values())
    with PendingFile(folder / "unit", n_bytes) as file:
        file.start_with(HEADER)
        with payload.writing(file, tensors, writer, lengths) as (norms, odd):
            pass
        file.seal()
        file.rename()
    return (folder / "unit").read_bytes(), file.crc, norms, odd


def check_checksums(module):
    """Fail unless the native CRC32C is that of another library, at any length, place and start."""
    data = np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8)
    for n in [*range(70), 4095, 4096, 3 * 4096 - 1, 3 * 4096, 3 * 4096 + 9, 6 * 4096 + 5, 99_000]:
        for start in (0, 1, 7):
            crc = module.crc32c(data[:start], 0)
            assert module.crc32c(data[start : start + n], crc) == google_crc32c.value(data[: start + n].tobytes())
    assert module.crc32c(b"123456789", 0) == 0xE3069283  # the check value of CRC-32/ISCSI in RFC 3720
