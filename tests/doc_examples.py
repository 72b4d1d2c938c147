"""Run the Python examples of a page of documentation as they stand, one after the other."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run_examples(page: Path) -> int:
    """Run them in one namespace; returns how many there were."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page.name, "exec"), namespace)
    return len(blocks)
