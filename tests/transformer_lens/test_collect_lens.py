"""`tlfast collect --lens`: a dataset of gradients at hook points, by TransformerLens' names."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import get_type_hints

import tokenizers
import torch
import transformers
from lens_models import BUILDER, VOCAB, tokens

import tlfast
import tlfast.transformer_lens
from tlfast.cli import main
from tlfast.hooks.options import TapOptions


def test_rows_are_the_gradients_at_the_points(model, tmp_path):
    given = tokens()
    point = "blocks.*.hook_resid_post"
    tlfast.collect(
        model, list(given), tmp_path / "out", points=point, reduce="sum", dtype=torch.float32, lens=True,
        progress=False, backend="native",
    )  # fmt: skip
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert list(dataset.points) == ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]

    def loss(logits):
        flat = logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, given[:, 1:].flatten(), reduction="sum")

    from tlfast.transformer_lens import cache_fwd_and_bwd

    _, _, grads = cache_fwd_and_bwd(model, given, loss, point)
    for name in dataset.points:
        # The same sum up to rounding: the batches differ.
        assert torch.allclose(torch.as_tensor(dataset[name][:]), grads[name].sum(1), rtol=1e-4, atol=1e-6)


def test_a_stream_has_the_rows_of_the_dataset(model, tmp_path):
    settings = {"reduce": "mean", "lens": True, "rows_per_unit": 2, "backend": "native"}
    point = "blocks.*.hook_resid_post"
    tlfast.collect(model, list(tokens()), tmp_path / "out", points=point, progress=False, **settings)
    dataset, seen = tlfast.open_dataset(tmp_path / "out"), []
    for batch in tlfast.stream(model, list(tokens()), point, buffer_rows=4, batch_size=2, **settings):
        for name in dataset.points:
            assert torch.equal(batch[name], dataset[name][batch["id"].tolist()])
        seen += batch["id"].tolist()
    assert sorted(seen) == list(range(len(dataset)))


def test_the_command_line(tmp_path, capsys):
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path / "model")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=VOCAB, n_positions=12)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(f"w{n % VOCAB}" for n in range(90)))
    arguments = ["collect", "--lens", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"),
                 "--points", "blocks.*.hook_resid_post", "--seq-len", "10", "--out", str(tmp_path / "out")]  # fmt: skip
    if BUILDER is None:  # before 3.3
        assert main(arguments) != 0
        assert "collect: lens must be a model that TransformerLens can bridge" in capsys.readouterr().err
        return
    assert main(arguments) == 0
    dataset = tlfast.open_dataset(tmp_path / "out")
    assert dataset["blocks.1.hook_resid_post"].shape == (9, 16)


def test_a_capture_takes_what_its_options_hold():
    hints, wanted = get_type_hints(tlfast.transformer_lens.capture), get_type_hints(TapOptions)
    given = inspect.signature(tlfast.transformer_lens.capture).parameters
    assert {name: hints[name] for name in wanted} == wanted
    defaults = {field.name: field.default for field in fields(TapOptions)}
    assert {name: given[name].default for name in wanted} == defaults | {"calls": "sum"}
