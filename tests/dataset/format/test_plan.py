"""What goes into dataset.json, config.yaml and the card: plans, columns, headers; and what others read of it."""

import subprocess

import pytest
import torch
import yaml
from dataset_cases import COLUMNS, make_dataset, make_writer, run_python

from tlfast.dataset import DatasetError, Plan


@pytest.mark.parametrize(
    "change, message",
    [
        ({"columns": {}}, "columns must name at least one point"),
        ({"columns": {"x": (torch.int64, ())}}, "dtype of 'x' must be one of float64, float32, float16, bfloat16"),
        ({"columns": {"x": (torch.float32, (-1,))}}, "shape of 'x' must be non-negative ints"),
        ({"columns": {"__metadata__": (torch.float32, ())}}, "column name must be valid text"),
        ({"columns": {"\ud800": (torch.float32, ())}}, "column name must be valid text"),
        ({"header": {"x": object()}}, "header must be JSON"),
        ({"header": {"x": float("nan")}}, "header must be JSON"),
    ],
)
def test_bad_arguments_make_no_folder(tmp_path, change, message):
    with pytest.raises(DatasetError, match=message):
        make_writer(tmp_path / "d", **change)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1, 1), (1.0, 1), (True, 1), ("1", 1)])
def test_bad_plans(numbers):
    with pytest.raises(DatasetError, match="must be a positive int"):
        Plan(*numbers)


def test_plan():
    plan = Plan(11, 4)
    assert [(u.name, u.start, u.stop) for u in plan.units] == [
        ("u000000", 0, 4),
        ("u000001", 4, 8),
        ("u000002", 8, 11),
    ]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.unit_named("u000002") == plan.unit(2)
    big = Plan(3_000_000, 1)
    assert big.unit_named("u1000000") == big.unit(1_000_000)
    for name in ("u3", "u0000001", "u000003", "U000001", "", "../u000000", "u000000\n", "u" + "\u0660" * 6):
        with pytest.raises(DatasetError):
            plan.unit_named(name)
    with pytest.raises(IndexError):
        plan.unit(3)


def test_config_and_card(tmp_path):
    make_dataset(tmp_path, config={"points": ["a|b", "ü"], "dtype": "bfloat16"}, columns={"a|b`\n": COLUMNS["loss"]})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"points": ["a|b", "ü"], "dtype": "bfloat16"}
    card = (tmp_path / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["configs"] == [{"config_name": "rows", "data_files": "rows/*.parquet"}]
    assert r"| `a\|b'\x0a` | F16 | [] |" in card


def test_hugging_face_reads_the_rows_by_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = (
        "import sys, datasets; d = datasets.load_dataset(sys.argv[1], 'rows', split='train', cache_dir=sys.argv[2]);"
        "print(len(d), d[10]['input_ids'], sorted(d.column_names)[:3], d[3]['source'])"
    )
    make_dataset(tmp_path / "d")
    process = run_python(
        "-c", script, tmp_path / "d", tmp_path / "cache", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    output, errors = process.communicate(timeout=120)
    assert output == "11 [10, 2147483647] ['flags', 'id', 'input_ids'] file_0.py\n", errors


def test_importing_the_dataset_needs_torch_and_numpy_only():
    script = (
        "import sys\n"
        "for name in ('pyarrow', 'safetensors', 'google_crc32c', 'yaml', 'pandas'): sys.modules[name] = None\n"
        "import tlfast.dataset as d\n"
        "try: d.DatasetWriter('/nonexistent', header={}, columns={}, plan=d.Plan(1, 1))\n"
        "except ImportError as error: print(error)\n"
    )
    process = run_python("-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = process.communicate(timeout=120)
    assert "google_crc32c must be installed" in output, errors
    assert output.endswith("Run: pip install 'tlfast[collect]'\n")
