"""The house rules hold: a file imports only from floors beneath it, says first what it holds, and stays small."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkout import ROOT, tracked
from source_rules import (
    CORE_LIBRARIES,
    FLOORS,
    MOST_LINES,
    MOST_PARAMETERS,
    NATIVE_FLOORS,
    broken_laws,
    module_name,
    outside_imports,
    upward_imports,
    upward_includes,
)

SOURCES = tracked("*.py", "*.pyi", "*.cpp", "*.h", "*.cu", "*.cuh")
PACKAGE = [path for path in SOURCES if path.parts[0] == "tlfast" and path.suffix == ".py"]
NATIVE = [path for path in SOURCES if path.parts[0] == "csrc"]
KNOWN = {module_name(path) for path in PACKAGE} | {"_C", "_build_info", "_disk"}


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=str)


@by_path(PACKAGE)
def test_imports_go_down(path):
    assert upward_imports(path, (ROOT / path).read_text(), KNOWN) == []


@by_path(PACKAGE)
def test_optional_libraries_are_imported_where_they_are_used(path):
    assert outside_imports((ROOT / path).read_text()) <= CORE_LIBRARIES


@by_path(NATIVE)
def test_includes_go_down(path):
    assert upward_includes(path, (ROOT / path).read_text()) == []


@by_path(SOURCES)
def test_laws_of_a_file(path):
    assert broken_laws(path, (ROOT / path).read_text()) == []


def test_floors_name_what_exists():
    names = [name for floor in FLOORS for name in floor]
    assert sorted(names) == sorted(KNOWN | {"__init__"})
    native = {name for floor in NATIVE_FLOORS for name in floor}
    assert {path.stem for path in NATIVE} == {name for name in native if not Path(name).suffix}
    assert {name for name in native if Path(name).suffix} <= {path.name for path in NATIVE}


@pytest.mark.parametrize(
    "path, source",
    [
        ("tlfast/spec.py", "from .hooks import capture"),
        ("tlfast/spec.py", "from . import reference"),
        ("tlfast/spec.py", "from . import __version__"),
        ("tlfast/backends/rows.py", "def f():\n    import tlfast.hooks"),
        ("tlfast/backends/rows.py", "from tlfast import Spec"),
        ("tlfast/backends/rows.py", "from tlfast.hooks.points import x"),
        ("tlfast/dataset/format/plan.py", "from .layout import x"),
        ("tlfast/dataset/format/plan.py", "from ...collecting.run import x"),
        ("tlfast/dataset/write/writer.py", "from ...hooks.captured import Capture"),
        ("tlfast/dataset/write/writer.py", "from ... import spec"),
    ],
)
def test_an_upward_import_is_found(path, source):
    assert len(upward_imports(Path(path), source, KNOWN)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        (
            "tlfast/hooks/captured.py",
            "from ..backends import rows, taps\nfrom ..errors import broken_rule\nimport torch",
        ),
        (
            "tlfast/dataset/write/writer.py",
            "from ..format.plan import Plan\nfrom ...errors import broken_rule\nfrom . import payload",
        ),
        ("tlfast/collecting/run.py", "from ..dataset.format.plan import Plan\nfrom ..dataset.write import writer"),
        ("tlfast/cli.py", "from . import __version__\nimport tlfast"),
    ],
)
def test_a_downward_import_is_right(path, source):
    assert upward_imports(Path(path), source, KNOWN) == []


def test_an_import_of_a_library_is_found():
    source = (
        "import torch, os\ntry:\n    import yaml.nodes\nexcept ImportError:\n    pass\n"
        "class A:\n    from tqdm import tqdm\ndef f():\n    import pyarrow\n"
        "if TYPE_CHECKING:\n    import transformers\n"
    )
    assert outside_imports(source) == {"torch", "yaml", "tqdm"}


def test_an_upward_include_is_found():
    assert len(upward_includes(Path("csrc/kernel/view.h"), '#include "tap.h"\n#include <vector>\n')) == 1
    assert upward_includes(Path("csrc/autograd/tap.cpp"), '#include "tap.h"\n#include "rows.h"\n') == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("tlfast/spec.py", '"""What is kept."""\ndef f():\n' + "    x = 1\n" * (MOST_LINES + 2)),
        ("tlfast/spec.py", '"""What is kept."""\ndef collect():\n' + "    x = 1\n" * (MOST_LINES + 2)),
        (
            "tlfast/spec.py",
            f'"""What is kept."""\ndef f({", ".join(f"a{k}" for k in range(MOST_PARAMETERS + 1))}): pass',
        ),
        ("tlfast/spec.py", "import os\n"),
        ("tlfast/spec.py", ""),
        ("tlfast/spec.py", '"""\nWhat is kept.\n"""\n'),
        ("tlfast/spec.py", '"""What is kept."""\nclass TapManager: ...\n'),
        ("tlfast/spec.py", '"""What is kept."""\nPATH = "/ho' + 'me/someone"\n'),
        ("tlfast/io_utils.py", '"""What is kept."""\n'),
        ("csrc/autograd/tap.h", "#pragma once\n"),
        ("csrc/helpers.h", "// What all files share.\n"),
    ],
)
def test_a_broken_law_is_found(path, source):
    assert len(broken_laws(Path(path), source)) == 1


@pytest.mark.parametrize(
    "path, source",
    [
        ("tlfast/spec.py", '"""What is kept."""\nfrom contextlib import contextmanager\n'),
        ("tlfast/spec.py", '"""What is kept."""\nPATH = "data/work/home/x"\n'),
        (
            "tlfast/spec.py",
            f'"""What is kept."""\ndef collect({", ".join(f"a{k}" for k in range(MOST_PARAMETERS + 1))}): pass',
        ),
        ("csrc/autograd/tap.h", "// The tap of one point.\n"),
    ],
)
def test_a_kept_law_is_right(path, source):
    assert broken_laws(Path(path), source) == []
