"""Rows of weights as an index of bergson and back: its files by its definitions, and what it can't hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bergson_cases import DIM, MODULES, PROJECT, TEXTS, philox, signs, some_rows, true_rows, write
from dataset_cases import content, same_bits
from tiny_models import collect, complaint_of, save_model, tiny_model

import tlfast
from tlfast.cli import main
from tlfast.dataset import DatasetError, Plan, export_dataset, import_bergson, open_dataset
from tlfast.dataset.read import arrow_rows

KEYS = [
    "projection_dim", "reshape_to_square", "projection_type", "projection_target", "projection_scale", "include_bias",
    "projection_seed", "projection_version",
]  # fmt: skip
SPEC = {"points": "h.*", "of": "weight"}
ONE_SIDED = {"scheme": "bergson-2", "form": "one-sided"}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts smaller than a unit: two rows of two modules, in float32."""
    monkeypatch.setattr(arrow_rows, "PART_BYTES", 2 * 2 * 4 * DIM * DIM)


def test_the_definitions_of_the_cases():
    assert [f"{x:08x}" for x in philox(np.zeros(4, np.uint64), (0, 0)).tolist()] == [
        "6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8",
    ]  # fmt: skip
    assert torch.equal(signs("h.0/left", 4, 300)[:2, :200], signs("h.0/left", 2, 200))


def test_a_collection_by_the_command_line_as_an_index(tmp_path):
    """Its rows are those of each example alone in float64, by matrices that are made here, up to float32."""
    texts, folder = [text for text in TEXTS if len(text) > 1], tmp_path / "texts"
    save_model(tmp_path / "model")
    folder.mkdir()
    for k, text in enumerate(texts):
        (folder / f"{k}.txt").write_text(text)
    words = f"--model {tmp_path}/model --text {folder} --out {tmp_path}/ds --of weight --dtype float32 --seq-len 64"
    words += f" --project dim={DIM},scheme=bergson-2 --points transformer.h.*.attn.c_* transformer.h.*.mlp.c_*"
    assert main(["collect", *words.split()]) == 0
    assert main(["export", f"{tmp_path}/ds", "--to", "bergson"]) == 0
    made = tmp_path / "ds-bergson"
    info, found = json.loads((made / "info.json").read_text()), load(made)
    assert list(info["grad_sizes"].items()) == [(name, DIM * DIM) for name in MODULES]  # inside of the base model
    assert (info["attribute_tokens"], info["num_items"], info["num_grads"], info["base_dtype"]) == (
        False,
        4,
        4,
        "float32",
    )
    for name, true in true_rows(tiny_model(dtype=torch.float64).eval(), texts).items():
        assert np.abs(found[name] - true.flatten(1).numpy()).max() <= 2e-6 * float(true.abs().max())
    settings = yaml.safe_load((made / "processor_config.yaml").read_text())
    assert list(settings) == KEYS
    assert list(settings.values()) == [DIM, False, "rademacher", "per_module", "jl", False, None, 2]
    (step,) = yaml.safe_load((made / "config.yaml").read_text())["steps"]
    index = step["build"]["index_cfg"]
    assert (index["model"], index["precision"], index["projection_dim"]) == (str(tmp_path / "model"), "fp32", DIM)
    assert index["data"]["dataset"] == str(made / "data.hf")
    import datasets

    assert datasets.load_from_disk(str(made / "data.hf"))["text"] == texts
    files = ["config.yaml", "data.hf", "gradients.bin", "info.json", "processor_config.yaml"]
    assert sorted(os.listdir(made)) == sorted([*files, "hessians.pth", "hessians_eigen.pth", "normalizers.pth"])
    assert main(["import-bergson", str(made), f"{tmp_path}/again", "--base", "transformer"]) == 0
    header = open_dataset(tmp_path / "again").header
    assert tlfast.Projection.from_json(header["specs"][0]["project"]) == tlfast.Projection(DIM, scheme="bergson-2")
    assert header["model"]["name"] == str(tmp_path / "model")
    # What was imported has the columns that were collected: one is scored against the other.
    scores = tlfast.score(tmp_path / "again", tmp_path / "ds", "cosine", k=1)
    assert scores.indices[:, 0].tolist() == [0, 1, 2, 3]
    assert list(load(export_dataset(tmp_path / "again", to="bergson"))) == MODULES


def load(made):
    """The rows of an index by module, as bergson maps them."""
    info = json.loads((made / "info.json").read_text())
    flat = np.fromfile(made / "gradients.bin", info["base_dtype"]).reshape(info["num_grads"], -1)
    return dict(
        zip(info["grad_sizes"], np.split(flat, np.cumsum(list(info["grad_sizes"].values()))[:-1], 1), strict=True)
    )


@pytest.mark.parametrize("project, bias", [({"kind": "normal", "seed": 3}, False), ({}, True), (None, False)])
def test_the_settings_of_a_projection(tmp_path, project, bias):
    spec = SPEC | ({} if project is None else {"project": PROJECT | project}) | ({"bias": True} if bias else {})
    shape = (3, 6) if project is None else (DIM, DIM)
    write(tmp_path / "ds", some_rows(shape=shape), specs=[spec, {"points": "h.*", "reduce": "mean"}])
    made = export_dataset(tmp_path / "ds", to="bergson")
    settings = yaml.safe_load((made / "processor_config.yaml").read_text())
    assert list(settings) == KEYS
    expected = {"projection_dim": None} if project is None else {"projection_dim": DIM, "include_bias": bias}
    if project:
        expected |= {"projection_type": "normal", "projection_seed": 3}
    assert settings.items() >= expected.items()
    again = import_bergson(made, tmp_path / "again")
    (said,) = open_dataset(again).header["specs"]
    as_collected = {"reduce": "none", "over": [], "dtype": "float32", "output": None, "name": None}
    assert said == spec | as_collected | {"points": ["h.0", "h.1"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_there_and_back(tmp_path, dtype):
    rows = some_rows(dtype=dtype)
    made = export_dataset(write(tmp_path / "ds", rows), to="bergson")
    ds = open_dataset(import_bergson(made, tmp_path / "again", rows_per_unit=2))
    assert ds.verify().ok
    assert [ds.column(point)[1:4] for point in ds.points] == [((DIM, DIM), "weight", "example")] * 2
    for point, values in rows.items():
        assert same_bits(ds[point][:], values.float() if dtype == torch.bfloat16 else values)
    first, known = open_dataset(tmp_path / "ds").examples, ("id", "input_ids", "source", "start", "length")
    assert [[e[k] for k in known] for e in ds.examples] == [[e[k] for k in known] for e in first]
    assert ds.header["examples"]["tokens"] == sum(map(len, TEXTS))
    assert ds.header["imported"]["left_out"] == ["id", "flags", "norm:h.0:weight", "norm:h.1:weight"]


def test_rows_per_token(tmp_path):
    lengths = [3, 0, 1, 4, 2]
    rows, last = some_rows(n=10), np.cumsum([n for n in lengths if n]) - 1
    for values in rows.values():
        values[last] = 0
    write(tmp_path / "ds", rows, per="token", lengths=lengths)
    done = []
    made = export_dataset(tmp_path / "ds", to="bergson", progress=done.append)
    assert np.load(made / "offsets.npy").tolist() == [0, 2, 2, 2, 5, 6]
    info = json.loads((made / "info.json").read_text())
    assert (info["attribute_tokens"], info["num_items"], info["num_grads"], sum(done)) == (True, 5, 6, 5)
    kept = np.delete(np.concatenate([values.reshape(10, -1) for values in rows.values()], axis=1), last, axis=0)
    assert np.array_equal(np.fromfile(made / "gradients.bin", np.float32).reshape(6, -1), kept)
    ds = open_dataset(import_bergson(made, tmp_path / "again", rows_per_unit=2))
    assert ds["h.0:weight"].lengths().tolist() == lengths
    for point, values in rows.items():
        assert same_bits(ds[point].flat[:], values)
    assert ds.header["specs"][0]["per"] == "token"
    rows["h.1:weight"][last[1]] = 1
    write(tmp_path / "other", rows, per="token", lengths=lengths)
    with pytest.raises(
        DatasetError, match=r"point 'h\.1:weight' must be zero at the last token of each example, which"
    ):
        export_dataset(tmp_path / "other", to="bergson")
    assert not list(tmp_path.glob(".tlfast*"))


def test_factors_per_token_are_multiplied(tmp_path):
    lengths = [3, 0, 1, 4, 2]
    rows, last = some_rows(shape=(2 * DIM,), n=10), np.cumsum([n for n in lengths if n]) - 1
    for values in rows.values():
        values[last, :DIM] = 0  # the gradient: the last token has an input all the same
    write(tmp_path / "ds", rows, per="token", lengths=lengths)
    made = export_dataset(tmp_path / "ds", to="bergson")
    product = {name: values[:, :DIM, None] * values[:, None, DIM:] for name, values in rows.items()}
    kept = np.delete(np.concatenate([values.reshape(10, -1) for values in product.values()], axis=1), last, axis=0)
    assert np.array_equal(np.fromfile(made / "gradients.bin", np.float32).reshape(6, -1), kept)
    ds = open_dataset(import_bergson(made, tmp_path / "again"))
    assert all(torch.equal(ds[point].flat[:], values.reshape(10, DIM, DIM)) for point, values in product.items())
    rows["h.0:weight"][last[0], 1] = 1
    write(tmp_path / "other", rows, per="token", lengths=lengths)
    with pytest.raises(DatasetError, match=r"point 'h\.0:weight' must be zero at the last token"):
        export_dataset(tmp_path / "other", to="bergson")


def test_heads_are_modules(tmp_path):
    rows = some_rows(shape=(2, DIM, DIM)) | some_rows(columns=("x",))
    specs = [SPEC | {"points": "h.*", "project": PROJECT, "heads": [2, 8]}, SPEC | {"points": "x", "project": PROJECT}]
    made = export_dataset(write(tmp_path / "ds", rows, specs=specs), to="bergson")
    info = json.loads((made / "info.json").read_text())
    assert list(info["grad_sizes"]) == ["h.0.head_0", "h.0.head_1", "h.1.head_0", "h.1.head_1", "x"]
    index = yaml.safe_load((made / "config.yaml").read_text())["steps"][0]["build"]["index_cfg"]
    assert index["split_attention_modules"] == ["h.0", "h.1"]
    assert index["attention"] == {"num_heads": 2, "head_size": 8, "head_dim": 2}
    ds = open_dataset(import_bergson(made, tmp_path / "again"))
    assert torch.equal(ds["h.1.head_1:weight"][:], rows["h.1:weight"][:, 1])


def odd(project, **more):
    return [SPEC | {"project": PROJECT | project} | more]


OWN = some_rows(columns=("h.0", "x"))
REFUSED = {
    "own scheme": ({"specs": odd({"scheme": "tlfast-1"})}, "scheme of the projection must be bergson-2, got tlfast-1"),
    "no scheme": ({"specs": [SPEC | {"project": {"dim": 4}}]}, r"be bergson-2, got tlfast-1\. Bergson makes matri"),
    "one-sided": ({"specs": odd({"form": "one-sided"})}, "for each module, or one-sided and summed, got one-s"),
    "sketch": ({"specs": odd({"nonzeros": 2})}, "must have no other settings than dim, .*, got nonzeros"),
    "normalized": ({"specs": odd({}, normalize="adam")}, "spec of rows of weights must say nothing .*'adam'"),
    "a normalizer": (
        {"specs": odd({}, normalizer={"kind": "adam", "sha256": "0"})},
        "rows of weights must be of gradients that aren't normalized, got .* bergson divides its queries by normali",
    ),
    "norms": ({"specs": [SPEC | {"reduce": "norm"}]}, "rows of weights must say nothing .* got reduce='norm'"),
    "per token": ({"specs": [SPEC], "per": "token"}, r"point 'h\.0:weight' must be projected to have rows per tok"),
    "nothing said": ({"specs": []}, "dataset must say in its header, under specs, how rows of weights were"),
    "two": ({"specs": [SPEC, *odd({})]}, r"projection, bias and summed must be the same .*, got \(None, False"),
    "shape": ({"specs": odd({"dim": 5})}, r"point 'h\.0:weight' must have rows of \[5, 5\], got \[4, 4\]\. Leave it"),
    "not all of weights": ({"of": {"h.0:weight": "weight", "x:weight": "grad"}}, "point 'x:weight' must be of weig"),
    "outside": (
        {"header": {"model": {"class": "GPT2Model"}}, "rows": some_rows(columns=("transformer.h.0", "lm_head"))},
        "module 'lm_head' must lie inside of 'transformer', where bergson looks, got one outside",
    ),
    "a name of one's own": (
        {"rows": {"x:whole": OWN["x:weight"]}}, "point 'x:whole' must be called <module>:weight, got another name. Leav"
    ),
    "twice": ({"rows": OWN | {"x": OWN["x:weight"]}}, "module 'x' must have one column, got several"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_bergson_would_misread_is_refused(tmp_path, case):
    settings, text = REFUSED[case]
    lengths = {"lengths": [1] * 5} if "per" in settings else {}
    write(tmp_path / "ds", **{"rows": OWN} | lengths | settings)
    with pytest.raises(DatasetError, match=f"^export_dataset: .*{text}"):
        export_dataset(tmp_path / "ds", to="bergson")
    assert os.listdir(tmp_path) == ["ds"]


class Layers(torch.nn.Module):
    """A layer of each kind that has such rows."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = torch.nn.Embedding(256, 4), torch.nn.Conv1d(4, 4, 1)
        self.norm, self.out = torch.nn.LayerNorm(4), torch.nn.Linear(4, 256)

    def forward(self, tokens):
        return self.out(self.norm(self.conv(self.embed(tokens).mT).mT))


@pytest.mark.parametrize("points, kind", [("conv", "conv"), ("embed", "embedding"), ("norm", "layer_norm")])
def test_layers_that_bergson_has_no_rows_of_are_refused(tmp_path, points, kind):
    """It takes a convolution for a linear layer of its channels, whose matrices have other sizes."""
    specs = [tlfast.Spec([points, "out"], of="weight", project=tlfast.Projection(4, scheme="bergson-2"))]
    collect(Layers(), tmp_path / "ds", [[1, 2, 3]] * 3, points=specs, batch_tokens=1)
    with pytest.raises(DatasetError, match=rf"point '{points}:weight' must be of a linear layer, got one of .* {kind}"):
        export_dataset(tmp_path / "ds", to="bergson")
    made = export_dataset(tmp_path / "ds", to="bergson", points=["out:weight"])
    assert list(json.loads((made / "info.json").read_text())["grad_sizes"]) == ["out"]
    summed = tlfast.Spec(["conv", "out"], of="weight", summed=True, project=tlfast.Projection(4, **ONE_SIDED))
    collect(Layers(), tmp_path / "summed", [[1, 2, 3]] * 3, points=[summed], batch_tokens=1)
    with pytest.raises(DatasetError, match="point 'gradients:weight' must be of a linear layer, got one of the kind c"):
        export_dataset(tmp_path / "summed", to="bergson")
    model = Layers()
    with (
        tlfast.capture(model, [tlfast.Spec("conv", of="weight", project=4)], rows=1) as cap,
        cap.into(tmp_path / "own", plan=Plan(1, 1), header={"model": "mine"}),
        cap.batch(ids=[0]),
    ):
        model(torch.ones(1, 3, dtype=torch.int64)).sum().backward()
    assert open_dataset(tmp_path / "own").info()["about"]["layers"] == {"conv:weight": "conv"}


def test_a_point_that_is_left_out_isnt_refused(tmp_path):
    write(tmp_path / "ds", OWN, of={"h.0:weight": "weight", "x:weight": "grad"})
    made = export_dataset(tmp_path / "ds", to="bergson", points=["h.0:weight"])
    assert list(json.loads((made / "info.json").read_text())["grad_sizes"]) == ["h.0"]
    made = export_dataset(tmp_path / "ds", tmp_path / "x", to="bergson", points=["x:weight"])
    assert (made / "processor_config.yaml").read_text() == "projection_dim: null\n"


# Indexes made by hand, as bergson leaves them.


def index(folder: Path, *, info=None, processor=None, files=None) -> Path:
    """An index of two modules and three examples in bfloat16: 0.0, 0.5, 1.0, ..."""
    folder.mkdir()
    said = {
        "attribute_tokens": False, "num_items": 3, "num_grads": 3, "grad_sizes": {"a": 4, "b.c": 2},
        "base_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "info.json").write_text(json.dumps(said | (info or {})))
    settings = {"projection_dim": 2, "projection_type": "rademacher", "projection_version": 2, "projection_scale": "jl"}
    (folder / "processor_config.yaml").write_text(yaml.safe_dump(settings if processor is None else processor))
    (folder / "gradients.bin").write_bytes((torch.arange(18) / 2).bfloat16().view(torch.int16).numpy().tobytes())
    torch.save({}, folder / "normalizers.pth")
    for name, data in (files or {}).items():
        (folder / name).write_bytes(data)
    return folder


def test_an_index_made_by_hand(tmp_path):
    config = {"steps": [{"build": {
        "index_cfg": {"run_path": "/tmp/x", "model": "gpt2", "loss_reduction": "mean", "modules": []},
        "preprocess_cfg": {"unit_normalize": True, "aggregation": "none"},
    }}]}  # fmt: skip
    made = index(tmp_path / "index", files={"config.yaml": yaml.safe_dump(config).encode()})
    torch.save({"a": {"__class__": "AdamNormalizer", "weight_avg_sq": torch.ones(2, 2)}}, made / "normalizers.pth")
    ds = open_dataset(import_bergson(made, tmp_path / "ds"))
    assert [(ds.column(p).dtype, ds.column(p).row_shape) for p in ds.points] == [
        (torch.bfloat16, (2, 2)), (torch.bfloat16, (2,)),
    ]  # fmt: skip
    assert ds["a:weight"][:].flatten(1).tolist() == [[0, 0.5, 1, 1.5], [3, 3.5, 4, 4.5], [6, 6.5, 7, 7.5]]
    assert ds["b.c:weight"][:].tolist() == [[2, 2.5], [5, 5.5], [8, 8.5]]
    assert [(e["source"], e["start"], e["length"]) for e in ds.examples] == [("data.hf", i, 0) for i in range(3)]
    imported, (spec,) = ds.header["imported"], ds.header["specs"]
    assert ds.header["model"] == {"name": "gpt2"}
    assert imported["made_by"].keys() == {"model", "loss_reduction", "preprocess"}
    assert (spec["normalized"], spec["preprocessed"]["unit_normalize"]) == (["AdamNormalizer"], True)
    with pytest.raises(DatasetError, match=r"normalized=.*, preprocessed=.*"):  # whose queries would be others
        export_dataset(tmp_path / "ds", to="bergson")


@pytest.mark.parametrize(
    "said, spec",
    [
        ({"projection_dim": None}, {}),
        ({"projection_dim": 2}, {"project": {
            "dim": 2, "scheme": "bergson-1", "kind": "normal", "scale": "row_norm",
        }}),
        ({"projection_dim": 2, "projection_type": "rademacher", "projection_version": 2, "projection_scale": "jl",
          "projection_target": "global", "include_bias": True}, {"project": {
            "dim": 2, "scheme": "bergson-2", "form": "one-sided"}, "summed": True, "bias": True}),
    ],
    ids=["unprojected", "an older version", "global"],
)  # fmt: skip
def test_what_an_index_says_of_its_projection(tmp_path, said, spec):
    ds = open_dataset(import_bergson(index(tmp_path / "index", processor=said), tmp_path / "ds"))
    assert {k: v for k, v in ds.header["specs"][0].items() if k in ("project", "bias", "summed")} == spec
    shape = (2, 2) if spec.get("project", {}).get("scheme") == "bergson-1" else (4,)
    assert ds.column("a:weight").row_shape == shape


BROKEN = {
    "no folder": (None, "index must be the folder of a build of bergson, got .*index"),
    "not ended": ("processor_config.yaml", r"index must hold processor_config\.yaml, got .*index without it\. Give"),
    "no info": ("info.json", r"index must hold info\.json"),
    "short": ({"files": {"gradients.bin": b"123"}}, r"gradients\.bin must have 36 bytes, as info\.json says, got 3"),
    "dtype": ({"info": {"base_dtype": "int8"}}, r"info\.json must say modules .*, got 2 modules, 3.*int8"),
    "sizes": ({"info": {"grad_sizes": [4, 2]}}, r"info\.json must say modules"),
    "no JSON": ({"files": {"info.json": b"{"}}, r"info\.json must hold a mapping, got"),
    "settings": ({"processor": {"projection_rank": 3}}, r"processor_config\.yaml must have no other keys .*tion_rank"),
    "offsets": ({"info": {"attribute_tokens": True}}, r"offsets\.npy must have 4 rising int64 from 0 to 3, got "),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_index_is_refused(tmp_path, capsys, case):
    made, text = BROKEN[case]
    if isinstance(made, dict):
        index(tmp_path / "index", **made)
    elif made is not None:
        (index(tmp_path / "index") / made).unlink()
    with pytest.raises(DatasetError, match=f"^import_bergson: .*{text}"):
        import_bergson(tmp_path / "index", tmp_path / "ds")
    assert complaint_of(capsys, ["import-bergson", str(tmp_path / "index"), str(tmp_path / "ds")]).startswith(
        "import_b"
    )
    assert not (tmp_path / "ds").exists()


def test_examples_that_dont_fit_the_rows_are_refused(tmp_path):
    import datasets

    offsets = tmp_path / "offsets.npy"
    np.save(offsets, np.array([0, 1, 1, 3]))
    made = index(tmp_path / "index", info={"attribute_tokens": True}, files={"offsets.npy": offsets.read_bytes()})
    for lengths, text in (
        ([2, 1], "data.hf must hold 3 examples"),
        ([2, 1, 4], "example 2 must have 3 rows, .*, got 2"),
    ):
        data = tmp_path / f"{len(lengths)}"
        datasets.Dataset.from_dict({"length": lengths}).save_to_disk(data)
        data.rename(made / "data.hf")
        with pytest.raises(DatasetError, match=text):
            import_bergson(made, tmp_path / "ds")
        (made / "data.hf").rename(data)
    assert not (tmp_path / "ds").exists()
    ds = open_dataset(import_bergson(made, tmp_path / "ds"))  # without data.hf, by the rows alone
    assert [e["length"] for e in ds.examples] == [2, 0, 3]


def test_a_base_with_a_dot_at_its_end_is_refused(tmp_path):
    text = r"import_bergson: base must be the name of a module, got 'transformer\.'\. Say"
    with pytest.raises(DatasetError, match=text):
        import_bergson(index(tmp_path / "index"), tmp_path / "ds", base="transformer.")
    assert not (tmp_path / "ds").exists()


def test_columns_of_every_kind(tmp_path):
    import datasets

    made = index(tmp_path / "index")
    kept = {
        "text": ["x", "y", "z"], "loss": [1.5, 2.5, 3.5], "labels": [[1], [2, 3], []], "good": [True, False, True],
        "length": [1, 2, 3], "source": ["a", "b", "c"], "input_ids": [[5], [6, 7], [8, 9, 10]],
    }  # fmt: skip
    other = {"flags": [1, 2, 3], "start": ["x", "y", "z"], "gap": [1, None, 3], "deep": [{"a": 1}] * 3}
    rows = datasets.Dataset.from_dict(kept | other)
    rows.cast_column("loss", datasets.Value("float32")).save_to_disk(made / "data.hf")
    ds = open_dataset(import_bergson(made, tmp_path / "ds"))
    found = ds.examples[1]
    assert {name: found[name] for name in kept} == {name: values[1] for name, values in kept.items()}
    assert ds.kept == {"text": "string", "loss": "float64", "labels": "list<int64>", "good": "bool"}
    assert ds.header["imported"]["left_out"] == list(other)
    assert found["start"] == 1


def test_an_import_that_was_cut_short_goes_on(tmp_path, capsys):
    made = export_dataset(write(tmp_path / "ds", some_rows()), to="bergson")
    import_bergson(made, tmp_path / "whole", rows_per_unit=2)

    def stop(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_bergson(made, tmp_path / "cut", rows_per_unit=2, progress=stop)
    assert len(open_dataset(tmp_path / "cut", partial=True).units) == 1
    assert main(["import-bergson", str(made), str(tmp_path / "cut"), "--rows-per-unit", "2"]) == 0
    assert capsys.readouterr().out == f"5 rows: {tmp_path / 'cut'}\n"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    data = bytearray((made / "gradients.bin").read_bytes())
    data[-1] ^= 1  # another index, another dataset
    (made / "gradients.bin").write_bytes(data)
    with pytest.raises(DatasetError, match=r"out must be the same dataset to continue it, got .*sha256"):
        import_bergson(made, tmp_path / "cut", rows_per_unit=2)
