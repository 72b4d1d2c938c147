"""Print what the extra `docs` asks for, a requirement a line, so that the site's environment needs nothing else."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text())["project"]
print("\n".join(project["optional-dependencies"]["docs"]))
