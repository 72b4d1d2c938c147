"""Reading checkpoints that may come from anyone: nothing in them runs, and nothing is read before its size is known.

Two containers are read: safetensors, and the zip that `torch.save` writes since PyTorch 1.6. A zip is looked through
first. Its records must be stored, not compressed, and so cannot be larger than the file; each must match its checksum;
its pickle is read opcode by opcode, and only names on `_ALLOWED_GLOBALS` may stand in it. Only then does torch's own
restricted unpickler (`weights_only=True`) run, with the records mapped from the file instead of read.
"""

import argparse
import hashlib
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.models import clean_state_dict
from torch import Tensor

from ..errors import first_line, printable
from ..torch_files import DamagedFileError, check_records, load_restricted

MAX_FILE_BYTES = 8 << 30  # the largest known checkpoint, with optimizer state, is a tenth of it
MAX_PICKLE_BYTES = 8 << 20  # the pickle holds names, shapes and options; the tensors are records of their own
MAX_PICKLE_OPCODES = 1_000_000
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 4096  # the largest of these models has under 1,000

_ALLOWED_GLOBALS = re.compile(
    r"collections OrderedDict|argparse Namespace|torch Size|torch device"
    r"|torch\._utils _rebuild_(tensor_v2|parameter)"
    r"|torch (Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool)Storage"
)
_WIDENED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_EMA_KEYS = ("state_dict_ema", "model_ema")
_MODEL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net")
# What wraps a model and stands before all its names: DDP and AveragedModel, torch.compile, Lightning, one's own.
_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
_MAX_CLASSES = 100_000
_SAMPLES = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")  # of trainer.data


class CheckpointError(ValueError):
    """A file is not a checkpoint that can be read safely."""


@dataclass
class Checkpoint:
    """A checkpoint's tensors under their own names, and what its file says about them."""

    path: Path
    md5: str
    tensors: dict[str, Tensor]
    weights: str  # which of the file's weights these are, for messages
    args: dict[str, Any] = field(default_factory=dict)  # the training's command line
    epoch: int | None = None
    arch: str | None = None  # the model's name, in timm's checkpoints
    class_names: tuple[str, ...] | None = None  # of the training's data, in the order of the classifier's outputs
    unclear: tuple[str, ...] = ()  # names of arguments that are nothing which can be written down


def read_checkpoint(path: Path, ema: bool | None = None) -> Checkpoint:
    """Read the weights of a checkpoint file without trusting it.

    Args:
        path: A plain state dict or a training checkpoint, in safetensors or `torch.save`'s zip format.
        ema: Take the weights' moving average (True), the weights themselves (False), or the former where there is
            one (None).

    Raises:
        CheckpointError: With the reason, for a file that cannot be read or has weights that no model can have.
        OSError: If the file cannot be opened.
    """
    content = read_content(path)
    with path.open("rb") as file:
        md5 = hashlib.file_digest(file, "md5").hexdigest()
    with _naming(path):
        tensors, weights = _choose(content, ema)
        _check_tensors(tensors, path.stat().st_size)
    if weights == _PLAIN:
        return Checkpoint(path, md5, tensors, weights)
    epoch, arch = content.get("epoch"), content.get("arch")
    args, unclear = _arguments(content)
    return Checkpoint(
        path,
        md5,
        tensors,
        weights,
        args,
        epoch if isinstance(epoch, int) else None,
        arch if isinstance(arch, str) else None,
        _class_names(content),
        unclear,
    )


def read_content(path: Path, mmap: bool = True) -> Any:
    """Read all that a checkpoint file holds, without trusting it: every reader of this package starts here.

    Args:
        path: The file, in safetensors or `torch.save`'s zip format.
        mmap: Leave the tensors of a zip on the disk until they are looked at.

    Raises:
        CheckpointError: With the reason, for a file that cannot be read.
        OSError: If the file cannot be opened.
    """
    with _naming(path):
        if not path.is_file():
            raise CheckpointError("there is no such file")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CheckpointError(f"{size:,} bytes are more than a checkpoint has (limit {MAX_FILE_BYTES:,})")
        with path.open("rb") as file:
            start = file.read(9)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path, size, mmap)
        if start[8:] == b"{":
            return _read_safetensors(path, size, int.from_bytes(start[:8], "little"))
        if start[:1] == b"\x80":
            raise CheckpointError(
                "a bare pickle. PyTorch before 1.6 saved so, and it can hide code; if you trust it, save it anew: "
                "torch.save(torch.load(OLD, weights_only=True), NEW)"
            )
        raise CheckpointError("neither a safetensors file nor one that torch.save wrote")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors begin with the file's name."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__


def _read_safetensors(path: Path, size: int, header: int) -> dict[str, Tensor]:
    if header > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(
            f"its safetensors header claims {header:,} bytes, the file has {size:,} (limit {MAX_HEADER_BYTES:,})"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            _check_count(names)
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, UnicodeDecodeError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"damaged or cut off ({first_line(error)})") from error


def _read_zip(path: Path, size: int, mmap: bool) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            _check_records(records, size)
            pickles = [record for record in records if record.filename.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise CheckpointError("not a file that torch.save wrote: it has no data.pkl")
            if pickles[0].file_size > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"its pickle has {pickles[0].file_size:,} bytes, more than names and shapes need "
                    f"(limit {MAX_PICKLE_BYTES:,})"
                )
            check_records(archive)
            _check_pickle(archive.read(pickles[0]))
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, DamagedFileError, NotImplementedError, EOFError, OSError, RuntimeError, ValueError,
            LookupError, struct.error) as error:  # fmt: skip
        raise CheckpointError(f"damaged or cut off ({first_line(error)})") from error
    try:
        return load_restricted(path, mmap)
    except Exception as error:  # a crafted pickle may fail in any way
        raise CheckpointError(f"PyTorch cannot read it ({first_line(error)})") from error


def _check_records(records: list[zipfile.ZipInfo], size: int) -> None:
    if len({record.filename for record in records}) != len(records):
        raise CheckpointError("its zip directory lists a name twice")
    if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
        raise CheckpointError("it has compressed or encrypted records, and torch.save writes none")
    total = sum(record.file_size for record in records)
    if total > size or any(record.file_size != record.compress_size for record in records):
        raise CheckpointError(f"its records claim {total:,} bytes, the file has {size:,}")


def _check_pickle(pickle: bytes) -> None:
    """Look at every opcode without executing one."""
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
            if count > MAX_PICKLE_OPCODES:
                raise CheckpointError(f"its pickle has more than {MAX_PICKLE_OPCODES:,} steps")
            if opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(f"its pickle builds objects in a way that torch.save does not ({opcode.name})")
            if opcode.name == "GLOBAL" and not _ALLOWED_GLOBALS.fullmatch(str(argument)):
                raise CheckpointError(
                    f"its pickle asks for {str(argument)[:80].replace(' ', '.')}, which weights do not need"
                    " and which could run code"
                )
    except (ValueError, IndexError, UnicodeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"its pickle is damaged ({first_line(error)})") from error


_PLAIN = "plain weights"


def _choose(content: Any, ema: bool | None) -> tuple[dict[str, Tensor], str]:
    """The state dict in the file: the moving average, the model's entry, or the whole."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"it holds a {type(content).__name__}, not a dict of tensors")
    ema_key = _first_dict(content, _EMA_KEYS)
    if ema and ema_key is None:
        raise CheckpointError(f"it has no moving average (ema) of the weights, no {' or '.join(_EMA_KEYS)}")
    model_key = _first_dict(content, _MODEL_KEYS)
    if ema_key is not None and (ema is not False or model_key is None):
        if ema is False:
            raise CheckpointError(f"it has only the moving average of the weights ({ema_key})")
        key, words = ema_key, f"moving average of the weights ({ema_key!r} of a training checkpoint)"
    elif model_key is not None:
        key, words = model_key, f"weights ({model_key!r} of a training checkpoint)"
    else:
        key, words = None, _PLAIN
    tensors = content if key is None else content[key]
    if not tensors:
        raise CheckpointError("it holds no tensors")
    strangers = [str(name)[:80] for name, value in tensors.items() if not isinstance(value, Tensor)]
    if strangers or not all(isinstance(name, str) for name in tensors):
        raise CheckpointError(f"not a state dict: {_listing(strangers or map(str, tensors))} is not a named tensor")
    _check_count(tensors)
    odd = [name for name in tensors if not name.isprintable()]
    if odd:
        raise CheckpointError(f"{_listing(odd)} has control characters in its name, which no tensor of a model has")
    return _unwrapped(clean_state_dict(dict(tensors))), words


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what wrapped their model: a prefix of all names, AveragedModel's counter."""
    counter = tensors.get("n_averaged")
    if counter is not None and counter.ndim == 0 and len(tensors) > 1:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    while prefix := next((p for p in _WRAPPERS if all(n.startswith(p) and n != p for n in tensors)), None):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _first_dict(content: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((key for key in keys if isinstance(content.get(key), Mapping)), None)


def _check_count(names: Any) -> None:
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"it has {len(names):,} tensors, none of these models has more than {MAX_TENSORS:,}")


def _check_tensors(tensors: dict[str, Tensor], size: int) -> None:
    """Refuse what no trained model has. Names and shapes are compared with the models' elsewhere."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > size:
        raise CheckpointError(f"its tensors claim {claimed:,} bytes, the file has {size:,}")
    for name, tensor in tensors.items():
        shown = name[:80]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{shown} is not a plain dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(f"{shown} claims the shape {list(tensor.shape)}, the file holds less")
        counter = name.endswith("num_batches_tracked")
        may_count = counter or tensor.ndim == 0  # whatever its name; `infer_architecture` compares with the model's
        if not ((tensor.dtype == torch.int64 and may_count) or (tensor.dtype in _WIDENED and not counter)):
            wanted = "an int64 counter" if counter else "float32, float64, float16 or bfloat16"
            raise CheckpointError(f"{shown} is {str(tensor.dtype).removeprefix('torch.')}, expected {wanted}")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{shown} has values that are not finite (NaN or infinity)")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise CheckpointError(f"{shown} has negative variances")


def _arguments(content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The training's arguments that are plain, with how this package's trainer says that it made its samples, and the
    names of those that are not plain."""
    args, trainer = content.get("args"), content.get("trainer")
    values = vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(values, Mapping):
        return {}, ()
    stated = {str(key): value for key, value in values.items() if value is not None}
    made = trainer.get("data") if isinstance(trainer, Mapping) else None
    if isinstance(made, Mapping):
        stated |= {key: made[key] for key in _SAMPLES if made.get(key) is not None}
    plain = {key: value for key, value in stated.items() if _is_plain(value)}
    return plain, tuple(stated.keys() - plain.keys())


def _is_plain(value: Any, depth: int = 4) -> bool:
    """A number, a word, a short row of them, such as a mean, or some of these by name, such as a model's arguments and
    those of its neurons."""
    if isinstance(value, Mapping):
        return (
            depth > 0
            and len(value) <= 64
            and all(isinstance(key, str) and _is_plain(item, depth - 1) for key, item in value.items())
        )
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= 64 and all(_is_plain(item, depth - 1) for item in value)
    return value is None or isinstance(value, (str, int, float))


def _class_names(content: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of the classes, as this package's trainer writes them; None for anything else."""
    trainer = content.get("trainer")
    names = trainer.get("class_names") if isinstance(trainer, Mapping) else None
    if not isinstance(names, (list, tuple)) or not 0 < len(names) <= _MAX_CLASSES:
        return None
    return tuple(printable(name)[:200] for name in names) if all(isinstance(name, str) for name in names) else None


def _listing(names: Iterable[str], shown: int = 3) -> str:
    names = list(names)
    return ", ".join(printable(name[:80]) for name in names[:shown]) + (
        f" and {len(names) - shown} more" if len(names) > shown else ""
    )
