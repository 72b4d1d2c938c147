"""The Python examples of docs/events.md run as they stand, one after the other."""

import warnings

from doc_examples import DOCS, run_examples


def test_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the skipped recording
        assert run_examples(DOCS / "events.md") == 4
    out = capsys.readouterr().out
    for text in (
        "[4, 4, 2, 64, 64] torch.int64",
        "[4, 2]",
        "4000 (16, 2, 128, 128) 4000",
        "1 of 18 recordings cannot be used",
        "17 {'3.npz': 'the file is empty (0 bytes)'}",
    ):
        assert text in out
