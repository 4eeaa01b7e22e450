"""Spec: what can be asked for, what is refused, and how specs and points are told apart."""

import dataclasses

import numpy as np
import pytest
import torch

import tlfast
from tlfast.spec import REDUCTIONS, SpecArguments, as_specs, parse_over


@pytest.mark.parametrize(
    "over, dims",
    [
        ("pos", (1,)),
        ("batch", (0,)),
        (("batch", "pos"), (0, 1)),
        (["pos", -1], (1, -1)),
        (2, (2,)),
        (-1, (-1,)),
        ((0, 3), (0, 3)),
        (range(1, 3), (1, 2)),
    ],
)
def test_dims(over, dims):
    assert tlfast.Spec("x", reduce="sum", over=over).dims == dims
    assert tlfast.Spec("x", reduce="none", over=over).dims == ()


def test_defaults_and_labels():
    spec = tlfast.Spec("x")
    assert (spec.reduce, spec.over, spec.dtype, spec.output, spec.name) == ("none", "pos", None, None, None)
    assert spec.label == "none"
    assert [tlfast.Spec("x", reduce=r).label for r in REDUCTIONS] == list(REDUCTIONS)
    assert tlfast.Spec("x", reduce="sum", name="total").label == "total"
    assert spec == tlfast.Spec("x")
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.reduce = "sum"


@pytest.mark.parametrize(
    "wrong, kind, text",
    [
        ({"reduce": "max"}, ValueError, "Spec: reduce must be one of none, sum, mean, last, norm, absmax, got 'max'. "),
        ({"reduce": None}, ValueError, "Spec: reduce must be one of none, sum, mean, last, norm, absmax, got None. "),
        ({"over": "width"}, ValueError, 'Spec: over must be "batch", "pos" or dimension numbers, got \'width\'. '),
        ({"over": ("pos", 1.5)}, TypeError, 'Spec: over must be "batch", "pos" or dimension numbers, got 1.5. '),
        ({"over": None}, TypeError, 'Spec: over must be "batch", "pos" or dimension numbers, got None. '),
        ({"over": ()}, ValueError, "Spec: over must name at least one dimension, got (). "),
        (
            {"dtype": torch.int32},
            ValueError,
            "Spec: dtype must be one of float32, bfloat16, float16, float64 or None, ",
        ),
        (
            {"dtype": "bf16"},
            ValueError,
            "Spec: dtype must be one of float32, bfloat16, float16, float64 or None, got 'bf16'.",
        ),
    ],
)
def test_refused_when_it_is_made(wrong, kind, text):
    with pytest.raises(kind) as error:
        tlfast.Spec("x", **wrong)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("word", ["bfloat16", "torch.bfloat16"])
def test_a_dtype_by_its_name_is_that_dtype(word):
    assert tlfast.Spec("x", dtype=word) == tlfast.Spec("x", dtype=torch.bfloat16)
    assert as_specs("capture", "x", SpecArguments(dtype=word)) == [tlfast.Spec("x", dtype=torch.bfloat16)]


def test_one_or_many_specs():
    one, two = tlfast.Spec("a"), tlfast.Spec("b")
    plain = ("sum", "batch", torch.float16, 1)
    assert as_specs("capture", one) == [one]
    assert as_specs("capture", [one, two]) == [one, two]
    assert as_specs("capture", (one,)) == [one]
    assert as_specs("capture", "a", SpecArguments(*plain)) == [tlfast.Spec("a", *plain)]
    assert as_specs("capture", ["a", "b"], SpecArguments(*plain)) == [tlfast.Spec(["a", "b"], *plain)]
    with pytest.raises(TypeError, match="capture: points must be all names or all Specs"):
        as_specs("capture", [one, "b"])


@pytest.mark.parametrize("over", [np.float32(1), np.int64(1), (np.int64(1),)])
def test_dimension_numbers_are_plain_ones(over):
    with pytest.raises(TypeError, match="Spec: over must be"):
        parse_over("Spec", over)
