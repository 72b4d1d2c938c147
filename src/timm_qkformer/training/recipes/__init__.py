"""Training recipes: YAML files whose keys are those of timm's train.py.

`timm-qkformer train -c NAME` and `train.py -c FILE` take each of them as it stands. Where the
values come from: docs/training.md.
"""

from importlib.resources import files
from pathlib import Path

__all__ = ["list_recipes", "recipe_path"]

_FOLDER = Path(str(files(__name__)))


def list_recipes() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe, such as "cifar10".

    Raises:
        ValueError: If there is no such recipe.
    """
    names = list_recipes()
    if name not in names:
        raise ValueError(f"recipe {name!r} is unknown, choose one of {', '.join(names)}")
    return _FOLDER / f"{name}.yaml"
