"""The comparisons that the dataset tests use fail on wrong data."""

import pytest
import torch
from dataset_cases import PLAN, check_rows, content, make_dataset, same_bits, truth


def test_same_bits_accepts_equal_nans():
    x = torch.tensor([1.0, float("nan")])
    assert same_bits(x, x.clone())


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([1.0, 0.0]),
        torch.tensor([1.0, -0.0, 2.0]),
        torch.tensor([1.0, 2.0], dtype=torch.float64),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, 2.0000002]),
    ],
)
def test_same_bits_refuses(wrong):
    assert not same_bits(torch.tensor([1.0, 2.0]), wrong)
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def _one_off(tensors):
    tensors["loss"] = tensors["loss"].roll(1)


def _one_value(tensors):
    tensors["blocks.1.attn"][7, 1, 2] += 1


def _another_name(tensors):
    tensors["other"] = tensors.pop("double")


@pytest.mark.parametrize("spoil", [_one_off, _one_value, _another_name])
def test_check_rows_refuses(tmp_path, spoil):
    ds = make_dataset(tmp_path / "d")
    tensors = truth()
    check_rows(ds, tensors)
    spoil(tensors)
    with pytest.raises(AssertionError):
        check_rows(ds, tensors)


def test_check_rows_refuses_other_examples(tmp_path, monkeypatch):
    ds = make_dataset(tmp_path / "d")
    row = ds.examples[PLAN.n_examples - 1]
    monkeypatch.setattr(type(ds.examples), "__getitem__", lambda table, i: row if i < len(table) else [][0])
    with pytest.raises(AssertionError):
        check_rows(ds, truth())


def test_content_sees_every_byte(tmp_path):
    make_dataset(tmp_path / "d")
    before = content(tmp_path / "d")
    path = tmp_path / "d" / "data" / "u000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert content(tmp_path / "d") != before
