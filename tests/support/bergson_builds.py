"""What bergson builds of a small model in many settings, and what we collect in the same ones.

``python tests/support/bergson_builds.py FOLDER``, where bergson 2.5.1 is installed, writes what it builds to FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from bergson_cases import MODULES, TEXTS
from tiny_models import WIDTH, byte_tokenizer, collect, tiny_model

import tlfast
from tlfast import Projection, Spec
from tlfast.dataset import export_dataset, open_dataset
from tlfast.hooks.normalizers import AdafactorNormalizer, AdamNormalizer

LONG = [text for text in TEXTS if len(text) > 1]  # what has a next token
HEADS = {"n": 3, "size": WIDTH}  # of [3 * WIDTH] outputs
FEW = ["h.0.attn.c_attn", "h.1.mlp.c_proj"]  # the modules of what is kept in the repository
GOLDEN = "bergson-2.5.1.npz"

# By name what bergson is told, and what our spec says; ``normalizer`` is the kind of one, for both.
BUILDS = {
    "4": ({"projection_dim": 4}, {"project": {"dim": 4}}),
    "16": ({"projection_dim": 16}, {"project": {"dim": 16}}),
    "64": ({"projection_dim": 64}, {"project": {"dim": 64}}),
    "bias": ({"projection_dim": 16, "include_bias": True}, {"project": {"dim": 16}, "bias": True}),
    "normal": (
        {"projection_dim": 16, "projection_type": "normal", "projection_seed": 3},
        {"project": {"dim": 16, "kind": "normal", "seed": 3}},
    ),
    "global": (
        {"projection_dim": 16, "projection_target": "global"},
        {"project": {"dim": 16, "form": "one-sided"}, "summed": True},
    ),
    "global, normal, bias": (
        {"projection_dim": 10, "projection_target": "global", "projection_type": "normal", "projection_seed": 1,
         "include_bias": True},
        {"project": {"dim": 10, "kind": "normal", "seed": 1, "form": "one-sided"}, "summed": True, "bias": True},
    ),
    "unprojected": ({}, {}),
    "unprojected, bias": ({"include_bias": True}, {"bias": True}),
    "per token": (
        {"projection_dim": 4, "attribute_tokens": True},
        {"project": {"dim": 4}, "per": "token"},
    ),
    "per token, unprojected": ({"attribute_tokens": True}, {"per": "token"}),
    "heads": (
        {"projection_dim": 4, "split_attention_modules": ["h.0.attn.c_attn"]},
        {"project": {"dim": 4}, "heads": True},
    ),
    "adam": ({"projection_dim": 16}, {"project": {"dim": 16}, "normalizer": "adam"}),
    "adam, bias": (
        {"projection_dim": 16, "include_bias": True},
        {"project": {"dim": 16}, "normalizer": "adam", "bias": True},
    ),
    "adam, unprojected": ({}, {"normalizer": "adam"}),
    "adam, global": (
        {"projection_dim": 16, "projection_target": "global"},
        {"project": {"dim": 16, "form": "one-sided"}, "summed": True, "normalizer": "adam"},
    ),
    "adafactor": ({"projection_dim": 16}, {"project": {"dim": 16}, "normalizer": "adafactor"}),
    "adafactor, bias": (
        {"projection_dim": 16, "include_bias": True},
        {"project": {"dim": 16}, "normalizer": "adafactor", "bias": True},
    ),
}  # fmt: skip
KEPT = [setting for setting in BUILDS if setting != "per token, unprojected"]  # which is too large for a repository


def tokens(text: str) -> list[int]:
    """The tokens of a text."""
    return byte_tokenizer()(text)["input_ids"]


def _wave(shape, number: int) -> torch.Tensor:
    """Numbers from -1 to 1 that no generator draws: the same for ever."""
    k = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return torch.cos(0.37 * k * k + 1.3 * k + number).view(shape)


def model():
    """The small model with weights that no version of a library changes."""
    made = tiny_model().eval()
    with torch.no_grad():
        for number, (name, weight) in enumerate(made.named_parameters()):
            of_norm = ".ln_" in name and name.endswith("weight")
            weight.copy_(0.25 * _wave(weight.shape, number) + float(of_norm))
    return made


def moments(name: str, n_outputs: int, n_inputs: int) -> torch.Tensor:
    """Second moments of a module, with that of its bias last: float32."""
    return ((_wave((n_outputs, n_inputs + 1), len(name)) + 1.25) ** 2 * 1e-2).float()


def build(folder: Path, setting: str = "", texts=tuple(LONG), modules=tuple(MODULES), of=None, **told):
    """An index of bergson's own of the texts: in one of the settings, or as it is ``told``."""
    import bergson
    from bergson.collection import collect_gradients
    from bergson.config.config import AttentionConfig, IndexConfig
    from bergson.data import allocate_batches
    from datasets import Dataset

    theirs, ours = BUILDS[setting] if setting else (told, {})
    ids = [tokens(text) for text in texts]
    data = Dataset.from_dict({"input_ids": ids, "length": [len(tokens) for tokens in ids], "text": list(texts)})
    processor = {key: value for key, value in theirs.items() if key.startswith(("proj", "include"))}
    config, made = IndexConfig(run_path=str(folder), **theirs), model() if of is None else of
    batches = allocate_batches(data["length"][:], 256)
    heads = AttentionConfig(num_heads=HEADS["n"], head_size=HEADS["size"], head_dim=2)
    normalizers = {}
    for name in modules if "normalizer" in ours else ():
        v = moments(name, *made.base_model.get_submodule(name).weight.T.shape)
        weight, bias = v[:, :-1].contiguous(), v[:, -1].contiguous() if ours.get("bias") else None
        if ours["normalizer"] == "adam":
            normalizers[name] = bergson.gradients.AdamNormalizer(weight, bias)
        else:
            normalizers[name] = bergson.gradients.AdafactorNormalizer(weight.mean(1), weight.mean(0), bias)
    collect_gradients(
        made, data, bergson.GradientProcessor(normalizers, **processor), config, batches=batches,
        target_modules=set(modules), attention_cfgs=dict.fromkeys(config.split_attention_modules, heads),
    )  # fmt: skip
    folder.with_name(folder.name + ".part").rename(folder)
    return folder


def modules_of(setting: str, modules) -> list[str]:
    """Those of these modules that a setting is about."""
    return ["h.0.attn.c_attn"] if setting == "heads" else list(modules)


def spec(setting: str, made, modules) -> Spec:
    """What we are told in a setting."""
    ours = dict(BUILDS[setting][1])
    if "project" in ours:
        ours["project"] = Projection(scheme="bergson-2", **ours["project"])
    if "heads" in ours:
        ours["heads"] = (HEADS["n"], HEADS["size"])
    kind = ours.pop("normalizer", None)
    if kind is not None:
        ours["normalizer"] = {}
        for name in modules:
            v = moments(name, *made.base_model.get_submodule(name).weight.T.shape)
            weight, bias = v[:, :-1], v[:, -1] if ours.get("bias") else None
            adam = AdamNormalizer(v if ours.get("bias") else weight)
            factored = AdafactorNormalizer(weight.mean(1), weight.mean(0), bias)
            ours["normalizer"][f"transformer.{name}"] = adam if kind == "adam" else factored
    return Spec([f"transformer.{name}" for name in modules], of="weight", **ours)


def collected(folder: Path, setting: str, modules, backend: str = "auto") -> Path:
    """A dataset of the texts in a setting."""
    made = model()
    one = spec(setting, made, modules)
    collect(made, folder, [tokens(text) for text in LONG], points=[one], backend=backend)
    return folder


def index_rows(index: Path) -> dict[str, np.ndarray]:
    """The rows of an index by module, as they lie in its file."""
    info = json.loads((index / "info.json").read_text())
    sizes = info["grad_sizes"]
    flat = np.fromfile(index / "gradients.bin", info["base_dtype"]).reshape(-1, sum(sizes.values()))
    parts = np.split(flat, np.cumsum(list(sizes.values()))[:-1], axis=1)
    return dict(zip(sizes, parts, strict=True))


def our_rows(folder: Path, setting: str) -> dict[str, np.ndarray]:
    """The same of a dataset: by way of an index, or as they are where that can't say how they were made."""
    if "normalizer" not in BUILDS[setting][1]:
        return index_rows(export_dataset(folder, to="bergson"))
    ds = open_dataset(folder)
    inside = {name: name.removesuffix(":weight").removeprefix("transformer.") for name in ds.points}
    return {module: ds[name][:].flatten(1).numpy() for name, module in inside.items()}


def assert_same(found: dict[str, np.ndarray], true: dict[str, np.ndarray]) -> None:
    """To 1e-6 of the largest number of a module, which is what float32 sums in another order differ by."""
    assert list(found) == list(true)
    for name, rows in true.items():
        assert found[name].shape == rows.shape
        error = np.abs(found[name].astype(np.float64) - rows).max()
        assert error <= 1e-6 * np.abs(rows).max(), (name, error / np.abs(rows).max())


def main(folder: str) -> None:
    """Write what bergson builds of a few modules in all settings."""
    rows = {}
    for number, setting in enumerate(KEPT):
        made = index_rows(build(Path(folder) / f"{number}", setting, modules=modules_of(setting, FEW)))
        rows |= {f"{setting}/{name}": values for name, values in made.items()}
    np.savez_compressed(Path(folder) / GOLDEN, **rows)
    print(tlfast.__version__, sum(values.nbytes for values in rows.values()), "bytes")


if __name__ == "__main__":
    main(sys.argv[1])
