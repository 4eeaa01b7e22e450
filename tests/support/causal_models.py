"""Every kind of causal LM of transformers that can be made tiny, and their gradients, each example alone."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from tlfast.backends.outputs import select_output

VOCAB, WIDTH, N_LAYERS = 64, 32, 2
MOST_PARAMETERS = 3_000_000

# The sizes of a model, by the names that configurations have for them.
SIZES = {
    WIDTH: "hidden_size d_model n_embd dim embed_dim emb_dim",
    48: "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff dim_ff",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    N_LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_encoder_layers num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "time_step_rank mamba_n_heads",
    8: "head_dim attention_head_size rotary_dim qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_d_state",
    16: "q_lora_rank kv_lora_rank mamba_d_head",
    1: "n_group topk_group n_shared_experts",
    VOCAB: "vocab_size max_position_embeddings n_positions max_seq_len n_ctx",
}  # fmt: skip
NAMES = {name: size for size, names in SIZES.items() for name in names.split()}
SPECIAL = {
    "dbrx": {"rope_theta": 1e4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"head_dim": 16},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind):
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    known = default.to_dict().keys() | getattr(default, "attribute_map", {}).keys()
    settings = {name: size for name, size in NAMES.items() if name in known}
    heads = 4 if "kv_lora_rank" in known else 2
    settings |= {name: heads for name in ("num_key_value_heads",) if name in known}
    for name, token in (("bos_token_id", 2), ("eos_token_id", 3), ("pad_token_id", 0)):
        given = getattr(default, name, None)
        if isinstance(given, int) and not 0 <= given < VOCAB:
            settings[name] = token
    if "is_decoder" in known:
        settings["is_decoder"] = True  # else it sees the token that it is to predict
    return config_class(**settings | SPECIAL.get(kind, {}))


def tiny_causal_lm(kind, dtype=torch.float32):
    """A model of one kind, of random weights that make a large gradient; ValueError where there is no tiny one."""
    logging.set_verbosity_error()
    config = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{kind} has {size} parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # a small initializer would hide what positions and padding do
            if p.dim() > 1 and p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=draw) * (0.5 if p.shape[-1] < 8 else 1.5 / p.shape[-1] ** 0.5))
    return model.to(dtype)


def tiny_kinds():
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def call(model, ids, **inputs):
    """The logits."""
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    output = model(ids, **inputs)
    return output if isinstance(output, torch.Tensor) else output.logits if hasattr(output, "logits") else output[0]


def outputs_of(model, names, run):
    """What ``run`` makes the modules put out: a list for each that was called, of first tensors (or None)."""
    kept = {}

    def keep(name):
        def hook(module, args, output):
            kept.setdefault(name, []).append(select_output(output, None)[0])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    result = run()
    for handle in handles:
        handle.remove()
    return kept, result


def layers_of(model, tokens):
    """Names of the modules in lists that are called once and put out [1, P, D]: the layers, four at most."""
    in_lists = [
        f"{name}.{number}".lstrip(".")
        for name, owner in model.named_modules() if isinstance(owner, torch.nn.ModuleList)
        for number in range(len(owner))
    ]  # fmt: skip
    called, _ = outputs_of(model, in_lists, lambda: call(model, torch.tensor([tokens])))
    fitting = [
        name for name, (tensor, *again) in called.items()
        if not again and tensor is not None and tensor.dim() == 3 and tensor.shape[:2] == (1, len(tokens))
        and tensor.requires_grad
    ]  # fmt: skip
    outermost = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    return outermost[:4]


def gradients(model, points, ids, labels=None, **inputs):
    """By `torch.autograd.grad`: the gradients [B, P, D] of the summed next-token loss at the points."""
    kept, logits = outputs_of(model, points, lambda: call(model, ids, **inputs))
    labels = ids[:, 1:] if labels is None else labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return dict(zip(kept, torch.autograd.grad(loss, [once for (once,) in kept.values()]), strict=True))
