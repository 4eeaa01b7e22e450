"""`tlfast collect --summed --normalizer`: it hands on what a file has, and refuses what it can't before any work."""

import pytest
import torch
from tiny_models import collect_words, complaint_of, save_model, save_text, tiny_model, unit_bytes

import tlfast
from tlfast.attribution import read_bergson_normalizers, write_bergson_normalizers
from tlfast.cli import main
from tlfast.collecting import from_text
from tlfast.collecting.huggingface import load_model, load_tokenizer
from tlfast.collecting.normalizer_files import reader_of
from tlfast.dataset import open_dataset
from tlfast.hooks.second_moments import AdamNormalizer, describe_normalizers

POINTS, LAYERS = (
    "transformer.h.**.c_proj",
    [f"transformer.h.{k}.{part}.c_proj" for k in (0, 1) for part in ("attn", "mlp")],
)
GLOBAL = ["--of", "weight", "--project", "dim=6,kind=count-sketch,form=one-sided", "--summed"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, text, its second moments, and an optimizer that was stepped twice."""
    folder = tmp_path_factory.mktemp("normalizers")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text", 2)
    data = ["--text", str(folder / "text"), "--seq-len", "16", "--max-examples", "4", "--points", POINTS]
    for kind in ("adam", "kfac"):
        words = ["factors", str(folder / "model"), *data, "--kinds", kind, "--out", str(folder / f"{kind}.npz")]
        assert main(words) == 0
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def words(folder, out, *more):
    changes = {"points": POINTS, "dtype": "float32", "out": str(out), "max_examples": "5", "rows_per_unit": "5"}
    return ["collect", *collect_words(folder, **changes), *more]


def test_the_command_sums_and_normalizes(folder, tmp_path, capsys):
    given = words(folder, tmp_path / "out", *GLOBAL, "--normalizer", str(folder / "adam.npz"))
    assert main([*given, "--dry-run"]) == 0
    assert "gradients:weight  4 modules, normalized by adam, F32 [6], weight" in capsys.readouterr().out
    assert main(given) == 0
    (said,) = tlfast.open_dataset(tmp_path / "out").header["specs"]
    held = tlfast.Factors.load(folder / "adam.npz").normalizers()
    assert said["summed"]
    assert said["normalizer"] == describe_normalizers(held, LAYERS)
    config = str(tmp_path / "out" / "config.yaml")
    assert main(["collect", config, "--out", str(tmp_path / "again")]) == 0
    assert unit_bytes(tmp_path / "again") == unit_bytes(tmp_path / "out")
    assert "specs" in complaint_of(capsys, ["collect", config, "--normalizer-kind", "adafactor"])
    plain = words(folder, tmp_path / "plain", *GLOBAL)
    assert main(plain) == 0
    assert unit_bytes(tmp_path / "plain") != unit_bytes(tmp_path / "out")
    assert "normalizer:" not in (tmp_path / "plain" / "config.yaml").read_text()


def test_what_a_file_gives(folder):
    model = tiny_model()
    factors = tlfast.Factors.load(folder / "adam.npz")
    (folder / "bergson").mkdir()
    write_bergson_normalizers(factors.normalizers(), folder / "bergson" / "normalizers.pth", model)
    in_float32 = read_bergson_normalizers(folder / "bergson" / "normalizers.pth", model)
    for layer in LAYERS:
        torch.testing.assert_close(in_float32[layer].factor, factors.normalizers()[layer].factor, rtol=1e-6, atol=0)
    for path, kind, wanted in (
        ("adam.npz", "auto", factors.normalizers()),
        ("adam.npz", "adafactor", factors.normalizers("adafactor")),
        ("optimizer.pt", "adam", tlfast.read_optimizer(folder, model)),
        (".", "auto", tlfast.read_optimizer(folder, model)),
        ("bergson", "auto", in_float32),
        ("bergson/normalizers.pth", "adam", in_float32),
    ):
        found = reader_of(str(folder / path), kind)(model, False)
        assert {*LAYERS} <= found.keys()
        assert describe_normalizers(found, LAYERS) == describe_normalizers(wanted, LAYERS)
    with_bias = {LAYERS[0]: AdamNormalizer(torch.rand(16, 17, dtype=torch.float64))}
    write_bergson_normalizers(with_bias, folder / "b.pth", model)
    for bias, n_inputs in ((False, 16), (True, 17)):
        assert reader_of(str(folder / "b.pth"), "auto")(model, bias)[LAYERS[0]].shape == (16, n_inputs)


def test_normalized_rows_are_searched(folder, tmp_path, capsys):
    model = load_model(str(folder / "model"), None, torch.device("cpu"))
    held = tlfast.Factors.load(folder / "adam.npz").normalizers("adafactor")
    text = (folder / "text" / "01.txt").read_text()
    tokens = load_tokenizer(str(folder / "model"))(text)["input_ids"]
    examples = [tokens[start : start + 8] for start in range(0, 40, 8)]
    spec = tlfast.Spec(POINTS, of="weight", project=4, normalizer=held)
    tlfast.collect(model, examples, tmp_path / "out", points=spec, progress=False)
    assert main(words(folder, tmp_path / "told", *GLOBAL, "--normalizer", str(folder / "adam.npz"))) == 0
    search = ["search", str(tmp_path / "out"), "a row of words", "--model", str(folder / "model"), "--top", "1"]
    for more, complaint in (
        ([], "tlfast search: the normalizer of the rows must be known, got a digest alone in dataset.json. Give the"),
        (["--normalizer", str(folder / "optimizer.pt")], "tlfast search: --normalizer must hold what the rows were no"),
        (["--normalizer", str(folder / "kfac.npz")], "tlfast search: normalizer must be a .npz file of `tlfast facto"),
    ):
        assert complaint_of(capsys, [*search, *more]).startswith(complaint)
    capsys.readouterr()
    found = open_dataset(tmp_path / "out").examples[2]["input_ids"]
    search[2] = load_tokenizer(str(folder / "model")).decode(found)
    for place, more in (("out", ["--normalizer", str(folder / "adam.npz")]), ("told", [])):
        search[1] = str(tmp_path / place)
        assert main([*search, *more]) == 0
        best = capsys.readouterr().out.splitlines()[1].split()
        assert float(best[0]) > (0.9999 if place == "out" else -1)
        assert place == "told" or best[2] == "2"


def test_what_is_refused_before_the_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(from_text, "load_model", None)  # nothing is loaded
    rule = (
        "collect: normalizer must be a .npz file of `tlfast factors --kinds adam`, or the optimizer.pt of a checkpoint"
    )
    weight = ["--of", "weight", "--project", "4"]
    for more, text in (
        (["--normalizer", "x"], "collect: normalizer must be left out unless of=\"weight\", got one with of='grad'."),
        (["--summed"], "collect: summed must be left out unless of=\"weight\", got one with of='grad'."),
        ([*weight, "--summed"], "collect: summed must be left out unless rows are one-sided projections"),
        ([*GLOBAL, "--per", "token"], "collect: summed must be left out unless rows are one-sided projections"),
        ([*weight, "--normalizer-kind", "adam"], "collect: normalizer_kind must be left out without normalizer"),
        ([*weight, "--normalizer", "/nowhere/v.npz"], rule),
        ([*weight, "--normalizer", "/nowhere"], rule),
        ([*weight, "--normalizer", str(folder / "text")], rule),
        ([*weight, "--normalizer", str(folder / "kfac.npz")], rule),
    ):
        assert complaint_of(capsys, words(folder, tmp_path / "out", *more)).startswith(text)
    assert not (tmp_path / "out").exists()


def test_what_is_refused_of_a_model(folder, tmp_path, capsys):
    def complaint(name, *more):
        given = ["--of", "weight", "--project", "4", "--normalizer", str(folder / name), *more]
        return complaint_of(capsys, words(folder, tmp_path / "out", *given))

    assert "normalizer_kind must be auto or adam for what" in complaint(
        "optimizer.pt", "--normalizer-kind", "adafactor"
    )
    assert "be of gradients [16, 17], got [16, 16]. Say bias=" in complaint("adam.npz", "--bias")
    assert "got '" in (refused := complaint("model/config.json"))
    assert "read_optimizer: path must hold the state_dict of an optimizer" in refused
    other = words(
        folder, tmp_path / "out", "--of", "weight", "--project", "4", "--normalizer", str(folder / "adam.npz")
    )
    other[other.index(POINTS)] = "transformer.h.0.**.c_*"
    assert "normalizer must have an entry for each point, got none for 'transformer.h.0.attn.c_attn'" in complaint_of(
        capsys, other
    )
    assert not (tmp_path / "out").exists()
