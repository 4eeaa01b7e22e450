"""Weight gradients of experts that lie in one module, against autograd's of each example alone, in float64."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel
from transformers.models.mixtral.modeling_mixtral import MixtralModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel
from weighted_models import assert_near

import tlfast
from tlfast import Projection, Spec
from tlfast.attribution import (
    read_bergson_hessians,
    read_bergson_normalizers,
    write_bergson_factors,
    write_bergson_hessians,
    write_bergson_normalizers,
)

SHARED = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "initializer_range": 0.5, "num_experts_per_tok": 2,
}  # fmt: skip
KINDS = {
    "mixtral": (MixtralModel, MixtralConfig(intermediate_size=6, num_local_experts=4, **SHARED)),
    "qwen3": (Qwen3MoeModel, Qwen3MoeConfig(moe_intermediate_size=6, num_experts=5, intermediate_size=6, **SHARED)),
    "gpt-oss": (GptOssModel, GptOssConfig(intermediate_size=6, num_local_experts=3, **SHARED)),  # turned, with a bias
}
LENGTHS = [6, 3, 1, 5]


@functools.cache
def made(kind, dtype=torch.float64):
    torch.manual_seed(1)
    model, config = KINDS[kind]
    found = model(config).to(dtype).eval()
    found.set_experts_implementation("eager")  # the one that takes float64
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.4)
    return found


def inputs(side="left"):
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(6) < torch.tensor(LENGTHS)[:, None]
    return ids, mask.flip(1) if side == "left" else mask


def loss(model, ids, mask):
    hidden = model(
        input_ids=ids, attention_mask=mask.long(), position_ids=mask.cumsum(1).sub(1).clamp(min=0)
    ).last_hidden_state
    return torch.where(mask[..., None], hidden * torch.linspace(-1, 1, 8).to(hidden), 0).pow(3).sum()


def truths(model, points, bias=False):
    """By name of a matrix: G of each example alone and without padding, in float64."""
    ids, mask = inputs()
    found = {}
    for row, real in zip(ids, mask, strict=True):
        model.zero_grad()
        loss(model, row[real][None], real[real][None]).backward()
        for point in points:
            module = model.get_submodule(point)
            for name in ("gate_up_proj", "down_proj"):
                weight, of_bias = getattr(module, name), getattr(module, f"{name}_bias", None)
                for number, grad in enumerate(weight.grad):
                    grad = grad.T if module.is_transposed else grad
                    if bias and of_bias is not None:
                        grad = torch.cat([grad, of_bias.grad[number, :, None]], 1)
                    found.setdefault(f"{point}.expert_{number}.{name}", []).append(grad.double().clone())
    model.zero_grad()
    return {name: torch.stack(rows) for name, rows in found.items()}


POINTS = ["layers.0.mlp.experts", "layers.1.mlp.experts"]


@pytest.mark.parametrize("kind, implementation", [("mixtral", "eager"), ("qwen3", "batched_mm"), ("gpt-oss", "eager")])
def test_experts_against_each_example_alone(kind, implementation, backend):
    model, (ids, mask) = made(kind), inputs()
    model.set_experts_implementation(implementation)
    wanted = truths(model, POINTS, bias=True)
    project, single = Projection(3), Projection(4, "count-sketch", form="one-sided")
    specs = [
        Spec("layers.*.mlp.experts", of="weight", bias=True),
        Spec(POINTS, "norm", of="weight", bias=True),
        Spec(POINTS, of="weight", bias=True, project=project, name="small"),
        Spec(POINTS, of="weight", bias=True, project=single, name="all", summed=True),
        Spec("layers.0.self_attn.o_proj", of="weight", project=2),
    ]
    with tlfast.capture(model, specs, rows=4, backend=backend) as cap, cap.batch(mask=mask, grad_scale=2.0):
        (2 * loss(model, ids, mask)).backward()
    total = 0
    for name, full in wanted.items():
        left, right = (
            project.matrix(name, role, n).double() for role, n in zip(("left", "right"), full.shape[1:], strict=True)
        )
        assert_near(cap[f"{name}:weight"], full, 1)
        assert_near(cap[f"{name}:weight:norm"], full.flatten(1).norm(dim=1), 1)
        assert_near(cap[f"{name}:small"], left @ full @ right.T / 3, 1)
        total = total + full.flatten(1) @ single.matrix(name, "single", full[0].numel()).double().T
    assert_near(cap["gradients:all"], total, 1)
    assert set(wanted) == {
        name.removesuffix(":weight") for name in cap.names if "expert_" in name and name[-7:] == ":weight"
    }


def test_the_model_is_as_before_and_experts_without_a_token_have_zeros(backend):
    model, (ids, mask) = made("qwen3"), inputs()
    model.zero_grad()
    loss(model, ids, mask).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with tlfast.capture(model, Spec("layers.1.mlp.experts", of="weight"), rows=8, backend=backend) as cap:
        loss(model, ids, mask).backward()
    for name, parameter in model.named_parameters():  # where three gradients meet, their order may be another
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, plain[name], rtol=1e-12, atol=1e-14)
    zero = [name for name in cap.names if (cap[name].flatten(1) == 0).all(1).any()]
    assert zero
    summed = torch.stack([cap[f"layers.1.mlp.experts.expert_{k}.down_proj:weight"].sum(0) for k in range(5)])
    # Without a mask what padding does counts, too: this is the whole batch's gradient.
    assert_near(summed, plain["layers.1.mlp.experts.down_proj"], 1)
    model.zero_grad()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
def test_checkpoints_and_frozen_models(backend):
    model, (ids, mask) = made("mixtral"), inputs()
    wanted = truths(model, POINTS[1:])
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with tlfast.capture(model, Spec(POINTS[1], of="weight"), rows=4, backend=backend) as cap, cap.batch(mask=mask):
            loss(model, ids, mask).backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    for name, full in wanted.items():
        assert_near(cap[f"{name}:weight"], full, 1)
    model.zero_grad()
    with (
        tlfast.capture(model, Spec(POINTS[1], of="weight"), rows=4, backend=backend) as cap,
        tlfast.freeze(model),
        cap.batch(mask=mask),
    ):
        loss(model, ids, mask).backward()
    for name, full in wanted.items():
        assert_near(cap[f"{name}:weight"], full, 1)


@pytest.mark.filterwarnings("ignore:capture. no backward")
def test_a_checkpoint_from_before_the_capture_takes_its_own_tensors_alone(backend):
    model = made("mixtral")
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()

    def run(x):
        return model.layers[0].mlp(x).pow(3).sin().sum()  # these are saved behind the experts

    (wanted,) = torch.autograd.grad(run(x), x)
    total = checkpoint(run, x, use_reentrant=False)
    with tlfast.capture(model, Spec("layers.0.mlp.experts", of="weight"), rows=2, backend=backend):
        (found,) = torch.autograd.grad(total, x)
    assert_near(found, wanted, 1)


def test_low_precision_and_autocast(backend):
    model, (ids, mask) = made("mixtral", torch.float32), inputs()
    wanted = truths(model, POINTS[:1])
    with tlfast.capture(model, Spec(POINTS[0], of="weight"), rows=4, backend=backend) as cap, cap.batch(mask=mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            made_low = loss(model, ids, mask)
        made_low.float().backward()
    total = {name: (cap[f"{name}:weight"].double() - full).norm() / full.norm() for name, full in wanted.items()}
    assert max(total.values()) < 0.3  # a token at the edge may go to another expert
    assert sorted(total.values())[len(total) // 2] < 0.05


class Block(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        index = torch.zeros(len(x), 1, dtype=torch.int64)
        return self.experts(x, index, torch.ones(len(x), 1))


def test_refusals():
    experts = made("mixtral", torch.float32).layers[0].mlp.experts
    with pytest.raises(ValueError, match=r"experts must be given the tokens of a batch \[B, P, D\], side by side"):  # noqa: SIM117
        with tlfast.capture(flat := Block(experts), Spec("experts", of="weight"), rows=4):
            flat(torch.randn(4, 8))
    with pytest.raises(ValueError, match='per="token" must be left out at an expert, got one'):
        tlfast.capture(made("mixtral"), Spec(POINTS, of="weight", per="token"), rows=4)
    odd = type("Odd", (type(experts),), {"forward": lambda self, x, index, weights: x * 2})
    other = made("mixtral", torch.float32).layers[1].mlp.experts
    kind = type(other)
    other.__class__ = odd
    try:
        with pytest.raises(ValueError, match="points must do what experts do, got layers"):
            tlfast.capture(made("mixtral", torch.float32), Spec(POINTS[1], of="weight"), rows=4)
    finally:
        other.__class__ = kind
    ids, mask = inputs()
    model = made("mixtral")
    text = r"mask must be \[4, 6\], of the tokens that the experts get, got \[4, 5\]"
    with tlfast.capture(model, Spec(POINTS, of="weight"), rows=4) as cap:
        with pytest.raises(ValueError, match=text), cap.batch(mask=mask[:, 1:]):
            loss(model, ids, mask).backward()
        loss(model, ids, mask).backward()


def test_some_experts_by_their_names(backend):
    model, (ids, mask) = made("qwen3"), inputs()
    points = ["layers.1.mlp.experts.expert_3.down_proj", "layers.*.mlp.experts.expert_[01].gate_*"]
    with tlfast.capture(model, Spec(points, of="weight"), rows=4, backend=backend) as cap, cap.batch(mask=mask):
        loss(model, ids, mask).backward()
    wanted = truths(model, POINTS)
    of_both = [f"{point}.expert_{k}.gate_up_proj:weight" for point in POINTS for k in (0, 1)]
    assert sorted(cap.names) == sorted([*of_both, "layers.1.mlp.experts.expert_3.down_proj:weight"])
    for name in cap.names:
        assert_near(cap[name], wanted[name.removesuffix(":weight")], 1)
    with pytest.raises(ValueError, match=r'expert_3.down_proj must be of="weight" at a matrix of an expert'):
        tlfast.capture(model, points[0], rows=4)


def test_experts_are_scored_as_other_layers_are(tmp_path):
    """By each method, of rows that are stored, too, by whatever name; bergson's files know them, too."""
    model, (ids, mask), points = made("qwen3"), inputs(), POINTS[1:]
    examples = [row[real].tolist() for row, real in zip(ids, mask, strict=True) if real.sum() > 1]
    rows = {name: values[[length > 1 for length in LENGTHS]] for name, values in truths(model, points).items()}

    def of_batch(model, batch):
        return loss(
            model, batch.input_ids, torch.ones_like(batch.input_ids).bool() if batch.mask is None else batch.mask
        )

    def products(queries):
        return sum(queries[name].flatten(1) @ rows[name].flatten(1).T for name in rows)

    more = {"examples": examples, "points": points, "k": None, "loss": of_batch}
    found = tlfast.score(model, examples[:2], "dot", **more)
    torch.testing.assert_close(found.scores, products({name: values[:2] for name, values in rows.items()}))
    factors = tlfast.factors(model, examples, points, kinds=("kfac", "ekfac", "adam"), loss=of_batch, missing="nan")
    ready = factors.precondition({name: values[:2] for name, values in rows.items()})
    found = tlfast.score(model, examples[:2], "ekfac", moments=factors, **more)
    torch.testing.assert_close(found.scores, products(ready))
    whole = Spec(points, of="weight", name="whole")
    tlfast.collect(model, examples, tmp_path / "rows", points=whole, loss=of_batch, progress=False)
    ds = tlfast.open_dataset(tmp_path / "rows")
    asked = {point: ds[point][:2] for point in ds.points}
    found = tlfast.score(ds, asked, "ekfac", moments=factors, k=None)
    torch.testing.assert_close(found.scores, products(ready))
    projection = tlfast.Projection(2, scheme="bergson-2")
    live = tlfast.score(model, examples[:2], "trackstar", project=projection, **more)
    spec = Spec(points, of="weight", project=projection)
    tlfast.collect(model, examples, tmp_path / "p", points=spec, loss=of_batch, progress=False)
    ds = tlfast.open_dataset(tmp_path / "p")
    stored = tlfast.score(ds, {point: ds[point][:2] for point in ds.points}, "trackstar", k=None)
    torch.testing.assert_close(live.scores, stored.scores)
    sums = tlfast.running(model, examples, spec, stats="moment2_full", loss=of_batch)
    write_bergson_hessians(sums, tmp_path, model)
    names = read_bergson_hessians(tmp_path, model, n_rows=3).names
    assert names == [f"{name}:weight" for name in factors]
    write_bergson_normalizers(factors.normalizers(), tmp_path / "n.pth", model)
    assert list(read_bergson_normalizers(tmp_path / "n.pth", model)) == factors.names
    with pytest.raises(
        ValueError, match=r"factors must be of layers that get all tokens, got .*gate_up_proj, an expert"
    ):
        write_bergson_factors(factors, tmp_path / "f", model)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("kind", ["qwen3", "gpt-oss"])
def test_factors_of_experts_count_the_tokens_that_they_get(kind):
    """Whatever else is in a batch: an expert's tokens of each example lie side by side, with nothing behind them."""
    model, (ids, mask) = made(kind), inputs()
    examples = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
    module, seen = model.get_submodule(POINTS[1]), []

    def of_batch(model, batch):
        real = torch.ones_like(batch.input_ids).bool() if batch.mask is None else batch.mask
        return loss(model, batch.input_ids, real)

    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), args[1])))
    for tokens in examples[:2] + examples[3:]:
        row = torch.tensor([tokens])
        loss(model, row, torch.ones_like(row).bool())
    handle.remove()
    settings = {"kinds": ("kfac", "ekfac"), "loss": of_batch, "missing": "nan", "bias": True}
    runs = [tlfast.factors(model, examples, [POINTS[1]], batch_examples=n, **settings) for n in (1, 4)]
    assert runs[0].names == runs[1].names
    for number in range(module.num_experts):
        given = torch.cat([hidden[(index == number).any(-1)] for hidden, index in seen])
        for found in runs:
            up, down = (found[f"{POINTS[1]}.expert_{number}.{name}"] for name in ("gate_up_proj", "down_proj"))
            assert up.n_tokens == down.n_tokens == len(given)
            a = torch.cat([given, torch.ones(len(given), 1)], 1) if up.bias else given
            assert_near(up.inputs, a.T @ a, 1)
            assert down.n_examples == 3
    for name in runs[0]:
        for what in ("inputs", "outputs", "kfac_eigenvalues"):
            assert_near(getattr(runs[0][name], what), getattr(runs[1][name], what), 1)


def test_factors_of_experts_that_a_glob_names():
    model, (ids, mask) = made("qwen3"), inputs()
    examples = [row[real].tolist() for row, real in zip(ids, mask, strict=True) if real.sum() > 1]
    wanted = truths(model, POINTS[1:])

    def of_batch(model, batch):
        return loss(model, batch.input_ids, torch.ones_like(batch.input_ids).bool())

    glob = "layers.1.mlp.experts.expert_[12].down_proj"
    found = tlfast.factors(model, examples, glob, kinds="adam", loss=of_batch, missing="nan", batch_examples=1)
    assert found.names == [glob.replace("[12]", number) for number in "12"]
    for name in found:
        v = wanted[name][[length > 1 for length in LENGTHS]].square().mean(0)
        assert_near(found[name].second_moment, v, 1)
