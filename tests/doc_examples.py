"""Run the Python examples of a page of documentation as they stand, one after the other, and find its commands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
_FENCES = re.compile(r"```(python|bash)\n(.*?)```", flags=re.DOTALL)
_PROGRAMS = ("timm-qkformer", "python", "torchrun", "make", "pip")


def run_examples(page: Path) -> int:
    """Run the Python in one namespace; returns how many blocks there were."""
    blocks = [text for kind, text in _FENCES.findall(page.read_text()) if kind == "python"]
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    return len(blocks)


def run_page(page: Path, run_command) -> None:
    """Run Python and `timm-qkformer` commands in their order; `run_command` gets a command's words."""
    namespace: dict[str, object] = {}
    for kind, text in _FENCES.findall(page.read_text()):
        if kind == "python":
            exec(compile(text, page.name, "exec"), namespace)
            continue
        for words in _commands(text):
            if words[0] == "timm-qkformer":
                run_command(words[1:])


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Every command of a page, in words, and whether it is whole: between backticks it may leave arguments out.

    Left out is what only shows a form: with "...", COMMAND, a variable or a part in brackets.
    """
    text = page.read_text()
    indented = re.findall(r"(?:^    .*\n)+", re.sub(_FENCES, "", text), flags=re.MULTILINE)
    fenced = [block for kind, block in _FENCES.findall(text) if kind == "bash"]
    for block in (*fenced, *indented):
        yield from ((words, True) for words in _commands(block))
    for code in re.findall(r"(?<!`)`((?:timm-qkformer|python benchmarks)[^`]*)`(?!`)", text):
        yield from ((words, False) for words in _commands(code.replace("\n", " ")))


def _commands(block: str) -> Iterator[list[str]]:
    block = re.sub(r"\\\n\s*", "", block)
    for line in block.splitlines():
        line = re.sub(r"^\s*(\$ )?([A-Z_]+=\S+ )*", "", line)
        if not line.startswith(_PROGRAMS) or "..." in line or " [" in line or "$" in line or "COMMAND" in line:
            continue
        words = shlex.split(line, comments=True)
        if words and words[0] in _PROGRAMS:
            yield words[: words.index(">")] if ">" in words else words
