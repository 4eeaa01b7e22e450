"""Rows on their way to the host: right under every schedule of the streams, and wrong as soon as a wait is left out."""

from __future__ import annotations

from collections import deque
from random import Random

import pytest
import torch
from fake_streams import FakeStreams
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tlfast.collecting.drain import (
    N_COUNTERS,
    N_SLOTS,
    DirectStreams,
    Drain,
    UnitMemory,
    streams_for,
)
from tlfast.dataset.format.layout import PAGE_BYTES, Column, payload_spans

COLUMNS = {"a": Column(torch.float32, (2,)), "b": Column(torch.int64, ())}
CAPACITY = 4
MOST_PENDING = 2  # units submitted and not yet durable, as in collect


def rows_of(unit, name, n):
    """What unit ``unit`` has in a column: other numbers than any other unit, column or example has."""
    shape = (n, *COLUMNS[name].row_shape)
    example = torch.arange(n).reshape(n, *(1 for _ in COLUMNS[name].row_shape)).expand(shape)
    return (example + 100 * unit + 10 * list(COLUMNS).index(name)).to(COLUMNS[name].dtype)


class Collection:
    """Units computed, drained and written, each at a pace of its own, on streams that lag behind."""

    def __init__(self, streams, random, sizes, with_room=True):
        self.streams, self.random, self.sizes, self.with_room = streams, random, sizes, with_room
        self.drain = Drain(streams, COLUMNS, CAPACITY)
        self.rings = {name: torch.zeros(CAPACITY, *c.row_shape, dtype=c.dtype) for name, c in COLUMNS.items()}
        self.counters = [torch.zeros(N_COUNTERS, dtype=torch.int64) for _ in COLUMNS]
        self.jobs = deque()
        self.writing = None
        self.n_written = 0
        self.writer_weight = random.choice((1, 100))

    def run(self):
        for unit, n in enumerate(self.sizes):
            order = self.random.sample(range(n), n)
            for example in order:
                self.compute(unit, n, order, example)
                self.pause()
            places = torch.tensor(order).argsort()
            rings = {name: ring[:n] for name, ring in self.rings.items()}
            arrived = self.drain.drain(rings, self.counters, places, self.wait_for_room)
            self.jobs.append((unit, n, arrived))
            self.pause()
        while self.n_written < len(self.sizes):
            self.happen()

    def compute(self, unit, n, order, example):
        """Queue what writes one row of each ring, and counts."""

        def work():
            for name, ring in self.rings.items():
                ring[order.index(example)] = rows_of(unit, name, n)[example]
            for column, counter in enumerate(self.counters):
                counter += torch.tensor([1, column, 0])

        self.streams.run("compute", work)

    def pause(self):
        for _ in range(self.random.choice((0, 1, 4, 30))):
            self.happen(must=False)

    def wait_for_room(self):
        while self.with_room and len(self.jobs) + (self.writing is not None) >= MOST_PENDING:
            self.happen()

    def happen(self, must=True):
        """Let one of the streams or the writer go on, or nobody."""
        able = bool(self.jobs) or self.writing is not None
        lots = [self.write] * (able * self.writer_weight)
        lots += [self.streams.advance] * (10 * bool(self.streams.ready()))
        lots += [lambda: None] * (10 * (not must))
        assert lots, "all wait for each other"
        self.random.choice(lots)()

    def write(self):
        """The writer takes a unit and waits for its rows, or has read what it took before."""
        if self.writing is None:
            unit, n, arrived = self.jobs.popleft()
            self.writing = (unit, n, *arrived())
            return
        unit, n, block, counters = self.writing
        for name, rows in block.items():
            assert torch.equal(rows, rows_of(unit, name, n)), f"unit {unit} has wrong rows in column {name}"
        n_done = sum(self.sizes[: unit + 1])
        assert counters.tolist() == [[n_done, n_done * column, 0] for column in range(len(COLUMNS))]
        self.writing = None
        self.n_written += 1


SIZES = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=6)
RANDOM = st.randoms(use_true_random=False)


@given(RANDOM, SIZES)
@settings(max_examples=300)
def test_every_unit_arrives_under_every_schedule(random, sizes):
    Collection(FakeStreams(random), random, sizes).run()


@pytest.mark.parametrize("left_out", ["compute", "side", "host", "room"])
def test_a_wait_that_is_left_out_is_found(left_out):
    @given(RANDOM, SIZES)
    @settings(max_examples=300, phases=[Phase.generate])  # found is enough, the smallest example costs too much
    def all_schedules(random, sizes):
        streams = FakeStreams(random, ignored=left_out)
        Collection(streams, random, sizes, with_room=left_out != "room").run()

    with pytest.raises(AssertionError, match="wrong rows in column"):
        all_schedules()


@given(RANDOM, SIZES)
@settings(max_examples=30)
def test_without_streams_rows_go_straight_to_the_host(random, sizes):
    class AtOnce(DirectStreams):
        def ready(self):
            return []

        def advance(self):
            return False

    collection = Collection(AtOnce(), random, sizes)
    slots = collection.drain._slots
    assert len(slots) == N_SLOTS
    for slot in slots:  # nothing beside the ring and two blocks
        assert slot.device is slot.host
        assert slot.device_counters is slot.host_counters
    collection.run()


def test_the_memory_is_allocated_once():
    streams = FakeStreams(Random(0))
    drain = Drain(streams, COLUMNS, CAPACITY)
    memory = [side.memory for slot in drain._slots for side in (slot.host, slot.device)]
    assert len({piece.data_ptr() for piece in memory}) == 2 * N_SLOTS
    rings = {name: rows_of(0, name, CAPACITY) for name in COLUMNS}
    counters = [torch.zeros(N_COUNTERS, dtype=torch.int64) for _ in COLUMNS]
    used = set()
    for _ in range(5):
        block, _ = drain.drain(rings, counters, torch.arange(CAPACITY), lambda: None)()
        used |= {tensor.data_ptr() for tensor in block.values()}
    assert used == {tensor.data_ptr() for slot in drain._slots for tensor in slot.host.block(CAPACITY).values()}


@pytest.mark.parametrize("n_rows", [1, CAPACITY - 1, CAPACITY])
def test_a_unit_lies_in_memory_as_in_its_file(n_rows):
    columns = COLUMNS | {"c": Column(torch.bfloat16, (3,)), "empty": Column(torch.float32, (0,))}
    memory = UnitMemory(columns, CAPACITY, torch.device("cpu"))
    block = memory.block(n_rows)
    spans = payload_spans(columns, n_rows)
    assert memory.memory.data_ptr() % PAGE_BYTES == 0
    assert list(block) == list(spans)
    assert len(memory.bytes_of(n_rows)) == max(stop for _, stop in spans.values())
    for name, (start, stop) in spans.items():
        assert block[name].shape == (n_rows, *columns[name].row_shape)
        assert block[name].dtype == columns[name].dtype
        assert block[name].nbytes == stop - start
        assert block[name].nbytes == 0 or block[name].data_ptr() == memory.memory.data_ptr() + start


@pytest.mark.parametrize("devices", [{"cpu"}, {"cuda:0", "cuda:1"}, {"cpu", "cuda:0"}, {"mps"}])
def test_what_is_not_one_gpu_is_copied_directly(devices):
    assert isinstance(streams_for({torch.device(device) for device in devices}), DirectStreams)
