"""`tlfast collect --image-column` and `--audio-column`: rows of images and sounds, from files of every kind."""

from __future__ import annotations

import json
import re
import shutil

import datasets
import media_files
import pytest
import torch
from media_files import CLASSES, NAMES, N, png, save_folder, save_table, wav
from task_models import gradients_alone
from tiny_models import complaint_of, unit_bytes
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification, AutoModelForSpeechSeq2Seq

import tlfast
from tlfast.cli import main
from tlfast.collecting.media import Processor
from tlfast.collecting.work import Work

POINTS = {"vit": "vit.layers.*", "sound": "wav2vec2.encoder.layers.*", "whisper": "model.encoder.layers.*"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    media_files.save_vit(folder / "vit")
    media_files.save_wav2vec2(folder / "sound")
    media_files.save_whisper(folder / "whisper")
    save_folder(folder / "images")
    save_table(folder / "images.parquet", "image", png)
    save_table(folder / "sounds.parquet", "audio", wav, text=[f"say {k}" for k in range(N)])
    return folder


def words(folder, model, dataset, out, **more):
    settings = {
        "model": str(folder / model), "dataset": str(folder / dataset), "points": POINTS.get(model, "**.layers.*"),
        "out": str(out), "over": "1", "dtype": "float32", "rows_per_unit": "3", "label_column": "label",
    } | more  # fmt: skip
    return ["collect", *(w for n, v in settings.items() if v is not None for w in (f"--{n.replace('_', '-')}", str(v)))]


def loss_of(model, inputs, label):
    logits = model(**{name: value[None] for name, value in inputs.items()}).logits
    return torch.nn.functional.cross_entropy(logits, torch.tensor([label]))


def check_rows(ds, model, inputs, labels, n_rows):
    assert len(ds) == n_rows
    for k in range(n_rows):
        alone = gradients_alone(model, ds.points, lambda k=k: loss_of(model, inputs(k), labels[k]))
        for point, grad in alone.items():
            assert torch.allclose(ds[point][k], grad[0].mean(0), rtol=1e-3, atol=1e-6), (k, point)


def image_inputs(k):
    return {"pixel_values": (torch.from_numpy(media_files.pixels(k)).permute(2, 0, 1) / 255 - 0.5) / 0.5}


ORDER = sorted(range(N), key=lambda k: NAMES[k])  # a folder is read by rising path


@pytest.mark.parametrize("kind", ["folder", "jsonl", "parquet", "saved"])
def test_rows_of_images(folder, tmp_path, kind, capsys):
    dataset, column = {"folder": ("images", "image"), "jsonl": ("images.jsonl", "path")}.get(
        kind, ("images.parquet", "image")
    )
    if kind == "saved":
        images = {"image": [str(folder / "images" / name) for name in NAMES], "label": [k % 3 for k in range(N)]}
        made = datasets.Dataset.from_dict(images).cast_column("image", datasets.Image())
        made.save_to_disk(folder / "saved")
        dataset = "saved"
    assert main(words(folder, "vit", dataset, tmp_path / "out", image_column=column)) == 0, capsys.readouterr().err
    ds = tlfast.open_dataset(tmp_path / "out")
    model = AutoModelForImageClassification.from_pretrained(folder / "vit")
    order = ORDER if kind == "folder" else list(range(N))
    check_rows(ds, model, lambda i: image_inputs(order[i]), [order[i] % 3 for i in range(N)], N)
    if kind == "folder":
        assert [e["source"] for e in ds.examples] == sorted(NAMES)


def test_sounds_of_several_lengths(folder, tmp_path, capsys):
    """Beside the extractor's mask; what padding adds has no gradient, so a sum is that of each alone."""
    given = words(folder, "sound", "sounds.parquet", tmp_path / "out", audio_column="audio", reduce="sum")
    assert main(given) == 0, capsys.readouterr().err
    ds = tlfast.open_dataset(tmp_path / "out")
    model = AutoModelForAudioClassification.from_pretrained(folder / "sound")

    def alone(k):
        values = torch.from_numpy(media_files.samples(k)) / 2**15
        return {"input_values": ((values - values.mean()) / (values.var(unbiased=False) + 1e-7).sqrt()).float()}

    for k in range(N):
        for point, grad in gradients_alone(model, ds.points, lambda k=k: loss_of(model, alone(k), k % 3)).items():
            assert torch.allclose(ds[point][k], grad[0].sum(0), rtol=1e-3, atol=1e-5), (k, point)


def test_a_mean_over_what_padding_adds_is_refused(folder, tmp_path, capsys):
    complaint = complaint_of(capsys, words(folder, "sound", "sounds.parquet", tmp_path / "out", audio_column="audio"))
    assert (
        "(a batch of 2). The loss must be a sum over examples, and no mean go over what pads shorter ones" in complaint
    )
    assert main(words(folder, "sound", "sounds.parquet", tmp_path / "o", audio_column="audio", batch_examples=1)) == 0


def test_speech_and_its_text(folder, tmp_path, capsys):
    given = words(
        folder, "whisper", "sounds.parquet", tmp_path / "out", audio_column="audio", response_column="text",
        label_column=None, keep_fields="label",
    )  # fmt: skip
    assert main(given) == 0, capsys.readouterr().err
    ds = tlfast.open_dataset(tmp_path / "out").with_fields("label")
    assert [int(ds.examples[k]["label"]) for k in range(N)] == [k % 3 for k in range(N)]
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder / "whisper")
    extractor = media_files.WhisperFeatureExtractor.from_pretrained(folder / "whisper")
    tokenizer = media_files.byte_tokenizer()
    for k in range(N):
        values = media_files.samples(k).astype("float32") / 2**15
        heard = extractor(values, sampling_rate=media_files.RATE, return_tensors="pt").input_features
        labels = torch.tensor([tokenizer(f"say {k}")["input_ids"]])

        def loss(heard=heard, labels=labels):
            return model(input_features=heard, labels=labels).loss * labels.numel()

        for point, grad in gradients_alone(model, ds.points, loss).items():
            assert torch.allclose(ds[point][k], grad[0].mean(0), rtol=1e-3, atol=1e-6), (k, point)


@pytest.fixture
def decoded(monkeypatch):
    """The numbers of the images and sounds that are decoded; None stands where planning ends and the probe begins."""
    found, fields, look = [], Processor.fields, Work.look
    numbers = {data(k): k for data in (png, wav) for k in range(N)}

    def counting(self, data, name):
        found.append(numbers.get(data, -1))
        return fields(self, data, name)

    def looking(self, most):
        found.append(None)
        return look(self, most)

    monkeypatch.setattr(Processor, "fields", counting)
    monkeypatch.setattr(Work, "look", looking)
    return found


CONTINUED = {  # by bytes in a table, by paths in one, with tokens beside
    "bytes": ("vit", "images.parquet", {"image_column": "image"}),
    "paths": ("vit", "images.jsonl", {"image_column": "path", "keep_fields": "number"}),
    "speech": ("whisper", "sounds.parquet", {"audio_column": "audio", "response_column": "text", "label_column": None}),
}


@pytest.mark.parametrize("kind", CONTINUED)
def test_a_run_that_continues_decodes_what_is_missing_alone(folder, tmp_path, decoded, kind):
    """Planning decodes nothing, the probe its two, and the run the last one, which is missing."""
    model, dataset, more = CONTINUED[kind]
    assert main(words(folder, model, dataset, tmp_path / "whole", **more)) == 0
    assert not (tmp_path / "whole" / ".examples").exists()
    assert main([*words(folder, model, dataset, tmp_path / "part", **more), "--units", "0:2"]) == 0
    assert (tmp_path / "part" / ".examples").exists()
    decoded.clear()
    assert main(["collect", str(tmp_path / "part" / "config.yaml")]) == 0
    assert decoded[0] is None, "something is decoded while planning"
    assert set(decoded[1:]) == {0, 1, N - 1}
    assert unit_bytes(tmp_path / "part") == unit_bytes(tmp_path / "whole")
    assert not (tmp_path / "part" / ".examples").exists()


def test_files_that_changed_are_decoded_again_and_refused(folder, tmp_path, decoded, capsys):
    """Whatever their times and names say; a dataset without what was read before goes on, too."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(folder / "images", images)
    (images / "cat" / "bad.png").write_bytes(b"none")
    given = words(tmp_path, folder / "vit", "images", out, image_column="image", points=POINTS["vit"])
    assert main([*given, "--dry-run"]) == 0
    assert not out.exists()
    assert main([*given, "--units", "0:1"]) == 0
    stored = (out / ".examples").read_bytes()
    changes = {"cat/0.png": png(3), "cat/bad.png": png(5), "dog/new.png": png(6), "eel/2.png": None}
    for name, data in changes.items():
        before = (images / name).read_bytes() if (images / name).exists() else None
        (images / name).unlink(missing_ok=True)
        if data is not None:
            (images / name).write_bytes(data)
        decoded.clear()
        assert main(given) == 2, name
        assert "header.examples" in capsys.readouterr().err
        assert decoded.index(None) >= N - 1, f"the stored examples were taken in spite of {name}"
        (images / name).unlink(missing_ok=True)
        if before is not None:
            (images / name).write_bytes(before)
        assert (out / ".examples").read_bytes() == stored
    decoded.clear()
    assert main([*given, "--units", "1:2"]) == 0
    assert decoded[0] is None
    (out / ".examples").unlink()
    assert main(given) == 0
    assert tlfast.open_dataset(out).skipped == [("cat/bad.png", 0, "image is no image (cannot identify image file)")]
    assert tlfast.open_dataset(out).verify().ok


def test_a_reason_that_names_an_object_is_continued(folder, tmp_path, monkeypatch):
    """As datasets of the first version have it, of an object that no other process has."""
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "cat" / "bad.png").write_bytes(b"none")
    given = words(tmp_path, folder / "vit", "images", tmp_path / "out", image_column="image", points=POINTS["vit"])
    with monkeypatch.context() as patch:
        patch.setattr("tlfast.collecting.media.without_addresses", str)
        assert main([*given, "--units", "0:1"]) == 0
    (tmp_path / "out" / ".examples").unlink()
    assert main(given) == 0
    ((_, _, reason),) = tlfast.open_dataset(tmp_path / "out").skipped
    assert re.search(r"<_io.BytesIO object at 0x\w+>", reason)


def test_what_can_not_be_decoded_is_left_out(folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(folder / "images", images)
    (images / NAMES[1]).write_bytes(png(1)[:60])
    (images / "zebra").mkdir()
    (images / "zebra" / "8.png").write_bytes(png(8))
    media_files.Image.new("I;16", (8, 8)).save(images / "eel" / "9.png")
    assert main(words(folder, "vit", images, tmp_path / "out", image_column="image")) == 0, capsys.readouterr().err
    ds = tlfast.open_dataset(tmp_path / "out")
    assert len(ds) == N - 1
    reasons = {source: reason for source, _, reason in ds.skipped}
    assert reasons["zebra/8.png"] == f"label 'zebra' is none of the model's ({', '.join(CLASSES)})"
    assert reasons[NAMES[1]].startswith("image is no image (")
    assert reasons["eel/9.png"].startswith("image has more than 8 bits a channel (I")


def test_sounds_that_do_not_fit(folder, tmp_path, capsys):
    """Of another rate; longer than what the model hears, which --truncate cuts."""
    places = {
        "rate.wav": wav(0, rate=800),
        "two.wav": wav(1, channels=2),
        "long.wav": wav(2, n=20_000),
        "no.wav": b"RIFF",
    }
    rows = []
    for name, data in places.items():
        (tmp_path / name).write_bytes(data)
        rows.append({"file": name, "said": "yes"})
    rows += [{"file": 3, "said": "no"}, {"file": "not/here.wav", "said": "no"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {"audio_column": "file", "response_column": "said", "label_column": None}
    for cut in ([], ["--truncate"]):
        out = tmp_path / f"out{len(cut)}"
        given = words(folder, "whisper", tmp_path / "list.jsonl", out, **more)
        assert main([*given, *cut]) == 0, capsys.readouterr().err
        reasons = {start: reason for _, start, reason in tlfast.open_dataset(out).skipped}
        assert reasons[0] == "file has 800 samples a second, the model 16000"
        assert reasons.get(2) == (None if cut else "file has 20000 samples, more than the 16000 that are read")
        assert reasons[4] == "file is a int, no file or its bytes"
        assert reasons[5] == "file names 'here.wav', no file that can be read", "wherever the data lie"
        assert 1 not in reasons


REFUSED = {
    "text for images": ("vit", {"column": "label", "label_column": None}, "model must read text, got .*--image-column"),
    "images for sound": (
        "sound", {"image_column": "image"},
        "be --audio-column for Wav2Vec2ForSequenceClassification, which reads input_values, got --image-column",
    ),
    "no labels": ("vit", {"image_column": "image", "label_column": None}, "got --image-column image alone"),
    "a length": ("vit", {"image_column": "image", "seq_len": "8"}, "seq_len must be left out with images and sounds"),
    "no such column": ("vit", {"image_column": "photo"}, r"the columns must name columns of the data \(image, label"),
    "no image": ("vit", {"image_column": "label"}, "dataset must hold examples, got 7 records without; 7 bad"),
    "a filter on tokens": ("vit", {"image_column": "image", "filter": "length > 3"}, "length"),
}  # fmt: skip


@pytest.mark.parametrize("model, change, text", REFUSED.values(), ids=REFUSED)
def test_refused_in_a_line(folder, tmp_path, capsys, model, change, text):
    complaint = complaint_of(capsys, words(folder, model, "images.parquet", tmp_path / "out", **change))
    assert re.search(text, complaint), complaint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["sound", "whisper"])
def test_points_of_models_of_sound(folder, capsys, model):
    assert main(["points", str(folder / model), POINTS[model]]) == 0
    assert re.search(r"\[B, \d+, 16\]", capsys.readouterr().out)
