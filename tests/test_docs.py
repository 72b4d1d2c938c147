"""Every Python example in the README runs as it stands, one after the other."""

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def test_readme_examples(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    with torch.inference_mode():
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    out = capsys.readouterr().out
    assert "'qkformer_hst10_768'" in out
    for shape in ("[1, 96, 56, 56]", "[1, 192, 28, 28]", "[1, 384, 14, 14]", "[1, 10]"):
        assert shape in out
