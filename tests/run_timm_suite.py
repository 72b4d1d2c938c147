"""Run timm's own model tests, unmodified, on this package's models.

The tests come from the source distribution of the installed timm, fetched from PyPI with pip. Tests that timm selects
by module name (forward_intermediates, pruning) run a second time with our modules added to that selection. Left out are
those that download the weights of every pretrained tag, as in timm's own CI, and `test_model_inference`, which compares
timm's own tiny weights with answers in timm's repositories on the Hub. Arguments are passed on to pytest.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

MODULES = (
    "qkformer",
    "maxformer",
    "spikformer",
    "spikingformer",
    "sdt",
    "spiliformer",
    "semm",
    "a2os2a",
    "autost",
    "tim",
)
# timm's tests of features want three levels; models of one resolution have one, and run in the second half with that.
# "tim" is part of timm's own name.
FLAT = ("spikformer", "spikingformer", "sdt", "semm", "a2os2a", "autost", "tim_2", "test_tim")
OURS = f"({' or '.join((*MODULES[:-1], 'tim_2', 'test_tim'))}) and not pretrained and not test_model_inference"
NAMES = f"{OURS} and not (test_model_forward_features and ({' or '.join(FLAT)}))"
SELECTED = f"{OURS} and (intermediates or contract or forward_features and ({' or '.join(FLAT)}))"
SELECTION = "FEAT_INTER_FILTERS = ["
LEVELS = "assert len(expected_channels) >= 3"
OWN_LEVELS = f"(1 if any(name in model_name for name in {FLAT}) else 3)"


def main(arguments: list[str]) -> int:
    version = importlib.metadata.version("timm")
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "-d", folder]
        subprocess.run([*pip, f"timm=={version}"], check=True)
        with tarfile.open(next(Path(folder).glob("timm-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        tests = Path(folder) / f"timm-{version}" / "tests"
        first = _pytest(tests / "test_models.py", NAMES, arguments)

        text = (tests / "test_models.py").read_text()
        added = SELECTION + "".join(f"\n    {module!r}," for module in MODULES)
        for passage, times in ((SELECTION, 1), (LEVELS, 2)):
            if text.count(passage) != times:
                raise SystemExit(f"timm {version} has other tests of features: {passage!r} is not there {times} times")
        text = text.replace(SELECTION, added).replace(LEVELS, LEVELS.replace("3", OWN_LEVELS))
        (tests / "test_models_selected.py").write_text(text)
        second = _pytest(tests / "test_models_selected.py", SELECTED, arguments)
        return first or second


def _pytest(file: Path, names: str, arguments: list[str]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-k", names]
    env = {**os.environ, "TORCH_BACKEND": "timm_qkformer"}
    return subprocess.run([*command, *arguments, str(file)], cwd=file.parents[1], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
