"""The Jacobian lens on a bridge is TransformerLens' own, its files go both ways, and `install` puts its fit on ours."""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
from lens_models import BUILDER, N_LAYERS, POSITIONS, VOCAB, gpt2_bridge, hooked_transformer, usable

from tlfast import transformer_lens as ours
from tlfast.recipes import fit_jacobian_lens

try:
    theirs = import_module("transformer_lens.tools.analysis.jacobian_lens")
except ImportError:
    theirs = None
needs_lens = pytest.mark.skipif(theirs is None, reason="this TransformerLens has no Jacobian lens")
SETTINGS = {"corpus": "drawn", "skip_first_positions": 3, "dim_batch": 6, "max_seq_len": POSITIONS}


def tokens(n=3):
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (1, POSITIONS - k), generator=draw) for k in range(n)]


@pytest.fixture
def bridge():
    torch.manual_seed(0)
    made = gpt2_bridge()
    made.to_tokens = lambda prompt, **given: prompt  # it has no tokenizer
    return made.eval()


def fit_theirs(bridge, given, **more):
    return theirs.JacobianLens.fit(bridge, given, show_progress=False, **SETTINGS, **more)


def check_same(lens, other):
    """Both round every sum of a position, of a width of 16 or 64 numbers, and of the prompts."""
    assert sorted(lens.jacobians) == sorted(other.jacobians) == list(range(N_LAYERS - 1))
    for layer, truth in other.jacobians.items():
        bound = 64 * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (lens.jacobians[layer] - truth).abs().max() <= bound


@needs_lens
def test_a_fit_and_its_files(bridge, tmp_path):
    truth = fit_theirs(bridge, tokens())
    lens = fit_jacobian_lens(bridge, tokens(), tmp_path / "lens.pt", **SETTINGS)
    check_same(lens, truth)
    assert lens.metadata == truth.metadata
    switches = [getattr(module, "use_native_layernorm_autograd", False) for module in bridge.modules()]
    assert not any(switches)  # as it was: it is on in the forward alone
    loaded = theirs.JacobianLens.load(str(tmp_path / "lens.pt")).validate_model(bridge)
    assert loaded.metadata == truth.metadata
    parts = [fit_theirs(bridge, tokens()[:1]), theirs.JacobianLens.load(str(tmp_path / "lens.pt"))]
    assert theirs.JacobianLens.merge(parts).n_prompts == 4


@needs_lens
def test_half_of_a_fit_is_a_checkpoint_of_theirs(bridge, tmp_path):
    def stop(done, of):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_jacobian_lens(bridge, tokens(), tmp_path / "lens.pt", progress=stop, **SETTINGS)
    found = theirs.JacobianLens.load(str(tmp_path / "lens.pt.part"))
    assert found.n_prompts == 2
    check_same(found, fit_theirs(bridge, tokens()[:2]))


@needs_lens
def test_install_makes_the_rows_of_their_fit(bridge, monkeypatch):
    truth, before = fit_theirs(bridge, tokens()), theirs._jacobian_for_prompt
    ours.install()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(theirs, "_ordinary_vjp", before)  # what fit hands on: no one's estimator here
            with pytest.raises(TypeError):
                fit_theirs(bridge, tokens())
        seen = []
        monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: seen.append(tensor) or tensor.to("cpu"))
        lens = fit_theirs(bridge, tokens())
        monkeypatch.undo()
        assert len(seen) == N_LAYERS - 1  # of the lens that is made; theirs copies each row, too
        check_same(lens, truth)
        assert lens.metadata == truth.metadata
        calls = []

        def other(target, sources, cotangent, retain_graph):
            calls.append(len(sources))
            return theirs._ordinary_vjp(target, sources, cotangent, retain_graph)

        rows = theirs._jacobian_for_prompt(
            bridge, tokens()[0], source_layers=[0], dim_batch=6, skip_first_positions=3, backward_provider=other
        )
        assert calls == [1, 1, 1]  # 16 numbers, 6 at once: another estimator is run by theirs
        assert list(rows) == [0]
    finally:
        ours.uninstall()
    assert theirs._jacobian_for_prompt is before
    again = fit_theirs(bridge, tokens())
    assert all(torch.equal(again.jacobians[layer], truth.jacobians[layer]) for layer in truth.jacobians)


@needs_lens
def test_accelerate_is_for_one_model(bridge):
    ran = []
    with ours.accelerate(gpt2_bridge()):
        replaced = theirs._jacobian_for_prompt
        provider = theirs._ordinary_vjp

        def counted(*given):
            ran.append(1)
            return provider(*given)

        theirs._ordinary_vjp = counted
        try:
            fit_theirs(bridge, tokens()[:1])
        finally:
            theirs._ordinary_vjp = provider
        assert theirs._jacobian_for_prompt is replaced
    assert len(ran) == 3


def test_without_a_jacobian_lens_nothing_happens():
    if theirs is not None:
        return
    ours.install()
    ours.uninstall()


@pytest.mark.skipif(BUILDER is None, reason="this TransformerLens has no bridge of 3.3 or later")
def test_what_is_refused_of_a_bridge(bridge):
    for name, value in (("tokenizer", len), ("blocks", "blocks.*")):
        text = f"fit_jacobian_lens: {name} must be left out for a TransformerBridge, got"
        with pytest.raises(ValueError, match=text):
            fit_jacobian_lens(bridge, tokens(), **SETTINGS, **{name: value})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge.enable_compatibility_mode(disable_warnings=True)
    with pytest.raises(ValueError, match="model must have its weights as they were loaded, got processed ones"):
        fit_jacobian_lens(bridge, tokens(), **SETTINGS)


@pytest.mark.skipif(not usable(hooked_transformer), reason="this TransformerLens has no HookedTransformer")
def test_a_hooked_transformer_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = hooked_transformer()
    with pytest.raises(TypeError, match="fit_jacobian_lens: model must be a TransformerBridge, got HookedTransformer"):
        fit_jacobian_lens(model, tokens(), **SETTINGS)
