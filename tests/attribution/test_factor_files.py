"""Factors as the files of kronfluence, and second moments as bergson's."""

import json
import re

import pytest
import torch
from torch import nn

import tlfast
from tlfast.attribution import write_bergson_normalizers, write_kronfluence


def refuses(text):
    return pytest.raises(ValueError, match="^" + re.escape(text))


def squares(model, batch):
    return model(batch.input_ids).square().sum()


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 3, bias=False))
    examples = [[1, 2, 3], [4, 5], [6, 1, 2]]
    return model, tlfast.factors(model, examples, kinds=("kfac", "ekfac", "adam"), bias=True, loss=squares)


def test_what_kronfluence_reads(made, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    _, factors = made
    write_kronfluence(factors, tmp_path / "factors_ours")
    read = {path.stem: safetensors.load_file(path) for path in (tmp_path / "factors_ours").glob("*.safetensors")}
    assert all(set(tensors) == {"1", "2"} for tensors in read.values())
    sides = (("activation", "inputs", "input_basis"), ("gradient", "outputs", "output_basis"))
    for name in ("1", "2"):
        of = factors[name]
        for side, total, basis in sides:
            torch.testing.assert_close(read[f"{side}_covariance"][name], getattr(of, total).float())
            assert read[f"num_{side}_covariance_processed"][name].tolist() == [8]
            vectors, values = read[f"{side}_eigenvectors"][name], read[f"{side}_eigenvalues"][name]
            assert torch.equal(vectors, getattr(of, basis).float())
            covariance = getattr(of, total).float() / 8
            scale = covariance.abs().max()
            torch.testing.assert_close(vectors * values @ vectors.T, covariance, rtol=0, atol=1e-5 * float(scale))
        assert read["num_lambda_processed"][name].tolist() == [3]
        torch.testing.assert_close(read["lambda_matrix"][name] / 3, of.eigenvalues.float())
    said = json.loads((tmp_path / "factors_ours" / "factor_arguments.json").read_text())
    assert said == {"strategy": "ekfac", "use_empirical_fisher": True}
    assert len(read) == 10
    with refuses("write_kronfluence: folder must be empty, got files in "):
        write_kronfluence(factors, tmp_path / "factors_ours")
    with refuses('write_kronfluence: factors must be of "kfac", with eigenvectors, got '):
        write_kronfluence(tlfast.factors(made[0], [[1, 2], [3, 4]], "1", loss=squares), tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Headed(nn.Module):
    """A model with a base, as transformers has them."""

    def __init__(self, base):
        super().__init__()
        self.body, self.head = base, nn.Linear(3, 2)

    @property
    def base_model(self):
        return self.body


def test_what_bergson_reads(made, tmp_path):
    base, factors = made
    model, path = Headed(base), tmp_path / "normalizers.pth"
    ours = {f"body.{name}": one for name, one in factors.normalizers("adam").items()}
    write_bergson_normalizers(ours, path, model)
    read = torch.load(path, weights_only=True)
    assert set(read) == {"1", "2"}
    v = factors["1"].second_moment.float()
    assert read["1"]["__class__"] == "AdamNormalizer"
    assert torch.equal(read["1"]["weight_avg_sq"], v[:, :4])
    assert torch.equal(read["1"]["bias_avg_sq"], v[:, 4])
    assert set(read["2"]) == {"__class__", "weight_avg_sq"}
    write_bergson_normalizers(factors.normalizers("adafactor"), path, base)
    read = torch.load(path, weights_only=True)
    assert set(read["1"]) == {"__class__", "row", "col", "bias_avg_sq"}
    assert [len(read["1"][key]) for key in ("row", "col")] == [5, 4]
    with refuses("write_bergson_normalizers: normalizers must be of modules of the model, got '1'."):
        write_bergson_normalizers(factors.normalizers(), path, model)
