"""Collections of products with a tensor of one's own, of heads and of chosen positions: right, resumed, refused."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import (
    WIDTH,
    collect,
    collect_words,
    complaint_of,
    save_model,
    save_text,
    sequences,
    tiny_model,
)

import tlfast
from tlfast import Spec
from tlfast.cli import main
from tlfast.dataset import DatasetError

POINT = "transformer.h.1"
REF = torch.linspace(-1, 1, WIDTH)
EXAMPLES = [
    {"input_ids": tokens, "answer": len(tokens) // 2, "chosen_mask": [k % 3 != 1 for k in range(len(tokens))]}
    for tokens in sequences(9)
]


def embedded(batch):
    """A function of the batch, with a row for each position: what its tokens are embedded as, by a table of ours."""
    return torch.linspace(-1, 1, 256 * WIDTH).reshape(256, WIDTH)[batch.input_ids]


def forms(point=POINT):
    same = dict(dtype="float32")
    return [
        Spec(point, at=-1, **same),
        Spec(point, "sum", -1, of="grad*act", at="answer", name="answer", **same),
        Spec(point, "sum", (1, -1), of="grad*ref", ref=REF, heads=(2, 8), at="chosen_mask", name="chosen", **same),
        Spec(point, "sum", -1, of="grad*ref", ref=embedded, heads=(2, 8), at=(0, -1), name="ends", **same),
        Spec(point, "sum", (1, 2), of="grad*ref", ref=embedded, name="all", **same),
    ]


def right_rows(model, example):
    """The rows of one example, by `torch.autograd.grad`."""
    kept, ids = [], torch.tensor([example["input_ids"]])
    handle = model.get_submodule(POINT).register_forward_hook(
        lambda m, args, out: kept.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    logits = model(ids, use_cache=False).logits[0, :-1]
    handle.remove()
    loss = -logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).sum()
    (grad,) = torch.autograd.grad(loss, kept)
    act, grad = kept[0][0].detach().double(), grad[0].double()
    chosen, table = (
        torch.tensor(example["chosen_mask"]),
        torch.linspace(-1, 1, 256 * WIDTH).reshape(256, WIDTH).double(),
    )
    own = grad * table[ids[0]]
    return {
        "": grad[-1],
        "answer": (grad * act)[example["answer"]].sum(),
        "chosen": (grad * REF.double())[chosen].sum(0).view(2, 8).sum(-1),
        "ends": own[[0, -1]].view(2, 2, 8).sum(-1),
        "all": own.sum(),
    }


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_are_those_of_each_example_alone(tmp_path, side):
    model = tiny_model().eval()
    settings = dict(rows_per_unit=4, batch_tokens=48, padding_side=side, grad_scale=4.0)
    collect(model, tmp_path / "rows", EXAMPLES, points=forms(), **settings)
    rows = tlfast.open_dataset(tmp_path / "rows")
    assert rows.header["batching"]["width"] is None  # no row keeps the positions of the batch
    for number, example in enumerate(EXAMPLES):
        for name, row in right_rows(model, example).items():
            column = rows[f"{POINT}:{name}"] if name else rows[POINT]
            torch.testing.assert_close(column[number].double(), row, rtol=1e-4, atol=1e-4)
    specs = rows.header["specs"]
    assert [spec.get("at") for spec in specs] == [-1, "answer", "chosen_mask", [0, -1], None]
    assert [spec.get("heads") for spec in specs] == [None, None, [2, 8], [2, 8], None]
    assert specs[2]["ref"].startswith("torch.float32 [16] ")
    assert specs[3]["ref"]["name"].endswith("embedded")


def test_continued_and_never_mixed(tmp_path):
    def run(points, **settings):
        return collect(tiny_model(), tmp_path / "rows", EXAMPLES, points=points, rows_per_unit=4, **settings)

    run(forms(), units="0:1")
    for k, change in ((0, {"at": -2}), (2, {"ref": REF + 1}), (2, {"heads": (4, 4)}), (3, {"ref": REF})):
        points = forms()
        points[k] = Spec(**{name: getattr(points[k], name) for name in vars(points[k])} | change)
        with pytest.raises(DatasetError, match="spec"):
            run(points)
    assert run(forms()).n_rows == len(EXAMPLES) - 4


def test_of_old_runs_nothing_is_said_anew(tmp_path):
    collect(tiny_model(), tmp_path / "rows", [e["input_ids"] for e in EXAMPLES], rows_per_unit=16)
    (spec,) = json.loads((tmp_path / "rows" / "dataset.json").read_text())["header"]["specs"]
    assert set(spec) == {"points", "reduce", "over", "dtype", "output", "name"}


def test_by_words_of_the_function_and_streamed(tmp_path):
    tokens = [example["input_ids"] for example in EXAMPLES]
    words = dict(of="grad*ref", ref=embedded, heads=(2, 8), at=[-1, 0], reduce="sum", over=-1, dtype="float32")
    collect(tiny_model(), tmp_path / "rows", tokens, points=POINT, rows_per_unit=4, **words)
    rows = tlfast.open_dataset(tmp_path / "rows")[f"{POINT}:grad*ref"][:]
    assert rows.shape == (len(EXAMPLES), 2, 2)
    model = tiny_model()
    with tlfast.stream(model, tokens, POINT, buffer_rows=8, batch_size=4, rows_per_unit=4, **words) as stream:
        for batch in stream:
            assert torch.equal(batch[f"{POINT}:grad*ref"], rows[batch["id"]])


@pytest.mark.parametrize(
    "examples, points, text",
    [
        (EXAMPLES, Spec(POINT, of="grad*ref"), "collect: ref must be given with of=\"grad*ref\", got none. Give a "),
        (EXAMPLES, Spec(POINT, at="reply"), "be a field of the examples (answer, chosen_mask), got 'reply'"),
        (EXAMPLES, Spec(POINT, at=-1), "collect: fields of the examples must be used by the model or the loss, or be "),
        ([{"input_ids": [1, 2, 3], "where": 3}] * 2, Spec(POINT, at="where"), "got 3 for example 0. Check them"),
        ([{"input_ids": [1, 2, 3], "where": 2}, {"input_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9], "where": 9}],
         Spec(POINT, at="where"), "got 9 for example 0. Check them: the last one is -1."),
        ([[1, 2, 3], [1, 2]], Spec(POINT, at=(0, 2)), "collect: at must be tokens that every example has, got 2 for "),
        ([[1, 2, 3]], Spec(POINT, at=-4), "for example 0, which has 3. Leave such examples out (--filter), or choose"),
        ([[1, 2, 3]] * 2, Spec(POINT, heads=(3, 3)), "be (n, d) with n * d the last dimension, 16, got (3, 3)"),
        ([[1, 2, 3]] * 2, Spec(POINT, of="grad*ref", ref=torch.ones(3)), "ref must broadcast to a gradient of shape"),
        ([[1, 2, 3], [1, 2]], Spec(POINT, of="grad*ref", reduce="sum", ref=torch.ones(3, 1)), "ref must broadcast"),
        ([[1, 2, 3]] * 2, Spec(POINT, of="grad*ref", reduce="sum", ref=lambda batch: 0), "must return a tensor, or a "),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(tmp_path, examples, points, text):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the text is compared below)
        collect(tiny_model(), tmp_path / "rows", examples, points=points)
    assert text in str(error.value)
    assert not (tmp_path / "rows").exists()


def test_a_position_that_an_example_lacks_is_named(tmp_path):
    examples = [{"input_ids": [1] * n, "where": 7} for n in (9, 9, 8, 8, 8, 7, 10, 10)]
    with pytest.raises(ValueError, match=r"got 7 for example \d, which has 7 real tokens\. Check both, and the mask"):
        collect(tiny_model(), tmp_path / "rows", examples, points=Spec(POINT, at="where"), batch_tokens=64)


def test_a_point_without_positions(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.LazyLinear(9))

    def loss(model, batch):
        return model(batch.input_ids)[:, 0].sum()

    model(torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^collect at 2: a gradient must have the positions as dimension 1 where"):
        collect(model, tmp_path / "rows", [[1, 2, 3]] * 3, points=Spec("2", at=0), loss=loss)


def test_graphs_are_refused(tmp_path):
    text = r'^collect: cuda_graph must be "auto" or "off" where ref is a function, or there is an at=, got "on"'
    for spec in (Spec(POINT, at=-1), Spec(POINT, of="grad*ref", ref=embedded)):
        with pytest.raises(ValueError, match=text):
            collect(tiny_model(), tmp_path / "rows", [[1, 2, 3]], points=spec, cuda_graph="on")


def test_by_words_of_the_command(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "model")
    save_text(tmp_path / "text")
    (tmp_path / "refs_of_ours.py").write_text("def ones(batch):\n    return batch.input_ids[..., None] * 0 + 1.0\n")
    monkeypatch.chdir(tmp_path)
    words = {"of": "grad*ref", "reduce": "sum", "over": "-1", "heads": "2,8", "at": "0,-1"}
    assert main(["collect", *collect_words(tmp_path, ref="refs_of_ours:ones", **words)]) == 0
    rows = tlfast.open_dataset(tmp_path / "out")
    assert rows[f"{POINT}:grad*ref"].shape == (24, 2, 2)
    assert rows.header["specs"][0]["at"] == [0, -1]
    assert main(["collect", str(tmp_path / "out" / "config.yaml")]) == 0  # says all of it again
    capsys.readouterr()
    for changes, text in (
        ({}, "ref must be given with --of grad*ref, and with that alone, got ''."),
        ({"ref": "refs_of_ours:none"}, "ref must be module:function, got 'refs_of_ours:none': "),
        ({"ref": "ones"}, "ref must be module:function, got 'ones': "),
        ({"ref": "refs_of_ours:ones", "of": "grad"}, "ref must be given with --of grad*ref, and with that alone"),
        ({"of": "grad", "heads": "2"}, "heads must be (n, d), two positive numbers, got [2]."),
        ({"of": "grad", "heads": "2,x"}, "heads must be (n, d), two positive numbers, got [2, 'x']."),
    ):
        arguments = ["collect", *collect_words(tmp_path, **words | {"out": str(tmp_path / "other")} | changes)]
        assert text in complaint_of(capsys, arguments)
