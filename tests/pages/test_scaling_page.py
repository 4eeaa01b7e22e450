"""What docs/scaling.md says can be typed: its commands have the options they name, and its program runs."""

from __future__ import annotations

import re
import shlex

import pytest
from checkout import ROOT
from processes import WAIT_S, started

import tlfast
from tlfast.collecting.settings import CollectSettings

PAGE = ROOT / "docs" / "scaling.md"


def commands(text):
    """The words of each indented command, continued lines joined, variables of the shell as they are."""
    lines = re.sub(r"\\\n\s+", "", text).splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    ") and " collect " in line]


@pytest.mark.parametrize("words", commands(PAGE.read_text()), ids=" ".join)
def test_a_command_can_be_typed(words):
    import tyro
    from torch.distributed.run import get_args_parser

    collect = words.index("collect")
    wanted = tyro.cli(tyro.conf.FlagCreatePairsOff[CollectSettings], args=words[collect + 1 :])
    assert wanted.points == ("transformer.h.*",)
    if words[0] == "torchrun":
        given = get_args_parser().parse_args(words[1:])
        assert (given.module, given.training_script, given.training_script_args[0]) == (True, "tlfast", "collect")
    else:
        assert words[collect - 1] == "tlfast"
        assert wanted.engine == "ray" or wanted.units == "$first:$((first + 100))"


def test_all_commands_are_found():
    assert [words[0] for words in commands(PAGE.read_text())] == ["torchrun", "torchrun", "srun", "RAY_ADDRESS=auto"]


def test_a_wrong_option_is_found():
    import tyro

    with pytest.raises(SystemExit):
        tyro.cli(CollectSettings, args=["--model", "a", "--text", "b", "--points", "c", "--out", "d", "--unit", "1:2"])


@pytest.mark.long
def test_the_program_runs(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = f"import os; os.chdir({str(tmp_path)!r})\n{code}"
    # What torchrun sets for one rank; port 0: any that is free.
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with started("-c", code, **group) as process:
        shown, errors = process.communicate(timeout=WAIT_S)
    assert (process.returncode, shown) == (0, "2\n"), errors
    assert len(tlfast.open_dataset(tmp_path / "out")) == 2
