"""`tlfast factors`: what it writes is what the function makes, also of parts; and what it refuses."""

import json

import pytest
import torch
from record_files import RECORDS
from tiny_models import complaint_of, save_model, save_text

import tlfast
from tlfast.cli import main
from tlfast.collecting import from_text

LAYERS = ["transformer.h.*.mlp.c_fc", "transformer.h.0.attn.c_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("factors")
    torch.set_num_threads(1)  # as every test has it; this comes before
    save_model(folder / "model")
    save_text(folder / "text")
    return folder


def words(folder, out, *more):
    data = ["--text", str(folder / "text"), "--seq-len", "8", "--bias"]
    return ["factors", str(folder / "model"), *data, "--points", *LAYERS, "--out", str(out), *more]


def test_parts_by_the_command_are_one_run(folder, tmp_path, capsys):
    whole = tmp_path / "whole.npz"
    assert main(words(folder, whole, "--kinds", "kfac", "ekfac")) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "<tlfast.Factors of kfac, ekfac>"
    assert shown[-1] == str(whole)
    for kind, more in (("kfac", []), ("ekfac", ["--basis", str(tmp_path / "kfac.npz")])):
        parts = [tmp_path / f"{kind}{k}.npz" for k in (0, 1)]
        for k, part in enumerate(parts):
            assert main(words(folder, part, "--kinds", kind, "--part", str(k), "2", *more)) == 0
        eigen = ["--eigen"] if kind == "kfac" else []
        assert main(["factors", "--merge", *map(str, parts), "--out", str(tmp_path / f"{kind}.npz"), *eigen]) == 0
    one, kfac, ekfac = (tlfast.Factors.load(tmp_path / f"{name}.npz") for name in ("whole", "kfac", "ekfac"))
    assert one.names == ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    for name in one:
        assert one[name].n_tokens == kfac[name].n_tokens == ekfac[name].n_tokens > 8
        scale = float(one[name].inputs.abs().max())
        torch.testing.assert_close(kfac[name].inputs, one[name].inputs, rtol=0, atol=1e-5 * scale)
        total = one[name].eigenvalues.sum()
        torch.testing.assert_close(ekfac[name].eigenvalues.sum(), total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("columns", [["text"], ["prompt", "answer"]])
def test_parts_of_records_are_every_so_many(folder, tmp_path, columns):
    """Of any number, and of records that are read many at once, with labels and without."""
    flags = ["--column"] if len(columns) == 1 else ["--prompt-column", "--response-column"]
    data = [word for pair in zip(flags, columns, strict=True) for word in pair]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    more = ["--dataset", str(tmp_path / "r.jsonl"), *data, "--points", LAYERS[0], "--kinds", "kfac"]
    counts = {}
    for part in ("", "0 3", "1 3", "2 3"):
        out = tmp_path / f"f{part[:1]}.npz"
        given = ["--part", *part.split()] if part else []
        assert main(["factors", str(folder / "model"), *more, "--out", str(out), *given]) == 0
        factors = tlfast.Factors.load(out)
        counts[part] = [(one.n_examples, one.n_tokens) for one in (factors[name] for name in factors)]
    sizes = [sum(len(one[name]) for name in columns) for one in RECORDS]
    assert set(counts[""]) == {(12, sum(sizes))}
    for k in range(3):
        assert set(counts[f"{k} 3"]) == {(4, sum(sizes[k::3]))}


def test_what_is_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(from_text, "load_model", None)  # nothing is loaded
    out = tmp_path / "new.npz"
    (tmp_path / "old.npz").write_bytes(b"")
    merge = ["factors", "--merge", "a.npz", "--out", str(out)]
    for given, text in (
        (
            words(folder, tmp_path / "old.npz"),
            "tlfast factors: --out must be a new .npz file in a folder that is there",
        ),
        (words(folder, tmp_path / "x.txt"), "tlfast factors: --out must be a new .npz file in a folder that is there"),
        (words(folder, out, "--kinds", "shampoo"), "tlfast factors: --kinds must be one of kfac, ekfac, adam"),
        (words(folder, out, "--part", "2", "2"), "tlfast factors: --part must be K and N with 0 <= K < N, got 2 2."),
        (words(folder, out, "--batch-tokens", "-1"), "tlfast factors: batch_tokens must be at least 1, got -1."),
        (words(folder, out, "--eigen"), "tlfast factors: --eigen must be given with --merge, got it alone."),
        (words(folder, out, "--merge", "a.npz"), "tlfast factors: the model must be given, or --merge, got both."),
        (["factors", "--out", str(out)], "tlfast factors: the model must be given, or --merge, got none."),
        ([*merge, "--loss", "x"], "tlfast factors: --loss must be left out with --merge, got both."),
    ):
        assert complaint_of(capsys, given).startswith(text)
    assert not out.exists()
