"""The package: what it imports, what its extras and versions are, and that it runs what was built."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re

import pytest
from fresh_python import ROOT, run

import tlfast

PYPROJECT = (ROOT / "pyproject.toml").read_text()
OPTIONAL = (
    "google_crc32c", "matplotlib", "pyarrow", "safetensors", "tokenizers", "tqdm", "transformer_lens", "transformers",
    "tyro", "yaml",
)  # fmt: skip

LOADED = f"""
import sys, torch, numpy
before = set(sys.modules)
import tlfast
names = {OPTIONAL!r}
print(*sorted(name for name in names if name in sys.modules and name not in before))
"""
# Imports of these libraries fail as they do where they are not installed.
BLOCK = """
import sys
class Blocked:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
CAPTURE = """
import torch, tlfast
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh())
with tlfast.capture(model, "0", reduce="mean", rows=4, backend="python") as cap:
    model(torch.ones(2, 5, 3)).sum().backward()
assert cap["0"].shape == (2, 3), cap["0"].shape
"""
WRITE = """
import torch
from tlfast.dataset import DatasetWriter, Plan
DatasetWriter("out", header={}, columns={"h": (torch.float32, (4,))}, plan=Plan(1, 1), config={"reduce": "mean"})
"""
COLLECT = """
from tlfast.cli import main
raise SystemExit(main(["collect", "--help"]))
"""
LOAD = """
from tlfast.collecting.huggingface import load_model
import torch
load_model("model", None, torch.device("cpu"))
"""


def extras():
    """Extra -> its requirements, as the installed package declares them."""
    metadata = importlib.metadata.metadata("tlfast")
    names = {name: [] for name in metadata.get_all("Provides-Extra")}
    for line in importlib.metadata.requires("tlfast"):
        requirement, _, marker = line.partition(";")
        found = re.search(r"""extra == ["']([\w-]+)["']""", marker)
        names.setdefault(found[1] if found else "", []).append(requirement.strip())
    return names


def project_name(requirement):
    return re.match(r"[\w-]+", requirement)[0]


# ------------------------------------------------------------------------------------------------------------ imports


def test_import_pulls_in_no_optional_library():
    done = run("-c", LOADED)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stdout + done.stderr


def test_the_check_of_imports_can_fail():
    done = run("-c", LOADED.replace("import tlfast", "import tlfast, yaml"))
    assert done.stdout.split() == ["yaml"]


def test_capture_works_without_any_optional_library():
    done = run("-c", BLOCK.format(names=OPTIONAL) + CAPTURE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "library, code",
    [("pyarrow", WRITE), ("google_crc32c", WRITE), ("yaml", WRITE), ("tyro", COLLECT), ("transformers", LOAD)],
)
def test_a_missing_library_names_its_extra(library, code, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    done = run("-c", BLOCK.format(names=(library,)) + code, folder=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"{library} must be installed" in last
    assert "pip install 'tlfast[collect]'" in last
    assert not (tmp_path / "out").exists(), "a missing library must be found before any work"


# ----------------------------------------------------------------------------------------------------------- metadata


def test_one_version():
    in_project = re.search(r'^version = "([^"]+)"', PYPROJECT, flags=re.MULTILINE)[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
    assert {tlfast.__version__, importlib.metadata.version("tlfast"), newest} == {in_project}


def test_the_core_needs_torch_and_numpy_alone():
    assert sorted(map(project_name, extras()[""])) == ["numpy", "torch"]


def test_every_named_extra_exists():
    pages = [*ROOT.glob("tlfast/**/*.py"), *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]
    named = {name for page in pages for name in re.findall(r"tlfast\[([\w,-]+)\]", page.read_text())}
    assert named, "the errors of missing libraries must name an extra"
    assert {part for name in named for part in name.split(",")} <= set(extras())


# Where a library is called otherwise than the package that brings it.
PACKAGES = {"PIL": "pillow", "faiss": "faiss-cpu", "lance": "pylance", "yaml": "pyyaml"}


def imports_by_extra():
    """Extra -> the packages that tlfast imports with an error that names this extra."""
    found = {}
    for page in ROOT.glob("tlfast/**/*.py"):
        for call in (node for node in ast.walk(ast.parse(page.read_text())) if isinstance(node, ast.Call)):
            words = [word.value if isinstance(word, ast.Constant) else "" for word in call.args]
            if isinstance(call.func, ast.Name) and call.func.id == "extra" and words[0]:
                library = words[0].partition(".")[0]
                name = words[2] if len(words) > 2 else "collect"
                found.setdefault(name, set()).add(PACKAGES.get(library, library.replace("_", "-")))
    return found


def test_an_extra_names_all_that_is_imported_in_its_name():
    found = imports_by_extra()
    assert "pyyaml" in found["collect"]
    assert "datasets" in found["hub"]
    for name, packages in found.items():
        declared = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, flags=re.MULTILINE | re.DOTALL)[1]
        assert packages <= {project_name(line) for line in re.findall(r'"([^"]+)"', declared)}, name


def test_the_command_is_declared():
    scripts = importlib.metadata.entry_points(group="console_scripts", name="tlfast")
    assert {script.value for script in scripts} == {"tlfast.cli:main"}
    done = run("-m", "tlfast", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"tlfast {tlfast.__version__}"), done.stderr


def test_what_runs_is_what_was_built():
    if importlib.util.find_spec("tlfast._build_info") is None:
        assert tlfast.backend().startswith("python: ")
        return
    import torch

    from tlfast import _build_info

    if _build_info.BUILT and torch.__version__ == _build_info.TORCH:
        assert tlfast.backend().startswith("native ("), tlfast.backend()
    else:
        assert tlfast.backend().startswith("python: ")
        assert _build_info.REASON in tlfast.backend() or str(_build_info.TORCH) in tlfast.backend()
