"""What a column may be, which version of the format it needs, and which tensors hold it."""

import re

import pytest
import torch

from tlfast.dataset import Column, DatasetError, Plan
from tlfast.dataset.format.description import describe
from tlfast.dataset.format.layout import check_columns, payload_spans, unit_layout, version_of
from tlfast.dataset.format.plan import Unit

F32 = torch.float32


@pytest.mark.parametrize(
    "column, version",
    [
        ((F32, (2,)), 1),
        ([F32, [2]], 1),
        (Column(F32, (2,), "grad", "example", None), 1),
        (Column(F32, (2,), of="act"), 2),
        (Column(F32, (2,), per="token"), 2),
        (Column(F32, (2,), encoding="int8"), 2),
    ],
)
def test_the_first_version_that_suffices(column, version):
    columns = check_columns("who", {"x": (F32, ()), "h": column})
    assert version_of(columns) == version
    described = describe("who", {}, columns, Plan(1, 1)).identity()
    assert described["version"] == version
    keys = ["name", "dtype", "shape"] + ["of", "per", "encoding"] * (version - 1)
    assert [list(entry) for entry in described["columns"]] == [keys, keys]


@pytest.mark.parametrize(
    "column, message",
    [
        (
            (F32,),
            "who: column 'h' must be a pair or a Column, got (torch.float32,). Give the dtype and the shape of a row",
        ),
        (
            Column(F32, 4),
            "who: shape of 'h' must be a tuple, the shape of one row, got 4. Write (4,).",
        ),
        ((F32, "4"), "who: shape of 'h' must be a tuple, the shape of one row, got '4'. Give a tuple of ints."),
        (F32, "who: column 'h' must be a pair or a Column, got torch.float32."),
        (Column(F32, (2,), of=""), "who: of of 'h' must be 1 to 64 printable characters, got ''."),
        (Column(F32, (2,), of="a\nb"), "who: of of 'h' must be 1 to 64 printable characters, got 'a\\nb'."),
        (Column(F32, (2,), of=7), "who: of of 'h' must be 1 to 64 printable characters, got 7."),
        (Column(F32, (2,), per="tok"), "who: per of 'h' must be one of example, token, got 'tok'."),
        (
            Column(F32, (2,), encoding="int4"),
            (
                "who: encoding of 'h' must be None or one of int8, int8:64, float8_e4m3fn, int4:64, "
                "int8:stochastic, int8:64:stochastic, float8_e4m3fn:stochastic, int4:64:stochastic, got 'int4'."
            ),
        ),
        (
            Column(torch.bfloat16, (2,), encoding="int8"),
            "who: dtype of the encoded 'h' must be float32, as decoded rows are, got torch.bfloat16. Rows of bfloat16",
        ),
        (Column(F32, (0,), encoding="int8"), "who: shape of the encoded 'h' must have a value in each row, got [0]."),
    ],
)
def test_refused_columns(column, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        check_columns("who", {"h": column})


def test_a_column_with_the_name_of_anothers_tensor():
    columns = {"h": Column(F32, (2,), encoding="int8"), "h:codes": (F32, (2,))}
    message = "who: column name must not be the name of a tensor of the encoded 'h', got 'h:codes'. Rename it."
    with pytest.raises(DatasetError, match=re.escape(message)):
        check_columns("who", columns)
    assert check_columns("who", {"h": (F32, (2,)), "h:codes": (F32, (2,))})


def test_fields_and_where_they_lie():
    columns = {
        "low": Column(F32, (70,), per="token", encoding="int8:64"),
        "h": Column(torch.bfloat16, (3,)),
        "wide": Column(torch.float64, (2,), per="token"),
    }
    assert payload_spans(columns, 5, 11) == {
        "wide": (0, 11 * 16),
        "low:scales": (176, 176 + 11 * 8),
        "h": (264, 264 + 5 * 6),
        "low:codes": (294, 294 + 11 * 70),
    }
    assert columns["low"].row_bytes == 78
    header = unit_layout(columns, Unit("u000000", 0, 5), 11).header
    assert b'"tlfast":"2"' in header
    assert b'"low:codes":{"dtype":"I8","shape":[11,70]' in header
    assert b'"low:scales":{"dtype":"F32","shape":[11,2]' in header
