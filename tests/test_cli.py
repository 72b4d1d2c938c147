"""The command line: help, errors in one line."""

import subprocess
import sys
from pathlib import Path

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


def test_the_package_alone_has_its_analysis():
    code = "import timm_qkformer; print(timm_qkformer.analysis.firing_rates.__name__)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "firing_rates\n"


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
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "pip install 'timm-qkformer[demo]'" in capsys.readouterr().err


def test_a_module_of_the_users_own_is_imported_first(tmp_path, monkeypatch, capsys):
    """An operator from outside of the package, on the command line."""
    operator = Path(__file__).parent / "contract" / "own.py"
    (tmp_path / "own_operators.py").write_text(operator.read_text().replace("own_", "command_"))
    monkeypatch.chdir(tmp_path)
    model = ["profile", "test_qkformer", "--random", "--limit", "1", "--device", "cpu"]
    mine = ["--model-kwargs", "attn=command_sdsa", "neuron=command_ternary"]
    assert cli.main(["--import", "own_operators", *model, *mine]) == 0
    assert "product of K and V" in capsys.readouterr().out
    assert cli.main(["--import", "no_such_module", *model]) == 2
    assert "--import no_such_module" in capsys.readouterr().err
