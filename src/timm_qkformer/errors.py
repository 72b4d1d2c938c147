"""Errors that name what is to blame, other libraries' among them.

Below every other module: nothing of the package is imported here.
"""

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any


def printable(text: str, keep: str = "") -> str:
    """Text with control characters spelled out (`\\x1b`), so that no file can write to the terminal as it likes.

    Args:
        text: What may come from a file or its name.
        keep: Control characters to leave as they are, such as a line break.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """What an error says first; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return printable((lines[0] if lines else type(error).__name__)[:200])


@contextmanager
def naming_settings(what: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a library raises for settings that it cannot use into a ValueError that names them.

    Args:
        what: What is being made of them.
        settings: Those that may be to blame, by name.

    Raises:
        ValueError: For errors that are made for programmers. Those that say what is wrong with a file or a value
            (OSError, ValueError) pass.
    """
    try:
        yield
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        named = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        reason = first_line(error)
        kind = "" if reason == type(error).__name__ else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be made with {named} ({kind}{reason})") from error


def import_extra(module: str, extra: str, doing: str) -> Any:
    """Import what one of the package's extras brings along.

    Args:
        module: Name of the package.
        extra: Of the extra.
        doing: What it is needed for: the error begins with it.

    Raises:
        ModuleNotFoundError: If it is not installed, with what to install.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f'{doing} needs the package {module}: pip install "timm-qkformer[{extra}]"', name=module
        ) from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; True and False are none."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # whole numbers of hundreds of digits
        return False


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """An argument that has to be a finite number, within bounds if there are any.

    Raises:
        ValueError: For anything else, with the argument's name.
    """
    if not is_number(value) or not low <= value <= high:
        bounds = "finite number" if math.isinf(low) else f"number between {low:g} and {high:g}"
        raise ValueError(f"{name}={value!r} must be a {bounds}")
    return float(value)


def check_whole(name: str, value: Any, low: int) -> int:
    """An argument that has to be a whole number of at least `low`; ValueError with its name for anything else."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}")
    return int(value)


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """Refuse what is none of the words that an argument may be, with a ValueError that names them."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={value!r} is unknown, choose one of {sorted(known)}")


def check_name(kind: str, name: Any) -> None:
    """Refuse what cannot be the name of something registered: `@register` without a name, for instance.

    Raises:
        TypeError: If it is no string.
        ValueError: If it could not be given on a command line or in a recipe.
    """
    if not isinstance(name, str):
        raise TypeError(f"{kind} {name!r} has no name: write @register_{kind}(NAME) above the class")
    if not name or not name.isprintable() or " " in name:
        raise ValueError(f"{kind} {name!r}: a name has at least one character, and no spaces")
