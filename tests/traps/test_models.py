"""Traps 13, 21 and 30: copies of hooked models, frozen models, one process of a distributed run."""

import copy
import io
import os
import pickle

import pytest
import torch
import torch.utils.checkpoint
from comparison import assert_rows, assert_same_bits
from models import SETUPS, Residual, Setup, activation_gradients, hooks_left, residual, tokens, uneven
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tlfast

NO_ROWS = "ignore:capture. no backward reached the points"


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
def test_trap_13_a_copy_carries_no_capture(backend, attach, way):
    setup = residual()
    right = activation_gradients(setup)
    batch = tokens()
    with tlfast.capture(setup.model, setup.points, rows=8, attach=attach, backend=backend) as cap:
        setup.loss().backward()
        twin = COPIES[way](setup.model)
        uneven(twin(batch)).backward()
        assert cap.rows == 3, "the copy wrote into the original's rows"
        with tlfast.capture(twin, setup.points, rows=8, attach=attach, backend=backend) as own:
            uneven(twin(batch)).backward()
        assert (cap.rows, own.rows) == (3, 3)
        setup.loss().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name][0].repeat(2, 1, 1))
    assert not hooks_left(setup.model)
    right = activation_gradients(Setup(twin, setup.points, lambda: uneven(twin(batch))))
    for name in setup.points:
        assert_rows(own, name, right[name][0])


def test_trap_13_a_capture_itself_can_not_be_copied_by_accident(backend):
    setup = residual()
    with tlfast.capture(setup.model, "unembed", rows=8, backend=backend) as cap:
        setup.model.capture = cap  # kept by the model: its copy must be one without a capture, or an error
        try:
            twin = copy.deepcopy(setup.model)
        except (TypeError, RuntimeError):
            pass
        else:
            uneven(twin(tokens())).backward()
        del setup.model.capture
        assert cap.rows == 0
        setup.loss().backward()
    assert cap.rows == 3


@pytest.mark.filterwarnings(NO_ROWS)
def test_trap_21_nothing_can_fire_in_a_frozen_model(backend, attach):
    model = Residual().requires_grad_(False)
    with tlfast.capture(model, ["hook_embed", "unembed"], rows=4, attach=attach, backend=backend) as cap:
        with pytest.raises(RuntimeError) as error:
            model(tokens())
        assert cap.rows == 0
    assert str(error.value) == (
        "capture at hook_embed: the output must require grad, got a tensor without a graph: no gradient can reach it. "
        'Use freeze(model) to start the graph at the embedding, or pass missing="nan".'
    )


@pytest.mark.parametrize("name", ["residual", "gpt2"])
def test_trap_21_freeze_gives_the_same_rows_and_no_parameter_gradient(backend, attach, name):
    setup = SETUPS[name]()
    with tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    setup.model.zero_grad()
    for frozen_first in (True, False):
        outer = tlfast.freeze(setup.model)
        inner = tlfast.capture(setup.model, setup.points, rows=4, attach=attach, backend=backend)
        first, second = (outer, inner) if frozen_first else (inner, outer)
        with first, second:
            setup.loss().backward()
        for point in setup.points:
            assert_rows(inner, point, cap[point])
        assert all(p.grad is None and p.requires_grad for p in setup.model.parameters())
    assert not hooks_left(setup.model)


def encoder_decoder(kind):
    """A tiny model with an encoder and a decoder, and points in both: (model, points)."""
    import transformers

    sizes = {"vocab_size": 20, "d_model": 8, "decoder_start_token_id": 0, "attn_implementation": "eager"}
    if kind == "t5":
        config = transformers.T5Config(d_kv=4, d_ff=16, num_layers=2, num_heads=2, **sizes)
        stacks, block = ("encoder", "decoder"), "block"
        model = transformers.T5ForConditionalGeneration(config).eval()
    else:
        heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        more = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16} | heads
        stacks, block = ("model.encoder", "model.decoder"), "layers"
        if kind == "bart":
            config = transformers.BartConfig(max_position_embeddings=16, **more, **sizes)
            model = transformers.BartForConditionalGeneration(config).eval()
        else:  # two embeddings that share nothing
            config = transformers.MarianConfig(
                max_position_embeddings=16, share_encoder_decoder_embeddings=False, decoder_vocab_size=20,
                tie_word_embeddings=False, pad_token_id=1, **more, **sizes,
            )  # fmt: skip
            model = transformers.MarianMTModel(config).eval()
    return model, [f"{stack}.{name}" for stack in stacks for name in ("embed_tokens", f"{block}.0", f"{block}.1")]


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_trap_21_freeze_starts_the_graph_in_an_encoder_and_in_a_decoder(backend, attach, kind):
    model, points = encoder_decoder(kind)
    source, target = torch.randint(3, 20, (3, 5)), torch.randint(3, 20, (3, 4))
    setup = Setup(model, points, lambda: uneven(model(input_ids=source, decoder_input_ids=target).logits))
    right, before = activation_gradients(setup), [p.requires_grad for p in model.parameters()]
    with tlfast.capture(model, points, rows=4, attach=attach, backend=backend) as whole:
        setup.loss().backward()
    model.zero_grad()
    with tlfast.freeze(model), tlfast.capture(model, points, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    for name in points:
        assert_rows(cap, name, whole[name])
        if attach == "tensor":  # PyTorch's full hooks add up a residual stream in an order of their own
            assert_same_bits(cap[name], right[name][0])
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == before
    assert not hooks_left(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_trap_21_an_embedding_changed_in_place_and_checkpoints(backend, attach, reentrant):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.layer, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
            self.head.weight, self.saved = self.words.weight, True

        def forward(self, batch):
            h = self.words(batch)
            h *= 2.5
            if self.saved:
                h = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.layer(x)), h, use_reentrant=reentrant)
            else:
                h = torch.tanh(self.layer(h))
            return self.head(h)

    model, batch = Scaled(), tokens()
    setup = Setup(model, ["layer", "head"], lambda: uneven(model(batch)))
    model.saved = False
    right = activation_gradients(setup)
    model.saved = True
    with tlfast.capture(model, "words", rows=4, backend=backend) as whole:
        setup.loss().backward()
    model.zero_grad()
    points = setup.points if attach == "full" else ["words", *setup.points]  # a full hook forbids the in-place change
    with tlfast.freeze(model), tlfast.capture(model, points, rows=4, attach=attach, backend=backend) as cap:
        setup.loss().backward()
    for name in setup.points:
        assert_rows(cap, name, right[name][0])
    if attach == "tensor":
        assert_rows(cap, "words", whole["words"])
    assert all(p.grad is None for p in model.parameters())


class CountProducts(TorchDispatchMode):
    """Counts matrix products, and notes their shapes."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("tied", [False, True])
def test_trap_21_no_weight_gradient_is_computed(backend, attach, tied):
    model, batch = Residual(n_tokens=37), tokens(5, 4, 37)  # 20 positions: no size of a weight
    if tied:
        model.unembed.weight = model.embed.weight
    products = {}
    for frozen in (False, True):
        context = tlfast.freeze(model) if frozen else torch.enable_grad()
        with context, tlfast.capture(model, "blocks.*", rows=6, attach=attach, backend=backend):
            loss = uneven(model(batch))
            with CountProducts() as count:
                loss.backward()
        products[frozen] = count.shapes
        model.zero_grad()
    weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    assert [s for s in products[False] if s in weights], "without freeze there are weight gradients to be seen"
    assert not [s for s in products[True] if s in weights]
    assert len(products[True]) == len(products[False]) // 2


@pytest.fixture
def one_process():
    """A gloo group of this process alone."""
    from torch import distributed

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", os.environ.get("GLOO_SOCKET_IFNAME", "lo"))
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        yield
        distributed.destroy_process_group()


@pytest.mark.parametrize("inside", [True, False])
def test_trap_30_ddp_rows_are_those_of_the_model(backend, attach, one_process, inside):
    setup = residual()
    right = activation_gradients(setup)
    model = nn.parallel.DistributedDataParallel(setup.model)
    target, prefix = (setup.model, "") if inside else (model, "module.")
    points = [prefix + name for name in setup.points]
    with tlfast.capture(target, points, rows=8, attach=attach, backend=backend) as cap:
        for _ in range(2):
            uneven(model(setup.batch)).backward()
    for name in setup.points:
        assert_rows(cap, prefix + name, right[name][0].repeat(2, 1, 1))
    grads = [p.grad.clone() for p in setup.model.parameters()]
    setup.model.zero_grad()
    setup.loss().backward()
    setup.loss().backward()
    for p, grad in zip(setup.model.parameters(), grads, strict=True):
        assert_same_bits(p.grad, grad)
