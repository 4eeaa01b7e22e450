"""Models of SAELens with sparse autoencoders attached: captured and cached as any other, where sae_lens is."""

from __future__ import annotations

import pytest
import torch
from host_adapter import adapter, adopt, counting
from lens_models import MODELS, WIDTH, hooked_transformer, state, tokens

import tlfast.transformer_lens as lens
from tlfast.recipes import attribution_patching

pytestmark = pytest.mark.peers("sae_lens")
POINT = "blocks.0.hook_resid_post"
N_FEATURES = 24


def sae():
    import sae_lens as saes

    generator = torch.Generator().manual_seed(5)
    config = saes.StandardSAEConfig(d_in=WIDTH, d_sae=N_FEATURES, metadata=saes.saes.sae.SAEMetadata(hook_name=POINT))
    made = saes.StandardSAE(config)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return made


def hooked_sae_transformer():
    import sae_lens as saes

    return hooked_transformer(saes.HookedSAETransformer)


def sae_bridge():
    import sae_lens as saes

    model = MODELS["gpt2_bridge"]()
    model.__class__ = saes.SAETransformerBridge  # what its boot_transformers does, after a download
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


KINDS = [hooked_sae_transformer] + ([sae_bridge] if "gpt2_bridge" in MODELS else [])


@pytest.fixture(params=KINDS)
def model(request):
    made = request.param()
    made.add_sae(sae(), use_error_term=True)
    return made


def features(model):
    return next(name for name in model.hook_dict if name.endswith("hook_sae_acts_post"))


def caches(model):
    given = dict(return_type="loss", incl_bwd=True)
    found = [model.run_with_cache(tokens(), **given)[1]]
    found.append(model.run_with_cache(tokens(), names_filter=features(model), **given)[1])
    found.append(model.run_with_cache_with_saes(tokens(), saes=[sae()], **given)[1])
    model.reset_saes()
    found.append(model.run_with_cache_with_saes(tokens(), saes=[sae()], **given)[1])
    model.add_sae(sae(), use_error_term=True)
    return [dict(cache.items()) for cache in found]


def assert_same(first, second):
    for one, other in zip(first, second, strict=True):
        assert list(one) == list(other)
        assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("how", ["accelerate", "install"])
def test_their_caches_are_the_same(model, how):
    plain = caches(model)
    assert features(model) + "_grad" in plain[0]
    if how == "accelerate":
        before = state(model)
        with lens.accelerate(model):
            for names, cache in zip((None, features(model)), plain, strict=False):
                fast = model.run_with_cache(tokens(), return_type="loss", incl_bwd=True, names_filter=names)[1]
                assert_same([cache], [dict(fast.items())])
        assert state(model) == before
        return
    lens.install()
    try:
        assert_same(plain, caches(model))
    finally:
        lens.uninstall()


def test_its_hooks_come_by_an_adapter(model, monkeypatch):
    plain, made = caches(model), adapter()
    hooked = counting(made)
    adopt(monkeypatch, "transformer_lens", made)
    assert_same(plain, caches(model))
    assert any(str(module.name).endswith("hook_sae_acts_post") for module in hooked)


def test_an_sae_is_attached_and_taken_off_inside_accelerate(model):
    plain = caches(model)
    with lens.accelerate(model):
        assert_same(plain, caches(model))
    assert "run_with_cache" not in vars(model)


def test_gradients_of_features(model, backend):
    name = features(model)
    seen = []
    with model.hooks(bwd_hooks=[(name, lambda grad, hook: seen.append(grad.clone()))]):
        model(tokens(), return_type="loss").backward()
    assert seen[0].abs().sum() > 0
    with lens.capture(model, name, rows=2, backend=backend) as cap:
        model(tokens(), return_type="loss").backward()
    assert torch.equal(cap[name], seen[0])
    _, acts, grads = lens.cache_fwd_and_bwd(
        model, tokens(), lambda loss: loss, name, return_type="loss", backend=backend
    )  # fmt: skip
    assert torch.equal(grads[name], seen[0])
    assert acts[name].shape == (2, 7, N_FEATURES)


def test_a_capture_of_features_of_an_sae_in_a_context(model, backend):
    model.reset_saes()
    with model.saes([sae()]), lens.capture(model, features(model), rows=2, backend=backend) as cap:
        model(tokens(), return_type="loss").backward()
    assert cap.rows == 2
    assert not [name for name in model.hook_dict if "sae" in name]


@pytest.mark.parametrize("kind, more", [("Standard", {}), ("JumpReLU", {}), ("Gated", {}), ("TopK", {"k": 5})])
def test_latents_and_what_they_do_not_explain_add_up_to_the_node(kind, more):
    import sae_lens as saes

    made, draw = hooked_transformer(saes.HookedSAETransformer).eval(), torch.Generator().manual_seed(5)
    config = getattr(saes, f"{kind}SAEConfig")(
        d_in=WIDTH, d_sae=N_FEATURES, metadata=saes.saes.sae.SAEMetadata(hook_name=POINT), **more
    )
    own = getattr(saes, f"{kind}SAE")(config)
    with torch.no_grad():
        for param in own.parameters():
            param.copy_(torch.randn(param.shape, generator=draw) * 0.3)
    given = (made, tokens(5, 1), tokens(5, 2), lambda logits, pairs: logits[:, -1, 0] - logits[:, -1, 1])
    found = attribution_patching(*given, {POINT: own}, "latent", batch_size=2)
    node = attribution_patching(*given, POINT)[POINT]
    assert found[POINT].shape == (5, N_FEATURES)
    both = found[POINT].sum(1) + found[f"{POINT}:error"]
    assert torch.allclose(both, node, atol=1e-5 * float(node.abs().max()))
    assert all(param.grad is None for param in own.parameters())
