"""The recipes on models of TransformerLens, and its own tool on the recipes: the same numbers, and its own errors."""

from __future__ import annotations

import sys
from importlib import import_module

import fresh_python
import pytest
import torch
from lens_models import BUILDER, HEADS, MODELS, N_LAYERS, VOCAB, tokens

import tlfast.transformer_lens as lens
from tlfast.recipes import attribution_patching, eap
from tlfast.transformer_lens import tools

POINTS = ["hook_embed", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
Z = "blocks.*.attn.hook_z"


def difference(logits, pairs=None):
    return logits[:, -1, 0] - logits[:, -1, 1]


def llama():
    """A model of grouped queries, rotary positions and RMS norms, and its config."""
    transformers = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), config


def grouped():
    """A bridge of it."""
    model, config = llama()
    return BUILDER.build_bridge_from_module(model, "LlamaForCausalLM", hf_config=config, dtype=torch.float32)


def cached(model, names, inputs):
    """Activations and gradients at hook points, by hooks of TransformerLens."""
    acts, grads = {}, {}
    model.eval()
    with model.hooks(
        fwd_hooks=[
            (name, lambda value, hook, name=name: acts.update({name: value.detach().double()})) for name in names
        ],
        bwd_hooks=[
            (name, lambda value, hook, name=name: grads.update({name: value.detach().double()})) for name in names
        ],
    ):
        difference(model(inputs)).sum().backward()
    return acts, grads


def test_scores_are_the_products_of_two_caches(model):
    clean, corrupted = tokens(5, 1), tokens(5, 2)
    names = [*POINTS[1:], *(f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS))]
    (clean_acts, _), (acts, grads) = cached(model, names, clean), cached(model, names, corrupted)
    found = attribution_patching(model, clean, corrupted, difference, POINTS, "position", batch_size=2)
    heads = attribution_patching(model, clean, corrupted, difference, Z, "head", batch_size=2)
    for name in names:
        terms = grads[name] * (clean_acts[name] - acts[name])
        got, truth = (heads[name], terms.sum((1, 3))) if name in heads.scores else (found[name], terms.sum(2))
        assert got.shape == truth.shape
        assert float((got - truth).abs().max()) <= 1e-5 * float(terms.abs().sum((-1, 1)).max())
    assert found["hook_embed"].shape == (5, clean.shape[1])  # a bridge has it inside what looks tokens up


def check_edges(model, clean, corrupted):
    """A node's edges add up to what attribution patching says of the node."""
    found = eap(model, clean, corrupted, difference, batch_size=2)
    nodes = attribution_patching(model, clean, corrupted, difference, POINTS[1:]).mean()
    heads = attribution_patching(model, clean, corrupted, difference, Z, "head").mean()
    size = float(found.scores.abs().max())
    truth = {"input": nodes[POINTS[1]], "m1": nodes[POINTS[2]]}
    truth |= {f"a{n}.h{head}": score for n, scores in enumerate(heads.values()) for head, score in enumerate(scores)}
    assert all(abs(float(found.nodes()[name] - score)) <= 2e-5 * size for name, score in truth.items())
    return found


def test_edges_add_up_to_their_nodes(model):
    clean, corrupted = tokens(5, 1), tokens(5, 2)
    found = check_edges(model, clean, corrupted)
    assert len(found.readers) == N_LAYERS * (3 * HEADS + 1) + 1
    apart = [abs(float(eap(model, clean, corrupted, difference, steps).nodes()["input"])) for steps in (1, 2)]
    assert apart[0] != apart[1]


@pytest.mark.skipif(BUILDER is None, reason="this TransformerLens makes no bridge of a model that is loaded")
def test_edges_of_grouped_queries():
    found = check_edges(grouped(), tokens(3, 1), tokens(3, 2))
    assert len(found.readers) == N_LAYERS * (4 + 2 * 2 + 1) + 1


def tool():
    """TransformerLens' module of attribution patching, where it has one."""
    try:
        return import_module(tools.TOOL)
    except ImportError:
        return pytest.skip("this TransformerLens has no such tool")


@pytest.fixture
def installed():
    lens.install()
    yield
    lens.uninstall()


def single(logits):
    return logits[0, -1, 0] - logits[0, -1, 1]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("granularity", ["node", "edge"])
def test_their_tool_gives_the_same(kind, granularity, installed, monkeypatch):
    theirs, model = tool(), MODELS[kind]().eval()
    try:
        config = theirs.EdgeAttributionConfig(granularity=granularity)
    except NotImplementedError:
        pytest.skip("this TransformerLens has no edges")
    original, ours = theirs.attribution_patch.tlfast_replaced, []
    attributed = tools._attributed
    monkeypatch.setattr(
        tools, "_attributed", lambda *given, **named: ours.append(attributed(*given, **named)) or ours[-1]
    )
    given = (model, tokens(3, 1), tokens(3, 2), single, config)
    if granularity == "edge" and kind == "native_bridge":  # whose edges can be read, but not by theirs
        with pytest.raises(NotImplementedError, match="use_attn_result"):
            theirs.attribution_patch(*given)
        return
    truth = original(*given)
    found = theirs.attribution_patch(*given)
    assert ours == [found]
    for got, wanted in ((found.node_scores, truth.node_scores), (found.edge_scores, truth.edge_scores)):
        assert list(got) == list(wanted)
        size = max([abs(score) for score in truth.node_scores.values()])
        assert all(abs(got[key] - wanted[key]) <= 2e-5 * size for key in wanted)
    assert [key for key, _ in found.top_nodes(3)] == [key for key, _ in truth.top_nodes(3)]


def test_what_theirs_refuses_it_refuses_in_its_own_words(installed):
    theirs, model = tool(), next(iter(MODELS.values()))().eval()
    clean, corrupted = tokens(3, 1), tokens(3, 2)
    patch, wrong = (
        theirs.attribution_patch,
        [(clean, corrupted[:, :5], single), (clean, corrupted, lambda logits: logits[0, 0])],
    )
    for given in wrong:
        with pytest.raises(ValueError, match=r"length|scalar"):
            patch(model, *given)
    with pytest.raises(ZeroDivisionError):
        patch(model, clean, corrupted, lambda logits: 1 / 0)
    seen = []
    handle = model.hook_dict["blocks.0.hook_mlp_out"].register_forward_hook(lambda *given: seen.append(1))
    patch(model, clean, corrupted, single)
    handle.remove()
    assert len(seen) == 6  # a model with somebody's hooks is run by theirs, pair by pair


def test_the_tool_is_replaced_while_it_is_installed_and_whenever_it_is_imported(installed):
    theirs, package = tool(), import_module(tools.PACKAGE)
    assert theirs.attribution_patch is package.attribution_patch
    assert hasattr(package.attribution_patch, "tlfast_replaced")
    lens.uninstall()
    try:
        assert not hasattr(theirs.attribution_patch, "tlfast_replaced")
        assert not hasattr(package.attribution_patch, "tlfast_replaced")
        assert not any(isinstance(finder, tools.Waiting) for finder in sys.meta_path)
    finally:
        lens.install()


@pytest.mark.long
def test_a_tool_that_is_imported_later_is_replaced_too(tmp_path):
    tool()
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
import tlfast.transformer_lens as lens
lens.install()
before = {tools.PACKAGE!r} in sys.modules
from {tools.PACKAGE} import attribution_patch
assert hasattr(attribution_patch, "tlfast_replaced")
lens.uninstall()
from {tools.PACKAGE} import attribution_patch
assert not hasattr(attribution_patch, "tlfast_replaced")
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("tlfast")]
package = sys.modules[{tools.PACKAGE!r}]
assert package.__loader__ is package.__spec__.loader and type(package.__loader__).__name__ == "SourceFileLoader"
print(before)
"""
    done = fresh_python.run("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(BUILDER is None, reason="this TransformerLens makes no bridge of a model that is loaded")
def test_edges_of_a_bridge_are_those_of_the_model():
    bridge, (model, _) = grouped(), llama()
    clean, corrupted = tokens(3, 1), tokens(3, 2)
    for steps in (1, 3):
        found, inner = (eap(one, clean, corrupted, difference, steps) for one in (bridge, model))
        assert (inner.writers, inner.readers) == (found.writers, found.readers)
        assert torch.equal(inner.exists, found.exists)
        assert torch.allclose(inner.scores, found.scores, atol=2e-5 * float(found.scores.abs().max()))
