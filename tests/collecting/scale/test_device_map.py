"""Models spread by device_map: a part on the CPU and a part on the disk give the bytes of the whole on the CPU."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import collect, collect_words, complaint_of, save_model, save_text, sequences, tiny_model, unit_bytes

import tlfast
from tlfast.cli import main
from tlfast.collecting.fingerprint import describe_model, model_fingerprint
from tlfast.collecting.huggingface import as_device_map, load_model

CPU = torch.device("cpu")
# accelerate's own names for places: a GPU's number, "cpu" and "disk". Its hooks work alike for all of them.
MIXED = {
    "transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk",
    "transformer.ln_f": "cpu", "lm_head": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and text."""
    folder = tmp_path_factory.mktemp("spread")
    save_model(folder / "model")
    save_text(folder / "text")
    return folder


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, MIXED, {"": "disk"}], ids=str)
@pytest.mark.parametrize("attach", ["tensor", "full"])
def test_a_model_in_several_places_makes_the_same_bytes(folder, tmp_path, device_map, attach):
    text = device_map if isinstance(device_map, str) else json.dumps(device_map)
    spread = load_model(str(folder / "model"), None, CPU, text)
    places = set(device_map.values()) if isinstance(device_map, dict) else {"cpu"}
    assert {p.device.type for p in spread.parameters()} == {"meta" if place == "disk" else place for place in places}
    for model, out in ((spread, "spread"), (load_model(str(folder / "model"), None, CPU), "whole")):
        collect(model, tmp_path / out, sequences(9), attach=attach, rows_per_unit=4)
    assert unit_bytes(tmp_path / "spread") == unit_bytes(tmp_path / "whole")
    assert tlfast.open_dataset(tmp_path / "spread").header == tlfast.open_dataset(tmp_path / "whole").header
    assert all(p.requires_grad for p in spread.parameters()), "as before"


def test_weights_on_the_disk_are_part_of_the_fingerprint(folder, tmp_path):
    changed = tiny_model()
    with torch.no_grad():
        changed.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
    changed.save_pretrained(tmp_path)
    mixed = [load_model(str(path), None, CPU, json.dumps(MIXED)) for path in (folder / "model", tmp_path)]
    assert model_fingerprint(mixed[0]) == model_fingerprint(tiny_model())
    assert model_fingerprint(mixed[1]) == model_fingerprint(changed) != model_fingerprint(mixed[0])


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(3, 2))
    with pytest.raises(ValueError, match=r"collect: model must have its weights, got 0\.weight on meta. Load the"):
        describe_model(model)


def test_the_command_line_spreads_a_model(folder, tmp_path, capsys):
    words = collect_words(folder, out=str(tmp_path / "spread"))
    assert main(["collect", *words, "--device-map", json.dumps(MIXED)]) == 0
    assert main(["collect", *collect_words(folder, out=str(tmp_path / "whole"))]) == 0
    assert unit_bytes(tmp_path / "spread") == unit_bytes(tmp_path / "whole")
    (tmp_path / "spread" / "commits" / "u000001.json").unlink()
    assert main(["collect", str(tmp_path / "spread" / "config.yaml"), "--device-map", ""]) == 0
    assert unit_bytes(tmp_path / "spread") == unit_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"device_map": "all"}, "device_map must be one of auto, balanced, balanced_low_0, sequential, or JSON that"),
        ({"device_map": "{}"}, "device_map must be one of auto, "),
        ({"device_map": '{"": [1]}'}, "device_map must be one of auto, "),
        ({"device_map": "auto", "device": "cpu"}, "device must be auto where device_map is given, got 'cpu' with"),
        ({"device_map": '{"": "nowhere"}'}, "device_map must be one of auto, "),
        ({"device_map": '{"": "meta"}'}, "device_map must be one of auto, "),
    ],
)  # fmt: skip
def test_a_wrong_map_is_refused(folder, tmp_path, capsys, change, text):
    out = tmp_path / "out"
    assert text in complaint_of(capsys, ["collect", *collect_words(folder, out=str(out), **change)])
    assert not out.exists()


def test_a_map_is_a_word_or_json():
    assert as_device_map("balanced") == "balanced"
    assert as_device_map('{"model.embed": 0, "model.layers": "cpu"}') == {"model.embed": 0, "model.layers": "cpu"}
