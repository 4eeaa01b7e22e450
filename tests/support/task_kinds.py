"""Kinds of models of transformers beside causal LMs, made tiny: encoders, encoder-decoders, vision and audio models."""

from __future__ import annotations

import inspect
from math import prod

import torch
import torch.nn.functional as F
from causal_models import MOST_PARAMETERS, NAMES, VOCAB, WIDTH
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
)
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from tlfast.backends.outputs import select_output

FAMILIES = {  # the class, the kinds that it has, and the loss
    "encoder": (AutoModelForMaskedLM, auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "masked_lm"),
    "encoder-decoder": (AutoModelForSeq2SeqLM, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "seq2seq"),
    "vision": (AutoModelForImageClassification, auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "classification"),
    "audio": (AutoModelForAudioClassification, auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, "classification"),
    "speech": (AutoModelForSpeechSeq2Seq, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "seq2seq"),
}
TEXT = ("encoder", "encoder-decoder")
N_CLASSES, IMAGE, SAMPLES, LENGTHS = 3, 32, 800, (9, 12, 20, 23)
# What configurations of images and of sound have beside those of text.
MORE = {
    "image_size": IMAGE, "patch_size": 8, "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32],
    "num_labels": N_CLASSES,
    "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_mel_bins": 16, "max_length": 64, "max_source_positions": 40,
    "max_target_positions": VOCAB, "conv_dim": [WIDTH] * 3, "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
    "decoder_start_token_id": 2, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16],
    "embedding_size": WIDTH, "window_size": 4, "classifier_proj_size": 16, "max_image_size": 64,
}  # fmt: skip
SPECIAL = {
    "bigbird_pegasus": {"attention_type": "original_full"},
    "big_bird": {"attention_type": "original_full"},
    "convbert": {"embedding_size": WIDTH, "conv_kernel_size": 3},
    "longformer": {"attention_window": 8},
    "led": {"attention_window": 8, "max_encoder_position_embeddings": VOCAB, "max_decoder_position_embeddings": VOCAB},
    "xmod": {"default_language": "en_XX"},
    "swin": {"embed_dim": 8, "num_heads": [1, 2, 2, 4], "patch_size": 2, "window_size": 4},
    "swinv2": {"embed_dim": 8, "num_heads": [1, 2, 2, 4], "patch_size": 2, "window_size": 4},
    "donut-swin": {"embed_dim": 8, "num_heads": [1, 2, 2, 4], "patch_size": 2, "window_size": 4},
    "beit": {"use_relative_position_bias": True},
}  # fmt: skip


def tiny_config(kind, **more):
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    known = default.to_dict().keys() | getattr(default, "attribute_map", {}).keys() | {"num_labels"}
    settings = {name: size for name, size in (NAMES | MORE).items() if name in known}
    for name, given in list(settings.items()):  # a list of sizes, one a stage, keeps its form
        default_value = getattr(default, name, None)
        if isinstance(default_value, (list, tuple)) and not isinstance(given, list):
            del settings[name]
    for name, token in (("bos_token_id", 2), ("eos_token_id", 3), ("pad_token_id", 0), ("decoder_start_token_id", 2)):
        given = getattr(default, name, None)
        begins = name == "decoder_start_token_id" and getattr(default, "is_encoder_decoder", False)
        if (name in known or begins) and (not isinstance(given, int) or not 0 <= given < VOCAB):
            settings[name] = token
    settings |= {name: None for name in ("forced_eos_token_id", "forced_bos_token_id") if name in known}
    return config_class(**settings | SPECIAL.get(kind, {}) | more)


def tiny_model(family, kind, **more):
    """A model of one kind, of random weights that make a large gradient; ValueError where there is no tiny one."""
    logging.set_verbosity_error()
    config, made = tiny_config(kind, **more), FAMILIES[family][0]
    with torch.device("meta"):
        size = sum(p.numel() for p in made.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{kind} has {size} parameters")
    torch.manual_seed(0)
    model = made.from_config(config).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # a small initializer would hide what positions and padding do
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=draw) * (1 / prod(p.shape[1:]) ** 0.5))
    return model


def input_name(model):
    """What a model that reads no tokens calls its input."""
    return getattr(model, "main_input_name", "input_ids")


def examples_for(family, model):
    """Examples of mixed lengths, or images or sounds of one size, with what the loss of the family asks for."""
    draw = torch.Generator().manual_seed(0)

    def tokens(n):
        return torch.randint(5, VOCAB, (n,), generator=draw).tolist()

    def labels(k):
        if family == "speech":
            return tokens(5)  # rows keep all positions
        return tokens(3 + k) if family == "encoder-decoder" else k % N_CLASSES

    if family == "encoder":
        each = [tokens(n) for n in LENGTHS]
        return [{"input_ids": ids, "labels": [t if k % 3 else -100 for k, t in enumerate(ids)]} for ids in each]
    if family == "encoder-decoder":
        return [{"input_ids": tokens(n), "labels": labels(k)} for k, n in enumerate(LENGTHS)]
    shape = (getattr(model.config, "num_channels", 3), IMAGE, IMAGE)
    if family != "vision":
        shape = {"input_values": (SAMPLES,), "input_features": (16, 80)}[input_name(model)]
        kind = model.config.model_type
        if kind == "audio-spectrogram-transformer":
            shape = (64, 16)
        elif kind == "wav2vec2-bert":
            shape = (20, getattr(model.config, "feature_projection_input_dim", 160))
        elif kind == "speech_to_text":
            shape = (40, getattr(model.config, "input_feat_per_channel", 80))
    return [{input_name(model): torch.randn(shape, generator=draw), "labels": labels(k)} for k in range(4)]


def loss_alone(model, example):
    """The sum of the losses of one example, from the logits that the model gives for it alone."""
    inputs = {name: torch.as_tensor(value)[None] for name, value in example.items() if name != "labels"}
    labels = torch.tensor(example["labels"])
    if "use_cache" in inspect.signature(type(model).forward).parameters:
        inputs["use_cache"] = False
    if getattr(model.config, "is_encoder_decoder", False) and labels.dim():
        inputs["labels"] = labels[None]
    logits = model(**inputs).logits[0].double()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=-100, reduction="sum")


def outputs_of(model, names, run):
    """What ``run`` makes the modules put out: a list for each that was called, of first tensors."""
    kept = {}

    def keep(name):
        def hook(module, args, output):
            kept.setdefault(name, []).append(select_output(output, None)[0])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        return kept, run()
    finally:
        for handle in handles:
            handle.remove()


def points_of(model, example):
    """Names of modules in lists that are called once, batch first: of the outermost the first three and the last."""
    in_lists = [
        f"{name}.{key}".lstrip(".")
        for name, owner in model.named_modules() if isinstance(owner, (torch.nn.ModuleList, torch.nn.Sequential))
        for key, _ in owner.named_children()
    ]  # fmt: skip
    called, _ = outputs_of(model, in_lists, lambda: loss_alone(model, example))
    fitting = [
        name for name, (tensor, *again) in called.items()
        if not again and tensor is not None and tensor.dim() > 2 and tensor.shape[0] == 1 and tensor.requires_grad
    ]  # fmt: skip
    outermost = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting)]
    return list(dict.fromkeys([*outermost[:3], *outermost[-3:]]))


def gradients(model, points, loss_of):
    """By `torch.autograd.grad`: the gradient of ``loss_of()`` at each point, None where it has none."""
    kept, loss = outputs_of(model, points, loss_of)
    found = torch.autograd.grad(loss, [once for (once,) in kept.values()], allow_unused=True)
    return dict(zip(kept, found, strict=True))


def n_terms(model, grad):
    """How many terms the sums of a forward and a backward have, one behind the other."""
    return grad.numel() + 2 * sum(prod(p.shape[1:]) + max(LENGTHS) for p in model.parameters() if p.dim() > 1)
