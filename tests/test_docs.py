"""The README and the docs: every Python example runs as it stands, and every command is one that there is."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from doc_examples import DOCS, commands, run_examples, run_page
from timm_qkformer import cli
from timm_qkformer.training.trainer.config import parse_train, read_recipe, resolve_train

ROOT = DOCS.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), ROOT / "benchmarks" / "README.md"]
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
MODEL_COMMANDS = {"profile", "validate", "visualize", "verify", "train"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_readme_examples(capsys):
    with torch.inference_mode():
        assert run_examples(README) == 1
    assert capsys.readouterr().out == "frog\n"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 110
    assert max(len(line) for line in re.findall(r"^[^|`!].*", README.read_text(), flags=re.MULTILINE)) <= 200


@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|8-bit arithmetic)")
@pytest.mark.parametrize(
    ("page", "least"),
    [
        ("analysis.md", 1),
        ("architecture.md", 5),
        ("execution.md", 1),
        ("models.md", 1),
        ("search.md", 1),
        ("spikingjelly.md", 2),
        ("streaming.md", 3),
    ],
)
def test_examples_of(page, least):
    assert run_examples(DOCS / page) >= least


def test_get_started(capsys, event_kernels):
    assert run_examples(DOCS / "get-started.md") >= 6
    out = capsys.readouterr().out
    assert "37 of 40 right; the first is a airplane" in out
    assert out.endswith("frog\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_tutorials_run_from_top_to_bottom(page, event_kernels, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")

    def run(words):
        assert cli.main(words) == 0, words

    run_page(page, run)
    out = capsys.readouterr().out
    if page.stem == "fine-tune":
        assert out.splitlines()[-1] == "digit-3"
        top1 = float(re.findall(r"^top-1 ([\d.]+) %", out, flags=re.MULTILINE)[-1])
        assert top1 > 80
    if page.stem == "events":
        sure = float(re.search(r"^across [\d.]+, down ([\d.]+)", out, flags=re.MULTILINE)[1])
        assert sure > 0.5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_commands(page, capsys):
    makefile = (ROOT / "Makefile").read_text()
    for words, whole in commands(page):
        program, *rest = words
        if program == "make":
            assert re.search(rf"^{rest[0]}:", makefile, flags=re.MULTILINE), words
        elif program == "timm-qkformer" and not {"--version", "--print-completion", "--help"} & set(rest):
            _check_command(rest, capsys if not whole else None)
        elif program == "torchrun" and "timm_qkformer.cli" in rest:
            _check_command(rest[rest.index("timm_qkformer.cli") + 1 :])
        elif program == "python" and rest[0] == "train.py":
            resolve_train(vars(_parsed(parse_train_words, rest[1:], None)))
        elif program == "python" and rest[0].startswith("benchmarks/"):
            script = (ROOT / rest[0]).read_text() + (ROOT / "benchmarks/_common.py").read_text()
            for flag in (word for word in rest if word.startswith("--")):
                assert f'"{flag}"' in script, words


def parse_train_words(words):
    import argparse

    from timm_qkformer.training.trainer.config import add_train_arguments

    parser = argparse.ArgumentParser()
    add_train_arguments(parser)
    return parser.parse_args(words)


def _parsed(parse, words, capsys):
    try:
        return parse(words)
    except SystemExit as stop:
        if capsys is not None and "arguments are required" in capsys.readouterr().err:
            return None
        raise AssertionError(f"{words} cannot be parsed") from stop


def _check_command(words, capsys=None):
    args = _parsed(cli.build_parser().parse_args, words, capsys)
    if args is None:
        return
    given = vars(args)
    if args.command == "train":
        with contextlib.suppress(FileNotFoundError):  # a recipe that an earlier command writes
            resolve_train({"data_dir": "data", **given})
    elif given.get("config"):
        read_recipe(given["config"])


def test_bad_commands_are_noticed(tmp_path):
    page = Path("page.md")
    page.write_text("    $ A=1 timm-qkformer profile x --nosuch\n\n`timm-qkformer validate m --data-dir d`\n")
    (first, _), second = commands(page)
    assert second == (["timm-qkformer", "validate", "m", "--data-dir", "d"], False)
    with pytest.raises(AssertionError):
        _check_command(first[1:])
    with pytest.raises(ValueError, match="momentum"):
        _check_command(["train", "data", "--momentum", "2"])
    assert parse_train(["data"]).device == "auto"
