"""The command line: help, errors in one line."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from timm_qkformer import cli
from timm_qkformer.commands.help import EXAMPLES
from timm_qkformer.devices import usable_device
from timm_qkformer.execution import execution_policy, native
from timm_qkformer.training.trainer.settings import Settings


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
    model = ["profile", "test_qkformer", "--random", "--limit", "1", "--all", "--device", "cpu"]
    mine = ["--model-kwargs", "attn=command_sdsa", "neuron=command_ternary"]
    assert cli.main(["--import", "own_operators", *model, *mine]) == 0
    assert "product of K and V" in capsys.readouterr().out
    assert cli.main(["--import", "no_such_module", *model]) == 2
    assert "--import no_such_module" in capsys.readouterr().err


def test_examples_in_help_are_commands():
    for command, lines in EXAMPLES.items():
        for line in lines:
            program, *words = shlex.split(line)
            assert program == "timm-qkformer"
            assert cli.build_parser().parse_args(words).command == command


@pytest.mark.parametrize("columns", [40, 80, 400])
def test_help_is_as_wide_as_the_terminal_within_bounds(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    out = capsys.readouterr().out
    widths = [len(line) for line in out.splitlines() if not line.startswith("  timm-qkformer")]
    assert max(widths) <= max(72, min(100, columns))
    assert "\n  timm-qkformer profile qkformer_hst10_384 --random --all\n" in out


@pytest.mark.parametrize("command", ["train", "validate", "verify", "profile"])
def test_the_device_is_found_by_itself(command):
    required = {"verify": ["x", "--data", "y"], "train": ["x"]}.get(command, ["x"])
    given = vars(cli.build_parser().parse_args([command, *required])).get("device", Settings.device)
    assert given == "auto"
    assert usable_device(given).type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_doctor_says_where_kernels_come_from(capsys, monkeypatch):
    origins = {"events.cpp": "prebuilt x86-64-v3", "ssa.cpp": "prebuilt x86-64-v3"}
    monkeypatch.setattr(native, "provenance", lambda: origins)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\nkernels      prebuilt x86-64-v3\n" in out
    assert "events.cpp" not in out
    assert "apt install" not in out
    origins["ssa.cpp"] = "none"
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\nkernels      none, prebuilt x86-64-v3\n  events.cpp           prebuilt x86-64-v3\n" in out
    assert "apt install g++" in out
    with execution_policy(kernels="never"):
        assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == "never, says the policy (none, prebuilt x86-64-v3)"
    assert found["sources"] == origins
    assert found["versions"].startswith("timm-qkformer ")


def test_json_is_all_that_profile_prints(capsys):
    model = ["profile", "test_qkformer", "--random", "--limit", "1", "--time-steps", "1"]
    assert cli.main([*model, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rates"]["time_steps"] == 1


def test_profile_shows_the_largest_layers(capsys):
    model = ["profile", "test_qkformer", "--random", "--limit", "1", "--time-steps", "1"]
    assert cli.main(model) == 0
    short = capsys.readouterr().out
    assert short.count("the 10 of ") == 2
    assert len(short.splitlines()) < 50
    assert cli.main([*model, "--all"]) == 0
    long = capsys.readouterr().out
    assert "--all" not in long
    assert len(long.splitlines()) > len(short.splitlines()) + 20


def test_a_closed_pipe_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as nobody_reads:
        monkeypatch.setattr(sys, "stdout", nobody_reads)
        monkeypatch.setitem(cli.COMMANDS, "publish", ("text", cli._add_publish, lambda args: print("x")))
        assert cli.main(["publish", "folder", "me/name"]) == 141
        print("y", flush=True)  # no error any more
    assert capsys.readouterr().err == ""


def test_completion_needs_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit):
        cli.main(["--print-completion", "bash"])
    assert "pip install 'timm-qkformer[completion]'" in capsys.readouterr().err


def test_completion_knows_commands_and_options(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", "bash"])
    assert stop.value.code == 0
    script = capsys.readouterr().out
    assert "quantize-weights" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
