"""Every Python example in the README and in the pages for developers runs as it stands, one after the other."""

import pytest
import torch

from doc_examples import DOCS, run_examples


def test_readme_examples(capsys):
    with torch.inference_mode():
        assert run_examples(DOCS.parent / "README.md") >= 3
    out = capsys.readouterr().out
    assert "'qkformer_hst10_768'" in out
    for shape in ("[1, 96, 56, 56]", "[1, 192, 28, 28]", "[1, 384, 14, 14]", "[1, 10]"):
        assert shape in out


@pytest.mark.filterwarnings("ignore:.*(rounded weights are multiplied|8-bit arithmetic)")
@pytest.mark.parametrize(
    ("page", "least"), [("architecture.md", 5), ("execution.md", 1), ("search.md", 1), ("spikingjelly.md", 2)]
)
def test_examples_of(page, least):
    assert run_examples(DOCS / page) >= least
