"""The command line: help, errors in one line."""

import pytest

from timm_qkformer import cli


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: timm-qkformer")


def test_bad_arguments_are_one_line(tmp_path, capsys):
    assert cli.main(["demo", "--epochs", "0", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "timm-qkformer: error: epochs=0 must be at least 1\n"


def test_output_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert cli.main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("timm-qkformer: error: ")
    assert err.count("\n") == 1


def test_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "pip install 'timm-qkformer[demo]'" in capsys.readouterr().err
