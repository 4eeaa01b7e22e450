"""A dataset of gradients, activations and their products: rows aligned, right for each example alone, resumed."""

from __future__ import annotations

import json

import pytest
import torch
from poisoned_rows import files_of
from tiny_models import POINTS, alone, collect, collect_words, save_model, save_text, sequences, tiny_model

import tlfast
from tlfast import Spec
from tlfast.cli import main

EXAMPLES = sequences(11)
SOURCES = ("grad", "act", "grad*act")
KINDS = list(POINTS)


def specs(kind, reduce="sum", over="pos"):
    return [Spec(POINTS[kind], reduce, over, "float32", of=of) for of in SOURCES]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_each_example_alone(tmp_path, kind, side):
    model = tiny_model(kind).eval()
    settings = dict(rows_per_unit=4, batch_tokens=64, padding_side=side, grad_scale=8.0)
    collect(model, tmp_path / "rows", EXAMPLES, points=specs(kind), **settings)
    rows = tlfast.open_dataset(tmp_path / "rows")
    points = [name for name in rows.points if ":" not in name]
    assert len(points) == 2
    assert set(rows.points) == {p + end for p in points for end in ("", ":act", ":grad*act")}
    for number, tokens in enumerate(EXAMPLES):
        for point in points:
            act, grad = alone(model, point, tokens)
            # Activations carry the forward's rounding, which is of the size of the largest of them.
            atol = 1e-5 * len(tokens) * float(act.abs().max())
            for column, terms in ((f"{point}:act", act), (point, grad), (f"{point}:grad*act", grad * act)):
                torch.testing.assert_close(rows[column][number].double(), terms.sum(0), rtol=1e-4, atol=atol)


def test_attribution_of_a_point(tmp_path):
    """Summed over positions and features: one number an example, the first-order effect of the point."""
    model = tiny_model().eval()
    attribution = Spec(POINTS["gpt2"], "sum", (1, 2), "float32", of="grad*act")
    collect(model, tmp_path / "rows", EXAMPLES, points=[attribution], rows_per_unit=4)
    rows = tlfast.open_dataset(tmp_path / "rows")
    for number, tokens in enumerate(EXAMPLES):
        act, grad = alone(model, "transformer.h.1", tokens)
        got = rows["transformer.h.1:grad*act"][number].double()
        torch.testing.assert_close(got, (grad * act).sum(), rtol=1e-4, atol=1e-4)


def test_continued_and_never_mixed(tmp_path):
    model = tiny_model()
    collect(model, tmp_path / "whole", EXAMPLES, points=specs("gpt2"), rows_per_unit=4)
    collect(model, tmp_path / "parts", EXAMPLES, points=specs("gpt2"), rows_per_unit=4, units="0:1")
    report = collect(model, tmp_path / "parts", EXAMPLES, points=specs("gpt2"), rows_per_unit=4)
    assert report.n_rows == len(EXAMPLES) - 4
    whole, parts = files_of(tmp_path / "whole"), files_of(tmp_path / "parts")
    assert {name: text for name, text in whole.items() if name.endswith("tlf")} == {
        name: text for name, text in parts.items() if name.endswith("tlf")
    }
    with pytest.raises(tlfast.dataset.DatasetError, match="spec"):
        collect(model, tmp_path / "parts", EXAMPLES, points=specs("gpt2")[:1], rows_per_unit=4)


def test_what_it_is_of_is_said_where_it_is_not_the_gradient(tmp_path):
    collect(tiny_model(), tmp_path / "rows", EXAMPLES, points=specs("gpt2"), rows_per_unit=4)
    header = tlfast.open_dataset(tmp_path / "rows").header
    assert [spec.get("of") for spec in header["specs"]] == [None, "act", "grad*act"]
    assert "of" not in header["specs"][0]
    description = json.loads((tmp_path / "rows" / "dataset.json").read_text())
    assert description["version"] == 2
    assert [column["of"] for column in description["columns"]] == ["grad", "act", "grad*act"] * 2
    collect(tiny_model(), tmp_path / "gradients", EXAMPLES, points=specs("gpt2")[:1], rows_per_unit=4)
    assert json.loads((tmp_path / "gradients" / "dataset.json").read_text())["version"] == 1


def test_by_words_of_the_function(tmp_path):
    settings = dict(reduce="sum", rows_per_unit=4, dtype="float32")
    collect(tiny_model(), tmp_path / "specs", EXAMPLES, points=specs("gpt2"), rows_per_unit=4)
    collect(tiny_model(), tmp_path / "words", EXAMPLES, of=SOURCES, **settings)
    collect(tiny_model(), tmp_path / "text", EXAMPLES, of="grad, act,grad*act", **settings)
    headers = [tlfast.open_dataset(tmp_path / out).header for out in ("specs", "words", "text")]
    assert headers[0] | {"specs": 0} == headers[1] | {"specs": 0} == headers[2] | {"specs": 0}
    assert headers[1] == headers[2]
    collect(tiny_model(), tmp_path / "inputs", EXAMPLES, of="act", side="input", **settings)
    assert tlfast.open_dataset(tmp_path / "inputs").points[0] == "transformer.h.0:input:act"
    with pytest.raises(ValueError, match=r"^collect: of must be left out where points are Specs, got 'act' beside"):
        collect(tiny_model(), tmp_path / "other", EXAMPLES, points=specs("gpt2"), of="act")
    with pytest.raises(
        ValueError, match=r"^collect: of must be one of grad, act, grad\*act, grad\*ref, weight, got 'loss'"
    ):
        collect(tiny_model(), tmp_path / "other", EXAMPLES, of="grad,loss", **settings)
    assert not (tmp_path / "other").exists()


def test_by_words_of_the_command(tmp_path):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text")
    arguments = collect_words(tmp_path, of="act,grad*act", side="input", reduce="sum")
    assert main(["collect", *arguments]) == 0
    rows = tlfast.open_dataset(tmp_path / "out")
    assert [name.partition(":")[2] for name in rows.points] == ["input:act", "input:grad*act"] * 2
    assert main(["collect", str(tmp_path / "out" / "config.yaml")]) == 0


def test_rows_of_a_loop_of_ones_own(tmp_path):
    model, data = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.GELU()), torch.randn(6, 4)
    plan = tlfast.dataset.Plan(n_examples=6, rows_per_unit=4)
    kept = [Spec("0"), Spec("0", of="act"), Spec("0", of="grad*act")]
    with tlfast.capture(model, kept, rows=4) as cap, cap.into(tmp_path / "rows", plan=plan) as written:
        for ids in written.batches(2):
            with cap.batch(ids=ids):
                model(data[ids]).square().sum().backward()
    rows = tlfast.open_dataset(tmp_path / "rows")
    act = model[0](data).detach()
    torch.testing.assert_close(rows["0:act"][:], act)
    torch.testing.assert_close(rows["0:grad*act"][:], rows["0"][:] * act)


def test_streamed(tmp_path):
    """Rows are drawn at random; those of one example stay together."""
    model = tiny_model().eval()
    kept = [Spec("transformer.h.1", "mean", of=of) for of in ("grad", "act")]
    with tlfast.stream(model, EXAMPLES, kept, buffer_rows=8, batch_size=4, rows_per_unit=4) as rows:
        batches = list(rows)
    acts, grads = (torch.cat([batch[name] for batch in batches]) for name in ("transformer.h.1:act", "transformer.h.1"))
    assert len(acts) == len(EXAMPLES)
    for tokens in EXAMPLES:
        act, grad = alone(model, "transformer.h.1", tokens)
        number = (acts.double() - act.mean(0)).norm(dim=1).argmin()
        torch.testing.assert_close(acts[number].double(), act.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads[number].double(), grad.mean(0), rtol=1e-4, atol=1e-5)
