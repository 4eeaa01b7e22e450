"""Images and sounds as files of every kind that the command reads, and tiny models of both with their processors."""

from __future__ import annotations

import io
import json
import wave

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from task_models import task_model
from tiny_models import byte_tokenizer
from transformers import (
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForSequenceClassification,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.utils import logging

N, CLASSES, RATE = 7, ("cat", "dog", "eel"), 16_000
NAMES = [f"{CLASSES[k % 3]}/{k}.png" for k in range(N)]


def pixels(k):
    """Image ``k``: uint8 [8, 8, 3]."""
    return np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)


def png(k):
    file = io.BytesIO()
    Image.fromarray(pixels(k)).save(file, "PNG")
    return file.getvalue()


def samples(k, n=None):
    """Sound ``k``: int16 [samples]."""
    return np.random.default_rng(k).integers(-20_000, 20_000, n or 400 + 40 * (k % 3), np.int16)


def wav(k, rate=RATE, channels=1, n=None):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples(k, n).repeat(channels).tobytes())
    return file.getvalue()


def save_folder(folder, data=png):
    """A folder of files, each below the name of its class; and a list of them, as paths, in images.jsonl beside it."""
    for k, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data(k))
    rows = [{"path": f"{folder.name}/{name}", "label": name.split("/")[0], "number": k} for k, name in enumerate(NAMES)]
    (folder.parent / f"{folder.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_table(path, column, data, **more):
    """A Parquet file as Hugging Face's datasets writes it: the bytes of the files in a struct."""
    rows = [
        {column: {"bytes": data(k), "path": None}, "label": k % 3} | {n: values[k] for n, values in more.items()}
        for k in range(N)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_vit(folder, **more):
    logging.disable_progress_bar()
    labels = dict(enumerate(CLASSES))
    model = task_model("vit", "image", id2label=labels, label2id={v: k for k, v in labels.items()}, **more)
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def save_wav2vec2(folder, mask=True):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, classifier_proj_size=8, num_labels=3, vocab_size=32, initializer_range=0.2,
        feat_extract_norm="layer" if mask else "group",
    )  # fmt: skip
    Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=mask).save_pretrained(folder)
    return folder


def save_whisper(folder):
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=260, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=50,
        max_target_positions=20, init_std=0.2, pad_token_id=256, bos_token_id=256, eos_token_id=257,
        decoder_start_token_id=258,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)  # of 16,000 a second
    byte_tokenizer(pad_token="|").save_pretrained(folder)
    return folder
