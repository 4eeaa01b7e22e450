"""cap.batch and cap.clear: masks, ids, scales, and rows that are forgotten."""

import math

import pytest
import torch
from comparison import assert_same_bits
from models import SETUPS, Residual, tokens, uneven

import tlfast

REDUCTIONS = ("none", "sum", "mean", "last", "norm", "absmax")


def test_rows_align_over_batches_of_different_sizes(backend, attach):
    model = Residual()
    batches = [tokens(n, 4) for n in (1, 3, 2)]
    with tlfast.capture(model, ["hook_embed", "unembed"], reduce="sum", rows=7, attach=attach, backend=backend) as cap:
        for number, batch in enumerate(batches):
            with cap.batch(ids=[f"{number}.{i}" for i in range(len(batch))]):
                uneven(model(batch)).backward()
    assert cap.ids == ["0.0", "1.0", "1.1", "1.2", "2.0", "2.1"]
    assert cap.rows == 6
    assert cap.capacity == 7
    model.zero_grad()
    with tlfast.capture(model, "unembed", reduce="sum", rows=7, attach=attach, backend=backend) as alone:
        for batch in batches:
            uneven(model(batch)).backward()
    assert_same_bits(cap["unembed"], alone["unembed"])
    assert alone.ids == [None] * 6


def test_steps_with_and_without_ids(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=13, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        with cap.batch(ids="abc"):
            setup.loss().backward()
        assert cap.ids == [None, None, None, *"abc"]
        setup.loss().backward()
        loss = setup.loss()
        with cap.batch(ids=(7, 8, 9)):
            loss.backward()
    assert cap.ids == [None, None, None, *"abc", None, None, None, 7, 8, 9]


def test_two_backwards_in_one_batch_name_their_rows_twice(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=7, attach=attach, backend=backend) as cap, cap.batch(ids="abc"):
        loss = setup.loss()
        loss.backward(retain_graph=True)
        loss.backward()
    assert cap.ids == [*"abcabc"]


def test_mask_makes_mean_and_last_blind_to_padding_on_either_side(backend, attach):
    # The same three tokens, padded on the left and on the right: a model without positions sees the same.
    model, real, pad = Residual(), tokens(1, 3), torch.zeros(1, 2, dtype=torch.long)
    batches = {"none": real, "left": torch.cat([pad, real], 1), "right": torch.cat([real, pad], 1)}
    for reduce in REDUCTIONS[1:]:
        with tlfast.capture(
            model, "blocks.*.hook_resid_post", reduce=reduce, rows=4, attach=attach, backend=backend
        ) as cap:
            for side, batch in batches.items():
                mask = torch.ones_like(batch, dtype=torch.bool)
                if side != "none":
                    mask[:, :2] = side == "right"
                    mask[:, -2:] = side == "left"
                with cap.batch(mask=mask):
                    # The loss reaches the padding, too: as at inner points of a real model.
                    (model(batch).square() * torch.where(mask, 1.0, 5.0)[..., None]).sum().backward()
        for name in cap.names:
            torch.testing.assert_close(cap[name][1:], cap[name][:1].expand(2, -1), rtol=1e-5, atol=1e-6)


def test_grad_scale_divides_the_scaler_out(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(
        setup.model, "hook", reduce="sum", dtype=torch.float16, rows=8, attach=attach, backend=backend
    ) as cap:
        setup.loss().backward()
        with cap.batch(grad_scale=2.0**20):
            (setup.loss() * 2.0**20).backward()
    assert cap.counts["hook"] == {"nonfinite": 0, "saturated": 0}
    assert_same_bits(cap["hook"][3:], cap["hook"][:3])


def test_clear_forgets_rows_and_keeps_memory(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=4, attach=attach, backend=backend) as cap:
        for _ in range(3):
            with cap.batch(ids="abc"):
                setup.loss().backward()
            first = cap["hook"].clone()
            memory = cap._columns["hook"].rows.data_ptr()
            assert (cap.rows, cap.ids) == (3, ["a", "b", "c"])
            cap.clear()
            assert (cap.rows, cap.ids, cap["hook"].shape[0]) == (0, [], 0)
        with cap.batch(ids="abc"):
            setup.loss().backward()
            cap.clear()  # once read, even inside
        assert cap.rows == 0
        with cap.batch(ids="xyz"):
            setup.loss().backward()
    assert cap.ids == ["x", "y", "z"]
    assert_same_bits(cap["hook"], first)
    assert cap._columns["hook"].rows.data_ptr() == memory


def test_a_mask_elsewhere_is_refused_also_where_its_sizes_are_known(backend, attach):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=9, reduce="mean", attach=attach, backend=backend) as cap:
        mask = torch.ones(3, 4, dtype=torch.bool)
        with cap.batch(mask=mask):
            setup.loss().backward()
        with (
            pytest.raises(ValueError, match="mask must be on cpu, as grad is, got meta"),
            cap.batch(mask=mask.to("meta")),
        ):
            setup.loss().backward()
        assert cap.rows == 3


BATCHES = {
    "mask of numbers": (
        {"mask": torch.ones(3, 4)},
        "batch: mask must be boolean [B, P], got torch.float32 [3, 4]. Use mask.bool().",
    ),
    "mask of one number": (
        {"mask": torch.tensor(True)},
        "batch: mask must be boolean [B, P], got torch.bool []. Use mask.bool().",
    ),
    "ids and mask": (
        {"mask": torch.ones(3, 4, dtype=torch.bool), "ids": [1, 2]},
        "batch: ids must have one id for each of 3 examples, got 2. Check both.",
    ),
    "grad_scale": ({"grad_scale": 0.0}, "batch: grad_scale must be positive, got 0.0. Use scaler.get_scale()."),
    "grad_scale nan": (
        {"grad_scale": math.nan},
        "batch: grad_scale must be positive, got nan. Use scaler.get_scale().",
    ),
}


@pytest.mark.parametrize("wrong, text", BATCHES.values(), ids=BATCHES)
def test_bad_batches(backend, wrong, text):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=4, backend=backend) as cap:
        with pytest.raises(ValueError, match=r"^batch: ") as error, cap.batch(**wrong):
            raise AssertionError("entered")
        setup.loss().backward()
    assert str(error.value) == text


class NotWalked(list):
    """Blocks that may be counted, appended and looked at from their end, but not gone through."""

    def __iter__(self):
        raise AssertionError("a step walks all steps before it")


def test_a_step_and_its_rows_are_found_without_walking_the_steps_before(backend, attach, monkeypatch):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=40, attach=attach, backend=backend) as cap:

        def committed(step):
            raise AssertionError("a step asks for all steps before it")

        monkeypatch.setattr(type(cap._ledger), "committed", committed)
        if backend == "python":
            cap._ledger.blocks = NotWalked()
        for number in range(1, 11):
            with cap.batch(ids="abc"):
                setup.loss().backward()
            assert cap.rows == len(cap) == 3 * number
            assert len(cap["hook"]) == 3 * number
        assert cap.ids == [*"abc"] * 10
        cap.clear()
        with cap.batch(ids="abc"):
            setup.loss().backward()
        assert cap.rows == 3


def test_rows_are_counted_beside_failed_backwards_and_holes(backend):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=40, backend=backend) as cap:
        for _ in range(3):
            x = setup.loss()
            x.register_hook(lambda grad: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                x.backward()
            setup.loss().backward()
            assert cap.rows == sum(n for _, n, _ in cap._ledger.committed())
        assert cap.rows == 9


def test_a_column_may_have_a_mask_of_its_own(backend, attach):
    model, batch = Residual(), tokens(2, 5)
    short, wide = (torch.arange(5) < torch.tensor(lengths) for lengths in ([[5], [3]], [[4], [5]]))
    specs = [tlfast.Spec(name, "mean", "pos", "float32") for name in ("hook_embed", "unembed")]

    def rows(*steps):
        with tlfast.capture(model, specs, rows=2 * len(steps), attach=attach, backend=backend) as cap:
            for mask, masks in steps:
                with cap.batch(mask, masks=masks):
                    uneven(model(batch)).backward()
        return {name: cap[name] for name in cap.names}

    one, other = rows((short, None)), rows((wide, None))
    both = rows((short, {"unembed": wide}), (short, None))  # the second knows nothing of the first
    assert_same_bits(both["hook_embed"][:2], one["hook_embed"])
    assert_same_bits(both["unembed"][:2], other["unembed"])
    assert_same_bits(both["unembed"][2:], one["unembed"])
    assert not torch.equal(one["unembed"], other["unembed"])


@pytest.mark.parametrize(
    "masks, text",
    [
        ({"odd": torch.ones(3, 4).bool()}, "batch: masks must name columns of the capture, got 'odd'"),
        ({"hook": torch.ones(3, 4)}, r"batch at hook: mask must be boolean \[B, P\], got torch.float32 \[3, 4\]"),
    ],
)
def test_masks_of_columns_that_are_none_are_refused(backend, masks, text):
    setup = SETUPS["chain"]()
    with tlfast.capture(setup.model, "hook", rows=3, backend=backend) as cap:
        setup.loss().backward()
        with pytest.raises(ValueError, match=text), cap.batch(masks=masks):
            pass
