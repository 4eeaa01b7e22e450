"""Examples added later: a plan extension, never an edit; old bytes stay, hostile extensions are refused."""

import json
import os
import shutil
import signal

import failing_farm
import pytest
from dataset_cases import (
    COLUMNS,
    PLAN,
    check_rows,
    content,
    make_base,
    make_dataset,
    make_writer,
    truth,
    write_units,
)

from tlfast.dataset import DatasetError, DatasetWriter, Plan, open_dataset, verify_dataset
from tlfast.dataset.format.card import recounted
from tlfast.dataset.format.strict_json import checksum_of

SAID = {"sha256": "f" * 64, "skipped": [["a.txt", 3, "no UTF-8 text"]]}
LONGER = PLAN.extended(6)
TENSORS = truth(plan=LONGER)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """The folder of a complete dataset that was extended by six examples."""
    writer = make_writer(make_base(tmp_path_factory.mktemp("extended") / "d", TENSORS))
    writer.extend(6, SAID)
    write_units(writer, TENSORS)
    return writer.out


@pytest.fixture
def out(extended, tmp_path):
    """A copy of it."""
    return shutil.copytree(extended, tmp_path / "d")


def test_an_extension_begins_a_unit():
    twice = PLAN.extended(6).extended(1)
    assert [(u.name, u.start, u.stop) for u in twice.units] == [
        ("u000000", 0, 4), ("u000001", 4, 8), ("u000002", 8, 11), ("u000003", 11, 15), ("u000004", 15, 17),
        ("u000005", 17, 18),
    ]  # fmt: skip
    assert twice.n_units == 6
    assert [twice.extension_of(u.start) for u in twice.units] == [0, 0, 0, 1, 1, 2]
    assert all(twice.unit_named(u.name) == u for u in twice.units)
    assert twice.to_json() == PLAN.to_json()  # dataset.json knows nothing of extensions
    with pytest.raises(DatasetError, match="u000006"):
        twice.unit_named("u000006")
    for at in ((0,), (18,), (11, 11), (12, 11)):
        with pytest.raises(DatasetError, match="extended_at must rise between 0 and 18"):
            Plan(18, 4, at)


def test_rows_of_both_parts_and_no_old_byte_changed(out, tmp_path):
    before = content(make_base(tmp_path / "alone", TENSORS))
    after = content(out)
    assert {name for name in before if after[name] != before[name]} == {"README.md"}  # which says how many there are
    assert b"17 examples" in after["README.md"]
    assert (out / "dataset.json").read_bytes().count(b'"n_examples": 11') == 1
    ds = open_dataset(out)
    check_rows(ds, TENSORS)
    assert len(ds) == 17
    assert ds.plan == LONGER
    assert ds.skipped == [("a.txt", 3, "no UTF-8 text")]
    assert verify_dataset(out).ok
    assert make_writer(out).done == {unit.name for unit in LONGER.units}


def test_units_of_an_extension_are_missed_and_made_again(out):
    expected = content(out)
    (out / "commits" / "u000004.json").unlink()
    with pytest.raises(DatasetError, match="must hold all 5 units of its plan"):
        open_dataset(out)
    assert "1 of 5 units are not there (u000004" in str(verify_dataset(out))
    write_units(make_writer(out), TENSORS)
    assert content(out) == expected


def test_a_commit_of_another_extension_is_refused(out, tmp_path):
    """Its units say which extension planned them."""
    make_base(tmp_path / "e", TENSORS)
    writer = make_writer(tmp_path / "e")
    writer.extend(6, SAID | {"sha256": "0" * 64})
    write_units(writer, TENSORS)
    assert (tmp_path / "e" / "commits" / "u000000.json").read_bytes() == (out / "commits" / "u000000.json").read_bytes()
    foreign = tmp_path / "e" / "commits" / "u000003.json"
    (out / "commits" / "u000003.json").write_bytes(foreign.read_bytes())
    with pytest.raises(DatasetError, match="agree with the plan"):
        open_dataset(out)
    assert [problem.unit for problem in verify_dataset(out).problems] == ["u000003"]


def test_of_two_extensions_at_once_the_first_wins(tmp_path):
    make_base(tmp_path, TENSORS)
    writers = [make_writer(tmp_path) for _ in range(3)]
    writers[0].extend(6, SAID)
    writers[1].extend(6, SAID)  # the same: both go on
    assert writers[0].plan == writers[1].plan == LONGER
    with pytest.raises(DatasetError, match=r"be free for this extension, got one by other .*plan/x000001\.json"):
        writers[2].extend(6, SAID | {"sha256": "0" * 64}, "others: yes")
    assert (tmp_path / "config.yaml").read_text() == "reduce: mean\n"
    write_units(writers[1], TENSORS)
    check_rows(open_dataset(tmp_path), TENSORS)
    assert sorted(os.listdir(tmp_path / "plan")) == ["x000001.json"]


def test_a_dataset_that_is_extended_while_it_is_opened(tmp_path, monkeypatch):
    """The commits that a reader lists may be of units that were not planned when it read the plan."""
    from tlfast.dataset.format import commits

    make_base(tmp_path, TENSORS)
    listed = commits.committed_names

    def extended_meanwhile(*arguments):
        monkeypatch.undo()
        writer = make_writer(tmp_path)
        writer.extend(6, SAID)
        write_units(writer, TENSORS)
        return listed(*arguments)

    monkeypatch.setattr(commits, "committed_names", extended_meanwhile)
    check_rows(open_dataset(tmp_path), TENSORS)


def test_config_and_card_follow_but_a_card_of_ones_own_stays(tmp_path):
    make_base(tmp_path, TENSORS)
    (tmp_path / "README.md").write_text("mine")
    writer = make_writer(tmp_path)
    writer.extend(6, SAID, {"max_examples": 17})
    assert (tmp_path / "config.yaml").read_text() == "max_examples: 17\n"
    assert (tmp_path / "README.md").read_text() == "mine"


def test_an_extended_dataset_is_overwritten_whole(out):
    make_dataset(out, overwrite=True)
    assert not (out / "plan").exists()
    check_rows(open_dataset(out), truth())


def test_strangers_in_its_folder_are_not_removed(out):
    (out / "plan" / "thesis.tex").write_text("")
    with pytest.raises(DatasetError, match=r"hold only a tlfast dataset to be overwritten, got 'plan/thesis\.tex'"):
        make_writer(out, overwrite=True)
    check_rows(open_dataset(out), TENSORS)


def test_a_disk_without_room_for_the_new_rows(tmp_path, monkeypatch):
    make_base(tmp_path, TENSORS)
    writer = make_writer(tmp_path)
    with pytest.raises(DatasetError, match="GB free for this dataset"):
        writer.extend(10**15, SAID)
    assert not (tmp_path / "plan").exists()


def forge(change):
    """Change an extension and give it a right checksum."""

    def write(path):
        value = json.loads(path.read_text())
        change(value)
        value.pop("checksum", None)
        path.write_text(json.dumps(value | {"checksum": checksum_of(value)}))

    return write


HOSTILE = [
    lambda path: path.write_text("{}"),
    lambda path: path.write_text("[]"),
    lambda path: path.write_text('"x"'),
    lambda path: path.write_bytes(b"\xff"),
    lambda path: path.write_text(path.read_text().replace('"n_examples": 6', '"n_examples": 7')),
    forge(lambda value: value.update(n_examples=0)),
    forge(lambda value: value.update(n_examples=True)),
    forge(lambda value: value.update(n_examples=2**62)),
    forge(lambda value: value.update(number=2)),
    forge(lambda value: value.update(first_example=10)),
    forge(lambda value: value.update(extends="0" * 64)),
    forge(lambda value: value.update(version=2)),
    forge(lambda value: value.update(examples=[])),
    forge(lambda value: value.update(more=1)),
    forge(lambda value: value.pop("extends")),
    lambda path: path.rename(path.with_name("x000002.json")),
    lambda path: path.with_name("x000003.json").write_bytes(path.read_bytes()),
    lambda path: (path.rename(path.parent.parent / "away"), path.symlink_to(path.parent.parent / "away")),
    lambda path: (path.parent.rename(path.parent.parent / "away"), path.parent.symlink_to("away")),
    lambda path: (path.unlink(), path.mkdir()),
]


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_extensions(out, damage):
    damage(out / "plan" / "x000001.json")
    for use in (open_dataset, make_writer):
        with pytest.raises(DatasetError, match="plan"):
            use(out)
    assert not verify_dataset(out).ok


def test_a_lost_extension_leaves_units_that_nobody_planned(out):
    (out / "plan" / "x000001.json").unlink()
    with pytest.raises(DatasetError, match="unit must be one of the plan's 3 units"):
        open_dataset(out)


def test_files_of_other_names_are_no_extensions(out):
    (out / "plan" / "x1.json").write_text("x")
    (out / "plan" / ".tlfast-0123456789abcdef.tmp").write_text("x")
    check_rows(open_dataset(out), TENSORS)
    make_writer(out)  # removes what a killed run left
    assert sorted(os.listdir(out / "plan")) == ["x000001.json", "x1.json"]


@pytest.mark.parametrize("skipped", [7, [7], [["a", 0]], [["a", "0", "b"]], "abc", {"abc": 1}])
def test_a_header_of_another_program_may_say_anything_of_skipped_examples(tmp_path, skipped):
    header = {"examples": {"skipped": skipped}}
    ds = make_dataset(tmp_path, header=header)
    check_rows(ds, truth())
    with pytest.raises(DatasetError, match=r"examples\.skipped must list a source, a start and a reason each"):
        ds.skipped  # noqa: B018


def test_a_header_without_examples_skipped_none(tmp_path):
    assert make_dataset(tmp_path).skipped == []


def test_the_run_that_began_says_what_is_about_it(tmp_path):
    for threads in (3, 4):
        writer = DatasetWriter(tmp_path, header={}, columns=COLUMNS, plan=PLAN, about={"threads": threads})
        assert writer.description.about["threads"] == 3


@pytest.mark.long
@failing_farm.needs_preload
def test_killed_while_it_was_extended(tmp_path):
    """Before each system call: the old rows are there, and the next run extends it or finds it extended."""
    columns, plan = failing_farm.COLUMNS, failing_farm.PLAN
    _, runs = failing_farm.run_farm(tmp_path / "farm", "extend", "python", ["kill"])
    assert {run["status"] for run in runs} == {-signal.SIGKILL}
    n_extended = []
    for run in runs:
        out = tmp_path / "farm" / f"kill-{run['k']}"
        writer = make_writer(out, columns=columns, plan=plan)
        n_extended.append(len(writer.description.extensions))
        check_rows(open_dataset(out, partial=True), truth(columns, plan))
        if not n_extended[-1]:
            writer.extend(6, {"sha256": "0" * 64}, {"max_examples": 17})
        assert writer.plan == plan.extended(6)
        assert (out / "config.yaml").read_text() == "max_examples: 17\n"
        assert "17 examples" in (out / "README.md").read_text()
        assert len(writer.done) == 3
    assert n_extended == sorted(n_extended)
    assert set(n_extended) == {0, 1}


def test_a_card_is_recounted_once():
    """A run that is killed between the card and the extension does both again, with 12 examples where there were 2."""
    cards = [f"# Mine\n\n{n} examples, 1 points, written by tlfast.\n\n{note}" for n in (2, 12) for note in ("a", "b")]
    few, other_few, many, other_many = cards
    assert recounted(few, few, many) == many
    assert recounted(other_few, few, many) == other_many
    assert recounted(many, few, many) == many
    assert recounted(other_many, few, many) == other_many
    assert recounted("my own: 2 examples, 1 points, written by tlfast.", few, many).startswith("my own: 2 examples")
