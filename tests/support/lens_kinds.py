"""Every kind of model that TransformerLens can make tiny without a network, and what a call of it takes."""

from __future__ import annotations

import copy
from functools import partial
from importlib import import_module
from importlib.metadata import version

import torch
from lens_models import BUILDER, HEADS, N_LAYERS, POSITIONS, VOCAB, WIDTH, native_bridge, root_module, tokens, usable

# What a size is called in one config or another; a config gets those that it has. Lists of layers follow from them.
SIZES = {
    16: ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim", "embed_dim", "lru_width", "embedding_size"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers", "depth",
        "num_decoder_layers", "num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_k", "top_k_experts"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "mamba_n_heads", "mamba_num_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
        "rotary_dim", "state_size", "mamba_d_state", "sliding_window", "patch_size"),
    8: ("head_dim", "d_kv", "image_size"),
    32: ("intermediate_size", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "ffn_hidden_size",
         "moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"),
    64: ("max_position_embeddings", "n_positions", "n_ctx", "context_length"),
    VOCAB: ("vocab_size",),
    1: ("n_group", "topk_group", "bos_token_id", "decoder_start_token_id"),
    0: ("pad_token_id",),
    VOCAB - 1: ("eos_token_id", "image_token_id", "video_token_id", "audio_token_id", "image_token_index"),
    None: ("forced_eos_token_id", "forced_bos_token_id"),
}  # fmt: skip
SIZE_OF = {name: size for size, names in SIZES.items() for name in names}
MAX_PARAMETERS = 2_000_000  # a few of them must fit in a small machine's memory

LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
              num_key_value_heads=4, head_dim=4)  # fmt: skip
AUDIO = dict(
    conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 2), num_conv_pos_embeddings=4, proj_codevector_dim=16,
    num_conv_pos_embedding_groups=2, codevector_dim=16, classifier_proj_size=16, num_codevectors_per_group=4,
    apply_spec_augment=False,
)  # fmt: skip
LINEAR = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
              linear_key_head_dim=4, linear_value_head_dim=4)  # fmt: skip
PER_LAYER = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, global_head_dim=8)
# What the table of sizes doesn't say: mixtures of layers, sizes of other names, sizes that must fit each other.
MORE = {
    "ASTForAudioClassification": dict(max_length=24, num_mel_bins=16, patch_size=8),
    "BambaForCausalLM": dict(attn_layer_indices=[1]),
    "DeepseekV2ForCausalLM": LATENT,
    "DeepseekV3ForCausalLM": LATENT,
    "Florence2ForConditionalGeneration": dict(vision_config=dict(
        patch_size=(3, 3, 3, 3), embed_dim=(8, 8, 8, 8), num_heads=(2, 2, 2, 2), num_groups=(2, 2, 2, 2),
        depths=(1, 1, 1, 1), projection_dim=16)),
    "GPTNeoForCausalLM": dict(attention_types=[[["global", "local"], 1]], window_size=4),
    "Gemma4ForCausalLM": PER_LAYER,
    "Gemma4ForConditionalGeneration": dict(text_config=PER_LAYER),
    "Glm4vForConditionalGeneration": dict(vision_config=dict(out_hidden_size=16)),
    "Glm4MoeLiteForCausalLM": LATENT,
    "GlmMoeDsaForCausalLM": LATENT | dict(index_n_heads=2, index_head_dim=8, index_topk=4),
    "GraniteMoeHybridForCausalLM": dict(layer_types=["mamba", "attention"], position_embedding_type="rope"),
    "HrmTextForCausalLM": dict(num_hidden_layers=4, num_layers_per_stack=2),
    "HubertForCTC": AUDIO,
    "HubertModel": AUDIO,
    "JambaForCausalLM": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
                             use_mamba_kernels=False),
    "Lfm2MoeForCausalLM": dict(layer_types=["conv", "full_attention"]),
    "Llama4ForConditionalGeneration": dict(
        text_config=dict(intermediate_size_mlp=32),
        vision_config=dict(vision_output_dim=16, projector_input_dim=16, projector_output_dim=16)),
    "Mamba2ForCausalLM": dict(head_dim=8, n_groups=2),
    "MuseGlimmerForConditionalGeneration": dict(projector_hidden_size=16, out_hidden_size=64),
    "NemotronHForCausalLM": dict(layers_block_type=["mamba", "attention"], n_groups=2),
    "Qwen3NextForCausalLM": LINEAR,
    "Qwen3_5ForCausalLM": LINEAR,
    "Qwen3_5ForConditionalGeneration": dict(text_config=LINEAR),
    "Qwen3_5MoeForCausalLM": LINEAR,
    "Qwen3_5MoeForConditionalGeneration": dict(text_config=LINEAR),
    "RecurrentGemmaForCausalLM": dict(block_types=["recurrent", "attention"], attention_window_size=4),
    "Wav2Vec2ForCTC": AUDIO,
    "Wav2Vec2ForPreTraining": AUDIO,
    "Wav2Vec2Model": AUDIO,
    "YoutuForCausalLM": LATENT,
    "Zamba2ForCausalLM": dict(layers_block_type=["hybrid", "linear_attention"], num_mem_blocks=1, mamba_headdim=8,
                              n_mamba_heads=4),
}  # fmt: skip


def tiny_config(cls, more):
    """A config of two narrow layers of a class of configs, and of each config in it."""
    default = cls()
    known = {*vars(default), *default.to_dict(), *getattr(cls, "attribute_map", {})}
    given = {name: size for name, size in SIZE_OF.items() if name in known} | more
    for name in getattr(cls, "sub_configs", None) or {}:
        if getattr(default, name, None) is not None:
            given[name] = tiny_config(type(getattr(default, name)), more.get(name, {}))
    return cls(**given)


def bridge(architecture):
    """A bridge around a tiny model of random weights."""
    cls = getattr(import_module("transformers"), architecture)
    config = tiny_config(cls.config_class, MORE.get(architecture, {}))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{architecture} must be tiny, got {size} parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    return BUILDER.build_bridge_from_module(model, architecture, hf_config=config, dtype=torch.float32)


# What a bridge needs that isn't here: a library, a part of a checkpoint, a class that its adapter takes.
NOT_BUILT = {
    "BloomModel": "a head",
    "CodeGenForCausalLM": "positions that CodeGen of this transformers keeps elsewhere",
    "Emu3ForConditionalGeneration": "a checkpoint's vocabulary of images",
    "Gemma3nForConditionalGeneration": "timm",
    "Glm4vForConditionalGeneration": "torchvision",
    "Llama4ForConditionalGeneration": "an image: transformers fails without one",
    "Qwen2_5_VLForConditionalGeneration": "torchvision",
    "Qwen3VLForConditionalGeneration": "torchvision",
    "Qwen3VLMoeForConditionalGeneration": "torchvision",
    "Qwen3_5ForConditionalGeneration": "torchvision",
    "Qwen3_5MoeForConditionalGeneration": "torchvision",
    "Wav2Vec2ForPreTraining": "the encoder or the head for CTC",
}


def architectures():
    """The names of all architectures that this TransformerLens knows and transformers has a class for."""
    try:
        known = import_module("transformer_lens.factories.architecture_adapter_factory").SUPPORTED_ARCHITECTURES
    except ImportError:
        return []
    there = dir(import_module("transformers"))  # to ask for each would import it
    return [name for name in known if BUILDER is not None and name in there]


def hooked(kind="HookedTransformer", **more):
    """A HookedTransformer or another of its kin, with a change of the configuration."""
    lens = import_module("transformer_lens")
    config = dict(n_layers=N_LAYERS, d_model=WIDTH, n_ctx=POSITIONS, d_head=WIDTH // HEADS, n_heads=HEADS,
                  d_vocab=VOCAB, act_fn="gelu", normalization_type="LN", seed=0, device="cpu")  # fmt: skip
    model = getattr(lens, kind)(config | more)
    if kind != "HookedTransformer":  # which is the only one that fills its weights
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=0.1)
    return model


HOOKED = {
    "plain": {},
    "rotary": dict(positional_embedding_type="rotary", rotary_dim=8, normalization_type="RMS"),
    "gated": dict(gated_mlp=True, act_fn="silu", normalization_type="LNPre"),
    "parallel": dict(parallel_attn_mlp=True),
    "split": dict(use_attn_result=True, use_split_qkv_input=True, use_hook_mlp_in=True),
    "shared keys": dict(n_key_value_heads=1),
    "shortformer": dict(positional_embedding_type="shortformer"),
    "attention only": dict(attn_only=True),
    "experts": dict(num_experts=2, experts_per_token=1, gated_mlp=True, act_fn="silu"),
    "solu": dict(act_fn="solu_ln", d_mlp=32, normalization_type=None),
    "encoder": dict(kind="HookedEncoder", attention_dir="bidirectional"),
    "encoder and decoder": dict(
        kind="HookedEncoderDecoder", positional_embedding_type="relative_positional_bias", act_fn="relu",
        relative_attention_max_distance=8, relative_attention_num_buckets=4, normalization_type="RMS",
        use_attn_scale=False, tie_word_embeddings=True, decoder_start_token_id=0,
    ),
}  # fmt: skip


def compatible(model):
    """A bridge in compatibility mode; None where there is none, or its adapter refuses."""
    try:
        model.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    except (AttributeError, RuntimeError, NotImplementedError):
        return None
    return model


def kinds():
    """How to make each kind of model, by name."""
    found = {name: partial(bridge, name) for name in architectures() if name not in NOT_BUILT}
    if usable(hooked):
        found |= {f"hooked, {name}": partial(hooked, **more) for name, more in HOOKED.items()}
    if usable(native_bridge):
        found["native bridge"] = native_bridge
    found["root module"] = root_module
    return found


# An encoder with a decoder, norms that fail with hooks, images, points within points; what is no bridge.
DRAWN = (
    "T5ForConditionalGeneration", "OlmoForCausalLM", "ViTModel", "OPTForCausalLM",
    "hooked, plain", "hooked, split", "hooked, encoder", "root module",
)  # fmt: skip
if int(version("transformer-lens").split(".")[0]) >= 4:
    DRAWN += ("JambaForCausalLM",)  # a point that is given a tuple; 3.9 keeps None where no gradient comes


def example(model):
    """What a call of a model takes: its arguments, its keywords, and those by which it returns a loss, or None."""
    config = getattr(getattr(model, "original_model", None), "config", None)
    draw = torch.Generator().manual_seed(1)
    if not hasattr(model, "cfg"):
        return (torch.randn(2, 3, WIDTH, generator=draw),), {}, {}
    if getattr(model.cfg, "is_visual_model", False):
        return (torch.randn(2, 3, config.image_size, config.image_size, generator=draw),), {}, None
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return (torch.randn(2, config.max_length, config.num_mel_bins, generator=draw),), {}, None
    if getattr(model.cfg, "is_audio_model", False):
        return (torch.randn(2, 64, generator=draw),), {}, None
    given = tokens()
    if type(model).__name__ == "HookedEncoderDecoder":
        return (given,), {"decoder_input": given, "one_zero_attention_mask": torch.ones_like(given)}, None
    if type(model).__name__ == "HookedEncoder":
        return (given,), {}, None
    if getattr(config, "is_encoder_decoder", False):
        return (given,), {"decoder_input_ids": given, "labels": given}, {"return_type": "loss"}
    return (given,), {}, {"return_type": "loss"}
