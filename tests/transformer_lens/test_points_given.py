"""Hook points given themselves: taken as points, and not for predicates that are true of everything."""

import pytest
import torch
from lens_models import WIDTH, root_module
from torch import nn

from tlfast import Spec
from tlfast.transformer_lens import capture, run_with_cache


def test_a_hook_point_is_itself_and_no_predicate(backend):
    model, x = root_module(), torch.ones(2, 3, WIDTH)
    point = model.hook_in
    for given in (point, [point], ["hook_in", point], Spec(point), Spec([point])):
        with capture(model, given, rows=4, backend=backend) as cap:
            model(x).backward()
        assert cap.names == ["hook_in"]
        assert cap["hook_in"].shape == x.shape
    with pytest.raises(ValueError, match="names_filter") as error:
        capture(model, nn.Identity(), rows=4, backend=backend)
    assert str(error.value) == (
        "capture: names_filter must be hook points of the model, got a Identity that isn't in its hook_dict. See "
        "model.hook_dict."
    )


@pytest.mark.parametrize("beside", [{"reduce": "sum"}, {"over": 2}, {"dtype": "float16"}])
def test_settings_beside_specs_are_refused(beside):
    ((argument, value),) = beside.items()
    text = f"^capture: {argument} must be left out where points are Specs, got {value!r} beside them. Say it in each Sp"
    with pytest.raises(ValueError, match=text):
        capture(root_module(), [Spec("hook_in")], rows=4, **beside)


def test_dtypes_by_their_names(backend):
    model, x = root_module(), torch.ones(2, 3, WIDTH)
    with capture(model, "hook_in", rows=4, dtype="bfloat16", backend=backend) as cap:
        model(x).backward()
    assert cap["hook_in"].dtype == torch.bfloat16
    _, cache = run_with_cache(model, x, names_filter=model.hook_out, dtype="torch.float16", backend=backend)
    assert {name: value.dtype for name, value in cache.items()} == {"hook_out": torch.float16}
    for wrong in (
        lambda: capture(model, "hook_in", rows=4, dtype="half", backend=backend),
        lambda: run_with_cache(model, x, dtype="half", backend=backend),
    ):
        with pytest.raises(
            ValueError, match="dtype must be one of float32, bfloat16, float16, float64 or None, got 'ha"
        ):
            wrong()
