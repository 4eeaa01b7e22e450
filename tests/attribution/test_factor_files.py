"""Factors as the files of kronfluence, and as bergson's, which has second moments, too: written, and read again."""

import copy
import json
import re

import pytest
import torch
from safetensors import torch as safetensors
from torch import nn

import tlfast
from tlfast.attribution import (
    read_bergson_factors,
    read_bergson_hessians,
    read_bergson_normalizers,
    read_kronfluence,
    write_bergson_factors,
    write_bergson_hessians,
    write_bergson_normalizers,
    write_kronfluence,
)
from tlfast.hooks.normalizers import AdamNormalizer


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


def check_same(found, factors, relative=1e-5):
    """Fail unless these are the same factors, stored in float32."""
    assert found.names == factors.names
    for name in factors:
        ours, theirs = factors[name], found[name]
        for what in ("n_outputs", "n_inputs", "bias", "n_examples", "n_tokens"):
            assert getattr(theirs, what) == getattr(ours, what)
        for what in ("inputs", "outputs", "eigenvalues", "output_basis", "input_basis", "kfac_eigenvalues"):
            wanted, got = getattr(ours, what), getattr(theirs, what)
            assert got.dtype == torch.float64
            assert (got - wanted).abs().max() <= relative * wanted.abs().max()


def test_kronfluence_files_are_read(made, tmp_path):
    model, factors = made
    folder = tmp_path / "factors_x"
    write_kronfluence(factors, folder)
    read = read_kronfluence(folder, model)
    check_same(read, factors)
    gradients = {"1": torch.ones(1, 5, 5)}
    torch.testing.assert_close(read.precondition(gradients), factors.precondition(gradients), rtol=1e-3, atol=1e-6)
    for other, text in (
        (
            nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5)),
            "folder must be of linear layers of the model, got '2' of",
        ),
        (nn.Sequential(model[0], nn.Linear(4, 5, bias=False), model[2]), "folder must be of linear layers of the mode"),
    ):
        with refuses(f"read_kronfluence: {text}"):
            read_kronfluence(folder, other)
    for file in ("lambda_matrix", "num_lambda_processed"):
        (folder / f"{file}.safetensors").unlink()
    with refuses("read_kronfluence: n_examples must be given where there are no Lambda matrices, got none."):
        read_kronfluence(folder, model)
    kfac = read_kronfluence(folder, model, n_examples=3)
    assert kfac.kinds == ("kfac",)
    assert torch.equal(kfac["1"].inputs, kfac["1"].inputs.T)
    partition = folder / "activation_covariance_data_partition0_module_partition0.safetensors"
    (folder / "activation_covariance.safetensors").rename(partition)
    with refuses("read_kronfluence: folder must hold activation_covariance.safetensors, got "):
        read_kronfluence(folder, model, n_examples=3)
    with refuses('read_kronfluence: folder must hold factor_arguments.json with the strategy "kfac" or "ekfac", got '):
        read_kronfluence(tmp_path, model)
    assert safetensors


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
    for normalizers in (factors.normalizers("adam"), factors.normalizers("adafactor")):
        write_bergson_normalizers(normalizers, path, base)
        read = read_bergson_normalizers(path, base)
        assert list(read) == ["1", "2"]
        gradient = torch.ones(5, 5, dtype=torch.float64)
        torch.testing.assert_close(read["1"](gradient), normalizers["1"](gradient), rtol=1e-5, atol=0)
    with refuses(f"read_bergson_normalizers: {path} must be of modules of the model, got '1'."):
        read_bergson_normalizers(path, model.head)


def test_bergson_gets_no_convolution_and_a_damaged_file_is_refused(made, tmp_path):
    """bergson 2.5 makes normalizers of matrices alone."""
    base, path = made[0], tmp_path / "normalizers.pth"
    conv = nn.Sequential(nn.Conv1d(4, 5, 3))
    with refuses("write_bergson_normalizers: normalizers must be of linear layers, got 0 (Conv1d). bergson has none"):
        write_bergson_normalizers({"0": AdamNormalizer(torch.ones(5, 12))}, path, conv)
    with refuses("write_bergson_normalizers: normalizers must be of gradients [3, 6] at 2, got [3, 7]."):
        write_bergson_normalizers({"2": AdamNormalizer(torch.ones(3, 7))}, path, base)
    adam, rows = {"__class__": "AdamNormalizer"}, {"__class__": "AdafactorNormalizer", "row": torch.ones(5)}
    whole = torch.ones(5, 4)
    for said, text in (
        (adam, "hold weight_avg_sq of '1' as floats of 2 dimensions, got NoneType."),
        (adam | {"weight_avg_sq": 3}, "hold weight_avg_sq of '1' as floats of 2 dimensions, got int."),
        (adam | {"weight_avg_sq": torch.ones(5, 3)}, "hold second moments of '1' in its shape, got {'weight_avg_sq': "),
        (adam | {"weight_avg_sq": whole, "bias_avg_sq": torch.ones(4)}, "hold second moments of '1' in its shape, got"),
        (adam | {"weight_avg_sq": whole, "bias_avg_sq": "x"}, "hold bias_avg_sq of '1' as floats of 1 dimension, got"),
        (rows, "hold col of '1' as floats of 1 dimension, got NoneType."),
        (rows | {"col": whole}, "hold col of '1' as floats of 1 dimension, got torch.float32 [5, 4]."),
        (["AdamNormalizer"], "hold Adam's or Adafactor's second moments, got None."),
    ):
        torch.save({"1": said}, path)
        with refuses(f"read_bergson_normalizers: {path} must {text}"):
            read_bergson_normalizers(path, base)


def test_second_moments_as_bergson_keeps_them(made, tmp_path):
    """The mean of x x^T of projected rows, and its eigenvalues; scores are the same by what is read."""
    base, model = made[0], Headed(made[0])
    spec = tlfast.Spec(["body.1", "body.2"], of="weight", project=tlfast.Projection(2, scheme="bergson-2"))
    examples = [[1, 2, 3], [4, 5], [6, 1, 2], [2, 2]]
    settings = {"loss": lambda model, batch: squares(model.body, batch)}
    sums = tlfast.running(model, examples, spec, stats="moment2_full", **settings)
    write_bergson_hessians(sums, tmp_path, model)
    hessians = torch.load(tmp_path / "hessians.pth", weights_only=True)
    eigen = torch.load(tmp_path / "hessians_eigen.pth", weights_only=True)
    assert list(hessians) == list(eigen) == ["1", "2"]
    for name, moment in hessians.items():
        assert (moment.dtype, moment.shape) == (torch.float32, (4, 4))
        assert torch.equal(moment, sums[f"body.{name}:weight"].moment2_full.float())
        values, vectors = eigen[name]
        assert (values.diff() >= 0).all()
        scale = float(moment.abs().max())
        torch.testing.assert_close(vectors * values @ vectors.T, moment, rtol=0, atol=1e-5 * scale)
    with refuses("read_bergson_hessians: n_rows must be given where no info.json says it, got None."):
        read_bergson_hessians(tmp_path, model)
    (tmp_path / "info.json").write_text(json.dumps({"num_grads": 4, "num_items": 4}))
    read = read_bergson_hessians(tmp_path, model)
    assert read["body.1:weight"].n == 4
    torch.testing.assert_close(read["body.1:weight"].moment2_full.float(), hessians["1"])
    scored = [
        tlfast.score(
            model, [[4, 5]], "trackstar", examples=examples, points=["body.1", "body.2"], moments=moments,
            project=tlfast.Projection(2, scheme="bergson-2"), **settings,
        ).scores
        for moments in (sums, read)
    ]  # fmt: skip
    torch.testing.assert_close(*scored, rtol=1e-4, atol=1e-5)
    with refuses(f"read_bergson_hessians: {tmp_path / 'hessians.pth'} must be of modules of the model, got '1'."):
        read_bergson_hessians(tmp_path, model.head)
    torch.save({}, tmp_path / "hessians.pth")
    with refuses(f"read_bergson_hessians: {tmp_path / 'hessians.pth'} must hold second moments by module, got none."):
        read_bergson_hessians(tmp_path, base)
    with refuses('write_bergson_hessians: sums must have rows, and stats="moment2_full", got sum, moment2 of 0'):
        write_bergson_hessians(tlfast.RunningSums(), tmp_path, base)


def test_second_moments_of_other_layers_are_refused(tmp_path):
    """bergson has no rows of a convolution, nor of an embedding."""
    model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.Embedding(4, 5), nn.Linear(5, 4))
    for name, kind in (("0", "Conv1d"), ("1", "Embedding")):
        sums = tlfast.RunningSums("moment2_full")
        sums.add({f"{point}:weight": torch.randn(3, 2, 2) for point in (name, "2")})
        with refuses(
            f"write_bergson_hessians: sums must be of linear layers, got {name} ({kind}). bergson has none of"
        ):
            write_bergson_hessians(sums, tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_heads_have_second_moments_of_their_own(tmp_path):
    model, sums = nn.Sequential(nn.Linear(4, 6)), tlfast.RunningSums("moment2_full")
    rows = torch.randn(5, 3, 2, 2)
    sums.add({"0:weight": rows})
    write_bergson_hessians(sums, tmp_path, model)
    found = torch.load(tmp_path / "hessians.pth", weights_only=True)
    assert list(found) == [f"0.head_{head}" for head in range(3)]
    flat = rows[:, 1].flatten(1)
    torch.testing.assert_close(found["0.head_1"], flat.T @ flat / 5)


def test_factors_as_bergson_keeps_them(made, tmp_path):
    base, factors = made
    model, folder = Headed(base), tmp_path / "run"
    write_bergson_factors(factors, folder, base)
    shards = {path.parent.name: safetensors.load_file(path) for path in folder.glob("*/shard_0.safetensors")}
    assert all(set(tensors) == {"1", "2"} for tensors in shards.values())
    assert torch.load(folder / "total_processed.pt", weights_only=True).item() == 8
    values = torch.outer(shards["factor_eig_g"]["1"], shards["factor_eig_a"]["1"])
    torch.testing.assert_close(values, shards["eigenvalue_sharded"]["1"])
    covariance = factors["1"].inputs / 8
    per_token = (factors["1"].input_basis.T @ covariance @ factors["1"].input_basis).diagonal()
    torch.testing.assert_close(shards["factor_eig_a"]["1"].double(), per_token * (8 / 3) ** 0.5, rtol=1e-5, atol=1e-6)
    check_same(read_bergson_factors(folder, base), factors)
    for path in list(folder.glob("*/shard_0.safetensors")):  # two processes would have written these
        rows = safetensors.load_file(path)
        for number, part in enumerate((slice(0, 1), slice(1, None))):
            some = {name: values[part].clone() for name, values in rows.items()}
            safetensors.save_file(some, path.with_name(f"shard_{number}.safetensors"))
    check_same(read_bergson_factors(folder, base), factors)
    with refuses(f"read_bergson_factors: {folder} must be of modules of the model, got '1'."):
        read_bergson_factors(folder, model.head)
    for path in (folder / "eigen_gradient_sharded").iterdir():
        path.unlink()
    with refuses(
        "read_bergson_factors: folder must hold the same modules in eigen_gradient_sharded as in others, got 0 "
    ):
        read_bergson_factors(folder, base)
    (folder / "config.yaml").write_text("steps: [{hessian: {hessian_cfg: {method: shampoo}}}]")
    with refuses("read_bergson_factors: folder must be of the method \"kfac\", got 'shampoo'."):
        read_bergson_factors(folder, base)
    with refuses("write_bergson_factors: folder must be empty, got files in "):
        write_bergson_factors(factors, folder, base)
    with refuses("read_bergson_factors: folder must hold activation_sharded, gradient_sharded and total_processed.pt"):
        read_bergson_factors(tmp_path, base)


@pytest.mark.long
@pytest.mark.peers("bergson.hessians.preconditioner")
@pytest.mark.filterwarnings("default")  # theirs
def test_bergson_applies_what_it_reads(made, tmp_path):
    """Its own code multiplies gradients with the same inverses."""
    from bergson.config.config import InversionConfig
    from bergson.gradients import GradientProcessor
    from bergson.hessians import preconditioner

    base, factors = made
    write_bergson_factors(factors, tmp_path / "run", base)
    gradients = {"1": torch.randn(2, 5, 5), "2": torch.randn(2, 3, 5)}
    for kind in ("kfac", "ekfac"):
        theirs = preconditioner.FactoredPreconditioner.from_path(
            tmp_path / "run", ev_correction=kind == "ekfac",
            inversion_cfg=InversionConfig(inversion="damped_inverse", damping_factor=0.1),
        )  # fmt: skip
        made_there = theirs.apply({name: rows.flatten(1) for name, rows in gradients.items()})
        ours = factors.precondition(gradients, kind=kind)
        for name, rows in ours.items():
            scale = float(rows.abs().max())
            torch.testing.assert_close(made_there[name].view_as(rows), rows, rtol=0, atol=1e-4 * scale)
    sums = tlfast.RunningSums("moment2_full")
    sums.add({"1:weight": torch.randn(9, 2, 2)})
    GradientProcessor().save(tmp_path / "index")
    write_bergson_hessians(sums, tmp_path / "index", base)
    processor = GradientProcessor.load(tmp_path / "index")
    assert torch.equal(processor.hessians["1"], sums["1:weight"].moment2_full.float())
    inverse = preconditioner.DensePreconditioner.from_processor(processor).h_inv["1"]
    assert torch.allclose(inverse, inverse.T, atol=1e-4)


@pytest.mark.long
@pytest.mark.peers("kronfluence.analyzer")
@pytest.mark.filterwarnings("default")  # theirs
def test_kronfluence_reads_what_is_written(made, tmp_path):
    """Its own code loads the files, and those that it saves are read."""
    from kronfluence import analyzer as kronfluence
    from kronfluence.task import Task

    class Squares(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return model(batch[0]).square().sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    points = torch.randn(12, 4)
    examples = [{"x": x} for x in points]
    ours = tlfast.factors(
        model, examples, ["0", "2"], kinds=("kfac", "ekfac"), bias=True, embedding="0",
        loss=lambda model, batch: model(batch["x"]).square().sum(),
    )  # fmt: skip
    wrapped = kronfluence.prepare_model(copy.deepcopy(model), Squares())
    analyzer = kronfluence.Analyzer("a", wrapped, Squares(), cpu=True, output_dir=str(tmp_path), disable_tqdm=True)
    analyzer.fit_all_factors(
        "theirs", torch.utils.data.TensorDataset(points), per_device_batch_size=4,
        factor_args=kronfluence.FactorArguments(use_empirical_fisher=True),
    )  # fmt: skip
    theirs = read_kronfluence(tmp_path / "a" / "factors_theirs", model)
    for name in ours:
        for what in ("inputs", "outputs", "kfac_eigenvalues"):
            wanted = getattr(ours[name], what)
            assert (getattr(theirs[name], what) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
        assert (theirs[name].n_examples, theirs[name].n_tokens) == (12, 12)
        total = ours[name].eigenvalues.sum()
        torch.testing.assert_close(theirs[name].eigenvalues.sum(), total, rtol=1e-4, atol=0)
    write_kronfluence(ours, tmp_path / "a" / "factors_ours")
    scores = {name: analyzer.load_lambda_matrices(name) for name in ("ours", "theirs")}
    for name in ours:
        found = [scores[kind]["lambda_matrix"][name].sum() for kind in ("ours", "theirs")]
        torch.testing.assert_close(*found, rtol=1e-4, atol=0)
