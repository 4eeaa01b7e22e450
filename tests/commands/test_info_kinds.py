"""`tlfast info` of a dataset with columns of activations, rows per token and encoded rows."""

import json

from kinds_cases import make_writer, write_units

from tlfast.cli import main


def test_info_says_how_points_are_stored(tmp_path, capsys):
    write_units(make_writer(tmp_path / "d"))
    assert main(["info", str(tmp_path / "d")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "h BF16 [7, 3] gradient h:act F32 [7, 2, 2], act activation t F16 [15, 5], per token gradient; a" in shown
    assert "q F32 [7, 70], as int8:64 gradient; stored as int8 with a scale for each 64 values, off by at most" in shown
    assert "tq F32 [15, 2, 3], act, per token, as int8" in shown
    assert main(["info", "--json", str(tmp_path / "d")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 15


def test_verify_is_right(tmp_path, capsys):
    write_units(make_writer(tmp_path / "d"))
    assert main(["verify", str(tmp_path / "d")]) == 0
