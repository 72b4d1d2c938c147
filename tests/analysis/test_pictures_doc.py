"""The Python examples of docs/pictures.md run as they stand; its pictures are there and small."""

import re

import pytest

from doc_examples import DOCS, run_examples

pytest.importorskip("matplotlib")

DOC = DOCS / "pictures.md"


def test_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_examples(DOC) == 2
    out = capsys.readouterr().out
    assert "'stages.0.blocks.0.attn': 'qkta'" in out
    for shape in ("(4, 2, 4, 1, 16, 16)", "(4, 2, 4, 4, 16, 16)", "(2, 16, 16)", "(4, 2, 64, 16, 16)"):
        assert shape in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["masks.png", "raster.png"]


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", DOC.read_text())
    assert len(pictures) >= 4
    for picture in pictures:
        assert 0 < (DOC.parent / picture).stat().st_size < 150_000
