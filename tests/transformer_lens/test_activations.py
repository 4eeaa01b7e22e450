"""Activations and products at hook points: what TransformerLens' own cache has, reduced in the tap."""

import pytest
import torch
from lens_models import called_several_times, tokens

import tlfast.transformer_lens as lens
from tlfast import Spec

SOURCES = ("grad", "act", "grad*act")


def test_as_the_caches_of_the_same_run(model, backend):
    """Conversions of hook points, too, are of both."""
    names = [name for name in model.hook_dict if name.endswith(("hook_resid_post", "hook_z"))]
    names = [name for name in names if not called_several_times(name)]
    specs = [Spec(names, of=of) for of in SOURCES]
    with lens.capture(model, specs, rows=2, backend=backend) as cap:
        model(tokens(), return_type="loss").backward()
    model.zero_grad()
    _, cache = lens.run_with_cache(model, tokens(), return_type="loss", incl_bwd=True, backend=backend)
    for name in names:
        assert torch.equal(cap[f"{name}:act"], cache[name]), name
        torch.testing.assert_close(cap[name], cache[f"{name}_grad"])
        torch.testing.assert_close(cap[f"{name}:grad*act"], cache[f"{name}_grad"] * cache[name])


def test_a_hook_point_has_one_side(model):
    with pytest.raises(ValueError, match=r"^capture: side must be output at hook points, got 'input'"):
        lens.capture(model, Spec("**.hook_resid_post", side="input"), rows=2)
