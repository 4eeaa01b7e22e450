"""bergson reads what is exported to it as its own, and what it builds is imported: both as float64 says."""

from __future__ import annotations

import csv

import bergson_builds
import pytest
import torch
from bergson_cases import DIM, MODULES, PROJECT, TEXTS, collected, gradients, projected, true_rows
from tiny_models import byte_tokenizer, collect, save_model, tiny_model

import tlfast
from tlfast.cli import main
from tlfast.dataset import export_dataset, import_bergson, open_dataset

pytestmark = [pytest.mark.peers("bergson"), pytest.mark.filterwarnings("default")]  # of theirs

QUERY = "a step of a unit"
# Of float32 sums over at most 2^12 products, in another order, of a model that runs in float32 itself.
CLOSE = {"rtol": 2**-13, "atol": 2**-16}
LONG = bergson_builds.LONG


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its true rows in float64, and an index that is exported of them."""
    folder = tmp_path_factory.mktemp("bergson")
    save_model(folder / "model")
    rows = {name: values.float() for name, values in true_rows(tiny_model(dtype=torch.float64).eval()).items()}
    export_dataset(collected(folder / "ds", folder / "model", rows), folder / "index", to="bergson")
    return folder


@pytest.fixture(scope="module")
def rows():
    """What float64 says of the texts, and of the query: by module [texts, p * p] and [1, p * p]."""
    model = tiny_model(dtype=torch.float64).eval()
    queries = true_rows(model, (QUERY,))
    return {name: (row.flatten(1), queries[name].flatten(1)) for name, row in true_rows(model).items()}


def tokens(text):
    return byte_tokenizer()(text)["input_ids"]


def summed_loss(model, text):
    ids = torch.tensor([tokens(text)])
    return model(ids, labels=ids).loss * (ids.shape[1] - 1)


def test_its_attributor_traces_a_query(folder, rows):
    import bergson

    model, attributor = tiny_model().eval(), bergson.Attributor(folder / "index")
    with attributor.trace(model.base_model, None) as result:
        summed_loss(model, QUERY).backward()
    scores = torch.stack([query @ row.T for row, query in rows.values()]).sum(0)[0]
    expected = scores.sort(descending=True)
    assert result.indices[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(result.scores[0].double(), expected.values, **CLOSE)
    assert scores.abs().max() > 1000 * CLOSE["atol"]


def ask(index, text, record, monkeypatch, top_k):
    """What `bergson query` says are the nearest examples."""
    from bergson.config.config import QueryConfig
    from bergson.query.query_index import query

    asked = iter([text, "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    query(QueryConfig(index=str(index), record=str(record), top_k=top_k))
    with open(record, newline="") as file:
        return [line for line in csv.DictReader(file) if line["direction"] == "Top"]


def test_its_query_command_prints_the_nearest_texts(folder, rows, tmp_path, monkeypatch, capsys):
    found = ask(folder / "index", QUERY, tmp_path / "found.csv", monkeypatch, top_k=len(TEXTS))
    texts, wanted = (torch.cat([both[k] for both in rows.values()], dim=1) for k in (0, 1))
    cosines = torch.nn.functional.cosine_similarity(texts, wanted)
    assert TEXTS.index("a") == 1
    cosines[1] = 0  # an example of one token has a row of zeros
    expected = cosines.sort(descending=True)
    assert [line["result"] for line in found] == [TEXTS[k] for k in expected.indices]
    torch.testing.assert_close(
        torch.tensor([float(line["score"]) for line in found]).double(), expected.values, **CLOSE
    )
    assert f"results for '{QUERY}'" in capsys.readouterr().out


def test_by_the_command_line_from_a_text_to_the_nearest_one(folder, tmp_path, monkeypatch, capsys):
    for k, text in enumerate(LONG):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{k}.txt").write_text(text)
    points = ["transformer.h.*.attn.c_*", "transformer.h.*.mlp.c_*"]
    words = ["--model", str(folder / "model"), "--text", str(tmp_path / "texts"), "--out", str(tmp_path / "rows")]
    words += ["--of", "weight", "--project", f"dim={DIM},scheme=bergson-2", "--dtype", "float32", "--seq-len", "64"]
    assert main(["collect", *words, "--points", *points]) == 0
    assert main(["export", str(tmp_path / "rows"), "--to", "bergson"]) == 0
    for k, text in enumerate(LONG):
        (line, *_) = ask(
            tmp_path / "rows-bergson", text, tmp_path / f"{k}.csv", monkeypatch, top_k=2
        )  # of one its own code takes no number
        assert line["result"] == text
        assert float(line["score"]) == pytest.approx(1, abs=CLOSE["rtol"])  # a cosine


def build(folder, **settings):
    """An index of bergson's own of the texts."""
    return bergson_builds.build(folder, texts=tuple(TEXTS), of=tiny_model().eval(), **settings)


@pytest.mark.parametrize(
    "settings",
    [{"projection_dim": DIM}, {"projection_dim": 16}, {}, {"projection_dim": DIM, "attribute_tokens": True}],
    ids=["4", "16", "unprojected", "per token"],
)
def test_its_builds_are_imported_and_exported_again(tmp_path, settings):
    import bergson

    made = build(tmp_path / "index", **settings)
    ds = open_dataset(import_bergson(made, tmp_path / "ds", rows_per_unit=2))
    assert ds.points == [f"{name}:weight" for name in MODULES]
    model, dim = tiny_model(dtype=torch.float64).eval(), settings.get("projection_dim")
    for k, text in enumerate(TEXTS):
        truth = gradients(model, tokens(text))
        for name, grad in truth.items():
            row = ds[f"{name}:weight"][k]
            row = row.sum(0) if "attribute_tokens" in settings else row
            wanted = grad.flatten() if dim is None else projected(grad, name, dim)
            torch.testing.assert_close(row.double(), wanted, rtol=CLOSE["rtol"], atol=float(grad.abs().sum()) * 2**-18)
    assert [(e["text"], e["length"]) for e in ds.examples] == [(text, len(text.encode())) for text in TEXTS]
    again = export_dataset(ds.path, to="bergson")
    for name in (
        "gradients.bin",
        "processor_config.yaml",
        *(["offsets.npy"] if "attribute_tokens" in settings else []),
    ):
        assert (again / name).read_bytes() == (made / name).read_bytes()
    ours, theirs = (bergson.GradientProcessor.load(path) for path in (again, made))
    theirs.check_projection_matches(ours, "what was exported")
    assert ds.header["specs"][0].get("project") == (None if dim is None else PROJECT | {"dim": dim})


def test_its_builds_are_scored_against_what_is_collected(tmp_path, rows):
    import_bergson(build(tmp_path / "index", projection_dim=DIM), tmp_path / "ds", base="transformer")
    points, project = [f"transformer.{name}" for name in MODULES], tlfast.Projection(DIM, scheme="bergson-2")
    collect(tiny_model().eval(), tmp_path / "asked", [tokens(QUERY)], points=points, of="weight", project=project)
    found = tlfast.score(tmp_path / "ds", tmp_path / "asked", "dot", k=len(TEXTS))
    expected = torch.stack([query @ row.T for row, query in rows.values()]).sum(0)[0].sort(descending=True)
    assert found.indices[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(found.scores[0].double(), expected.values, **CLOSE)


@pytest.mark.peers("faiss")
def test_its_faiss_index(folder, rows, monkeypatch):
    import bergson
    import faiss
    from bergson.query.faiss_index import FaissConfig

    monkeypatch.setattr(faiss, "GpuIndex", type("GpuIndex", (), {}), raising=False)  # which it asks for on a CPU, too
    attributor = bergson.Attributor(folder / "index", faiss_cfg=FaissConfig())
    scores, indices = attributor.search({name: query.float() for name, (_, query) in rows.items()}, 3)
    expected = torch.stack([query @ row.T for row, query in rows.values()]).sum(0)[0].topk(3)
    assert indices[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(scores[0].double(), expected.values, **CLOSE)
