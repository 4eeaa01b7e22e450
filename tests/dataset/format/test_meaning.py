"""What a dataset says of its columns in words: the spec that made each is found, or nothing is claimed."""

from __future__ import annotations

import json

import kinds_cases
import pytest
import torch
from torch import nn

import tlfast
from tlfast import Projection, Spec
from tlfast.cli import main
from tlfast.dataset import Column, Plan, open_dataset
from tlfast.dataset.format.meaning import Meanings
from tlfast.globs import ForeignGlob, glob_to_regex

F32 = torch.float32
EACH = "element by element, at the output"
BOUND = "off by at most 1/{} of the largest magnitude that shares it"


def test_every_form_of_a_capture(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 6)), torch.randn(4, 5, 4)
    sketch = Projection(8, "count-sketch", form="one-sided", nonzeros=2)
    specs = [
        Spec("0", "mean"), Spec("0", "norm", -1), Spec("1"), Spec("*", "sum", (1, 2), of="grad*act"),
        Spec("0", of="act", per="token", encoding="int8:64"), Spec("2", "mean", of="act", side="input", at=[0, -1]),
        Spec("2", "sum", -1, of="grad*ref", ref=torch.ones(6), heads=(2, 3)), Spec("1", "last", of="act", at="answer"),
        Spec(["0", "2"], of="weight", project=Projection(4, "normal", seed=7)), Spec("0", "norm", of="weight"),
        Spec("2", of="weight", bias=True, name="whole"), Spec("2", of="weight", queries=torch.ones(3, 6, 6)),
        Spec(["0", "2"], of="weight", project=sketch, summed=True, name="all"),
        Spec("2", of="weight", per="token", name="factors"),
    ]  # fmt: skip
    mask = torch.tensor([[True] * 5] * 3 + [[True] * 3 + [False] * 2])
    with tlfast.capture(model, specs, rows=4) as cap, cap.into(tmp_path / "ds", plan=Plan(4, 4)) as out:
        for ids in out.batches(4):
            with cap.batch(mask, ids=ids, at={"answer": [0, 1, 2, 2]}):
                model(x).square().sum().backward()
    ds = open_dataset(tmp_path / "ds")
    weight = "weight gradient of each example"
    expected = {
        "0:mean": "gradient at the output; mean over positions",
        "0:norm": "gradient at the output; L2 norm over the last dimension",
        "0:grad*act": f"gradient times activation, {EACH}; sum over positions and dimension 2",
        "0:act": "activation at the output; a row for each real token; stored as int8 with a scale for each 64 values, "
        + BOUND.format(254),
        "0:weight": f"{weight}; projected to 4 a side, L G R^T; normal, seed 7, tlfast-1",
        "0:weight:norm": f"{weight}; not projected; its norm",
        "gradients:all": "weight gradients of 0, 2 added up; projected to 8, R vec(G); count-sketch, seed 0, tlfast-1, "
        "nonzeros 2",
        "1": "gradient at the output; not reduced",
        "1:grad*act": f"gradient times activation, {EACH}; sum over positions and dimension 2",
        "1:act": "activation at the output; at the positions that the field 'answer' names; the last real position",
        "2:grad*act": f"gradient times activation, {EACH}; sum over positions and dimension 2",
        "2:grad*ref": f"gradient times a reference, {EACH}; the last dimension as 2 heads of 3; "
        "sum over the last dimension",
        "2:weight": f"{weight}; projected to 4 a side, L G R^T; normal, seed 7, tlfast-1",
        "2:whole": f"{weight}; with the bias, the last column; not projected",
        "2:weight:scores": f"{weight}; not projected; its dot products with 3 queries",
        "2:factors": "weight gradient of each token; not projected; "
        "as its two factors side by side, that of the outputs first: 6 numbers and 6",
        "2:input:act": "activation at the input; positions 0, -1 of the real tokens; mean over positions",
    }
    assert {point: ds.holds(point) for point in ds.points} == expected
    assert all(ds.made_by(point) is not None for point in ds.points)
    assert ds.made_by("0:norm")["reduce"] == "norm"
    card = (tmp_path / "ds" / "README.md").read_text()
    assert card.count("\n| `") == len(ds.points)
    assert f"| `1` | F32 | [5, 6] | {expected['1']} |" in card
    assert "# Gradients and more, one row per example or token" in card


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("int8:stochastic", "int8 rounded at random, right on average, with a scale for each row, "
         + BOUND.format(127)),
        ("int4:64", "int4 with a scale for each 64 values, " + BOUND.format(14)),
        ("float8_e4m3fn", "float8_e4m3fn with a scale for each row, " + BOUND.format("16 of the value, or 1/458,752")),
        ("float8_e4m3fn:stochastic", "float8_e4m3fn rounded at random, right on average, with a scale for each row, "
         + BOUND.format("8 of the value, or 1/229,376")),
    ],
)  # fmt: skip
def test_the_error_of_an_encoding(encoding, text):
    column = Column(F32, (4,), of="grad*x", per="token", encoding=encoding)
    assert Meanings({}).holds("h", column) == f"grad*x; a row for each real token; stored as {text}"


PLAIN, ACT = Column(F32, (4,)), Column(F32, (4,), of="act")
MEAN = {"points": "h.*", "reduce": "mean", "over": [1]}


@pytest.mark.parametrize(
    "specs, name, column, text",
    [
        ([MEAN], "h.3", PLAIN, "gradient at the output; mean over positions"),
        ([MEAN], "h.3", ACT, "activation"),  # of another kind
        ([MEAN], "x.3", PLAIN, "gradient"),
        ([MEAN, {**MEAN, "points": ["h.3"], "reduce": "sum"}], "h.3", PLAIN, "gradient"),  # which of them?
        ([MEAN, {**MEAN, "reduce": "sum"}], "h.3:sum", PLAIN, "gradient at the output; sum over positions"),
        ([MEAN | {"output": 1}], "h.3", PLAIN, "gradient at the output; output 1 of the module; mean over positions"),
        ([MEAN | {"new": 1}], "h.3", PLAIN, "gradient at the output; mean over positions; also new: see the header"),
        ([{"points": "", "reduce": "none", "of": "act"}], ":act", ACT, "activation at the output; not reduced"),
        ([{"points": "m.experts", "of": "weight", "reduce": "norm"}], "m.experts.expert_2.up_proj:weight:norm",
         Column(F32, (), of="weight"), "weight gradient of each example; not projected; its norm"),
        (None, "h.3", PLAIN, "gradient"), (7, "h.3", PLAIN, "gradient"), ([[1], None, "h.*"], "h.3", PLAIN, "gradient"),
        ([{"points": ["[z-a]", 5, "["], "name": [1], "over": "x", "project": 3, "at": {}}], "h", PLAIN, "gradient"),
        ([{"points": {}, "of": ["grad"], "side": {}, "reduce": {}, "summed": 1, "heads": 5}], "h", PLAIN, "gradient"),
        ([MEAN | {"reduce": {}, "over": ["x", 1], "at": [{}], "heads": ["a", 2], "output": [1]}], "h.3", PLAIN,
         "gradient at the output; output [1] of the module; positions {} of the real tokens; {} positions"),
    ],
)  # fmt: skip
def test_what_a_header_says(specs, name, column, text):
    assert Meanings({"specs": specs, "calls": "raise"}).holds(name, column) == text


def test_calls_are_told():
    for calls, text in (
        ("sum", "a module's calls added up"),
        ("stack", "a module's calls stacked, the first dimension"),
    ):
        assert Meanings({"specs": [MEAN], "calls": calls}).holds("h.3", PLAIN).endswith(f"positions; {text}")


def test_which_rows_begin_with_positions():
    kept, rows = {"points": "h", "reduce": "none", "over": []}, Column(F32, (4, 4))

    def keeps(name, column, *specs, **header):
        return Meanings({"batching": {"width": 4}, "specs": list(specs)} | header).keeps_positions(name, column)

    assert keeps("h", rows, kept)
    assert keeps("h", Column(F32, (4,)), {"points": "h", "reduce": "sum", "over": [-1]})
    assert not keeps("h", rows, kept, calls="stack")
    assert not keeps("h", rows, kept, batching={"width": 5})
    assert not keeps("h", rows, kept | {"at": [0, 1, 2, 3]})
    assert not keeps("h:weight", Column(F32, (4, 4), of="weight"), {"points": "h", "of": "weight", "reduce": "none"})
    assert not keeps("h", PLAIN, {"points": "h", "reduce": "mean", "over": [-2]})  # of [B, P, D]: over positions
    # Means of a model that is as wide as its rows are long, beside activations that keep positions.
    both = ({"points": "h", "reduce": "mean", "over": [1]}, kept | {"of": "act"})
    assert not keeps("h", PLAIN, *both)
    assert keeps("h:act", Column(F32, (4, 4), of="act"), *both)


def test_globs_of_files_mean_what_ours_mean():
    names = ["", "h", "h.1", "h.12", "a.1.mlp", "h.1.mlp", "h.1.mlp.up", "h.b.mlp"]
    for glob in ("*", "**", "h.*", "h.?", "h.[01]*", "h.[!1].mlp", "**.mlp", "h.**", "*.*.mlp", "[", "a[1"):
        ours, theirs = glob_to_regex(glob), ForeignGlob(glob)
        assert [theirs.matches(name) for name in names] == [bool(ours.fullmatch(name)) for name in names], glob
    assert not ForeignGlob("**a" * 40).matches("a" * 400 + "b")  # a regular expression would try for ever
    with pytest.raises(ValueError, match="bad character range"):
        ForeignGlob("[z-a]")


def test_it_is_told_of_datasets_and_views(tmp_path, capsys):
    header = {"specs": [{"points": "h", "reduce": "mean", "over": [1]}]}
    for name, more in (("a", header), ("b", {"specs": []})):
        kinds_cases.write_units(kinds_cases.make_writer(tmp_path / name, header=more))
    one, other = (open_dataset(tmp_path / name) for name in "ab")
    text = "gradient at the output; mean over positions"
    assert one.select([1])["h"].shape == (1, 3)
    assert one.select([1]).holds("h") == one.holds("h") == text
    assert one.info()["holds"]["t"] == "gradient; a row for each real token"
    both = tlfast.dataset.concat_datasets([one, other], may_differ=["specs"])
    assert both.holds("h") == f"of dataset 1: {text} | of dataset 2: gradient"
    assert both.info()["holds"]["h"] == both.holds("h")
    assert text in one._repr_html_()
    assert text in one.with_fields("h")._repr_html_()
    with pytest.raises(KeyError, match="point must be one of h, "):
        one.holds("nope")
    assert main(["info", str(tmp_path / "a")]) == 0
    assert f"h BF16 [7, 3] {text} h:act F32" in " ".join(capsys.readouterr().out.split())
    assert main(["info", "--json", str(tmp_path / "a")]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]["h"] == text


def test_what_a_card_quotes_does_not_act(tmp_path):
    from dataset_cases import make_dataset

    spec = {"points": "*<b>.*", "of": "weight", "reduce": "none", "over": [], "summed": True}
    columns = {"gradients:weight": Column(F32, (2,), of="weight")}
    make_dataset(tmp_path, columns=columns, header={"specs": [spec]})
    text = r"| weight gradients of \*&lt;b>.\* added up; not projected |"
    assert text in (tmp_path / "README.md").read_text()


def test_a_card_of_another_version_gets_the_new_number_of_examples(tmp_path):
    from dataset_cases import make_dataset, make_writer

    make_dataset(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("11 examples, 4 points, written by tlfast.\n") == 1
    old = card.replace("| holds |", "|")
    (tmp_path / "README.md").write_text(old)
    make_writer(tmp_path).extend(6, {"tokens": 6})
    assert (tmp_path / "README.md").read_text() == old.replace("11 examples", "17 examples")
