"""Points: names, globs, lists, predicates; shared modules; and the hints when nothing matches."""

import pytest
import torch
from models import Residual
from torch import nn

import tlfast
from tlfast.hooks.points import find_points, glob_to_regex, is_glob, match_names

NAMES = list(dict(Residual(n_layers=12).named_modules()))[1:]


def matched(points):
    return match_names("capture", NAMES, points)


def test_names_globs_lists_and_predicates():
    assert matched("hook_embed") == ["hook_embed"]
    assert matched("blocks.*.hook_resid_post") == [f"blocks.{i}.hook_resid_post" for i in range(12)]
    assert matched("blocks.1?.norm") == ["blocks.10.norm", "blocks.11.norm"]
    assert matched("blocks.[2-4].norm") == ["blocks.2.norm", "blocks.3.norm", "blocks.4.norm"]
    assert matched("blocks.[!2-9].norm") == ["blocks.0.norm", "blocks.1.norm"]
    assert matched("blocks.*") == [f"blocks.{i}" for i in range(12)], "a star stays within one part of a name"
    assert matched("**.hook_mlp_out") == [f"blocks.{i}.hook_mlp_out" for i in range(12)]
    assert matched("**") == NAMES
    assert matched("*embed") == ["embed", "hook_embed", "unembed"]
    assert matched(lambda name: name.endswith("resid_pre")) == [f"blocks.{i}.hook_resid_pre" for i in range(12)]


def test_a_list_keeps_the_order_of_the_model_and_names_each_once():
    assert matched(["unembed", "blocks.3", "hook_*", "hook_embed"]) == ["hook_embed", "blocks.3", "unembed"]
    assert matched(("unembed", "embed")) == ["embed", "unembed"]


@pytest.mark.parametrize("glob", ["blocks.0", "a.b", "a+b", "a(b", "^a$", "a|b", "{a}"])
def test_other_characters_stand_for_themselves(glob):
    assert glob_to_regex(glob).fullmatch(glob)
    assert not glob_to_regex(glob).fullmatch(glob.replace(".", "x").replace("+", "").replace("|", "") + "x")
    assert not is_glob(glob)


@pytest.mark.parametrize(
    "points, text",
    [
        ("blocks.0.hook_resid_pst", "got 'blocks.0.hook_resid_pst'. Nearest: blocks.0.hook_resid_post, blocks."),
        ("hok_embed", "got 'hok_embed'. Nearest: hook_embed"),
        ("blocks.*.hook_q", "got 'blocks.*.hook_q'. "),
        (["embed", "xyzzyxyzzyxyzzy"], "got 'xyzzyxyzzyxyzzy'. The model has 88 modules: embed, hook_embed, blocks, "),
        (lambda name: False, "got a predicate that is false for all. The model has 88 modules: embed"),
    ],
)
def test_what_matches_nothing_is_an_error_with_the_nearest_names(points, text):
    with pytest.raises(ValueError, match=r"^capture: points must match a module, got ") as error:
        matched(points)
    assert text in str(error.value)


def test_things_that_are_no_names():
    with pytest.raises(ValueError, match=r"capture: points must name at least one module, got \[\]"):
        matched([])
    text = r"capture: points must be names, globs or modules, got 3\. Pass strings, or modules of the model\."
    with pytest.raises(TypeError, match=text):
        matched(["embed", 3])
    with pytest.raises(TypeError, match=text):
        find_points("capture", Residual(), 3)


def test_the_root_is_found_by_its_empty_name_alone():
    model = Residual()
    assert list(find_points("capture", model, "")) == [""]
    assert list(find_points("capture", model, ["", "embed"])) == ["", "embed"]
    assert "" not in find_points("capture", model, "**")
    assert "" not in find_points("capture", model, lambda name: True)


def test_a_module_with_two_names():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared})})
    assert find_points("capture", model, "b.c") == {"b.c": shared}
    assert find_points("capture", model, ["a", "b.c"]) == {"a": shared, "b.c": shared}
    assert find_points("capture", model, "**") == {"a": shared, "b": model["b"]}, "a glob finds each module once"


def test_modules_themselves_are_points_and_no_predicates():
    model = Residual()
    block, norm = model.blocks[1], model.blocks[0].norm
    assert find_points("capture", model, block) == {"blocks.1": block}
    assert list(find_points("capture", model, [block, "hook_*", norm])) == ["hook_embed", "blocks.0.norm", "blocks.1"]
    assert list(find_points("capture", model, (model, "embed"))) == ["", "embed"]
    assert find_points("capture", model, model) == {"": model}


def test_a_module_with_two_names_and_itself():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleDict({"c": shared}), "d": nn.Tanh()})
    assert list(find_points("capture", model, shared)) == ["a"], "its first name"
    assert list(find_points("capture", model, [shared, "b.c"])) == ["b.c"], "the name that was asked for beside it"
    assert list(find_points("capture", model, ["d", "b.c"])) == ["b.c", "d"]
    assert list(find_points("capture", model, ["*", "b.c"])) == ["a", "b", "b.c", "d"], "a name beside a glob"


@pytest.mark.parametrize(
    "points, kind, text",
    [
        (
            nn.Linear(2, 2),
            ValueError,
            "be modules of the model, got a Linear that isn't in it. Pass the model that holds",
        ),
        (
            ["embed", nn.Tanh()],
            ValueError,
            "be modules of the model, got a Tanh that isn't in it. Pass the model that h",
        ),
        (
            "blocks",
            TypeError,
            "be modules that are called, got a ModuleList (blocks). Pass a list of the modules in it.",
        ),
    ],
)
def test_modules_that_can_not_be_points(points, kind, text):
    model = Residual()
    with pytest.raises(kind) as error:
        find_points("capture", model, model.blocks if points == "blocks" else points)
    assert str(error.value).startswith(f"capture: points must {text}")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_modules_made_by_torch_jit_take_no_hooks():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    scripted, traced = torch.jit.script(plain), torch.jit.trace(plain, torch.ones(1, 2))
    for model, points, name in ((scripted, "1", "1"), (nn.Sequential(traced), "**", "0"), (scripted, "", "Recursive")):
        with pytest.raises(TypeError) as error:
            tlfast.capture(model, points, rows=1)
        assert f"capture: points must run in Python, got {name}" in str(error.value)
        assert "made by torch.jit. Use the model that it was made of: code of torch.jit calls no" in str(error.value)
