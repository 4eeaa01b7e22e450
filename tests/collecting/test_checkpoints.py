"""A checkpoint without its head, or of a model that sees the next token, is refused before anything is written."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import (
    N_TOKENS,
    byte_tokenizer,
    collect,
    collect_words,
    complaint_of,
    save_text,
    sequences,
    tiny_config,
)
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2DoubleHeadsModel,
    GPT2Model,
    LlamaModel,
    MixtralConfig,
)
from transformers.utils import logging

import tlfast
from tlfast.collecting.huggingface import load_model
from tlfast.collecting.loss import next_token_loss

EXAMPLES = sequences(8)
SIZES = {
    "vocab_size": N_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip


def saved(folder, model, **config):
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def llama(**changes):
    config = tiny_config("llama")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    "make",
    [
        lambda: AutoModelForCausalLM.from_config(tiny_config("gpt2")),
        lambda: GPT2Model(tiny_config("gpt2")),  # its head is its embedding
        lambda: GPT2DoubleHeadsModel(tiny_config("gpt2")),  # a head too many
        lambda: AutoModelForCausalLM.from_config(llama(tie_word_embeddings=False)),
        lambda: AutoModelForCausalLM.from_config(llama(tie_word_embeddings=True)),
        lambda: LlamaModel(llama(tie_word_embeddings=True)),
        lambda: AutoModelForCausalLM.from_config(BertConfig(is_decoder=True, **SIZES)),
    ],
    ids=["gpt2", "gpt2-base", "gpt2-two-heads", "llama", "llama-tied", "llama-tied-base", "bert-decoder"],
)
@pytest.mark.parametrize("device_map", ["", '{"": "cpu"}'])
def test_a_checkpoint_with_all_weights_is_loaded(tmp_path, make, device_map):
    name = saved(tmp_path, make())
    one, two = (load_model(name, None, torch.device("cpu"), device_map) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "make, changes, text",
    [
        (lambda: LlamaModel(llama()), {}, r"have all weights of LlamaForCausalLM, got .* without 'lm_head\.weight'"),
        (lambda: AutoModelForSequenceClassification.from_config(llama(pad_token_id=0)), {}, r"'lm_head\.weight'"),
        (lambda: BertModel(BertConfig(is_decoder=True, **SIZES)), {}, r"'cls\.predictions\.bias', .* and 3 more"),
        (lambda: LlamaModel(llama()), {"num_hidden_layers": 3}, r"without 'lm_head\.weight', 'model\.layers\.2\."),
        (lambda: GPT2Model(tiny_config("gpt2")), {"vocab_size": 300}, r"'transformer\.wte\.weight', or of other sizes"),
        (
            lambda: AutoModelForCausalLM.from_config(tiny_config("gpt2")), {"n_layer": 1},
            r"have the layers of GPT2LMHeadModel, got .* with 'transformer\.h\.1\..* too\. Its config\.json",
        ),
    ],
    ids=["base", "classifier", "encoder", "layers", "sizes", "fewer-layers"],
)  # fmt: skip
@pytest.mark.parametrize("device_map", ["", '{"": "cpu"}'])
def test_a_weight_that_would_be_random_is_named(tmp_path, make, changes, text, device_map):
    name = saved(tmp_path, make(), **changes)
    with pytest.raises(ValueError, match=text):
        load_model(name, None, torch.device("cpu"), device_map)


def test_the_command_line_refuses_both_and_writes_nothing(tmp_path, capsys):
    save_text(tmp_path / "text", 2)
    byte_tokenizer().save_pretrained(tmp_path / "model")
    saved(tmp_path / "model", LlamaModel(llama()))
    assert "without 'lm_head.weight'" in complaint_of(capsys, ["collect", *collect_words(tmp_path)])
    saved(tmp_path / "model", AutoModelForCausalLM.from_config(BertConfig(**SIZES)))
    words = collect_words(tmp_path, points="bert.encoder.layer.*")
    assert "model must not see the token that it is to predict" in complaint_of(capsys, ["collect", *words])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_an_encoder_is_no_model_for_the_next_token(tmp_path, padding_side):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BertConfig(**SIZES))
    with pytest.raises(
        ValueError, match=r"got BertLMHeadModel, whose logits change by .* Give a causal model; or loss="
    ):
        collect(model, tmp_path / "out", EXAMPLES, points="bert.encoder.layer.*", padding_side=padding_side)
    assert not (tmp_path / "out").exists()
    loss = lambda model, batch: next_token_loss(model, batch)  # noqa: E731 (whoever asks for it gets it)
    collect(model, tmp_path / "out", EXAMPLES, points="bert.encoder.layer.*", padding_side=padding_side, loss=loss)
    assert len(tlfast.open_dataset(tmp_path / "out")) == len(EXAMPLES)


class Neighbours(nn.Module):
    """Adds to the logits the token before, ``back`` times, and the one behind, ``ahead`` times."""

    def __init__(self, back, ahead):
        super().__init__()
        self.embed, self.point = nn.Embedding(N_TOKENS, 8), nn.Linear(8, N_TOKENS)
        self.back, self.ahead = back, ahead

    def forward(self, input_ids):
        logits = self.point(self.embed(input_ids))
        told = torch.zeros_like(logits)
        told[:, :-1] = nn.functional.one_hot(input_ids[:, 1:], N_TOKENS) * self.ahead
        told[:, 1:] += nn.functional.one_hot(input_ids[:, :-1], N_TOKENS) * self.back
        return logits + told


def test_what_it_sees_is_tried_and_not_guessed(tmp_path):
    collect(Neighbours(back=1.0, ahead=0.0), tmp_path / "a", EXAMPLES, points="point")
    with pytest.raises(ValueError, match="must not see the token that it is to predict, got Neighbours"):
        collect(Neighbours(back=1.0, ahead=1e-3), tmp_path / "b", EXAMPLES, points="point")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_mixture_of_experts_is_causal(tmp_path, dtype, padding_side):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZES)).to(
        dtype
    )
    collect(model, tmp_path, EXAMPLES, points="model.layers.*", padding_side=padding_side)
