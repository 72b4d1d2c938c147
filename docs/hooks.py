"""What mkdocs does besides: pages from outside of docs/ become part of the site, and links to them point there."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "src/timm_qkformer/models/weights"


def _outside() -> dict[Path, str]:
    """Files of the repository, and where they are on the site."""
    pages = {
        name: f"project/{name}" for name in ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")
    }
    pages |= {"README.md": "project/README-of-the-repository.md", "CITATION.cff": "project/CITATION.cff"}
    pages |= {"benchmarks/README.md": "benchmarks/benchmarks.md"}
    pages |= {f"benchmarks/results/{p.name}": f"benchmarks/{p.name}" for p in ROOT.glob("benchmarks/results/*.png")}
    pages |= {f"{WEIGHTS}/{p.name}": f"weights-cards/{p.name}" for p in (ROOT / WEIGHTS).glob("*.md")}
    return {ROOT / source: target for source, target in pages.items()}


def on_files(files: Any, config: Any) -> Any:
    """Add them."""
    for source, target in _outside().items():
        files.append(File.generated(config, target, abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Relative links of a page as they are in the repository, to where their targets are on the site."""
    places = _outside()
    source = Path(page.file.abs_src_path).resolve()
    here = os.path.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        target = (source.parent / link).resolve()
        if target == ROOT / "benchmarks":
            target = ROOT / "benchmarks/README.md"
        if target in places:
            uri = places[target]
        elif target.is_relative_to(ROOT / "docs"):
            uri = target.relative_to(ROOT / "docs").as_posix()
        else:
            return match[0]
        return f"]({os.path.relpath(uri, here or '.')}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", moved, markdown)
