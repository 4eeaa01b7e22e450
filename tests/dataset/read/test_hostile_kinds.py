"""Version 2 of the format: files that lie about tokens, kinds of columns or codes are refused."""

import json
import re

import pytest
from kinds_cases import LENGTHS, PLAN, make_writer, rows_of, truth, write_units

from tlfast.dataset import DatasetError, Example, open_dataset, verify_dataset
from tlfast.dataset.format.strict_json import checksum_of, sha256_of


@pytest.fixture
def out(tmp_path):
    """The folder of a complete dataset."""
    write_units(make_writer(tmp_path / "d"))
    return tmp_path / "d"


def edit_json(path, change):
    """Apply ``change`` to the JSON value in ``path``."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(version=1),
        lambda c: c.pop("tokens"),
        lambda c: c.update(tokens=None),
        lambda c: c.update(tokens=4),
        lambda c: c.update(tokens=-5),
        lambda c: c.update(tokens=True),
        lambda c: c.update(tokens="5"),
        lambda c: c.update(tokens=2**70),
        lambda c: c.update(tokens=5.0),
    ],
)
def test_commits_that_count_other_tokens(out, change):
    edit_json(out / "commits" / "u000000.json", change)
    with pytest.raises(DatasetError):
        open_dataset(out)


def test_a_commit_that_counts_tokens_where_no_column_has_any(tmp_path):
    write_units(make_writer(tmp_path / "d", columns={"h": make_writer(tmp_path / "e").columns["h:act"]}))
    edit_json(tmp_path / "d" / "commits" / "u000000.json", lambda c: c.update(version=2, tokens=0))
    with pytest.raises(DatasetError, match="must agree with the plan"):
        open_dataset(tmp_path / "d")


@pytest.mark.parametrize("lengths", [(2, 0, 2), (3, -1, 3)])
def test_lengths_of_the_row_table_that_are_not_the_tokens_of_the_commit(tmp_path, monkeypatch, lengths):
    # A row table with other lengths, under a commit that says that there are five tokens.
    monkeypatch.setattr("tlfast.dataset.write.unit_contents._token_counts", lambda who, examples: [2, 0, 3])
    writer, unit = make_writer(tmp_path / "other"), PLAN.unit(0)
    examples = [Example(i, [1], "a", 0, length) for i, length in enumerate(lengths)]
    writer.write_unit(unit, rows_of(unit, truth()), examples)
    ds = open_dataset(tmp_path / "other", partial=True)
    message = "must hold examples 0..2 and the norms of 5 points, got lengths of other than 5 tokens"
    with pytest.raises(DatasetError, match=re.escape(message)):
        ds["t"][0]
    assert not verify_dataset(tmp_path / "other", partial=True).ok


def test_a_header_of_another_number_of_tokens(out):
    path = out / "data" / "u000000.safetensors"
    data = path.read_bytes()
    assert data.count(b'"shape":[5,5]') == 1
    path.write_bytes(data.replace(b'"shape":[5,5]', b'"shape":[6,5]'))
    with pytest.raises(DatasetError, match="must begin with the header of its plan"):
        open_dataset(out)["t"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c[2].update(per="word"), "per of 't' must be one of example, token, got 'word'"),
        (lambda c: c[2].update(per=["token"]), "per of 't' must be one of example, token"),
        (
            lambda c: c[3].update(encoding="int2"),
            (
                "encoding of 'q' must be None or one of int8, int8:64, float8_e4m3fn, int4:64, "
                "int8:stochastic, int8:64:stochastic, float8_e4m3fn:stochastic, int4:64:stochastic, got 'int2'"
            ),
        ),
        (
            lambda c: c[3].update(encoding=8),
            (
                "encoding of 'q' must be None or one of int8, int8:64, float8_e4m3fn, int4:64, "
                "int8:stochastic, int8:64:stochastic, float8_e4m3fn:stochastic, int4:64:stochastic, got 8"
            ),
        ),
        (lambda c: c[3].update(dtype="F16"), "dtype of the encoded 'q' must be float32"),
        (lambda c: c[1].update(of=""), "of of 'h:act' must be 1 to 64 printable characters"),
        (lambda c: c[1].pop("of"), "must list columns with name, dtype, shape, of, per and encoding"),
        (lambda c: c[1].update(more=1), "must list columns with name, dtype, shape, of, per and encoding"),
        (lambda c: c[0].update(name="q:codes"), "must not be the name of a tensor of the encoded 'q'"),
        (lambda c: [e.update(of="grad", per="example", encoding=None) for e in c], "must match its config_hash"),
    ],
)
def test_columns_that_cannot_be(out, change, message):
    def forge(d):
        d.pop("checksum")
        change(d["columns"])
        d["config_hash"] = sha256_of({key: d[key] for key in ("format", "version", "header", "columns", "plan")})
        d["checksum"] = checksum_of(d)

    edit_json(out / "dataset.json", forge)
    with pytest.raises(DatasetError, match=re.escape(message)):
        open_dataset(out)


def test_version_1_has_no_keys_of_version_2(tmp_path):
    write_units(make_writer(tmp_path / "d", columns={"h": make_writer(tmp_path / "e").columns["h"]}))
    written = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert written["version"] == 1
    assert set(written["columns"][0]) == {"name", "dtype", "shape"}
    assert len(open_dataset(tmp_path / "d")) == len(LENGTHS)
