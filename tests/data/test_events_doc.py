"""The Python examples of docs/events.md run as they stand, one after the other."""

import re
import warnings
from pathlib import Path

DOC = Path(__file__).resolve().parents[2] / "docs" / "events.md"


def test_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the skipped recording
        for block in blocks:
            exec(compile(block, "docs/events.md", "exec"), namespace)
    out = capsys.readouterr().out
    for text in (
        "[4, 4, 2, 64, 64] torch.int64",
        "[4, 2]",
        "4000 (16, 2, 128, 128) 4000",
        "1 of 18 recordings cannot be used",
        "17 {'3.npz': 'the file is empty (0 bytes)'}",
    ):
        assert text in out
