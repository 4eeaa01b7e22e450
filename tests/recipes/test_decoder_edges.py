"""Edges of decoders of Hugging Face: the nodes' scores, each edge by its own copy of the stream, what is refused."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from stream_model import difference
from tiny_models import tiny_model
from torch import nn

from tlfast.recipes import attribution_patching, eap

VOCAB, WIDTH, HEADS = 64, 16, 4
SIZES = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS)
INNER = dict(intermediate_size=32, max_position_embeddings=32, pad_token_id=None)
NO_ENDS = dict(bos_token_id=None, eos_token_id=None)
# Of each kind its config, and how many heads of keys and values it has.
KINDS = {
    "gpt2": ("GPT2", dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32), 4),
    "llama": ("Llama", SIZES | INNER | dict(num_key_value_heads=2), 2),
    "gpt_neox": ("GPTNeoX", SIZES | INNER, 4),
    "gptj": ("GPTJ", dict(vocab_size=VOCAB, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=32, rotary_dim=2), 4),
    "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS), 4),
    "falcon": ("Falcon", SIZES | dict(multi_query=True, alibi=False), 1),
    "phi3": ("Phi3", SIZES | INNER | dict(num_key_value_heads=2), 2),
    "opt": ("OPT", SIZES | dict(ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=WIDTH), 4),
    "qwen3": ("Qwen3", SIZES | INNER | dict(num_key_value_heads=2, head_dim=6), 2),
    "gemma": ("Gemma", SIZES | INNER | dict(num_key_value_heads=1, head_dim=6), 1),
}


def made(kind):
    name, settings, _ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings, **NO_ENDS, initializer_range=0.3)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def prompts(n=3, length=6):
    draw = torch.Generator().manual_seed(2)
    return [torch.randint(VOCAB, (n, length), generator=draw) for _ in range(2)]


@pytest.mark.parametrize("kind", KINDS)
def test_edges_of_a_node_add_up_to_its_score(kind):
    model, (clean, corrupted) = made(kind), prompts()
    found = eap(model, clean, corrupted, difference, batch_size=2)
    assert len(found.readers) == 2 * (HEADS + 2 * KINDS[kind][2] + 1) + 1
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    names = {module: name for name, module in model.named_modules()}
    written = [names[next(m for n, m in layer.named_modules() if re.search(r"(o_proj|out_proj|attn.c_proj|dense)$", n))]
               for layer in layers]  # fmt: skip
    heads = attribution_patching(model, clean, corrupted, difference, written, "head", heads=HEADS).mean()
    whole = attribution_patching(model, clean, corrupted, difference, names[layers[0]], side="input").mean()
    truth = {"input": whole[names[layers[0]]]}
    truth |= {f"a{n}.h{h}": score for n, scores in enumerate(heads.values()) for h, score in enumerate(scores)}
    size = float(found.scores.abs().max())
    assert all(abs(float(found.nodes()[name] - score)) <= 2e-5 * size for name, score in truth.items())
    assert (found.scores[~found.exists] == 0).all()


def columns_of(kind, part, head):
    """(module of the second layer's attention, columns there) of the queries, keys or values of a head."""
    if kind == "gpt2":
        return "attn.c_attn", range("qkv".index(part) * WIDTH + head * 4, "qkv".index(part) * WIDTH + head * 4 + 4)
    if kind == "gpt_neox":
        return "attention.query_key_value", range(
            head * 12 + "qkv".index(part) * 4, head * 12 + "qkv".index(part) * 4 + 4
        )
    return f"self_attn.{part}_proj", range(head * 4, head * 4 + 4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_each_edge_is_the_product_with_the_gradient_at_its_own_copy_of_the_stream(kind):
    model, (clean, corrupted) = made(kind), prompts(2)
    found = eap(model, clean, corrupted, difference, per_position=True)
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)[1]
    norm = next(m for n, m in layer.named_children() if n in ("ln_1", "input_layernorm"))
    streams = []
    with layer.register_forward_pre_hook(lambda m, args, kw: streams.append(args[0]), with_kwargs=True):
        model(clean), model(corrupted)
    delta = (streams[0] - streams[1]).detach()
    for part, head in (("q", 3), ("k", 1), ("v", 0), ("q", 0), ("v", 1)):
        name, columns = columns_of(kind, part, head)
        module, columns = layer.get_submodule(name), list(columns)
        copy = streams[1].detach().clone().requires_grad_()
        again = type(module).forward(module, norm(copy))

        def put(m, args, out, again=again, columns=columns):
            out = out.clone()
            out[..., columns] = again[..., columns]
            return out

        with module.register_forward_hook(put):
            (grad,) = torch.autograd.grad(difference(model(corrupted).logits).sum(), copy)
        truth = (delta * grad).sum((0, 2)) / len(clean)
        # All that is written before the second layer, in one sum.
        got = sum(
            found[writer, f"a1.h{head}<{part}>"] for writer in ("input", *[f"a0.h{h}" for h in range(HEADS)], "m0")
        )
        assert torch.allclose(got, truth, rtol=1e-3, atol=2e-5 * float(found.scores.abs().max())), (part, head)


def test_integrated_gradients_move_what_the_first_layer_is_given():
    model, (clean, corrupted) = made("llama"), prompts()
    with torch.no_grad():
        whole = float((difference(model(clean).logits) - difference(model(corrupted).logits)).mean())
    apart = [abs(float(eap(model, clean, corrupted, difference, m).nodes()["input"]) - whole) for m in (1, 48)]
    assert apart[0] > 0.5 * abs(whole)
    assert apart[1] < 0.1 * abs(whole)  # a sum of so many steps, from the left


def test_padding_and_mappings_leave_no_trace():
    model, (clean, corrupted) = made("llama"), prompts()
    mask = torch.cat([torch.zeros(3, 2), torch.ones(3, 6)], 1).long()

    def padded(tokens, pad):
        full = torch.cat([torch.full((3, 2), pad), tokens], 1)
        return {"input_ids": full, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    plain = eap(model, clean, corrupted, difference)
    found = eap(model, padded(clean, 5), padded(corrupted, 9), difference, batch_size=1)
    assert torch.allclose(found.scores, plain.scores, atol=2e-5 * float(plain.scores.abs().max()))


def test_sixteen_bits_are_summed_in_float32():
    """Not in bfloat16, as peers do: the sums are those of float64 over the same tensors, a thousand times nearer."""
    model, (clean, corrupted) = made("llama").to(torch.bfloat16), prompts(2, 24)
    found = eap(model, clean, corrupted, difference, batch_size=None)
    last, kept = model.model.layers[1], []

    def keep(module, args, out):
        kept.append(out)
        if len(kept) == 4:
            out.retain_grad()

    mlp = model.model.layers[0].mlp
    for tokens in (clean, corrupted):
        with mlp.register_forward_hook(keep), last.register_forward_hook(keep):
            output = model(tokens).logits
    difference(output).sum().backward()
    terms = (kept[0].detach().double() - kept[2].detach().double()) * kept[3].grad.double() / len(clean)
    assert found.scores.dtype == torch.float32
    error = abs(float(found["m0", "logits"].double() - terms.sum()))
    assert error <= terms.numel() * torch.finfo(torch.float32).eps * float(terms.abs().sum()) / 4
    in_bfloat16 = torch.zeros((), dtype=torch.bfloat16)
    for term in terms.flatten().bfloat16():
        in_bfloat16 += term
    assert abs(float(in_bfloat16.double() - terms.sum())) > 100 * error


def test_what_is_no_such_decoder_is_an_error():
    (clean, corrupted), post = prompts(), SIZES | INNER | dict(num_key_value_heads=2, head_dim=4)
    torch.manual_seed(0)
    gemma2 = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**post, **NO_ENDS))
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES | dict(intermediate_size=32)))
    granite = transformers.AutoModelForCausalLM.from_config(
        transformers.GraniteConfig(**SIZES, **INNER, residual_multiplier=0.5)
    )
    adapted = tiny_model("llama")
    adapted.model.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: out * 2)
    for model, text in (
        (gemma2, "what heads and MLPs write must add up to the residual stream"),
        (granite, "what heads and MLPs write must add up to the residual stream"),
        (bert, "model must be a decoder whose layers add to the residual stream"),
        (adapted, "every projection must be a product with its weight, got model.layers.0.self_attn.q_proj, a Linear"),
        (nn.Sequential(nn.Embedding(VOCAB, 3), nn.Linear(3, VOCAB)), "model must have one list of layers"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)) as error:
            eap(model, clean, corrupted, difference)
        assert str(error.value).startswith("eap: ")
    with pytest.raises(ValueError, match="whose queries, keys and values can't be told apart"):
        eap(tiny_model("llama"), clean[:, :1], corrupted[:, :1], difference)
