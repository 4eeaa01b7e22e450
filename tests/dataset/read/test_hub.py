"""Pushing to the Hugging Face hub and opening from it: the real client against a stand-in for the hub's API."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from dataset_cases import HEADER, PLAN, check_rows, content, flip, make_dataset, make_writer, rows_of, truth
from dataset_cases import examples as examples_of
from hub_stand_in import Hub

import tlfast
from tlfast.cli import main
from tlfast.dataset import DatasetError, GradientDataset, Plan, open_dataset
from tlfast.dataset.format.card import dataset_card
from tlfast.dataset.format.description import describe
from tlfast.dataset.read.hub import CachedStore

# The client of the hub uses its HTTP library in a way that this library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty hub, and an empty cache of the client."""
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    yield hub
    hub.close()


@pytest.fixture
def ds(tmp_path):
    """A complete dataset."""
    return make_dataset(tmp_path / "ds")


def test_there_and_back(hub, ds):
    url = ds.push_to_hub("me/gradients", private=True, token="t", commit_message="My gradients")
    assert url == f"{hub.url}/datasets/me/gradients"
    assert hub.repos["me/gradients"]["private"]
    pushed = {name: data for name, data in hub.files("me/gradients").items() if name != ".gitattributes"}
    assert pushed.pop("dataset.json") == (ds.path / "dataset.json").read_bytes()
    assert pushed == {name: data for name, data in content(ds.path).items() if name != ".lock"}
    opened = GradientDataset.from_pretrained("me/gradients", token="t")
    check_rows(opened, truth())
    assert opened.verify().ok
    assert opened.header == HEADER
    check_rows(pickle.loads(pickle.dumps(opened)), truth())
    n = len(hub.log)
    check_rows(GradientDataset.from_pretrained("me/gradients", token="t"), truth())
    assert not [path for method, path in hub.log[n:] if method == "GET" and "/resolve/" in path], "it was in the cache"


def test_a_folder_is_opened_where_it_is(ds):
    assert GradientDataset.from_pretrained(ds.path).path == ds.path
    assert GradientDataset.from_pretrained(str(ds.path)).path == ds.path


def test_a_unit_is_said_to_exist_after_its_data(hub, ds):
    ds.push_to_hub("me/gradients", token="t")
    for files in hub.history("me/gradients"):
        committed = {name[8:15] for name in files if name.startswith("commits/")}
        assert committed <= {name[5:12] for name in files if name.startswith("data/")}
        assert committed <= {name[5:12] for name in files if name.startswith("rows/")}


def test_an_upload_cut_short_is_completed_by_the_next(hub, ds):
    commits = iter([None, 403])
    hub.refuse = lambda method, path: next(commits) if "/commit/" in path else None
    from huggingface_hub.errors import HfHubHTTPError

    with pytest.raises(HfHubHTTPError):
        ds.push_to_hub("me/gradients", token="t")
    assert "dataset.json" not in hub.files("me/gradients")
    hub.refuse = lambda method, path: None
    n = len(hub.log)
    ds.push_to_hub("me/gradients", token="t")
    assert not [path for method, path in hub.log[n:] if method == "PUT"], "the data were there already"
    check_rows(GradientDataset.from_pretrained("me/gradients", token="t"), truth())


def test_only_what_belongs_to_the_dataset_is_pushed(hub, ds):
    for name in ("notes.txt", ".tlfast-0123456789abcdef.tmp", "data/u000009.safetensors", "rows/u[0].parquet"):
        (ds.path / name).write_bytes(b"x")
    ds.push_to_hub("me/gradients", token="t")
    names = set(hub.files("me/gradients")) - {".gitattributes"}
    assert names == {name for name in content(ds.path) if "/u0" in name or name in ("README.md", "config.yaml")} - {
        "data/u000009.safetensors"
    } | {"dataset.json"}


def test_a_partial_dataset_and_what_is_added_to_it(hub, tmp_path):
    writer = make_writer(tmp_path / "part")
    writer.write_unit(PLAN.unit(1), rows_of(PLAN.unit(1), truth()), examples_of(PLAN.unit(1)))
    open_dataset(tmp_path / "part", partial=True).push_to_hub("me/part", token="t")
    with pytest.raises(DatasetError, match="must hold all 3 units of its plan"):
        GradientDataset.from_pretrained("me/part", token="t")
    check_rows(GradientDataset.from_pretrained("me/part", token="t", partial=True), truth())
    for unit in (PLAN.unit(0), PLAN.unit(2)):
        writer.write_unit(unit, rows_of(unit, truth()), examples_of(unit))
    open_dataset(tmp_path / "part").push_to_hub("me/part", token="t")
    check_rows(GradientDataset.from_pretrained("me/part", token="t"), truth())


def test_an_extended_dataset(hub, tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
    settings = {"points": "0", "rows_per_unit": 2, "progress": False}
    for n, extend in ((3, False), (5, True)):
        tlfast.collect(model, [[1, 2, 3]] * n, tmp_path / "more", extend=extend, **settings)
        open_dataset(tmp_path / "more").push_to_hub("me/more", token="t")
        opened = GradientDataset.from_pretrained("me/more", token="t")
        assert torch.equal(opened["0"][:], open_dataset(tmp_path / "more")["0"][:])
    assert "plan/x000001.json" in hub.files("me/more")


def test_a_branch_and_a_revision(hub, ds, tmp_path):
    ds.push_to_hub("me/gradients", token="t")
    first = hub.repos["me/gradients"]["branches"]["main"]
    make_dataset(tmp_path / "other", header={"other": 1}).push_to_hub("me/other", token="t")
    with pytest.raises(DatasetError, match=r"repo_id must be new, or hold this dataset, got me/other with"):
        ds.push_to_hub("me/other", token="t")
    open_dataset(tmp_path / "ds").push_to_hub("me/gradients", revision="trial", token="t")
    assert hub.repos["me/gradients"]["branches"]["main"] == first
    check_rows(GradientDataset.from_pretrained("me/gradients", revision="trial", token="t"), truth())
    check_rows(GradientDataset.from_pretrained("me/gradients", revision=first, token="t"), truth())


def test_damage_is_not_handed_on(hub, ds):
    flip(ds.path / "data" / "u000001.safetensors", 4100, 2)
    with pytest.raises(DatasetError, match=r"push_to_hub: dataset must be right before it is shared, got .*CRC32C"):
        open_dataset(ds.path).push_to_hub("me/gradients", token="t")
    assert hub.repos == {}


def test_a_repository_that_is_not_there_or_no_dataset(hub, ds):
    from huggingface_hub.errors import RepositoryNotFoundError

    with pytest.raises(RepositoryNotFoundError):
        GradientDataset.from_pretrained("me/nothing", token="t")
    ds.push_to_hub("me/gradients", token="t")
    hub.files("me/gradients").pop("dataset.json")
    with pytest.raises(DatasetError, match=r"without dataset\.json"):
        GradientDataset.from_pretrained("me/gradients", token="t")


def test_the_commands(hub, ds, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "t")
    capsys.readouterr()
    assert main(["push", str(ds.path), "me/gradients", "--private"]) == 0
    assert capsys.readouterr().out == f"11 rows: {hub.url}/datasets/me/gradients\n"
    assert main(["pull", "me/gradients", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out == f"11 rows: {tmp_path / 'mine'}\n"
    assert hub.repos["me/gradients"]["private"]
    check_rows(open_dataset(tmp_path / "mine"), truth())
    assert open_dataset(tmp_path / "mine").verify().ok


def test_a_hub_that_cannot_be_reached_is_one_line(hub, ds, capsys, monkeypatch):
    def fail(*_, **__):
        raise type("ConnectError", (Exception,), {"__module__": "httpx"})("Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    assert main(["push", str(ds.path), "me/gradients"]) == 1
    assert capsys.readouterr().err == "tlfast push: the hub can't be reached: Connection refused\n"
    hub.refuse = lambda method, path: 401
    assert main(["pull", "me/gradients", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("tlfast pull: ")


# ----------------------------------------------------------------------------------------------------------- the card


def test_the_card_is_what_the_hub_expects(ds):
    from huggingface_hub import DatasetCard

    card = DatasetCard.load(ds.path / "README.md")
    assert card.data.configs == [{"config_name": "rows", "data_files": "rows/*.parquet"}]
    assert card.data.size_categories == ["n<1K"]
    assert card.data.tags == ["gradients", "interpretability", "tlfast"]
    assert "11 examples, 4 points" in card.text


def test_the_hubs_library_loads_the_rows_by_the_card(ds, tmp_path, monkeypatch):
    import datasets

    rows = datasets.load_dataset(str(ds.path), cache_dir=str(tmp_path / "cache"))["train"]
    assert rows["id"][:] == list(range(11))
    assert "norm:blocks.1.attn" in rows.column_names


@pytest.mark.parametrize(
    "n, size",
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**10, "10B<n<100B"), (10**12, "n>1T")],
)
def test_size_categories(n, size):
    description = describe("test", {}, {"h": (torch.float32, ())}, Plan(n, 1))
    assert f"size_categories:\n- {size}\n" in dataset_card(description)


# ---------------------------------------------------------------------------------------------- the cache and its links


@pytest.fixture
def snapshot(hub, ds):
    """The folder of a snapshot in the cache."""
    ds.push_to_hub("me/gradients", token="t")
    return GradientDataset.from_pretrained("me/gradients", token="t").path


def test_blobs_that_repositories_share(snapshot):
    """Newer clients keep a blob once for all repositories, behind a second link."""
    for link in (snapshot / "data").iterdir():
        blob = link.resolve()
        shared = snapshot.parents[2] / "blobs" / blob.name[:2] / blob.name
        shared.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(blob, shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    check_rows(open_dataset(CachedStore(snapshot)), truth())


@pytest.mark.parametrize("name", ["data/u000001.safetensors", "commits/u000001.json", "dataset.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_no_link_leads_out_of_the_cache(snapshot, tmp_path, name, relative):
    outside = tmp_path / "secret"
    shutil.copy((snapshot / name).resolve(), outside)
    (snapshot / name).unlink()
    (snapshot / name).symlink_to(os.path.relpath(outside, (snapshot / name).parent) if relative else outside)
    with pytest.raises(DatasetError, match="must be a "):
        open_dataset(CachedStore(snapshot))


def test_no_blob_leads_out_of_the_cache(snapshot, tmp_path):
    blob = (snapshot / "data" / "u000001.safetensors").resolve()
    shutil.move(blob, tmp_path / "secret")
    blob.symlink_to(tmp_path / "secret")
    with pytest.raises(DatasetError, match="must be a regular file"):
        open_dataset(CachedStore(snapshot))


def test_a_missing_library_names_its_extra(ds, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'tlfast\[hub\]'"):
        ds.push_to_hub("me/gradients")
    with pytest.raises(ImportError, match=r"pip install 'tlfast\[hub\]'"):
        GradientDataset.from_pretrained("me/gradients")
