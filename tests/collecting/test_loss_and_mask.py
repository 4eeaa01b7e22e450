"""A loss is known by its name, its code and what it closes over: another one doesn't continue a dataset."""

from __future__ import annotations

import functools
import json
import linecache
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass

import pytest
import torch
from tiny_models import collect, sequences, tiny_model, unit_bytes
from torch import nn

import tlfast
from tlfast import Capture, freeze, graph_step, reduce_into
from tlfast.collecting.batches import Batch
from tlfast.collecting.function_identity import describe_function
from tlfast.collecting.loss import next_token_loss
from tlfast.dataset import DatasetError
from tlfast.dataset.format.description import Description

EXAMPLES = sequences(8)
SCALE = 2.0


def scaled(factor):
    def loss(model, batch):
        return next_token_loss(model, batch) * factor

    return loss


def one_of(name):
    if name == "half":

        def loss(model, batch):
            return next_token_loss(model, batch) / 2
    else:

        def loss(model, batch):
            return next_token_loss(model, batch) / 3

    return loss


def reads_global(model, batch):
    return helper(next_token_loss(model, batch)) * SCALE


def helper(value):
    return value + 0.0


def other_helper(value):
    return value * 10


@dataclass
class Scaled:
    factor: float
    weight: torch.Tensor | None = None

    def __call__(self, model, batch):
        return next_token_loss(model, batch) * self.factor

    def method(self, model, batch):
        return next_token_loss(model, batch) * self.factor


class Module(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor), requires_grad=False)

    def forward(self, model, batch):
        return next_token_loss(model, batch) * self.factor


def keyword(model, batch, *, factor=1.0):
    return next_token_loss(model, batch) * factor


LAMBDAS = [lambda m, b: next_token_loss(m, b) * 1, lambda m, b: next_token_loss(m, b) * 2]  # fmt: skip
PAIRS = {
    "closure": (scaled(1.0), scaled(2.0)),
    "tensor": (scaled(torch.tensor(1.0)), scaled(torch.tensor(2.0))),
    "list": (scaled([1.0][0]), scaled([2.0][0])),
    "code": (one_of("half"), one_of("third")),
    "lambdas": LAMBDAS,
    "object": (Scaled(1.0), Scaled(2.0)),
    "state": (Scaled(1.0, torch.zeros(2)), Scaled(1.0, torch.ones(2))),
    "method": (Scaled(1.0).method, Scaled(2.0).method),
    "module": (Module(1.0), Module(2.0)),
    "partial": (functools.partial(keyword, factor=1.0), functools.partial(keyword, factor=2.0)),
    "wrapped": (torch.enable_grad()(scaled(1.0)), torch.enable_grad()(scaled(2.0))),
    "cached": (functools.lru_cache(scaled(1.0)), functools.lru_cache(scaled(2.0))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_two_losses_of_one_name_are_two(pair):
    if pair == "lambdas" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 doesn't say which of two lambdas on a line one is")
    (one, unknown), (other, _) = map(describe_function, PAIRS[pair])
    assert one != other
    assert not unknown
    assert json.loads(json.dumps(one)) == one == describe_function(PAIRS[pair][0])[0]


@pytest.mark.parametrize("pair", ["closure", "code", "object"])
@pytest.mark.parametrize("backend", ["native", "python"])
def test_another_loss_of_the_same_name_does_not_continue_a_dataset(tmp_path, pair, backend):
    one, other = PAIRS[pair]
    collect(tiny_model(), tmp_path, EXAMPLES, loss=one, rows_per_unit=4, backend=backend)
    before = unit_bytes(tmp_path)
    (tmp_path / "commits" / "u000001.json").unlink()
    with pytest.raises(DatasetError, match=r"be the same dataset to continue it, got .*header\.loss_code\."):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=other, rows_per_unit=4, backend=backend)
    collect(tiny_model(), tmp_path, EXAMPLES, loss=one, rows_per_unit=4, backend=backend)
    assert unit_bytes(tmp_path) == before


def test_what_differs_is_named(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0))
    with pytest.raises(DatasetError, match=r"header\.loss_code\.closure\.factor: '1\.0' there, '2\.0' here"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(2.0))


def test_globals_and_the_functions_among_them_count(monkeypatch):
    before, unknown = describe_function(reads_global)
    assert not unknown
    assert before["globals"]["SCALE"] == "2.0"
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert describe_function(reads_global)[0] != before
    monkeypatch.undo()
    monkeypatch.setattr(sys.modules[__name__], "helper", other_helper)
    assert describe_function(reads_global)[0] != before
    monkeypatch.undo()
    assert describe_function(reads_global)[0] == before


def compiled(source, name="<a cell>"):
    """The function ``loss`` of a source that `linecache` knows, as it knows a notebook's cells."""
    source = textwrap.dedent(source)
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    scope = {"__name__": "cells"}
    exec(compile(source, name, "exec"), scope)
    return scope["loss"]


def test_comments_and_place_are_no_code_and_everything_else_is():
    plain, _ = describe_function(compiled("def loss(m, b):\n    return 1\n"))
    moved, _ = describe_function(
        compiled("\n\nif True:\n    # why\n    def loss(m, b):  # what\n\n        return 1  # '#'\n", "<other>")
    )
    changed, _ = describe_function(compiled("def loss(m, b):\n    return 1 + 0\n", "<third>"))
    assert plain == moved != changed


def test_without_a_source_the_bytecode_counts_and_says_so():
    scope = {"__name__": "cells"}
    exec("def loss(m, b): return 1", scope)
    one, _ = describe_function(scope["loss"])
    exec("def loss(m, b): return 2", scope)
    other, _ = describe_function(scope["loss"])
    assert one != other
    assert "bytecode of Python 3." in one["code"]


@pytest.mark.long
def test_another_process_tells_a_loss_alike(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.nn import functional as F\nS = {'b', 'a', 'c'}\n"
        "class Loss:\n    def __init__(self):\n        self.f = {F.relu: 1}\n        self.t = torch.ones(2)\n"
        "    def __call__(self, model, batch):\n        return S and self.f\n"
    )
    path = [str(tmp_path), *sys.path]
    program = (
        f"import json, sys; sys.path[:] = {path!r}; import mine; "
        "from tlfast.collecting.function_identity import describe_function; "
        "print(json.dumps(describe_function(mine.Loss())))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(told) == 1
    assert json.loads(told.pop())[1] == []


def unknown_to_all(lock):
    def loss(model, batch):
        with lock:
            return next_token_loss(model, batch)

    return loss


def test_a_loss_that_cannot_be_known_is_said_to_be_and_warned_of(tmp_path):
    loss = unknown_to_all(threading.Lock())
    collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, rows_per_unit=4)
    assert tlfast.open_dataset(tmp_path).header["loss_code"]["closure"] == {"lock": "unknown: lock"}
    with pytest.warns(
        RuntimeWarning, match=r"loss must be known by its code .*, got unknown closure\.lock\. Make sure"
    ):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, rows_per_unit=4)
    collect(tiny_model(), tmp_path, EXAMPLES, loss=loss, rows_per_unit=4, identity="mine, of May")  # vouched for


class Counting:
    def __init__(self, factor=1.0):
        self.n, self.seen, self.factor = 0, [], factor

    def __call__(self, model, batch):
        self.n += 1
        self.seen.append(batch.input_ids.shape[1])
        return next_token_loss(model, batch) * self.factor


def test_what_changes_as_a_loss_is_called_is_no_part_of_it(tmp_path):
    loss = Counting()
    collect(tiny_model(), tmp_path, EXAMPLES, loss=loss)
    state = tlfast.open_dataset(tmp_path).header["loss_code"]["state"]
    assert state == {"n": "changes when it is called", "seen": "changes when it is called", "factor": "1.0"}
    collect(tiny_model(), tmp_path, EXAMPLES, loss=loss)
    with pytest.raises(DatasetError, match=r"header\.loss_code\.state\.factor: '1\.0' there, '2\.0' here"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=Counting(2.0))


def test_what_the_user_vouches_for_stands_for_the_code(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), identity="one")
    header = tlfast.open_dataset(tmp_path).header
    assert header["loss_identity"] == "one"
    assert "loss_code" not in header
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(2.0), identity="one")
    with pytest.raises(DatasetError, match=r"header\.loss_identity: 'one' there, 'two' here"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), identity="two")
    with pytest.raises(DatasetError, match=r"header\.loss_identity: 'one' there, nothing here"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0))


def without_code(monkeypatch):
    """As a dataset was begun before the code of a loss was written down."""
    identity = Description.identity

    def old(self):
        for key in ("loss_code", "loss_identity"):
            self.header.pop(key, None)
        return identity(self)

    monkeypatch.setattr(Description, "identity", old)


def test_a_dataset_that_knows_a_name_alone_goes_on_with_a_warning(tmp_path, monkeypatch):
    without_code(monkeypatch)
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), rows_per_unit=4)
    monkeypatch.undo()
    assert "loss_code" not in tlfast.open_dataset(tmp_path).header
    before = unit_bytes(tmp_path)
    (tmp_path / "commits" / "u000001.json").unlink()
    with pytest.warns(
        RuntimeWarning, match=r"got the name .*scaled\.<locals>\.loss alone\. Make sure that it is the same"
    ):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), rows_per_unit=4)
    assert unit_bytes(tmp_path) == before
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), rows_per_unit=4, identity="the same")
    with pytest.raises(DatasetError, match=r"header\.loss: .*scaled\.<locals>\.loss' there"):
        collect(tiny_model(), tmp_path, EXAMPLES, loss=reads_global, rows_per_unit=4)


def test_a_header_that_names_the_loss_stands_for_it(tmp_path):
    header = {"loss": "mine"}
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(1.0), header=header)
    assert "loss_code" not in tlfast.open_dataset(tmp_path).header
    collect(tiny_model(), tmp_path, EXAMPLES, loss=scaled(2.0), header=header)


def test_the_default_loss_says_nothing_new(tmp_path):
    collect(tiny_model(), tmp_path, EXAMPLES)
    header = tlfast.open_dataset(tmp_path).header
    assert header["loss"] == "next-token cross-entropy, summed over each example's tokens"
    assert not {"loss_code", "loss_identity"} & set(header)


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"identity": "x"}, ValueError, "identity must name the loss= that is given, got 'x' with the default loss"),
        ({"identity": 5, "loss": reads_global}, ValueError, "identity must name the loss= that is given, got 5"),
        ({"loss": 3}, TypeError, "loss must be a function, got int. Pass a function of model and batch"),
        ({"identity": "x", "loss": "response"}, ValueError, "the loss= that is given, got 'x' with loss response"),
        ({"header": "mine"}, ValueError, "header must be a mapping, got str"),
        ({"header": {"model": "gpt2"}}, ValueError, r"header\['model'\] must be a mapping, got 'gpt2'"),
        ({"staging": "folder"}, ValueError, "staging must be left out unless out is a URL, got 'folder'"),
    ],
)  # fmt: skip
def test_what_is_given_and_not_used_is_refused(tmp_path, change, error, text):
    with pytest.raises(error, match=text):
        collect(tiny_model(), tmp_path / "out", EXAMPLES, **change)
    assert not (tmp_path / "out").exists()


def all_of_ours(model, batch):
    return Batch, next_token_loss, freeze, graph_step, reduce_into, Capture, tlfast


def test_an_identity_names_our_functions_as_the_first_datasets_did():
    told, unknown = describe_function(all_of_ours)
    assert unknown == []
    assert told["globals"] == {
        "Batch": "tlfast.batches.Batch",
        "Capture": "tlfast.hooks.Capture",
        "freeze": {"name": "contextlib.helper", "wraps": "tlfast.freeze.freeze"},
        "graph_step": "tlfast.graphs.graph_step",
        "next_token_loss": "tlfast.loss.next_token_loss",
        "reduce_into": "tlfast.ops.reduce_into",
        "tlfast": "tlfast",
    }
