"""`tlfast points`: names, classes and shapes of a model's modules, by names and globs; what can't be listed."""

from __future__ import annotations

import json

import pytest
import torch
from record_files import save_task_model
from task_models import WIDTH, task_model
from tiny_models import complaint_of, save_model

from tlfast.cli import main
from tlfast.collecting.point_list import Point, list_points

KINDS = {  # kind, head, glob, and the shapes of some points
    "llama": ("llama", "causal", {"model.layers.0": ("B", "P", WIDTH), "lm_head": ("B", "P", 64)}),
    "bert": ("bert", "sequence", {"bert.encoder.layer.1": ("B", "P", WIDTH), "classifier": ("B", 3)}),
    "t5": (
        "t5", "seq2seq",
        {"encoder.block.0": ("B", "P", WIDTH), "decoder.block.0": ("B", "L", WIDTH),
         "decoder.block.0.layer.1.EncDecAttention.k": ("B", "P", WIDTH)},
    ),
    "vit": ("vit", "image", {"vit.layers.0": ("B", 5, WIDTH)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_name_examples_and_positions(kind):
    name, head, shapes = KINDS[kind]
    model = task_model(name, head).train()
    found = {point.name: point for point in list_points(model)}
    assert {point: found[point].shape for point in shapes} == shapes
    assert all(found[point].kind == type(model.get_submodule(point)).__name__ for point in shapes)
    assert list(found) == [point for point, _ in model.named_modules() if point]
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_module_that_is_not_called_has_no_shape():
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4))
    model.spare = torch.nn.Linear(4, 4)
    model.forward = lambda tokens: model[0](tokens)
    assert list_points(model, "*") == [Point("0", "Embedding", ("B", "P", 4)), Point("spare", "Linear", None)]


def test_a_model_that_takes_no_tokens_says_so():
    model = torch.nn.Linear(3, 3)
    model.inner = torch.nn.Linear(1, 1)
    with pytest.raises(
        RuntimeError, match=r"^points: model must run on made-up input, got Linear: .* Call tlfast.capt"
    ):
        list_points(model, "inner")


def test_the_command_lists_them_without_weights(tmp_path, capsys):
    save_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main(["points", str(tmp_path / "model"), "transformer.h.*", "lm_head"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "transformer.h.0  GPT2Block  [B, P, 16]",
        "transformer.h.1  GPT2Block  [B, P, 16]",
        "lm_head          Linear     [B, P, 256]",
    ]
    assert main(["points", str(tmp_path / "model"), "lm_head", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"name": "lm_head", "class": "Linear", "shape": ["B", "P", 256]}]


def test_the_task_is_that_of_the_checkpoint_or_another(tmp_path, capsys):
    save_task_model(tmp_path / "model", "bert", "sequence")
    assert main(["points", str(tmp_path / "model"), "classifier"]) == 0
    assert main(["points", str(tmp_path / "model"), "cls", "--task", "masked"]) == 0
    save_task_model(tmp_path / "vit", "vit", "image")
    assert main(["points", str(tmp_path / "vit"), "vit.layers.1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "classifier  Linear  [B, 3]",
        "cls  BertOnlyMLMHead  [B, P, 64]",
        "vit.layers.1  ViTLayer  [B, 5, 16]",
    ]


@pytest.mark.parametrize(
    "words, text",
    [
        ([], "tlfast points: the argument must be one model, and globs, got nothing"),
        (
            ["/nowhere/model"],
            "tlfast points: model must be a folder or a name on the hub, got '/nowhere/model', no suc",
        ),
        (["MODEL", "transfromer.h.*"], "points: points must match a module, got 'transfromer.h.*'. Nearest: transform"),
        (["MODEL", "--task", "vision"], "tlfast points: the argument must be one model, and globs, got MODEL --task"),
        (["MODEL", "--jsn"], "Nearest: --json."),
    ],
)
def test_what_is_no_model_or_point_is_one_line(tmp_path, capsys, words, text):
    save_model(tmp_path / "model")
    place = str(tmp_path / "model")
    assert text.replace("MODEL", place) in complaint_of(
        capsys, ["points", *(word.replace("MODEL", place) for word in words)]
    )
