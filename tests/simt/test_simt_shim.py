"""The SIMT shim does what CUDA says: indices, shuffles, votes, barriers, shared memory, limits, conversions."""

import ctypes
import itertools

import numpy as np
import pytest
import simt_build
import torch

ORDERS = (0, 1, 2, 3, 4, 5)
WARP = 32
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9
TYPES = (np.int32, np.float32, np.float64, np.int64)
SHUFFLE, UP, DOWN, XOR = range(4)


@pytest.fixture(scope="module")
def shim():
    loaded = ctypes.CDLL(str(simt_build.library("shim_kernels.cu")))
    loaded.simt_message.restype = ctypes.c_char_p
    return loaded


@pytest.fixture(autouse=True)
def _forward(shim):
    yield
    shim.simt_set_order(0)


def at(array):
    return ctypes.c_void_p(array.ctypes.data)


def numbers(*values):
    return (ctypes.c_uint * len(values))(*values)


@pytest.mark.parametrize("order", ORDERS)
def test_indices(shim, order):
    shim.simt_set_order(order)
    grid, block = (3, 2, 2), (5, 4, 3)
    out = np.full((12 * 60, 4, 3), -1, np.int32)
    assert shim.run_who_am_i(at(out), numbers(*grid, *block)) == 0
    places = [i[::-1] for i in itertools.product(*map(range, grid[::-1]))]
    threads = [i[::-1] for i in itertools.product(*map(range, block[::-1]))]
    assert out.tolist() == [[list(t), list(b), list(block), list(grid)] for b in places for t in threads]


def source_lane(kind, lane, argument, width):
    """From whom a lane gets its value: the rules of the CUDA C++ programming guide, "Warp Shuffle Functions"."""
    first = lane // width * width
    if kind == SHUFFLE:
        return first + argument % width
    if kind == UP:
        return lane - argument if lane - argument >= first else lane
    if kind == DOWN:
        return lane + argument if lane + argument < first + width else lane
    return lane ^ argument if lane ^ argument < first + width else lane


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [SHUFFLE, UP, DOWN, XOR])
@pytest.mark.parametrize("type_", range(4), ids=[t.__name__ for t in TYPES])
def test_shuffles(shim, type_, kind, order):
    shim.simt_set_order(order)
    for mask, width, argument in itertools.product(
        (0xFFFFFFFF, 0x0000FFFF, 0x80000101, 0x2), (32, 8, 1), (0, 1, 5, 31)
    ):
        out = np.full(2 * WARP, -1, TYPES[type_])
        assert shim.run_shuffle(at(out), type_, 2 * WARP, kind, ctypes.c_uint(mask), argument, width) == 0
        for thread, value in enumerate(out):
            lane = thread % WARP
            source = source_lane(kind, lane, argument, width)
            if not mask >> lane & 1:
                assert value == -1, "a lane outside of the mask has written"
            elif mask >> source & 1:
                assert value == thread - lane + source + 100
            else:  # from nobody: all bits set
                assert (value.tobytes()) == b"\xff" * value.nbytes


@pytest.mark.parametrize("order", ORDERS)
def test_votes(shim, order):
    shim.simt_set_order(order)
    for mask, yes in itertools.product((0xFFFFFFFF, 0xF0F0, 0x80000001), (0, 0xFFFFFFFF, 0x1, 0xFF, 0xF0F0)):
        out = np.full((WARP + 8, 3), 77, np.uint32)
        n = WARP if mask > 0xFFFF else WARP + 8
        # The last warp has 8 lanes: it may name no others.
        mask_here = mask if n == WARP else mask & 0xFF
        assert shim.run_vote(at(out), n, ctypes.c_uint(mask_here), ctypes.c_uint(yes)) == 0
        for thread in range(n):
            want = [yes & mask_here, int(yes & mask_here != 0), int(yes & mask_here == mask_here)]
            assert out[thread].tolist() == (want if mask_here >> thread % WARP & 1 else [77] * 3)


@pytest.mark.parametrize("order", ORDERS)
def test_parts_of_a_warp_meet_on_their_own(shim, order):
    shim.simt_set_order(order)
    out = np.zeros(WARP, np.int32)
    assert shim.run_halves(at(out)) == 0
    low, high = sum(range(16)), 16 * sum(range(16, 32))
    assert out.tolist() == [high] * 16 + [low] * 16


@pytest.mark.parametrize("n", [1, 2, 31, 33, 200, 1024])
@pytest.mark.parametrize("order", ORDERS)
def test_barriers(shim, order, n):
    shim.simt_set_order(order)
    rounds = 5
    out = np.zeros((3, n), np.int32)
    assert shim.run_ring(at(out), 3, n, rounds, 1) == 0
    assert (out == (np.arange(n) + rounds) % n + rounds).all()


def test_without_one_of_its_barriers_the_orders_differ(shim):
    results = set()
    for order in ORDERS:
        shim.simt_set_order(order)
        out = np.zeros(64, np.int32)
        assert shim.run_ring(at(out), 1, 64, 3, 0) == 0
        results.add(out.tobytes())
    assert len(results) > 1


@pytest.mark.parametrize("type_", [0, 2])
def test_shared_memory_is_poisoned_before_each_block(shim, type_):
    out = np.zeros((3, 8), TYPES[type_])
    assert shim.run_unwritten(at(out), type_, 3) == 0
    assert out.tobytes() == b"\xff" * out.nbytes


def queue(shim, order, n):
    shim.simt_set_order(order)
    out = np.zeros(3 * n, np.uint32)
    assert shim.run_queue(at(out), n) == 0
    return out.reshape(3, n).tolist()


def test_orders(shim):
    n = 96
    assert queue(shim, 0, n)[0] == list(range(n))
    assert queue(shim, 1, n)[0] == list(reversed(range(n)))
    seen = [queue(shim, order, n) for order in range(8)]
    for step in (0, 1):  # before and after the barrier
        assert len({tuple(found[step]) for found in seen}) == len(seen)
    for order, found in enumerate(seen):
        assert found == queue(shim, order, n), "the same order twice"
        assert sorted(found[0]) == list(range(n))
        assert sorted(found[1] + found[2]) == sorted([*range(n)] * 2)
        warps = [t // WARP for t in found[0]]
        changes = sum(a != b for a, b in itertools.pairwise(warps))
        assert (changes > 10) == (order >= 2 and order % 2 == 0), "an even seed mixes the threads of all warps"
        if order >= 2:
            assert found[0] != sorted(found[0])


@pytest.mark.parametrize(
    "sizes, want",
    [
        ((1, 1, 1, 1024, 1, 1), 0),
        ((1, 1, 1, 1025, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 1, 64, 64, 1), INVALID_CONFIGURATION),
        ((1, 1, 1, 1, 1, 65), INVALID_CONFIGURATION),
        ((1, 1, 1, 0, 1, 1), INVALID_CONFIGURATION),
        ((0, 1, 1, 1, 1, 1), INVALID_CONFIGURATION),
        ((1, 65535, 1, 1, 1, 1), 0),
        ((1, 65536, 1, 1, 1, 1), INVALID_CONFIGURATION),
        ((1, 1, 65536, 1, 1, 1), INVALID_CONFIGURATION),
        ((70000, 1, 1, 1, 1, 1), 0),
        ((2**31, 1, 1, 1, 1, 1), INVALID_CONFIGURATION),
    ],
)
def test_limits_of_a_launch(shim, sizes, want):
    assert shim.run_nothing(numbers(*sizes), ctypes.c_size_t(0), 0) == want


@pytest.mark.parametrize(
    "n_bytes, opt_in, want",
    [
        (48 << 10, 48 << 10, 0),
        ((48 << 10) + 1, 48 << 10, INVALID_VALUE),
        (227 << 10, 227 << 10, 0),
        (227 << 10, (227 << 10) - 1, INVALID_VALUE),
        (0, (227 << 10) + 1, -1),
    ],
)
def test_limits_of_shared_memory(shim, n_bytes, opt_in, want):
    assert shim.run_nothing(numbers(1, 1, 1, 32, 1, 1), ctypes.c_size_t(n_bytes), opt_in) == want


def test_addresses_must_be_aligned(shim):
    memory, out = np.arange(12, dtype=np.float32), np.zeros(8, np.float32)
    first = -memory.ctypes.data % 16 // 4
    to = out.ctypes.data + -out.ctypes.data % 16
    assert shim.run_load_four(ctypes.c_void_p(to), ctypes.c_void_p(memory.ctypes.data + 4 * first)) == 0
    assert (ctypes.c_float * 4).from_address(to)[:] == [first + i for i in range(4)]
    assert shim.run_load_four(ctypes.c_void_p(to), ctypes.c_void_p(memory.ctypes.data + 4 * (first + 1))) == 719
    text = shim.simt_message().decode()
    assert text.startswith("simt: an address must be a multiple of 16, got 0x")
    assert " at simt.h:" in text
    assert shim.run_load_four(ctypes.c_void_p(to), ctypes.c_void_p(memory.ctypes.data + 4 * first)) == 0


def test_what_the_device_says(shim):
    out = np.zeros(4, np.int32)
    assert shim.device_answers(at(out)) == 0
    assert out.tolist() == [1, 13000, 9, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_to_the_bit(shim, dtype):
    """All 65536 halves widened; all 65536 upper halves of a float32, with several lower ones, narrowed."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    kind = [torch.bfloat16, torch.float16].index(dtype)
    wide = torch.empty(len(half), dtype=torch.float32)
    call = [ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(half.data_ptr()), ctypes.c_int64(len(half))]
    assert shim.run_convert(*call, kind) == 0
    want = half.view(dtype).float()
    nan = want.isnan()
    assert torch.equal(wide.isnan(), nan)
    assert torch.equal(wide.view(torch.int32)[~nan], want.view(torch.int32)[~nan])
    for low in (0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        given = (torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16 + low).view(torch.float32)
        out = torch.empty(len(given), dtype=dtype)
        call = [ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(given.data_ptr()), ctypes.c_int64(len(given))]
        assert shim.run_convert(*call, 2 + kind) == 0
        want = given.to(dtype)
        nan = want.isnan()
        assert torch.equal(out.isnan(), nan)
        assert torch.equal(out.view(torch.int16)[~nan], want.view(torch.int16)[~nan]), hex(low)
