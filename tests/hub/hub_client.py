"""What a user's process does, run in a process of its own: huggingface_hub reads its environment when imported."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any


class Client:
    """A process with its own environment. Calls run one after the other."""

    def __init__(self, **env: str) -> None:
        self.home = Path(env["HF_HOME"])
        before = dict(os.environ)
        os.environ.update(env)
        try:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_impatient)
            self._pool.submit(time.time).result()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def load(self, name: str, **kwargs: Any) -> dict[str, Any]:
        """{"logits": ...} of `logits_of`, or {"error", "type", "cause", "naps": how often the client waited}."""
        return self._pool.submit(_load, name, kwargs).result()

    def transformers_logits(self, name: str) -> list[list[float]]:
        return self._pool.submit(_transformers_logits, name).result()

    def cli(self, *argv: str, answer: str | None = None) -> tuple[int, str, str]:
        """Exit code, output and error output. `answer`: what a person at a terminal types; None: no terminal."""
        return self._pool.submit(_cli, argv, answer).result()

    def close(self) -> None:
        self._pool.shutdown()


_naps: list[float] = []


def _impatient() -> None:
    time.sleep = _naps.append  # the client waits between its retries


def logits_of(model: Any) -> list[list[float]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return model(torch.randn(2, 3, 64, 64, generator=generator)).tolist()


def _load(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    import timm

    _naps.clear()
    try:
        return {"logits": logits_of(timm.create_model(name, pretrained=True, **kwargs).eval())}
    except Exception as error:
        kinds = {"type": type(error).__name__, "cause": type(error.__cause__).__name__}
        return {"error": str(error), **kinds, "naps": len(_naps)}


def _transformers_logits(name: str) -> list[list[float]]:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(name).eval()
    return logits_of(lambda x: model(x).logits)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def _stdin(answer: str | None) -> Iterator[None]:
    before = sys.stdin
    sys.stdin = io.StringIO() if answer is None else _Terminal(answer + "\n")
    try:
        yield
    finally:
        sys.stdin = before


def _cli(argv: tuple[str, ...], answer: str | None) -> tuple[int, str, str]:
    from timm_qkformer.cli import main

    out, err = io.StringIO(), io.StringIO()
    with _stdin(answer), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(argv)
    return code, out.getvalue(), err.getvalue()
