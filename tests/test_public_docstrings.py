"""Every public name has a docstring and type hints: modules, classes, functions, methods, properties."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src"
MODULES = sorted(SOURCE.rglob("*.py"))
# What a base class explains, or Python or PyTorch calls.
INHERITED = {"forward", "extra_repr", "format_dict"}


def public(node: ast.AST, prefix: str = ""):
    """Public definitions of a module or class, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from public(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):
            yield from public(child, prefix)


def is_overload_or_setter(node: ast.AST) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in node.decorator_list}
    return bool(names & {"overload", "setter", "deleter"})


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases]


def overrides(tree: ast.Module) -> set[str]:
    """Methods of classes that derive from another class of the same name's method, in this module or elsewhere."""
    return {
        f"{node.name}.{method.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and bases(node)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name in METHODS_OF_BASES
    }


def _methods() -> set[str]:
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found |= {m.name for m in node.body if isinstance(m, ast.FunctionDef) and ast.get_docstring(m)}
    return found


METHODS_OF_BASES = _methods()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has no docstring"
    explained = overrides(tree)
    missing = [
        name
        for name, node in public(tree)
        if not ast.get_docstring(node)
        and not is_entry_point(path, node)
        and name.split(".")[-1] not in INHERITED
        and name not in explained
        and not (isinstance(node, ast.FunctionDef) and is_overload_or_setter(node))
    ]
    assert not missing


def is_entry_point(path: Path, node: ast.AST) -> bool:
    """timm's entry points, and the commands that cli.py describes in its table."""
    if isinstance(node, ast.ClassDef):
        return False
    registered = any(ast.unparse(decorator).split("(")[0] == "register_model" for decorator in node.decorator_list)
    return registered or path.parent.name == "commands"


def test_a_missing_docstring_is_noticed():
    tree = ast.parse("def seen():\n    pass\n\nclass A:\n    '''x'''\n    def b(self): pass\n    def _c(self): pass\n")
    assert [name for name, node in public(tree) if not ast.get_docstring(node)] == ["seen", "A.b"]
