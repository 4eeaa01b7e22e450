"""Conditions as text: what they mean, and that nothing else is taken for one."""

import numpy as np
import pytest
from dataset_cases import make_dataset

from tlfast.dataset.read.conditions import Condition

VALUES = {
    "length": np.array([1, 5, 9, 20]), "source": np.array(["a.txt", "b.txt", "b.py", ""], object),
    "flags": np.array([0, 1, 2, 7]), "norm:h": np.array([1.0, np.nan, 3.0, np.inf], np.float32),
    "label": np.array([0.5, -1.0, 2.0, 0.0]), "start": np.array([0, 1, 2, 3]),
}  # fmt: skip
RIGHT = {
    "length > 5": [2, 3], "5 <= length < 20": [1, 2], "length == 5 or length == 9": [1, 2], "not length > 5": [0, 1],
    "length > 1 and norm['h'] < 5": [2], 'norm["h"] >= 1': [0, 2, 3], "not norm['h'] < 2": [1, 2, 3],
    "source == 'b.py'": [2], "source != 'b.py' and source != ''": [0, 1], "source in ['a.txt', 'b.py']": [0, 2],
    "'.txt' in source": [0, 1], "'.txt' not in source": [2, 3], "length in (1, 20)": [0, 3], "non_finite": [1, 3],
    "missing and not saturated": [2], "saturated": [3], "length * 2 - 1 > 3 * 5": [2, 3], "length % 2 == 1": [0, 1, 2],
    "-label > 0": [1], "label / start > 0.9": [0, 2], "length // 5 == 1": [1, 2], "length not in [1]": [1, 2, 3],
    " length > 5 ": [2, 3], "length > start and True": [0, 1, 2, 3], "'a' < source": [0, 1, 2],
}  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_a_condition_means(text):
    found = Condition(text)(VALUES)
    assert np.flatnonzero(found).tolist() == RIGHT[text]
    one_by_one = [
        bool(Condition(text)({name: values[k] for name, values in VALUES.items()})) for k in range(4)
    ]  # as of an example that is not collected yet
    assert one_by_one == found.tolist()


WRONG = {
    "length >": "invalid syntax", "": "invalid syntax", "length = 5": "", "length": "neither true nor false|no truth",
    "__import__('os').system('true')": "is more than it can say", "length.real > 1": "is more than it can say",
    "[x for x in length] == 1": "is more than it can say", "length if length else 1": "is more than it can say",
    "lambda: length": "is more than it can say", "length ** 9 > 1": "is more than it can say",
    "source[0] == 'a'": r"only norm\['point'\] has brackets", "norm[h] > 1": "takes the name of a point in quotes",
    "norm[1] > 1": "takes the name of a point in quotes", "1 < 2": "it asks for no value of a row",
    "length > 1j": "is no number and no text",
    "length is 5": "is more than it can say", "length > None": "is no number",
    "length == '5'": "a number and text can't be compared", "source > 3": "a number and text can't be compared",
    "length in ['a']": "a number and text can't be compared", "length and source": "neither true nor false",
    "length in 5": "`in` takes a list", "(" * 300 + "length" + ")" * 300 + " > 1": "", "length > 1 " * 500: "",
    "not " * 60 + "length > 1": "nested too deeply", "(x := length) > 1": "is more than it can say",
    "-source == 'a'": "", "f'{length}' == '1'": "is more than it can say",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("text", WRONG, ids=lambda text: text[:40])
def test_what_is_no_condition(text):
    with pytest.raises(ValueError, match=f"filter: condition must compare values of a row, got .*({WRONG[text]})"):
        Condition(text)(VALUES)


def test_names_that_rows_do_not_have(tmp_path):
    ds = make_dataset(tmp_path)
    for text, got in (("lenght > 1", "lenght"), ("norm['nope'] > 1", r"norm\['nope'\]"), ("norm > 1", "norm")):
        message = (
            rf"filter: condition must name values that rows have, got {got}. There are flags, id, input_ids, .*norm"
        )
        with pytest.raises(ValueError, match=message):
            ds.filter(text)
    with pytest.raises(ValueError, match=r"Skipped examples have no row: see ds.skipped."):
        ds.filter("skipped == 1")


def test_functions_of_rows(tmp_path):
    ds = make_dataset(tmp_path)
    asked = []

    def long(row):
        asked.append(row)
        return row["length"] > 3 and row["norms"]["loss"] >= 0

    assert ds.filter(long).ids.tolist() == ds.filter("length > 3").ids.tolist()
    assert asked == list(ds.examples)
    for wrong in (lambda row: None, lambda row: 1, lambda row: "yes"):
        with pytest.raises(
            TypeError, match=r"filter: condition must return True or False, got .*. Return a comparison."
        ):
            ds.filter(wrong)
    with pytest.raises(TypeError, match=r'filter: condition must be a text or a function, got 7. Write "length > 10"'):
        ds.filter(7)


def test_rows_of_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("tlfast.dataset.read.views._BLOCK_ROWS", 3)
    ds = make_dataset(tmp_path)
    assert ds.filter("id % 2 == 0").ids.tolist() == [0, 2, 4, 6, 8, 10]
    assert ds.filter(lambda row: row["id"] % 2 == 0).ids.tolist() == [0, 2, 4, 6, 8, 10]
