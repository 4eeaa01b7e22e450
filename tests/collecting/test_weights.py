"""A dataset of weight gradients: right for each example alone, by the command too, and wherever rows go from there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import collect, collect_words, save_model, save_text, sequences, tiny_model, unit_bytes

import tlfast
from tlfast import Projection, Spec
from tlfast.cli import main
from tlfast.dataset import DatasetError, Plan, ShuffledBatches
from tlfast.hooks.normalizers import AdamNormalizer

EXAMPLES = sequences(9)
LAYERS = {
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "transformer.h.1.ln_1"),
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.1.input_layernorm"),
}
FIRST, SECOND, NORM = LAYERS["gpt2"]
SETTINGS = {"points": LAYERS["gpt2"], "of": "weight", "project": 4, "rows_per_unit": 4, "batch_tokens": 64}


def alone(model, names, examples):
    """By name the gradients of each example's own loss in float64, [n, O, I], or [n, D] of a norm."""
    model = model.double()
    weights = {name: model.get_submodule(name).weight for name in names}
    found = {name: [] for name in names}
    for tokens in examples:
        ids = torch.tensor([tokens])
        logits = model(ids, use_cache=False).logits[0, :-1]
        loss = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
        for name, grad in zip(names, torch.autograd.grad(loss, list(weights.values())), strict=True):
            found[name].append(grad.T if ".c_" in name else grad)  # a Conv1D has [inputs, outputs]
    return {name: torch.stack(grads) for name, grads in found.items()}


def projected(name, full, projection):
    right = projection.matrix(name, "right", full.shape[-1]).double()
    if full.dim() == 2:
        return full @ right.T * projection.scale
    return projection.matrix(name, "left", full.shape[1]).double() @ full @ right.T * projection.row_scale


def assert_rows(found, wanted):
    """Within the rounding of a model of two layers in float32, a hundred times that of its largest row."""
    assert found.shape == wanted.shape
    bound = 100 * 2**-24 * wanted.flatten(1).norm(dim=1).max()
    assert (torch.as_tensor(found).double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("kind, side", [("gpt2", "left"), ("llama", "right")])
def test_rows_are_those_of_each_example_alone(tmp_path, kind, side):
    model, projection = tiny_model(kind).eval(), Projection(4, "normal", seed=3)
    settings = SETTINGS | {"points": LAYERS[kind], "project": projection, "grad_scale": 8.0}
    collect(model, tmp_path / "rows", EXAMPLES, padding_side=side, **settings)
    rows = tlfast.open_dataset(tmp_path / "rows")
    assert rows.header["specs"][0]["project"] == {"dim": 4, "kind": "normal", "seed": 3}
    assert rows.header["batching"]["width"] is None  # rows have no positions: no batch is wider than its examples
    for name, full in alone(model, LAYERS[kind], EXAMPLES).items():
        assert_rows(rows[f"{name}:weight"][:], projected(name, full, projection))


def test_embeddings_start_the_graph_and_have_rows(tmp_path):
    model = tiny_model().eval()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    collect(model, tmp_path / "rows", EXAMPLES, **SETTINGS | {"points": "transformer.wte"})
    rows, projection = tlfast.open_dataset(tmp_path / "rows"), Projection(4)
    full = alone(model, ["transformer.wte"], EXAMPLES)["transformer.wte"].transpose(1, 2)
    assert_rows(rows["transformer.wte:weight"][:], projected("transformer.wte", full, projection))


def test_tokens_codes_streams_and_sums_are_of_the_same_rows(tmp_path):
    model = tiny_model().eval()
    both = [Spec([FIRST, SECOND], of="weight", project=4, per=per, name=per) for per in ("example", "token")]
    collect(model, tmp_path / "rows", EXAMPLES, points=[*both, Spec(NORM, "norm", of="weight")], rows_per_unit=4)
    collect(model, tmp_path / "codes", EXAMPLES, **SETTINGS | {"encoding": "int8"})
    rows, codes = tlfast.open_dataset(tmp_path / "rows"), tlfast.open_dataset(tmp_path / "codes")
    whole = torch.as_tensor(rows[f"{FIRST}:example"][:])
    for number, tokens in enumerate(EXAMPLES):
        pairs = torch.as_tensor(np.asarray(rows[f"{FIRST}:token"][number]))
        assert pairs.shape == (len(tokens), 8)
        product = pairs[:, :4].T @ pairs[:, 4:]
        torch.testing.assert_close(product, whole[number], rtol=0, atol=1e-5 * float(whole.norm()))
    decoded = torch.as_tensor(codes[f"{FIRST}:weight"][:])
    assert ((decoded - whole).flatten(1).abs() <= whole.flatten(1).abs().amax(1, keepdim=True) * 0.51 / 127).all()
    sums = tlfast.running(model, EXAMPLES, stats=("mean",), **{k: SETTINGS[k] for k in ("points", "of", "project")})
    torch.testing.assert_close(torch.as_tensor(sums[f"{FIRST}:weight"].mean).float(), whole.mean(0), rtol=0, atol=1e-5)
    units = tlfast.stream(model, EXAMPLES, buffer_rows=8, batch_size=3, of="weight", project=4, points=[FIRST])
    streamed = {int(i): row for unit in units for i, row in zip(unit["id"], unit[f"{FIRST}:weight"], strict=True)}
    for number in range(len(EXAMPLES)):
        torch.testing.assert_close(streamed[number], whole[number], rtol=0, atol=1e-5 * float(whole.norm()))
    drawn = next(iter(ShuffledBatches(codes, 4, points=[f"{FIRST}:weight"])))
    assert torch.equal(drawn[f"{FIRST}:weight"], decoded[drawn["id"]])


def test_the_command_its_settings_and_its_report(tmp_path, capsys):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text", 2)
    words = collect_words(tmp_path, points=FIRST, dtype="auto", max_examples="6", rows_per_unit="3")
    del words[words.index("--reduce") : words.index("--reduce") + 2]
    assert main(["collect", *words, "--of", "weight", "--project", "16", "--padding-side", "left"]) == 0
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "project: '16'" in config
    assert main(["collect", str(tmp_path / "out" / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert unit_bytes(tmp_path / "again") == unit_bytes(tmp_path / "out")
    capsys.readouterr()
    assert main(["info", str(tmp_path / "out")]) == 0
    assert f"{FIRST}:weight  F32 [6, 16, 16], weight" in capsys.readouterr().out
    for words in (
        ["report", "--out", str(tmp_path / "page.html")],
        ["export", "--to", "npy", "--out", str(tmp_path / "npy")],
    ):
        assert main([words[0], str(tmp_path / "out"), *words[1:]]) == 0


def test_only_what_is_projected_has_a_projection_in_its_settings(tmp_path):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text", 2)
    assert main(["collect", *collect_words(tmp_path, max_examples="3")]) == 0
    assert not {"project:", "bias:"} & set((tmp_path / "out" / "config.yaml").read_text().split())
    spec = tlfast.open_dataset(tmp_path / "out").header["specs"][0]
    assert not {"project", "bias"} & spec.keys()


def test_a_weight_that_is_shared_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="collect: the point lm_head must have a weight of its own"):
        collect(tiny_model(), tmp_path / "rows", EXAMPLES, **SETTINGS | {"points": "lm_head"})
    assert not (tmp_path / "rows").exists()


def test_sums_over_modules_and_normalized_rows(tmp_path):
    """Rows of each example alone, by collect, into and a stream; a normalizer with other numbers is another dataset."""
    model, project = tiny_model().eval(), Projection(6, "count-sketch", form="one-sided")
    points, held = [FIRST, SECOND], {}
    full = alone(tiny_model().eval(), points, EXAMPLES)
    for number, name in enumerate(points):
        v = torch.rand(full[name].shape[1:], generator=torch.Generator().manual_seed(number)) * 1e-3 + 1e-3
        held[name] = AdamNormalizer(v)
    summed = Spec(points, of="weight", project=project, summed=True, normalizer=held)
    adam = Spec(points, of="weight", project=3, normalizer=held, dtype="float32", name="adam")
    settings = {"points": [summed, adam], "rows_per_unit": 4, "batch_tokens": 64}
    collect(model, tmp_path / "rows", EXAMPLES, **settings)
    rows, total = tlfast.open_dataset(tmp_path / "rows"), 0
    for name in points:
        normalized = held[name](full[name])
        flat = normalized.flatten(1)
        total = total + flat @ project.matrix(name, "single", flat.shape[1]).double().T
        assert_rows(rows[f"{name}:adam"][:], projected(name, normalized, Projection(3)))
    assert_rows(rows["gradients:weight"][:], total)
    said, other = rows.header["specs"]
    assert (said["summed"], said["points"], said["project"]["form"]) == (True, points, "one-sided")
    assert said["normalizer"] == other["normalizer"]
    assert said["normalizer"]["kind"] == "adam"
    changed = dict(held)
    changed[SECOND] = AdamNormalizer(held[SECOND].second_moment * (1 + 2**-20))
    others = [replace(summed, normalizer=changed), adam]
    with pytest.raises(DatasetError, match="specs"):
        collect(model, tmp_path / "rows", EXAMPLES, **settings | {"points": others})
    collect(model, tmp_path / "rows", EXAMPLES, resume="must", **settings)
    same = {"of": "weight", "project": project, "summed": True, "normalizer": held}
    collect(model, tmp_path / "one", EXAMPLES, points=[summed], rows_per_unit=9)
    collect(model, tmp_path / "one", EXAMPLES, points=points, rows_per_unit=9, resume="must", **same)
    with pytest.raises(DatasetError, match="specs"):
        collect(model, tmp_path / "one", EXAMPLES, points=points, rows_per_unit=9, **same | {"normalizer": changed})
    sums = tlfast.running(model, EXAMPLES, stats=("mean",), points=[summed])
    assert_rows(sums["gradients:weight"].mean[None].float(), total.mean(0, keepdim=True))


def test_rows_of_ones_own_loop_say_what_they_are(tmp_path):
    """Sums over modules, and the size of the first factor of tokens: not a part of the identity."""
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), torch.randn(4, 5, 3)
    specs = [
        Spec("*", of="weight", project=Projection(3, form="one-sided"), summed=True),
        Spec(["0", "1"], of="weight", per="token", name="pairs"),
    ]
    plan = Plan(4, rows_per_unit=4)
    with tlfast.capture(model, specs, rows=4) as cap, cap.into(tmp_path / "rows", plan=plan) as written:
        for ids in written.batches(2):
            with cap.batch(ids=ids):
                model(x[ids]).square().sum().backward()
    rows = tlfast.open_dataset(tmp_path / "rows")
    assert rows.info()["about"]["factors"] == {"0:pairs": 4, "1:pairs": 2}
    assert rows.header["specs"][0]["summed"]
    assert rows.header["specs"][0]["points"] == ["0", "1"]
    wanted = 0
    for name in ("0", "1"):
        grads = [torch.autograd.grad(model(one).square().sum(), model.get_submodule(name).weight)[0] for one in x]
        flat = torch.stack(grads).flatten(1)
        wanted = wanted + flat @ Projection(3, form="one-sided").matrix(name, "single", flat.shape[1]).T / 3**0.5
    torch.testing.assert_close(rows["gradients:weight"][:], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rademacher", "count-sketch"])
def test_matrices_are_made_once_for_all_captures_of_a_run(tmp_path, monkeypatch, kind):
    """The probe alone has several captures."""
    made, matrix = [], Projection.matrix

    def counted(projection, name, role, columns, start=0):
        made.append((name, role))
        return matrix(projection, name, role, columns, start)

    monkeypatch.setattr(Projection, "matrix", counted)
    spec = Spec("transformer.h.*.mlp.c_fc", of="weight", project=Projection(4, kind))
    model, examples = tiny_model(), sequences(5)
    collect(model, tmp_path / "out", examples, points=spec)
    assert sorted(made) == [(f"transformer.h.{layer}.mlp.c_fc", side) for layer in (0, 1) for side in ("left", "right")]
    tlfast.running(model, examples, spec)
    assert len(made) == 8


def test_what_a_layer_hasnt_is_said_as_it_is(tmp_path):
    """A norm has no normalizer, whatever its shape; nothing has run, and nothing is left."""
    norm = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.LayerNorm(4))
    norm.register_forward_hook(lambda *_: pytest.fail("it ran"))
    spec = Spec("1", of="weight", normalizer=AdamNormalizer(torch.ones(1, 4)))
    with pytest.raises(ValueError, match=r"^collect at 1: normalizer must be left out but at linear layers and convol"):
        collect(norm, tmp_path / "x", [[1, 2]], points=[spec])
    assert not (tmp_path / "x").exists()
