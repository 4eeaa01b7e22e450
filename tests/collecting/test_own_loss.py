"""What a loss must return, models whose embedding is no embedding, and what is said of inputs that are no tokens."""

import pytest
import torch
from tiny_models import collect, sequences, tiny_model
from torch import nn

import tlfast
from tlfast.collecting.probe import _shaken

EXAMPLES = sequences(5)


def returns_nothing(model, batch):
    model(batch.input_ids).logits.sum()


def a_models_own(model, batch):
    return model(batch.input_ids).loss


@pytest.mark.parametrize(
    "loss, kind, text",
    [
        (returns_nothing, TypeError, "return a tensor, got NoneType. The function lacks a return"),
        (a_models_own, TypeError, "return a tensor, got NoneType. The function lacks a return, or the model"),
        (lambda m, b: m(b.input_ids).logits.sum().item(), TypeError, "return a tensor, got float. Return the tensor"),
        (lambda m, b: m(b.input_ids).logits.sum(2), ValueError, "return one number, got a tensor [1, 10]. Sum it"),
        (
            lambda m, b: m(b.input_ids).logits.detach().sum(), ValueError,
            "be made of the model's output, got a tensor without a graph. Detach nothing. If the model doesn't",
        ),
    ],
    ids=["nothing", "no labels", "a number", "several", "detached"],
)  # fmt: skip
def test_what_a_loss_must_return(tmp_path, loss, kind, text):
    with pytest.raises(kind) as error:
        collect(tiny_model(), tmp_path / "out", EXAMPLES, loss=loss)
    assert str(error.value).startswith(f"collect: loss must {text}")
    assert not (tmp_path / "out").exists()


class Patches(nn.Module):
    """Starts at a layer of one-hot tokens: nothing in it is an embedding."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(256, 6), nn.Linear(6, 256)

    def forward(self, input_ids):
        return self.second(torch.tanh(self.first(nn.functional.one_hot(input_ids, 256).float())))


def test_a_model_without_an_embedding_starts_where_it_is_told(tmp_path):
    torch.manual_seed(0)
    model = Patches()
    with pytest.raises(ValueError, match=r"freeze: model must have an embedding, got Patches\. Pass embedding=<the"):
        collect(model, tmp_path / "none", EXAMPLES, points="second")
    with pytest.raises(ValueError, match=r"collect: embedding must match a module, got 'frst'\. Nearest: first"):
        collect(model, tmp_path / "none", EXAMPLES, points="second", embedding="frst")
    assert not (tmp_path / "none").exists()
    for out, embedding in (("name", "first"), ("module", model.first)):
        collect(model, tmp_path / out, EXAMPLES, points=["first", "second"], embedding=embedding)
    alone = []
    for tokens in EXAMPLES:
        with tlfast.capture(model, ["first", "second"], reduce="mean", rows=1) as cap:
            nn.functional.cross_entropy(
                model(torch.tensor([tokens]))[0, :-1], torch.tensor(tokens[1:]), reduction="sum"
            ).backward()
        alone.append({name: cap[name] for name in cap.names})
    datasets = [tlfast.open_dataset(tmp_path / out) for out in ("name", "module")]
    assert datasets[0].header == datasets[1].header
    for name in ("first", "second"):
        right = torch.cat([rows[name] for rows in alone])
        torch.testing.assert_close(datasets[0][name][:], right)
        assert torch.equal(datasets[0][name][:], datasets[1][name][:])


def test_where_the_graph_starts_is_no_part_of_a_datasets_identity(tmp_path):
    model = tiny_model()
    collect(model, tmp_path / "a", EXAMPLES)
    collect(model, tmp_path / "b", EXAMPLES, embedding=["transformer.wte", model.transformer.wpe])
    a, b = (tlfast.open_dataset(tmp_path / out) for out in "ab")
    assert a.header == b.header
    for name in a.points:
        assert torch.equal(a[name][:], b[name][:])


def test_points_given_themselves_make_the_same_dataset(tmp_path):
    model = tiny_model()
    blocks = list(model.transformer.h)
    for out, given in (
        ("names", {"points": ["transformer.h.0", "transformer.h.1"], "dtype": "torch.float32"}),
        ("modules", {"points": blocks, "dtype": "torch.float32"}),
        ("specs", {"points": [tlfast.Spec(blocks, reduce="mean", dtype="float32")]}),
    ):
        collect(model, tmp_path / out, EXAMPLES, **given)
    headers = [tlfast.open_dataset(tmp_path / out).header for out in ("names", "modules", "specs")]
    assert headers[0] == headers[1] == headers[2]
    collect(model, tmp_path / "one", EXAMPLES, points=blocks[1], rows_per_unit=2, units="0:1")
    report = collect(model, tmp_path / "one", EXAMPLES, points="transformer.h.1", rows_per_unit=2)
    assert report.n_rows == 3, "a dataset of a module is continued by its name"
    with pytest.raises(ValueError, match="collect: points must be modules of the model, got a Linear that isn't in it"):
        collect(model, tmp_path / "other", EXAMPLES, points=nn.Linear(2, 2))


class Virtual(nn.Module):
    """Puts two learnt positions in front of the tokens, as prompt tuning does."""

    def __init__(self):
        super().__init__()
        self.embed, self.prompt, self.head = nn.Embedding(256, 6), nn.Parameter(torch.ones(2, 6)), nn.Linear(6, 256)

    def forward(self, input_ids):
        return self.head(torch.cat([self.prompt.expand(len(input_ids), 2, 6), self.embed(input_ids)], 1))


@pytest.mark.parametrize("backend", ["python", pytest.param("native", marks=pytest.mark.sanitize)])
def test_positions_that_a_model_adds(tmp_path, backend):
    with pytest.raises(ValueError, match="collect: model must return logits") as error:
        collect(Virtual(), tmp_path / "out", [[1, 2, 3]], points="head")
    assert str(error.value) == (
        "collect: model must return logits [B, P, V] for tokens [1, 3], got [1, 5, 256]. It adds 2 positions (virtual "
        "tokens?), that no mask covers. Collect a model without them."
    )
    with pytest.raises(
        ValueError,
        match=r"collect at head: over=\"pos\" must mean a dimension 1 that is the positions, got \[1, 5, 256\]",
    ):
        collect(Virtual(), tmp_path / "out", [[1, 2, 3]], points="head", loss=lambda m, b: m(b.input_ids).sum())
    assert not (tmp_path / "out").exists()


def test_a_model_of_images(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(TypeError) as error:
        collect(model, tmp_path / "out", [torch.zeros(2, 3, 8, 8)], points="0")
    assert str(error.value) == (
        "collect: batches must hold token sequences, tensors [P] or [B, P], or mappings of fields, got Tensor in "
        "batches[0]. Tokenize the text first; fields= names the parts."
    )
    with pytest.raises(ValueError, match="have input_ids for loss next_token, got pixel_values"):
        collect(model, tmp_path / "out", [{"pixel_values": torch.zeros(3, 8, 8)}], points="0")


def test_a_classifier_has_no_next_token(tmp_path):
    model = nn.Sequential(nn.Embedding(256, 4), nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match="collect: model must return logits") as error:
        collect(model, tmp_path / "out", [[1, 2, 3]], points="2")
    assert str(error.value) == (
        "collect: model must return logits [B, P, V] for tokens [1, 3], got [1, 5]. Pass loss=, a function of model "
        "and batch."
    )


def test_what_rounding_moves_is_measured_where_the_graph_starts():
    model, tokens = Patches(), torch.tensor([[1, 2, 3]])
    with tlfast.freeze(model, embedding="first"):
        plain = model(tokens)
        with _shaken(model, 0):
            shaken = model(tokens)
    assert shaken.requires_grad
    assert not torch.equal(shaken, plain)
    torch.testing.assert_close(shaken, plain)
