"""Causal LMs of transformers, padded on both sides: the rows are those of each example alone, or there are none."""

from __future__ import annotations

import pytest
import torch
from causal_models import N_LAYERS, VOCAB, WIDTH, gradients, layers_of, tiny_causal_lm, tiny_kinds
from tiny_models import collect

import tlfast
from tlfast.collecting.batches import Batching, as_examples
from tlfast.collecting.loss import model_inputs

LENGTHS = (9, 12, 20, 23)
EXAMPLES = [torch.randint(5, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
REFUSED = "collect: a row must be the same as with its example alone, got a row at "

# With left padding wrong: BART's kin and speech decoders have no position_ids, nor have these others positions or
# states that padding leaves alone.
WRONG_LEFT = ("bart", "trocr", "roformer", "rwkv", "recurrent_gemma", "xlstm")
# RoBERTa's kin count positions from the padding's index on; the rest are usual, or have states, experts, no positions.
RIGHT_LEFT = ("gpt2", "llama", "opt", "bloom", "roberta", "camembert", "bert", "mamba", "mixtral", "gemma3_text")


class Wrapped(torch.nn.Module):
    """What PEFT puts around a model: the arguments of its forward can't be read off."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_input_embeddings(self):
        return self.base_model.get_input_embeddings()

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


class Opaque(Wrapped):
    """The same, of a model that nobody finds: it is given no mask."""

    def __init__(self, model):
        super().__init__(model)
        del self.base_model
        self.hidden = [model]
        self.embed, self.layers = model.get_input_embeddings(), torch.nn.ModuleList([torch.nn.Identity()])

    def get_input_embeddings(self):
        return self.embed

    def forward(self, *args, **kwargs):
        return self.layers[0](self.hidden[0](*args, **kwargs).logits)


def explained(grad):
    """How far rounding may move the mean of a gradient [P, D]: one eps for each term of the longest chain of sums.

    Per layer the sums run over the width (4 times), the inner width of the MLP (twice) and the positions (twice); then
    the vocabulary.
    """
    n_terms = N_LAYERS * (12 * WIDTH + 2 * max(LENGTHS)) + 2 * VOCAB
    return n_terms * torch.finfo(torch.float32).eps * grad.abs().mean(0).norm()


def truth(model, points):
    """For each example the gradient [P, D] at each point, alone."""
    each = [gradients(model, points, torch.tensor([tokens])) for tokens in EXAMPLES]
    return [{point: grad[0] for point, grad in grads.items()} for grads in each]


def is_wrong_in_a_batch(model, points, true, side):
    """The same by `torch.autograd.grad` in a padded batch: whether some row is off by more than rounding."""
    batch = Batching(1, None, side).batch(as_examples(EXAMPLES), max(LENGTHS))
    labels = batch.input_ids.masked_fill(~batch.mask, -100)
    if side == "left":  # the first token is nobody's next one
        labels[torch.arange(len(LENGTHS)), batch.mask.int().argmax(1)] = -100
    grads = gradients(model, points, batch.input_ids, labels, **model_inputs(model, batch))
    return any(
        (grads[point][i][batch.mask[i]].mean(0) - true[i][point].mean(0)).norm() > explained(true[i][point])
        for i in range(len(LENGTHS)) for point in points
    )  # fmt: skip


def rows_or_none(model, points, side, out):
    """Whether collect took the model; an AssertionError where its rows, or its refusal, are wrong."""
    true = truth(model, points)
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    refusal = ""
    try:
        collect(model, out, EXAMPLES, points=points, padding_side=side, pad_id=pad_id)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert not out.exists()
        # Other refusals are of models that can't be collected at all, on either side.
        assert not refusal.startswith(REFUSED) or is_wrong_in_a_batch(model, points, true, side), refusal
        return False
    dataset = tlfast.open_dataset(out)
    for i, grads in enumerate(true):
        for point, grad in grads.items():
            off = (dataset[point][i] - grad.mean(0)).norm()
            assert off <= explained(grad), f"row {i} at {point} is off by {off}, rounding explains {explained(grad)}"
    return True


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", WRONG_LEFT + RIGHT_LEFT)
def test_rows_are_those_of_each_example_or_there_are_none(tmp_path, kind, side):
    model = tiny_causal_lm(kind)
    taken = rows_or_none(model, layers_of(model, EXAMPLES[0]), side, tmp_path / "out")
    assert taken == (side == "right" or kind in RIGHT_LEFT)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_wrapper_hands_mask_and_positions_on(tmp_path, kind, side):
    model = Wrapped(Wrapped(tiny_causal_lm(kind)))
    assert rows_or_none(model, layers_of(model, EXAMPLES[0]), side, tmp_path / "out")


@pytest.mark.parametrize(
    "kind, side, taken", [("gpt2", "right", True), ("gpt2", "left", False), ("bert", "left", False)]
)
def test_a_wrapper_that_hides_its_model_is_tried(tmp_path, kind, side, taken):
    model = Opaque(tiny_causal_lm(kind))
    assert rows_or_none(model, ["layers.0"], side, tmp_path / "out") == taken


@pytest.mark.every_model
@pytest.mark.parametrize("kind", tiny_kinds())
def test_every_kind(tmp_path, kind):
    try:
        model = tiny_causal_lm(kind)
        points = layers_of(model, EXAMPLES[0])
    except Exception as error:
        pytest.skip(f"no tiny {kind}: {type(error).__name__}: {str(error)[:80]}")
    if not points:
        pytest.skip(f"{kind} has no list of layers")
    for side in ("right", "left"):
        taken = rows_or_none(model, points, side, tmp_path / side)
        print(f"{kind} {side}: {'right rows' if taken else 'refused'}")


@pytest.mark.every_model
def test_there_are_over_a_hundred_kinds():
    def can_be_made(kind):
        try:
            return bool(layers_of(tiny_causal_lm(kind), EXAMPLES[0]))
        except Exception:
            return False

    assert sum(map(can_be_made, tiny_kinds())) > 100


@pytest.mark.every_model
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.peers("peft")
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, for what PEFT calls
def test_peft_itself(tmp_path, side):
    import peft

    config = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    for wrapped in (
        peft.get_peft_model(tiny_causal_lm("gpt2"), config),
        peft.LoraModel(tiny_causal_lm("gpt2"), config, "a"),
    ):
        wrapped.eval()
        assert rows_or_none(wrapped, layers_of(wrapped, EXAMPLES[0]), side, tmp_path / type(wrapped).__name__)
