"""Pack on a GPU: the same bytes as on the CPU, without a wait of the host."""

from __future__ import annotations

import pytest
import torch
from gpu_device import no_wait_of_the_host

from tlfast.collecting.drain import UnitMemory
from tlfast.collecting.pack import Pack, Tokens
from tlfast.dataset import Column

COLUMNS = {
    "rows": Column(torch.bfloat16, (64,)),
    "tokens": Column(torch.float32, (64,), per="token"),
    "codes": Column(torch.float32, (200,), encoding="int8:64"),
    "low tokens": Column(torch.float32, (64,), per="token", encoding="int8"),
}
PLACES, TOKENS, WIDTH = torch.tensor([2, 0, 1]), Tokens([3, 0, 5], [2, 5, 0]), 5


def rings(device):
    """Rows of every size, subnormal and non-finite ones among them, the same on each device."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, column in COLUMNS.items():
        shape = (3, *[WIDTH] * (column.per == "token"), *column.row_shape)
        exponents = torch.randint(-140, 120, shape, generator=generator)
        rows = torch.randn(shape, generator=generator) * torch.exp2(exponents.double())
        rows[0, ..., 7] = torch.inf
        found[name] = rows.to(column.dtype).to(device)
    return found


@pytest.mark.gpu
def test_a_block_has_the_bytes_of_the_cpu(cuda):
    pack, memory = Pack(COLUMNS), {}
    for device in (torch.device("cpu"), cuda):
        memory[device.type] = UnitMemory(COLUMNS, 3, device, n_tokens=TOKENS.total)
        given, block = rings(device), memory[device.type].block(3, TOKENS.total)
        pinned = pack.choose(given, PLACES, TOKENS, pinned=device.type == "cuda")
        if device.type == "cpu":
            pack.put(given, pinned, block)
        else:
            with no_wait_of_the_host():
                pack.put(given, pinned, block)
    assert torch.equal(memory["cuda"].memory.cpu(), memory["cpu"].memory)
