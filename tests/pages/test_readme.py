"""What the README says is true: its examples run, its commands exist. test_pages.py looks at its links."""

from __future__ import annotations

import doctest
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from page_examples import code_blocks, run_block
from tiny_models import byte_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.utils import logging

import tlfast
from tlfast.commands.collecting import _check_flags

sys.path.append(str(ROOT))

from bench import quoted

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8") if page.exists() else ""


def missing_commands(text: str, targets: set[str]) -> set[str]:
    """Targets of make that a page names, in code, and that the Makefile does not have."""
    code = re.findall(r"`{1,3}[^`]*`{1,3}", text)
    return {name for part in code for name in re.findall(r"\bmake ([a-z][a-z-]*)", part)} - targets


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Without a block there is still a test, and it fails.
PYTHON_BLOCKS = code_blocks(text_of(README), "python") or [(0, "raise SystemExit('README.md holds no python block')")]


def test_readme_exists():
    assert README.exists(), "README.md must exist: what it is, the two commands, an example of capture"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """What "gpt2" stands for where no hub is: its class, names and width, with one block and a byte for a token."""
    folder = tmp_path_factory.mktemp("gpt2")
    logging.disable_progress_bar()
    config = GPT2Config(n_layer=1, vocab_size=256, n_positions=64, bos_token_id=None, eos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def promised(code: str) -> str:
    """What a block says that it prints: the comments behind its calls of print."""
    return "".join(f"{line}\n" for line in re.findall(r"^print\(.*\)  # (.*)$", code, flags=re.MULTILINE))


@pytest.mark.parametrize("code", [pytest.param(code, id=f"line {line}") for line, code in PYTHON_BLOCKS])
def test_readme_example_runs_and_prints_what_it_says(code, tmp_path, gpt2):
    done = run_block(code.replace('"gpt2"', repr(str(gpt2))), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == promised(code) or not promised(code)


def test_the_model_of_the_readme_is_replaced():
    assert sum(code.count('"gpt2"') for _, code in PYTHON_BLOCKS) == 2
    assert promised("x = 1  # one\nprint(x)  # 1\n    print(x)\nprint(x, f(x))  # 1 2\n") == "1\n1 2\n"


def test_the_versions_of_the_readme_are_those_that_ci_runs():
    words = " ".join(text_of(README).split())
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch_version = re.search(r"^TORCH_VERSION := (\S+)", makefile, flags=re.MULTILINE)[1]
    lens = re.search(r"^LENS_VERSIONS \?= (.+)", makefile, flags=re.MULTILINE)[1].split()
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))[1]
    said = f"the tests beside torch {torch_version}, the core tests beside torch {oldest}.0, and TransformerLens "
    assert said + " and ".join(lens) in words
    assert set(re.findall(r"torch[ =]=?(\d+\.\d+)", words)) == {torch_version.rpartition(".")[0], oldest}
    assert list(lens) == list(quoted.LENS)


LONG = [
    pytest.param(name, marks=pytest.mark.long)
    for name in ("attribution.md", "collecting.md", "recipes.md", "remote.md", "datasets.md", "hosts.md")
]


@pytest.mark.parametrize("name", LONG)
def test_the_blocks_of_a_page_are_one_program(name, tmp_path):
    blocks = code_blocks(text_of(ROOT / "docs" / name), "python")
    done = run_block("\n".join(code for _, code in blocks), tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_flags_of_a_page_are_those_of_the_command():
    commands = re.findall(r"^ {4}tlfast collect (--.*)$", text_of(ROOT / "docs" / "collecting.md"), flags=re.MULTILINE)
    assert len(commands) == 10
    for command in commands:
        _check_flags(shlex.split(command), complete=False)
        with pytest.raises(ValueError, match="the flag must be one of tlfast collect, got --odd"):
            _check_flags([*shlex.split(command), "--odd"], complete=False)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_commands_of_a_page(page):
    assert page.exists(), f"{page.name} must exist"
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert missing_commands(text_of(page), targets) == set()


@pytest.mark.parametrize("name", [name for name in tlfast.__all__ if callable(getattr(tlfast, name))])
def test_public_docstring_has_an_example_that_runs(name):
    thing = getattr(tlfast, name)
    examples = [test for test in doctest.DocTestFinder().find(thing, name) if test.examples]
    assert examples, f"tlfast.{name} must have a runnable example in its docstring"
    for example in examples:
        # The globals of its own module would hide a missing import.
        example.globs = {}
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        assert runner.run(example).failed == 0, f"the example of tlfast.{example.name} failed, see above"


def test_all_names_are_there():
    assert sorted(tlfast.__all__) == sorted(set(tlfast.__all__))
    assert importlib.import_module("tlfast").__doc__


@pytest.mark.long
def test_a_wrong_block_is_found(tmp_path):
    assert "ZeroDivisionError" in run_block("1 / 0", tmp_path).stderr
    assert run_block("torch.ones(1)", tmp_path).returncode != 0, "a block must import what it uses"
    assert run_block("import warnings; warnings.warn('old')", tmp_path).returncode != 0


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n```\nplain\n```\n```bash\nmake it\n```\n```python\ny = 2\nz = 3\n```\n"
    assert code_blocks(text, "python") == [(3, "x = 1\n"), (12, "y = 2\nz = 3\n")]


def test_wrong_commands_are_found():
    assert missing_commands("Run `make demo`, then\n```\nmake nothing\n```\nwe make sure", {"demo"}) == {"nothing"}
