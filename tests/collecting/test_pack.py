"""Rows and tokens into a unit's block: chosen, padding squeezed out, cast, encoded; against plain loops."""

import re
from random import Random

import numpy as np
import pytest
import torch
from dataset_cases import same_bits
from fake_streams import FakeStreams
from hypothesis import given, settings
from hypothesis import strategies as st

from tlfast.collecting import pack as packing
from tlfast.collecting.drain import N_COUNTERS, DirectStreams, Drain, UnitMemory
from tlfast.collecting.pack import Pack, Tokens
from tlfast.dataset import Column, DatasetWriter, Example, Plan, open_dataset
from tlfast.dataset.format.encodings import encode
from tlfast.dataset.write import native as native_writer

COLUMNS = {
    "rows": Column(torch.bfloat16, (2, 3)),
    "tokens": Column(torch.float32, (5,), per="token"),
    "codes": Column(torch.float32, (70,), encoding="int8:64"),
    "low tokens": Column(torch.float32, (3,), per="token", encoding="int8"),
    "scalars": Column(torch.float16, (), per="token"),
}
WIDTH = 6  # positions of a padded row
NAN = float("nan")  # what padding, and whatever may not be read, is made of


@st.composite
def units(draw):
    """Where the rows of a unit lie in the rings, and which of their positions are real."""
    n = draw(st.integers(1, 5))
    places = draw(st.permutations(range(n)))
    lengths = draw(st.lists(st.integers(0, WIDTH), min_size=n, max_size=n))
    left = draw(st.booleans())
    firsts = [WIDTH - length for length in lengths] if left else draw(st.sampled_from([None, [0] * n]))
    return places, Tokens(lengths, firsts)


def rings_of(places, tokens, dtype=None):
    """Rings with NaN wherever nothing real lies, and what each example has at each column, in plain loops."""
    generator = torch.Generator().manual_seed(0)
    rings, truth = {}, {name: [] for name in COLUMNS}
    for name, column in COLUMNS.items():
        shape = (WIDTH,) * (column.per == "token") + column.row_shape
        rings[name] = torch.full((len(places), *shape), NAN, dtype=dtype or column.dtype)
        for i, place in enumerate(places):
            first = 0 if tokens.firsts is None else tokens.firsts[i]
            n = tokens.lengths[i] if column.per == "token" else 1
            values = torch.randn((n, *column.row_shape), generator=generator).to(rings[name].dtype)
            if column.per == "token":
                rings[name][place, first : first + n] = values
            else:
                rings[name][place] = values[0]
            truth[name].append(values)
    return rings, {name: torch.cat(parts) for name, parts in truth.items()}


def check(block, truth):
    """Fail unless a block holds these rows, of columns of its dtype or encoded."""
    contents = Pack(COLUMNS).contents(block)
    assert list(contents) == list(COLUMNS)
    for name, column in COLUMNS.items():
        if column.encoding is None:
            assert same_bits(contents[name], truth[name].to(column.dtype)), name
        else:
            for ours, theirs in zip(contents[name], encode(truth[name], column.encoding), strict=True):
                np.testing.assert_array_equal(ours.numpy(), theirs.numpy(), err_msg=name)


def packed(places, tokens, rings, native=None):
    block = UnitMemory(COLUMNS, len(places), torch.device("cpu"), n_tokens=tokens.total).block(
        len(places), tokens.total
    )
    pack = Pack(COLUMNS, native)
    pack.put(rings, pack.choose(rings, torch.tensor(places), tokens), block)
    return block


@given(units())
@settings(max_examples=60)
def test_each_form_is_what_plain_loops_make(unit):
    places, tokens = unit
    rings, truth = rings_of(places, tokens)
    check(packed(places, tokens, rings), truth)
    check(packed(places, tokens, rings, native_writer.loaded()), truth)


def test_the_check_finds_a_row_in_a_wrong_place():
    places, tokens = [1, 0, 2], Tokens([2, 0, 6])
    rings, truth = rings_of(places, tokens)
    block = packed([0, 1, 2], tokens, rings)
    with pytest.raises(AssertionError):
        check(block, truth)


def test_rings_of_another_dtype_are_cast_once():
    places, tokens = [2, 0, 1], Tokens([3, 6, 1], [3, 0, 5])
    rings, truth = rings_of(places, tokens, dtype=torch.float32)
    check(packed(places, tokens, rings), truth)


def test_codes_do_not_depend_on_how_many_rows_are_encoded_at_a_time(monkeypatch):
    places, tokens = [2, 0, 1], Tokens([3, 6, 1])
    rings, truth = rings_of(places, tokens)
    monkeypatch.setattr(packing, "_CPU_BYTES", 1)
    check(packed(places, tokens, rings), truth)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (None, "Pack: tokens must be given for columns per token, got None. Say the lengths."),
        (Tokens([1]), "Pack: lengths and firsts must be of each example, got 1 and 1 of 2 examples. Give one of each."),
        (Tokens([1, 7]), "Pack: tokens of row 1 must lie in 0..6, got 0 to 7. Count positions from 0."),
        (Tokens([1, -1]), "Pack: tokens of row 1 must lie in 0..6, got 0 to -1."),
        (Tokens([1, 3], [0, 4]), "Pack: tokens of row 1 must lie in 0..6, got 4 to 7."),
    ],
)
def test_tokens_that_cannot_be(tokens, message):
    rings, _ = rings_of([0, 1], Tokens([1, 1]))
    with pytest.raises(ValueError, match=re.escape(message)):
        Pack(COLUMNS).choose(rings, torch.tensor([0, 1]), tokens)


@pytest.mark.parametrize("streams", [DirectStreams(), None])
def test_a_drain_brings_each_form_to_the_host_and_to_the_disk(streams, tmp_path):
    if streams is None:
        streams = FakeStreams(Random(0))
    plan, lengths = Plan(5, 3), [2, 0, 6, 1, 4]
    drain = Drain(streams, COLUMNS, n_rows=3, n_tokens=8)
    writer = DatasetWriter(tmp_path, header={}, columns=COLUMNS, plan=plan)
    counters = [torch.zeros(N_COUNTERS, dtype=torch.int64) for _ in COLUMNS]
    wanted = []
    for unit in plan.units:
        tokens = Tokens(lengths[unit.start : unit.stop])
        places = list(reversed(range(len(unit))))
        rings, truth = rings_of(places, tokens)
        wanted.append(truth)
        block, _ = drain.drain(rings, counters, torch.tensor(places), lambda: None, tokens)()
        check(block, truth)
        examples = [Example(i, [1], "a", 0, lengths[i]) for i in range(unit.start, unit.stop)]
        assert writer.write_unit(unit, drain.pack.contents(block), examples)
    ds = open_dataset(tmp_path)
    assert ds.verify().ok
    assert same_bits(torch.cat(ds["tokens"][:]), torch.cat([truth["tokens"] for truth in wanted]))


@pytest.mark.parametrize("n", [2, 9])
def test_rows_of_another_shape_than_their_column(n):
    columns = {"a": Column(torch.float32, (5,)), "b": Column(torch.float32, (5,))}
    block = UnitMemory(columns, 2, torch.device("cpu")).block(2)
    block["b"].zero_()
    rings = {"a": torch.ones(2, n), "b": torch.zeros(2, 5)}
    message = f"Pack: rows of a ring must have the shape of their column, got [{n}] for [5]. Make the Pack for these"
    with pytest.raises(ValueError, match=re.escape(message)):
        Pack(columns).put(rings, {name: torch.tensor([0, 1]) for name in rings}, block)
    assert not block["b"].any()


def test_a_unit_with_more_tokens_than_there_is_room_for():
    drain = Drain(DirectStreams(), COLUMNS, n_rows=2, n_tokens=3)
    rings, _ = rings_of([0, 1], Tokens([2, 2]))
    message = "Drain: a unit must have at most 3 tokens, got 4. Make the Drain for the largest unit."
    with pytest.raises(ValueError, match=re.escape(message)):
        drain.drain(rings, [], torch.tensor([0, 1]), lambda: None, Tokens([2, 2]))


def test_rows_that_are_rounded_by_their_example_need_its_number():
    pack = Pack({"h": Column(torch.float32, (3,), per="token", encoding="int8:stochastic")})
    with pytest.raises(ValueError, match=r"^Pack: first_example must be known to encode 'h' as int8:stochastic"):
        pack.roundings(None, 2, Tokens([1, 2]))
    (rounding,) = pack.roundings(7, 2, Tokens([1, 2])).values()
    assert (rounding.column, rounding.examples.tolist(), rounding.positions.tolist()) == ("h", [7, 8, 8], [0, 0, 1])
