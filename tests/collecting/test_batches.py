"""Batches hold each example once, within the budget, with little padding; examples come from many forms."""

from __future__ import annotations

from array import array
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import sequences
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from tlfast.collecting.batches import Batch, Batching, as_examples, unit_rows
from tlfast.dataset.format.plan import Example

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def of_lengths(lengths):
    return as_examples([list(range(100, 100 + length)) for length in lengths])


@given(LENGTHS, st.integers(1, 200), st.sampled_from(["right", "left"]), st.booleans())
def test_each_example_is_in_one_batch_and_whole(lengths, batch_tokens, side, fixed):
    examples = of_lengths(lengths)
    batching = Batching(batch_tokens, 40 if fixed else None, side, pad_id=7)
    seen = []
    for rows, batch in batching.batches(examples, batching.order(examples)):
        seen += rows
        n_rows, n_positions = batch.input_ids.shape
        assert n_rows == 1 or n_rows * n_positions <= batch_tokens
        assert n_positions == (40 if fixed else max(lengths[i] for i in rows))
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        assert (batch.mask is None) == bool(mask.all())
        for i, ids, real in zip(rows, batch.input_ids, mask, strict=True):
            assert ids[real].tolist() == list(examples[i].input_ids)
            assert (ids[~real] == 7).all()
            assert real[0 if side == "right" else -1]
    assert sorted(seen) == list(range(len(lengths)))


def test_neighbours_are_of_like_length():
    lengths = [2, 30, 3, 29, 2, 30, 3, 29]
    examples = of_lengths(lengths)
    batching = Batching(60)
    padded = sum(batch.input_ids.numel() for _, batch in batching.batches(examples, batching.order(examples)))
    assert padded == 2 * 30 + 2 * 29 + 4 * 3


@given(LENGTHS, st.sampled_from(["right", "left"]))
def test_next_tokens_are_the_next_real_ones(lengths, side):
    examples = of_lengths(lengths)
    batch = Batching(1, None, side).batch(examples, max(lengths))
    for example, row in zip(examples, batch.next_tokens, strict=True):
        assert row[row != -100].tolist() == list(example.input_ids)[1:]
    # A token stands where the token before it stands.
    at = (batch.next_tokens != -100).nonzero()
    assert torch.equal(batch.next_tokens[at[:, 0], at[:, 1]], batch.input_ids[at[:, 0], at[:, 1]] + 1)


def test_positions_of_left_padding_count_from_the_first_real_token():
    batch = Batching(1, 5, "left").batch(of_lengths([3]), 5)
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2]]
    assert Batching(1, 5, "right").batch(of_lengths([3]), 5).position_ids is None
    assert Batch(torch.zeros(2, 3), None, "left").position_ids is None


@pytest.mark.parametrize(
    "batches",
    [
        [[1, 2, 3], [4, 5]],
        [[[1, 2, 3], [4, 5]]],
        [(1, 2, 3), np.array([4, 5])],
        [torch.tensor([1, 2, 3]), torch.tensor([[4, 5]])],
        [{"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([[4, 5]])}],
        [{"input_ids": torch.tensor([[1, 2, 3], [9, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 1], [0, 1, 1]])}],
        [{"input_ids": [[1, 2, 3], [4, 5, 9]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}],
        [Example(8, [1, 2, 3], "", 0, 3), [Example(9, [4, 5], "", 0, 2)]],
        ([1, 2, 3] if k == 0 else [4, 5] for k in range(2)),
    ],
    ids=lambda batches: type(batches).__name__,
)
def test_examples_come_from_many_forms(batches):
    examples = as_examples(batches)
    assert [list(example.input_ids) for example in examples] == [[1, 2, 3], [4, 5]]
    assert [example.id for example in examples] == [0, 1]


def test_source_and_start_are_kept():
    batch = {"input_ids": [[1, 2], [3, 4]], "source": ["a", "b"], "start": torch.tensor([0, 7])}
    one = {"input_ids": [5, 6], "source": "c", "start": 2}
    examples = as_examples([batch, one, Example(0, [7, 8], "d", 3, 2)])
    assert [(e.source, e.start) for e in examples] == [("a", 0), ("b", 7), ("c", 2), ("d", 3)]


@pytest.mark.parametrize(
    "batches, error, text",
    [
        ([], ValueError, "batches must hold examples, got none"),
        ([[1]], ValueError, "examples must have 2 tokens or more, got 1 in example 0"),
        ([[1, 2], torch.zeros(3, 0, dtype=torch.long)], ValueError, "got 0 in example 1"),
        ([[1, 2, -1]], ValueError, "tokens must be ints from 0 on, got -1"),
        ([torch.tensor([0.5, 1.0])], ValueError, r"tokens must be ints from 0 on, got 0\.5"),
        (["some text"], TypeError, r"batches must hold token sequences, .* got str in batches.0.\. Tokenize the text"),
        ([{"text": "a"}], ValueError, "keys of batches must be among input_ids, attention_mask, .*, got text. Only"),
        ([None], TypeError, "got NoneType"),
    ],
)
def test_what_holds_no_tokens_is_refused(batches, error, text):
    with pytest.raises(error, match=text):
        as_examples(batches)


IDS = torch.tensor([[1, 2, 3], [4, 5, 9]])
Fields = namedtuple("Fields", "input_ids labels")


@pytest.mark.parametrize(
    "batch, error, text",
    [
        (
            {"input_ids": IDS, "labels": IDS},
            ValueError,
            r"keys of batches must be among .*, got labels\. Only `collect` takes other fields",
        ),
        (
            {"input_ids": IDS, "position_ids": IDS, "token_type_ids": IDS},
            ValueError,
            "got position_ids, token_type_ids",
        ),
        ({"input_ids": IDS, "attention_masks": IDS}, ValueError, "got attention_masks"),
        (BatchEncoding({"input_ids": [[1, 2]], "labels": [[1, 2]]}), ValueError, "got labels"),
        (
            Fields(IDS, IDS),
            ValueError,
            r"must name the fields of a batch, got Fields\(input_ids, labels\)\. Give mappings",
        ),
        ([IDS, IDS], ValueError, r"got 2 parts with sizes \[2, 3\], \[2, 3\]"),
        ([IDS, torch.tensor([0, 1])], ValueError, "must name the fields of a batch"),
        ((IDS.numpy(), IDS.numpy()), ValueError, "must name the fields of a batch"),
        (([1, 2, 3], [1, 1, 0]), ValueError, "must name the fields of a batch, got tokens, and as many 0s and 1s"),
        (
            [IDS[:, 0], IDS[:, 1]],
            ValueError,
            r"one example after the other, got a list of 2 tensors \[2\]\. Stack them",
        ),
        ({"input_ids": [IDS[:, 0], IDS[:, 1]]}, ValueError, r"input_ids of batches\[0\] must hold one example after"),
        ({"input_ids": IDS[None]}, ValueError, r"must be tokens, \[P\] or \[B, P\], got a tensor \[1, 2, 3\]"),
        ({"input_ids": 5}, ValueError, r"must be tokens, \[P\] or \[B, P\], got 5"),
        ({"input_ids": IDS.float()}, ValueError, r"tokens must be ints from 0 on, got 1\.0"),
        ({"input_ids": IDS > 3}, ValueError, "tokens must be ints from 0 on, got False"),
        ([True, False], ValueError, "tokens must be ints from 0 on, got True"),
        (array("f", [1.5, 2.0]), ValueError, r"tokens must be ints from 0 on, got 1\.5"),
        ({"input_ids": IDS, "attention_mask": IDS}, ValueError, "must be 0 or 1 at each of the 3 tokens, got"),
        ({"input_ids": IDS, "attention_mask": (IDS > 1).float().log()}, ValueError, "must be 0 or 1 at each"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, "must be 0 or 1 at each"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 2)}, ValueError, "must be 0 or 1 at each of the 3 tokens"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 1]}, ValueError, "have one for each of 2 examples, got 3 values"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, ValueError, "keep one run of tokens, got a gap"),
        ({"input_ids": IDS, "source": ["a"]}, ValueError, "source of .* have one for each of 2 examples, got 1 values"),
        ({"input_ids": IDS, "source": [1, 2]}, ValueError, "must be a text and a whole number, got 1 and 0"),
        ({"input_ids": IDS, "start": 1.5}, ValueError, r"start of .* have one for each of 2 examples, got 1\.5"),
        ({"input_ids": [1, 2], "id": 3, "flags": 0}, ValueError, "got id, flags"),
        (Example(0, [1, 2, 0, 0], "", 0, 2), ValueError, r"length of batches\[0\] must count its tokens, got 2 for 4"),
    ],
)
def test_what_would_be_dropped_or_taken_for_something_else_is_refused(batch, error, text):
    with pytest.raises(error, match=text):
        as_examples([batch])


def test_what_a_data_loader_makes_of_lists_is_refused_and_its_remedy_works():
    rows = [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(ValueError, match="needs collate_fn=list"):
        as_examples(DataLoader(rows, batch_size=2))
    found = as_examples(DataLoader(rows, batch_size=2, collate_fn=list))
    assert [list(example.input_ids) for example in found] == rows
    with pytest.raises(ValueError, match="name the fields of a batch"):
        as_examples(DataLoader(TensorDataset(IDS, IDS > 2), batch_size=2))


def test_a_mapping_is_one_batch():
    with pytest.raises(
        TypeError, match=r"be an iterable of batches, got a mapping with input_ids\. Put it into a list"
    ):
        as_examples({"input_ids": IDS})


def test_none_is_nothing_and_bytes_are_tokens():
    batch = {
        "input_ids": IDS,
        "labels": None,
        "attention_mask": torch.tensor([[True, True, False], [True, True, True]]),
    }
    assert [list(e.input_ids) for e in as_examples([batch, b"abcd"])] == [[1, 2], [4, 5, 9], [97, 98, 99, 100]]


def test_what_next_tokens_were_called_is_an_error_that_says_so():
    batch = Batching(1).batch(of_lengths([3]), 3)
    assert batch.next_tokens.tolist() == [[101, 102, -100]]
    with pytest.raises(AttributeError, match=r"labels must be asked for as next_tokens.* shifted already"):
        batch.labels  # noqa: B018


def test_rows_of_a_unit_fit_the_ring():
    assert unit_rows(1 << 20) == 256
    assert unit_rows(1 << 30) == 1
    assert unit_rows(24) == 2048
    assert unit_rows(0) == 2048


def test_order_depends_on_the_examples_alone():
    examples = as_examples(sequences(40))
    batching = Batching(64)
    order = batching.order(examples)
    assert order == batching.order(list(examples))
    lengths = [examples[i].length for i in order]
    assert lengths == sorted(lengths, reverse=True)
