"""Kernels in C++: those that came with the wheel (`prebuilt`), else compiled here when first needed (`compiler`)."""

import ctypes
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

from torch import Tensor

from . import compiler, prebuilt
from .budget import Budget
from .libraries import COMMON, Source, sources
from .policy import current_policy, under_dispatch_mode

# Multiply-adds that dense convolutions do in training, without gradients, before "auto" compiles kernels for it: one
# core takes about as long for them as for compiling.
AUTO_BUDGET = 2**37

POINTER, INT, DOUBLE, THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int

_libraries: dict[str, ctypes.CDLL | None] = {}
_compiling = Lock()


class _Kernels(NamedTuple):
    kernel: str


_TRAINING = _Kernels("events")
_budget = Budget(_Kernels)


def training_kernels_pay() -> bool:
    """Whether training may compile and run kernels by now, see `Policy.kernels`."""
    kernels = current_policy().kernels
    return kernels == "always" or (
        kernels == "auto" and (_budget.work.get(_TRAINING, 0) > AUTO_BUDGET or _training_kernels_came_along())
    )


_TRAINING_FILES = ("events.cpp", "event_gradients.cpp", "packing.cpp")


def _training_kernels_came_along() -> bool:
    """Whether those of training came with the wheel: then nothing is compiled, and they pay at once."""
    global _came_along
    if _came_along is None:
        folder = files(__package__)
        made = (Source.of(folder.joinpath(COMMON), folder.joinpath(file)) for file in _TRAINING_FILES)
        _came_along = all(prebuilt.find(source) is not None for source in made) and prebuilt.shares_openmp()
    return _came_along


_came_along: bool | None = None


def count_training_work(amount: int) -> None:
    """Count multiply-adds that a kernel could have saved in training."""
    _budget.spend(_TRAINING, amount, AUTO_BUDGET)


class _Neuron(ctypes.Structure):
    _fields_ = [
        ("leak", ctypes.c_double),
        ("threshold", ctypes.c_double),
        ("soft_reset", ctypes.c_int32),
        ("decay_input", ctypes.c_int32),
        ("ternary", ctypes.c_int32),
        ("max_spikes", ctypes.c_int32),
    ]


def neuron_operand(*neurons: Any) -> ctypes.Array:
    """Neurons (`NeuronSpec`, of other than real levels) as the kernels take them, to be read alone."""
    return _neurons(*map(_fields, neurons))


def _fields(neuron: Any) -> tuple[float | bool, ...]:
    most = neuron.max_spikes if neuron.levels == "integer" else 0
    flags = (neuron.soft_reset, neuron.decay_input, neuron.levels == "ternary")
    return float(neuron.leak), float(neuron.threshold), *flags, most  # by value: tensors may change


@lru_cache(maxsize=256)
def _neurons(*fields: tuple[float | bool, ...]) -> ctypes.Array:
    return (_Neuron * len(fields))(*(_Neuron(*each) for each in fields))


def may_run(x: Tensor) -> bool:
    """Whether kernels may process x here and now: on CPUs, where x has numbers, unless the policy leaves them out."""
    return x.is_cpu and x.numel() > 0 and not under_dispatch_mode(x) and current_policy().kernels != "never"


def function(
    name: str, package: str, file: str, functions: Mapping[str, Sequence[Any]], instances: str = ""
) -> Callable[..., None] | None:
    """A function of a library; None, after one warning, where none came along and none can be compiled.

    Args:
        name: Of the function.
        package: Where the file is.
        file: The library's source, which follows common.cpp.
        functions: Names and operands of all of its functions. The last operand is torch's number of threads.
        instances: Put behind the source.
    """
    key = f"{package} {file} {instances}"
    if key not in _libraries:
        with _compiling:
            if key not in _libraries:
                _libraries[key] = _load(package, file, functions, instances)
    library = _libraries[key]
    return None if library is None else getattr(library, name)


def _load(package: str, file: str, functions: Mapping[str, Sequence[Any]], instances: str) -> ctypes.CDLL | None:
    global _missing
    prebuilt.levels()  # a setting that is wrong is the user's error, not a missing library
    try:
        source = Source.of(files(__package__).joinpath(COMMON), files(package).joinpath(file))
        library = prebuilt.load(source, functions)
        if library is None:
            if _missing is not None:  # whoever was asked in vain, perhaps for minutes, is not asked again
                return None
            library = compiler.load(source.text(instances), file)
        for name, operands in functions.items():
            run = getattr(library, name)
            run.argtypes, run.restype = operands, None
    except Exception as error:
        if isinstance(error, compiler.NoCompilerError):
            _missing = error
        _warn(file, error)
        return None
    return library


def provenance() -> dict[str, str]:
    """Where the kernels of each of this package's sources come from on this machine; nothing is compiled to find out.

    "prebuilt" and the kind of processors: they came with the wheel. "built here": they are on disk, or will be compiled
    when they are first needed. "none": nothing came along, and there is no compiler.
    """
    return {source.file: _origin(source) for source in sources(Path(__file__).parents[1])}


def _origin(source: Source) -> str:
    found = prebuilt.find(source)
    if found is not None and prebuilt.shares_openmp():
        return f"prebuilt {found[0].name}"
    if compiler.compiler_path() or any(compiler.is_kept(source.text(each)) for each in source.instances()):
        return "built here"
    return "none"


INSTALL = (
    "a C++ compiler makes them: `apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora), "
    "`conda install gxx`, `xcode-select --install` (macOS)"
)

_missing: compiler.NoCompilerError | None = None
_warned = False


def _warn(file: str, error: Exception) -> None:
    """Once: what holds for one library holds for most of them."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"the kernels of {file} did not come with this installation and do not compile on this machine: deployed "
            "models and training on CPUs do without, which changes no result but takes up to three times as long: "
            f"{type(error).__name__}: {error}. {INSTALL}; or "
            'execution_policy(kernels="never") silences this',
            RuntimeWarning,
            stacklevel=4,
        )
