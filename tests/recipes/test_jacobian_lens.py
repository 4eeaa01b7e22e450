"""The Jacobian lens is the one of the formula, whatever the model, and goes on where it was stopped."""

from __future__ import annotations

import warnings
from functools import wraps
from types import MethodType

import pytest
import torch
from lens_fits import SKIP, TOKENS, Block, Stream, outputs_of, plain_lens, prompts
from op_tapes import OpTapes
from processes import started
from tiny_models import byte_tokenizer, tiny_model
from torch import nn

from tlfast.recipes import fit_jacobian_lens, jacobian_graphs
from tlfast.recipes.lens_file import FittedLens
from tlfast.recipes.slopes import _ELEMENTWISE, slopes_once

BLOCKS = "blocks.*"
EPS = torch.finfo(torch.float32).eps


def fit(model, given, out=None, **more):
    return fit_jacobian_lens(
        model, given, out, **{"corpus": "drawn", "blocks": BLOCKS, "skip_first_positions": SKIP} | more
    )


def check(lens, truth, bound):
    """Rows in float64, which are rounded once, added up and divided: each rounds once more."""
    for layer, matrix in lens.jacobians.items():
        assert matrix.dtype == torch.float32
        n_roundings = lens.n_prompts + 2
        assert ((matrix - truth[layer]).abs() <= n_roundings * EPS * bound[layer]).all()


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("dim_batch", [1, 2, 8])
def test_rows_are_those_of_the_formula(dim_batch, one_by_one):
    model = Stream(one_by_one=one_by_one).double()
    lens = fit(model, prompts(), dim_batch=dim_batch)
    truth, bound = plain_lens(model, model.blocks, prompts())
    assert (lens.source_layers, lens.n_prompts, lens.d_model) == ([0, 1], 4, 5)
    check(lens, truth, bound)
    with pytest.raises(AssertionError):
        check(lens, truth * (1 + 1e-5), bound)


def test_against_jacrev():
    model, tokens = Stream(2).double(), torch.tensor([prompts(1)[0]])
    (start, _) = outputs_of(model.blocks, lambda: model(tokens))
    jacobian = torch.func.jacrev(lambda h: model.blocks[1](h)[0])(start.detach())[0, :, :, 0]  # [t', k, t, d]
    real = slice(SKIP, tokens.shape[1] - 1)
    truth = jacobian[real][:, :, real]
    check(fit(model, [tokens[0]]), truth.sum(0).mean(1)[None], truth.abs().sum(0).mean(1)[None])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_hugging_face(kind):
    model, tokenizer = tiny_model(kind).double(), byte_tokenizer()
    texts = ["a lens for the", "stream of a", "model"]
    model.eval()
    blocks = model.transformer.h if kind == "gpt2" else model.model.layers
    truth, bound = plain_lens(model, blocks, [tokenizer(text)["input_ids"][:9] for text in texts])
    model.train()
    lens = fit_jacobian_lens(
        model, texts, corpus="three texts", tokenizer=tokenizer, max_seq_len=9, skip_first_positions=SKIP
    )
    check(lens, truth, bound)
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert lens.metadata["fit_dtype"] == "float64"


class Identity(torch.autograd.Function):
    """LXT's rule of an activation: it runs inside, without a graph, and the backward is the rule's own."""

    @staticmethod
    def forward(ctx, function, x):
        out = function(x)
        ctx.save_for_backward(out / (x + 1e-6))
        return out

    @staticmethod
    def backward(ctx, grad):
        return None, grad * ctx.saved_tensors[0]


def by_identity(plain):
    def forward(self, x):
        return Identity.apply(lambda given: plain(self, given), x)

    return forward


class Ruled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return Identity.apply(self.inner, x)


@pytest.mark.parametrize("where", ["around", "class", "instance", "hidden"])
def test_a_rule_of_an_activation_makes_its_derivative(where, monkeypatch):
    """Wherever it was put, the rows are those that autograd has of the model as it then is."""
    model = Stream().double()
    plain = plain_lens(model, model.blocks, prompts())[0]
    rule = by_identity(nn.GELU.forward)
    if where == "hidden":
        rule = wraps(nn.GELU.forward)(rule)
    for block in model.blocks:
        block.act = Ruled(nn.GELU()) if where == "around" else nn.GELU()
        if where == "instance":
            block.act.forward = MethodType(rule, block.act)
    if where in ("class", "hidden"):
        monkeypatch.setattr(nn.GELU, "forward", rule)
    truth, bound = plain_lens(model, model.blocks, prompts())
    check(fit(model, prompts()), truth, bound)
    assert not torch.allclose(plain, truth, rtol=0.01)


def test_layers_alone_are_those_of_all():
    model = Stream(4)
    whole, alone = fit(model, prompts()), fit(model, prompts(), source_layers=[-2, 1])
    assert alone.source_layers == [1, 2]
    # The same products, but for the layers below, which aren't there.
    assert all(torch.equal(alone.jacobians[layer], whole.jacobians[layer]) for layer in (1, 2))


def test_merged_parts_are_one_fit(tmp_path):
    model, given = Stream(), prompts()
    whole, parts = fit(model, given), []
    for k, part in enumerate((given[:1], given[1:])):
        fit(model, part).save(tmp_path / f"{k}.pt", dtype=torch.float32)
        parts.append(FittedLens.load(tmp_path / f"{k}.pt"))
    merged = FittedLens.merge(parts)
    assert merged.n_prompts == merged.metadata["n_prompts"] == 4
    assert merged.metadata == whole.metadata
    for layer in whole.jacobians:
        bound = 8 * EPS * whole.jacobians[layer].abs().max()
        assert (merged.jacobians[layer] - whole.jacobians[layer]).abs().max() <= bound
    with pytest.raises(ValueError, match="merge: corpus must be the same in all lenses, got 'drawn' and 'other'"):
        FittedLens.merge([whole, fit(model, given, corpus="other")])
    with pytest.raises(ValueError, match="merge: lenses must have prompts, got"):
        FittedLens.merge([])


class Stopped(Exception):
    pass


def stop_at(place):
    def progress(done, of):
        if done == place:
            raise Stopped

    return progress


@pytest.mark.parametrize("place", [1, 3, 4])
def test_a_fit_goes_on_where_it_was_stopped(place, tmp_path):
    given = [*prompts(3), [1] * SKIP, *prompts(1, seed=8)]  # one is too short
    whole, part = tmp_path / "whole.pt", tmp_path / "part.pt"
    with pytest.warns(UserWarning, match="left out prompt 3, of 2 tokens and not 4"):
        lens = fit(Stream(), given, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(Stopped):
            fit(Stream(), given, part, progress=stop_at(place))
        assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "part.pt.part"}
        heard = []
        fit(Stream(), given, part, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(k + 1, 5) for k in range(place, 5)]
    assert part.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole.pt", "part.pt"}
    loaded = FittedLens.load(whole)
    assert loaded.metadata == lens.metadata
    assert all(torch.equal(loaded.jacobians[k], lens.jacobians[k].half().float()) for k in lens.jacobians)


@pytest.mark.parametrize(
    "argument, changed",
    [
        ("model", {"model": Stream(causal=True).double()}),
        ("metadata", {"dim_batch": 2}),
        ("metadata", {"corpus": "other"}),
        ("source_layers", {"source_layers": [1]}),
        ("prompts", {"prompts": prompts(4, seed=9)}),
        ("prompts", {"prompts": prompts(1)}),
    ],
)
def test_half_of_another_fit_is_refused(argument, changed, tmp_path):
    with pytest.raises(Stopped):
        fit(Stream(), prompts(), tmp_path / "out.pt", progress=stop_at(2))
    before = (tmp_path / "out.pt.part").read_bytes()
    settings = {"model": Stream(), "prompts": prompts()} | changed
    with pytest.raises(
        ValueError, match=rf"fit_jacobian_lens: {argument} must .*out.pt.part.* or remove .*out.pt.part"
    ):
        fit(settings.pop("model"), settings.pop("prompts"), tmp_path / "out.pt", **settings)
    assert (tmp_path / "out.pt.part").read_bytes() == before


KILLED = """
import os, signal, sys, torch
from lens_fits import Stream, prompts
from tlfast.recipes import fit_jacobian_lens

def die(done, of):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
fit_jacobian_lens(Stream(), prompts(), sys.argv[1], corpus="drawn", blocks="blocks.*", skip_first_positions=2,
                  progress=die)
"""


@pytest.mark.long
def test_a_fit_that_was_killed_makes_the_same_file(tmp_path):
    for place in (2, 3, 0):
        with started("-c", KILLED, str(tmp_path / "killed.pt"), str(place)) as process:
            said = process.communicate()
        assert process.returncode == (-9 if place else 0), said
        # What a process leaves that dies in the middle of a write.
        (tmp_path / f".tlfast-{'0' * 16}.tmp").write_bytes(b"torn")
    fit(Stream(), prompts(), tmp_path / "whole.pt")
    assert (tmp_path / "killed.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"killed.pt", "whole.pt"}


def test_a_prompt_that_is_not_finite_ends_the_fit(tmp_path):
    model = Stream()
    with torch.no_grad():
        model.embed.weight[TOKENS - 1] = float("nan")
    given = [[1, 2, 3, 4, 5], [1, 2, TOKENS - 1, 4, 5]]
    with pytest.raises(FloatingPointError, match="prompt 1 must have a finite Jacobian, got a NaN or an infinity"):
        fit(model, given, tmp_path / "out.pt")
    kept = torch.load(tmp_path / "out.pt.part", weights_only=True)
    assert (kept["n_done"], kept["next_idx"], kept["skip_first"], kept["target_layer"]) == (1, 1, SKIP, 2)
    assert all(p.requires_grad for p in model.parameters())


class Twice(Stream):
    """A model that calls its last block once more."""

    def forward(self, tokens):
        super().forward(tokens)
        return self.blocks[-1](self.embed(tokens))[0]


class Aside(Stream):
    """A model with a block that has nothing of the others."""

    def __init__(self):
        super().__init__()
        self.aside = Block()

    def forward(self, tokens):
        return super().forward(tokens) + self.aside(self.embed(tokens))[0].sum()


@pytest.mark.parametrize(
    "text, changed",
    [
        ("model must be causal, got Stream, which looks ahead", {"model": Stream(causal=False)}),
        ("model must be an nn.Module, got str", {"model": "gpt2"}),
        ("model must have one list of layers, got a Stream", {"blocks": None}),
        ("blocks must be at least two, got 1", {"blocks": "blocks.0"}),
        ("blocks must be called once in a forward, got a second call of Block", {"model": Twice()}),
        ("blocks must be called in a forward, got no call of number 1", {"blocks": ["blocks.0", "blocks.0.late"]}),
        ("blocks must lead to the last one, got an output that it isn't made of",
         {"model": Aside(), "blocks": ["blocks.2", "aside"]}),
        (r"blocks must have outputs of one shape, got", {"blocks": ["blocks.1", "head"]}),
        (r"prompts must be several prompts, got str", {"prompts": "a b c"}),
        (r"prompts must have 4 tokens or more, got 0 prompts of at most 0", {"prompts": []}),
        (r"prompts must have 4 tokens or more, got 1 prompts of at most 3", {"prompts": [[1, 2, 3]]}),
        (r"prompts must be texts or tokens \[P\], got \[2, 2\] torch.int64 for number 1",
         {"prompts": [[1] * 9, [[1, 2], [3, 4]]]}),
        ("tokenizer must be given for texts, got None", {"prompts": ["a text"]}),
        ("corpus must be a text, got ' '", {"corpus": " "}),
        ("dim_batch must be a number from 1 on, got 0", {"dim_batch": 0}),
        ("skip_first_positions must be a number from 0 on, got -1", {"skip_first_positions": -1}),
        ("max_seq_len must leave a position behind the first 2, got 3", {"max_seq_len": 3}),
        (r"source_layers must be layers below 2, the last one, got \[2\]", {"source_layers": [2]}),
        ("metadata must have names of its own, got corpus, dim_batch", {"metadata": {"dim_batch": 1, "corpus": ""}}),
        (r"metadata.x\[0\] must be None, numbers, texts", {"metadata": {"x": [torch.ones(1)]}}),
        ("out must lie in a folder that is there", {"out": "absent/out.pt"}),
        ("out must be new, or half done", {"out": "there.pt"}),
    ],
)  # fmt: skip
def test_what_is_refused(text, changed, tmp_path):
    (tmp_path / "there.pt").write_bytes(b"")
    settings = {"model": Stream(), "prompts": prompts()} | changed
    if "late" in str(settings.get("blocks")):
        settings["model"].blocks[0].late = nn.Identity()
    out = tmp_path / settings.pop("out", "out.pt")
    with pytest.raises((ValueError, TypeError), match=f"fit_jacobian_lens: {text}"):
        fit(settings.pop("model"), settings.pop("prompts"), out, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt"]


def test_another_file_is_no_lens(tmp_path):
    torch.save({"J": {}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"load: .*odd\.pt must be a Jacobian lens, got another file"):
        FittedLens.load(tmp_path / "odd.pt")


def activations():
    from transformers import activations as theirs

    for name in sorted(_ELEMENTWISE["torch.nn.modules.activation"]):
        yield getattr(nn, name)()
    for name in sorted(_ELEMENTWISE["transformers.activations"]):
        kind = getattr(theirs, name, None)
        if kind is not None:  # of this version
            yield kind(-1.0, 1.0) if name == "ClippedGELUActivation" else kind()


def test_slopes_are_derivatives():
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for act in activations():
        model, truth = nn.Sequential(act), x.clone().requires_grad_()
        act(truth).sum().backward()
        with slopes_once(model):
            at = x.clone().requires_grad_()
            out = model(at)
            assert type(out.grad_fn).__name__ == "_SlopedBackward", act
        assert torch.equal(out, act(x))
        out.sum().backward()
        assert torch.allclose(at.grad, truth.grad, rtol=1e-14, atol=1e-14), act
        assert not act._forward_hooks


def test_a_hooked_function_stays_as_it_is():
    model = nn.Sequential(nn.GELU(), nn.Softmax(-1))
    model[0].register_forward_hook(lambda module, args, out: None)
    with slopes_once(model):
        assert len(model[0]._forward_hooks) == 1
        assert not model[1]._forward_hooks


@pytest.fixture
def tapes(monkeypatch):
    made = OpTapes()
    monkeypatch.setattr(jacobian_graphs, "graphs_of", lambda model, device: made)
    return made


def test_a_forward_and_its_backwards_are_replayed(tapes, monkeypatch):
    model, given = tiny_model(), [*prompts(3), *([*prompt, 1, 2] for prompt in prompts(2, seed=8))]
    more = {"blocks": "transformer.h.*", "dim_batch": 5}  # 16 columns: the last backward has one
    forwards = []
    with model.transformer.h[0].register_forward_hook(lambda *_: forwards.append(1)):
        recorded = fit(model, given, **more)
    assert (tapes.n_warmups, tapes.n_recorded) == (4, 8)  # of four lengths
    assert tapes.n_replays == 5 * (1 + 4)
    assert len(forwards) == 4 * 2 + 3  # of the lengths, to see whether it is causal, and to try a batch of gradients
    monkeypatch.setattr(jacobian_graphs, "graphs_of", lambda model, device: None)
    plain = fit(model, given, **more)
    for layer, matrix in plain.jacobians.items():
        assert (recorded.jacobians[layer] - matrix).abs().max() <= 8 * EPS * matrix.abs().max()


def test_where_no_graph_can_be_made_backwards_run_one_by_one(tapes, monkeypatch):
    def broken(run):
        raise RuntimeError("operation not\npermitted")

    monkeypatch.setattr(tapes, "record", broken)
    model = Stream()
    with pytest.warns(RuntimeWarning, match="fit_jacobian_lens: backwards run one by one, .* operation not permitted"):
        lens = fit(model, prompts())
    assert tapes.n_warmups == 1  # it isn't tried again
    monkeypatch.setattr(jacobian_graphs, "graphs_of", lambda model, device: None)
    plain = fit(model, prompts())
    assert all(torch.equal(lens.jacobians[layer], plain.jacobians[layer]) for layer in plain.jacobians)


def test_lengths_that_were_used_last_are_kept(tapes, monkeypatch):
    monkeypatch.setattr(jacobian_graphs, "MOST_LENGTHS", 2)
    one, two, three = (prompts(4)[3][:length] for length in (6, 7, 8))
    fit(Stream(), [one, two, one, three, one, two])
    assert tapes.n_warmups == 4  # the second one is made again


def test_graphs_are_of_a_model_on_one_cuda_device():
    model = Stream()
    assert jacobian_graphs.graphs_of(model, torch.device("cpu")) is None
    assert jacobian_graphs.graphs_of(model, torch.device("cuda", 0)) is None  # its tokens are there, it isn't
