"""The settings of a collection are written once: function, command line and identity agree on them."""

from __future__ import annotations

import inspect
import shutil
import sys
from dataclasses import dataclass, fields, replace
from typing import get_type_hints

import half_finished
import pytest
from checkout import TESTS
from tiny_models import tiny_model

import tlfast
import tlfast.collecting.run
from tlfast.collecting.checks import wanted_specs
from tlfast.collecting.identity import ALWAYS, IN_OTHER_WORDS, MAKES_NO_OTHER_ROWS, describe_options
from tlfast.collecting.options import CollectOptions, SharedOptions
from tlfast.collecting.settings import CollectSettings, TextOptions
from tlfast.dataset import DatasetError
from tlfast.hooks.options import CaptureOptions, TapOptions, words_of

OPTIONS = CollectOptions(points="0")
SETTINGS = CollectSettings("model", ("text",), ("h.*",), "out")
OTHER = {  # than the defaults
    "attach": "full", "backend": "python", "calls": "last", "missing": "nan", "reduce": "sum", "batch_tokens": 7,
    "padding_side": "left", "grad_scale": 2.0, "cuda_graph": "off", "lens": True, "units": "1:2", "overwrite": True,
    "extend": True, "resume": "must", "bad_examples": "stop", "non_finite": "stop", "disk_wait_s": 1.0,
    "deterministic": "warn", "side": "input", "per": "token",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Longer(CollectOptions):
    """The options with one more, which nobody has said anything of."""

    dropped: float = 0.0


def names_of(kind):
    return {field.name for field in fields(kind)}


def test_the_function_takes_what_the_options_hold():
    given = dict(list(inspect.signature(tlfast.collect).parameters.items())[3:])
    hints, wanted = get_type_hints(tlfast.collect), get_type_hints(CollectOptions)
    assert {parameter.kind for parameter in given.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert given.pop("points").default is inspect.Parameter.empty
    assert {name: parameter.default for name, parameter in given.items()} == {
        field.name: field.default for field in fields(CollectOptions) if field.name != "points"
    }
    assert {name: hints[name] for name in names_of(CollectOptions)} == {
        name: wanted[name] for name in names_of(CollectOptions)
    }


def test_the_options_of_the_function_arrive(monkeypatch):
    made = []

    class Stopped(Exception):
        pass

    def run(model, batches, out, options):
        made.append((model, batches, out, options))
        raise Stopped

    monkeypatch.setattr(sys.modules["tlfast.collecting.run"], "Run", run)
    with pytest.raises(Stopped):
        tlfast.collect("model", "batches", out="out", points="0", **OTHER)
    assert made == [("model", "batches", "out", CollectOptions(points="0", **OTHER))]


def test_a_capture_takes_what_its_options_hold():
    hints, wanted = get_type_hints(tlfast.capture), get_type_hints(TapOptions)
    given = inspect.signature(tlfast.capture).parameters
    assert {name: hints[name] for name in wanted} == wanted
    assert {name: given[name].default for name in wanted} == {field.name: field.default for field in fields(TapOptions)}
    assert names_of(CaptureOptions) - names_of(TapOptions) == {"specs", "rows"}


def test_the_command_takes_what_the_function_does():
    assert names_of(CollectSettings) == names_of(SharedOptions) | names_of(TextOptions)
    assert names_of(SharedOptions) == set(OTHER)
    assert not names_of(SharedOptions) & names_of(TextOptions)


def test_all_settings_of_the_command_arrive():
    made = replace(SETTINGS, **OTHER).to_options()
    assert {name: getattr(made, name) for name in OTHER} == OTHER
    assert (made.points, made.over, made.rows_per_unit, made.seq_len) == (("h.*",), ["pos"], None, 128)
    assert (made.of, made.encoding) == ("grad", None)
    changed = replace(
        SETTINGS,
        of="act,grad",
        over="1,-1",
        dtype="auto",
        encoding="int8",
        output="2",
        rows_per_unit=9,
        staging="s",
        embedding=("e",),
    )
    made = changed.to_options(pad_id=3, progress=False)
    assert (made.over, made.dtype, made.output, made.rows_per_unit) == ([1, -1], None, 2, 9)
    assert (made.of, made.encoding) == ("act,grad", "int8")
    assert (made.staging, made.embedding, made.pad_id, made.progress) == ("s", ("e",), 3, False)


@pytest.mark.parametrize(
    "at, wanted", [("", None), ("-1", -1), ("-2, 0", [-2, 0]), ("answer", "answer"), ("h-1", "h-1")]
)
def test_positions_and_heads_of_the_command(at, wanted):
    made = replace(SETTINGS, at=at, heads="2, 8").to_options()
    assert (made.at, made.heads, SETTINGS.to_options().heads) == (wanted, (2, 8), None)


@pytest.mark.parametrize("calls, wanted", [("raise", "sum"), ("last", "last")])
def test_lens_means_the_sum_of_calls(calls, wanted):
    assert replace(SETTINGS, lens=True, calls=calls).to_options().calls == wanted


def test_what_is_said_of_the_identity_is_of_options():
    said = [*ALWAYS, *IN_OTHER_WORDS, *MAKES_NO_OTHER_ROWS]
    assert len(set(said)) == len(said)
    assert set(said) == names_of(CollectOptions)


def test_the_first_options_enter_as_they_always_did():
    assert describe_options(OPTIONS) == {"grad_scale": 1.0, "calls": "raise", "missing": "raise"}
    made = CollectOptions(points="0", **OTHER)
    assert describe_options(made) == {"grad_scale": 2.0, "calls": "last", "missing": "nan"}


def test_a_new_option_enters_where_it_is_not_its_default():
    assert describe_options(Longer(points="0")) == describe_options(OPTIONS)
    assert describe_options(Longer(points="0", dropped=0.5)) == describe_options(OPTIONS) | {"dropped": 0.5}


@pytest.mark.filterwarnings(half_finished.OTHER_CPU)
def test_a_new_option_resumes_what_was_begun_without_it(tmp_path, monkeypatch):
    module = sys.modules["tlfast.collecting.run"]
    begun = shutil.copytree(TESTS / "collecting" / "golden" / "plain", tmp_path / "plain")
    monkeypatch.setattr(module, "CollectOptions", lambda **given: Longer(**given, dropped=0.5))
    with pytest.raises(DatasetError):
        half_finished.collect("plain", begun)
    monkeypatch.setattr(module, "CollectOptions", Longer)
    assert half_finished.collect("plain", begun).n_rows_before == 2


@pytest.mark.parametrize("name, known", words_of(CollectOptions).items())
def test_an_unknown_word_is_refused(name, known):
    text = f"^collect: {name} must be one of {', '.join(known)}, got 'odd'. Check the spelling.$"
    with pytest.raises(ValueError, match=text):
        CollectOptions(points="0", **{name: "odd"})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"batch_tokens": 0}, "batch_tokens must be a positive number, got 0. Give a whole number."),
        ({"seq_len": 2.0}, "seq_len must be a positive number, got 2.0. Give a whole number."),
        ({"rows_per_unit": True}, "rows_per_unit must be a positive number, got True. Give a whole number."),
        ({"grad_scale": 0.0}, "grad_scale must be positive, got 0.0. 1.0 changes nothing."),
        ({"disk_wait_s": -1.0}, "disk_wait_s must be 0 or more, got -1.0. Give seconds."),
        ({"units": "a"}, "units must be A:B, numbers of units as in a Python slice, got 'a'. Say 0:100, 100: or :-1."),
        ({"share": (1, 1)}, r"share must be \(index, count\), ints with 0 <= index < count, got \(1, 1\)."),
    ],
)
def test_a_wrong_number_is_refused(change, text):
    with pytest.raises(ValueError, match=f"^collect: {text}"):
        CollectOptions(points="0", **change)


@pytest.mark.parametrize(
    "beside, got",
    [
        ({"reduce": "none"}, "'none'"),
        ({"reduce": "sum"}, "'sum'"),
        ({"over": 1}, "1"),
        ({"dtype": "float32"}, "'float32'"),
        ({"output": "hidden"}, "'hidden'"),
    ],
)
def test_settings_beside_specs_are_refused(tmp_path, beside, got):
    (argument,) = beside
    text = f"{argument} must be left out where points are Specs, got {got} beside them. Say it in each Spec."
    model, texts, spec = tiny_model(), [[1, 2, 3]], tlfast.Spec("transformer.h.0", "sum")
    for who, ask in {
        "collect": lambda: tlfast.collect(model, texts, tmp_path / "out", points=[spec], **beside),
        "stream": lambda: tlfast.stream(model, texts, spec, buffer_rows=2, batch_size=1, **beside),
        "running": lambda: tlfast.running(model, texts, spec, **beside),
    }.items():
        with pytest.raises(ValueError, match=f"^{who}: {text}$"):
            ask()
    assert not (tmp_path / "out").exists()


def test_a_default_that_nobody_gave_is_not_beside_specs():
    model, spec = tiny_model(), tlfast.Spec("transformer.h.0", "none", per="token")
    assert OPTIONS.reduce == "mean" != spec.reduce
    assert wanted_specs(model, CollectOptions(points=spec)) == [spec]


def test_a_capture_of_no_rows_is_refused():
    with pytest.raises(ValueError, match=r"^capture: rows must be a positive number, got 0\. Give the rows to hold\.$"):
        CaptureOptions(specs=[], rows=0)
