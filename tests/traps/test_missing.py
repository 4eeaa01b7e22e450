"""Traps 7, 8 and 10b: checkpoints commit once, and a point that did not fire never leaves stale rows."""

import pytest
import torch
from comparison import assert_rows, assert_same_bits
from models import Experts, Repeated, Residual, Setup, activation_gradients, inputs, tokens, uneven
from torch import nn
from torch.utils.checkpoint import checkpoint

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


class Checkpointed(nn.Module):
    """The blocks of a residual model in checkpoints: each on its own, or nested two deep."""

    def __init__(self, model, reentrant, nested):
        super().__init__()
        self.model, self.reentrant, self.nested = model, reentrant, nested

    def save(self, function, x):
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, batch):
        x = self.model.hook_embed(self.model.embed(batch))
        if self.nested:
            first, second = self.model.blocks
            x = self.save(lambda x: self.save(second, self.save(first, x)), x)
        else:
            for block in self.model.blocks:
                x = self.save(block, x)
        return self.model.unembed(x)


# A reentrant checkpoint inside another one runs its first forward on tensors without a graph.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("where", ["inside", "outside", "both"])
def test_trap_07_and_10b_checkpoints_commit_once(backend, attach, reentrant, nested, where):
    model, batch = Residual(), tokens()
    outside, inside = ["hook_embed", "unembed"], ["blocks.0.hook_mlp_out", "blocks.1", "blocks.1.hook_resid_pre"]
    points = {"inside": inside, "outside": outside, "both": outside + inside}[where]
    right = activation_gradients(Setup(model, points, lambda: uneven(model(batch))))
    saved = Checkpointed(model, reentrant, nested)
    with tlfast.capture(model, points, rows=8, attach=attach, backend=backend) as cap:
        for start in (0, 3):
            with cap.batch(ids=[start, start + 1, start + 2]):
                uneven(saved(batch)).backward()
            assert cap.rows == start + 3
    assert cap.ids == list(range(6))
    for name in points:
        assert_rows(cap, name, right[name][0].repeat(2, 1, 1))


@pytest.mark.parametrize("calls", ["sum", "stack", "last"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_10b_a_module_shared_by_several_checkpoints(backend, attach, reentrant, calls):
    x = inputs()
    right = activation_gradients(Setup(model := Repeated(3), ["hook"], lambda: uneven(model(x))))["hook"]
    model.n_calls = 1
    with tlfast.capture(model, "hook", rows=7, attach=attach, backend=backend, calls=calls) as cap:
        for _ in range(2):
            h = x
            for _ in range(3):
                h = checkpoint(model, h, use_reentrant=reentrant)
            uneven(h).backward()
    want = {"sum": (right[2] + right[1]) + right[0], "stack": torch.stack(right, 1), "last": right[0]}[calls]
    assert_rows(cap, "hook", torch.cat([want, want]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_10b_an_error_inside_a_checkpoint(backend, attach, reentrant):
    model, batch = Residual(), tokens()
    points = ["hook_embed", "blocks.0", "blocks.1"]
    right = activation_gradients(Setup(model, points, lambda: uneven(model(batch))))
    saved = Checkpointed(model, reentrant, nested=False)

    def fail(module, args, output):
        if torch._C._current_graph_task_id() != -1:
            raise ZeroDivisionError

    with tlfast.capture(model, points, rows=7, attach=attach, backend=backend) as cap:
        uneven(saved(batch)).backward()
        loss = uneven(saved(batch))
        handle = model.blocks[0].norm.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()
        assert cap.rows == 3
        uneven(saved(batch)).backward()
    for name in points:
        assert_rows(cap, name, right[name][0].repeat(2, 1, 1))


def test_trap_08_a_point_that_did_not_fire_is_an_error(backend, attach):
    model, x = Experts(), inputs()
    everyone = torch.arange(12).reshape(3, 4) % 3
    nobody = torch.zeros(3, 4, dtype=torch.long)
    with tlfast.capture(model, "experts.*", reduce="sum", rows=7, attach=attach, backend=backend) as cap:
        uneven(model(x, everyone)).backward()
        with pytest.raises(RuntimeError) as error:
            uneven(model(x, nobody)).backward()
        assert cap.rows == 3
        uneven(model(x, everyone)).backward()
    assert str(error.value) == (
        "capture: every point must fire in a backward, got no call of experts.1, experts.2 since the last step "
        "(none is seen in compiled code). "
        'Leave these points out, or pass missing="nan" for NaN rows.'
    )
    for name in cap.names:
        assert_same_bits(cap[name][3:], cap[name][:3])


def test_trap_08_nan_rows_and_a_flag_and_never_stale_ones(backend, attach):
    model, x = Experts(), inputs()
    everyone, nobody = torch.arange(12).reshape(3, 4) % 3, torch.zeros(3, 4, dtype=torch.long)
    right = activation_gradients(Setup(model, ["experts.1"], lambda: uneven(model(x, everyone))))["experts.1"][0]
    with tlfast.capture(model, "experts.*", rows=7, attach=attach, backend=backend, missing="nan") as cap:
        for first, second in ((everyone, nobody), (nobody, everyone)):
            cap.clear()
            uneven(model(x, first)).backward()
            uneven(model(x, second)).backward()
            nan = torch.full_like(right, torch.nan)
            assert_same_bits(cap["experts.1"], torch.cat([right, nan] if first is everyone else [nan, right]))
            flags = [first is nobody] * 3 + [second is nobody] * 3
            assert {name: f.tolist() for name, f in cap.missing.items()} == {
                "experts.0": [False] * 6, "experts.1": flags, "experts.2": flags,
            }  # fmt: skip
    assert not cap["experts.0"].isnan().any()
    assert cap._columns["experts.1"].rows[6].isnan().all()


@pytest.mark.parametrize("how", ["detached later", "detached inside", "no_grad"])
@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_08_detached_branches(backend, attach, how):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.side = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            if how == "no_grad":
                with torch.no_grad():
                    side = self.side(x)
            else:
                side = self.side(x)
            return self.main(x) + side.detach()

    class Inside(nn.Module):
        def forward(self, x):
            return x.detach()

    model, x = Branch(), inputs()
    if how == "detached inside":
        model.side = Inside()
    for missing in ("raise", "nan"):
        with tlfast.capture(model, ["main", "side"], rows=4, attach=attach, backend=backend, missing=missing) as cap:
            if missing == "raise":
                with pytest.raises(RuntimeError, match="side"):
                    uneven(model(x)).backward()
                assert cap.rows == 0
            else:
                uneven(model(x)).backward()
                assert cap.missing["side"].all()
                assert not cap.missing["main"].any()
                with pytest.raises(RuntimeError, match="capture: the column side must have been written, got no row"):
                    cap["side"]
