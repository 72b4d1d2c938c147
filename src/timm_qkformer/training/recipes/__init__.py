"""Training recipes: YAML files whose keys are those of timm's train.py.

`timm-qkformer train -c NAME` and `train.py -c FILE` take each of them as it stands. Where the
values come from: docs/training.md.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

__all__ = ["list_recipes", "read_yaml", "recipe_path"]

MAX_BYTES = 1 << 20  # args.yaml has a few thousand
MAX_VALUES = 10_000  # with aliases written out

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


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, if it is of a recipe's size, however it is written.

    Raises:
        ValueError: If it is not YAML, nests too deeply, or its aliases (`*name`) stand for more than any recipe has.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"recipe {path} has {path.stat().st_size:,} bytes, more than a recipe needs ({MAX_BYTES:,})")
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        count = 0 if root is None else _count(root, {})
        if count > MAX_VALUES:
            raise ValueError(f"its aliases stand for {count:.3g} values, a recipe has at most {MAX_VALUES:,}")
        return yaml.safe_load(text)
    except RecursionError:
        raise ValueError(f"recipe {path} is nested too deeply") from None
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"recipe {path} is not YAML for a recipe: {' '.join(str(error).split())[:300]}") from error


def _count(node: yaml.Node, counts: dict[int, float]) -> float:
    """Values under a node; infinitely many for one that contains itself."""
    if id(node) in counts:
        return counts[id(node)]
    counts[id(node)] = float("inf")  # until it is known
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    counts[id(node)] = 1 + sum(_count(child, counts) for child in children)
    return counts[id(node)]
