"""Every Python example in the README runs as it stands, one after the other."""

import torch

from doc_examples import DOCS, run_examples


def test_readme_examples(capsys):
    with torch.inference_mode():
        assert run_examples(DOCS.parent / "README.md") >= 3
    out = capsys.readouterr().out
    assert "'qkformer_hst10_768'" in out
    for shape in ("[1, 96, 56, 56]", "[1, 192, 28, 28]", "[1, 384, 14, 14]", "[1, 10]"):
        assert shape in out
