"""What a training checkpoint holds, entry by entry: a file that is whole may still not be what a run wrote."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import first_line
from ...hub.checkpoints import CheckpointError

_RANKED = re.compile(r"checkpoint-\d+\.pth\.tar")

Check = Callable[[str, Any], None]


def _fail(name: str, value: Any, wanted: str) -> None:
    shown = type(value).__name__ if isinstance(value, (Mapping, list, tuple, Tensor)) else repr(value)[:60]
    raise CheckpointError(f"its entry {name} needs to be {wanted}, got {shown}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(name, value, "a number")


def _count(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 1 << 62:
        _fail(name, value, "a whole number, at least 0")


def _of(kind: type | tuple[type, ...], wanted: str) -> Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            _fail(name, value, wanted)

    return check


_flag, _text = _of(bool, "true or false"), _of(str, "text")


def _maybe(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _list_of(check: Check, length: int | None = None) -> Check:
    def check_list(name: str, value: Any) -> None:
        if not isinstance(value, (list, tuple)) or len(value) != (len(value) if length is None else length):
            _fail(name, value, "a list" if length is None else f"a list of {length}")
        for index, item in enumerate(value):
            check(f"{name}.{index}", item)

    return check_list


def _dict_of(check: Check, key: type = str) -> Check:
    def check_dict(name: str, value: Any) -> None:
        if not isinstance(value, Mapping) or not all(type(k) is key for k in value):
            _fail(name, value, f"a dict whose keys are {key.__name__}")
        for k, item in value.items():
            check(f"{name}.{k}", item)

    return check_dict


def _record(**checks: Check) -> Check:
    """A dict with these entries, and perhaps others."""

    def check_record(name: str, value: Any) -> None:
        if not isinstance(value, Mapping):
            _fail(name, value, "a dict")
        for key, check in checks.items():
            if key not in value:
                raise CheckpointError(f"it has no entry {name}.{key}")
            check(f"{name}.{key}", value[key])

    return check_record


def _anything(name: str, value: Any) -> None:
    pass


def _bytes(length: int | None = None) -> Check:
    def check(name: str, value: Any) -> None:
        is_row = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1
        if not is_row or len(value) != (len(value) if length is None else length):
            _fail(name, value, "a row of bytes" if length is None else f"a row of {length} bytes")

    return check


def _position_in(limit: int) -> Check:
    def check(name: str, value: Any) -> None:
        if type(value) is not int or not 0 <= value <= limit:
            _fail(name, value, f"a whole number from 0 to {limit}")

    return check


_random_state = _record(
    torch=_bytes(len(torch.get_rng_state())),
    numpy=_bytes(624 * 4),
    numpy_position=_position_in(624),
    numpy_gauss=_maybe(_number),
    python=_bytes(625 * 4),
    python_version=_count,
    python_gauss=_maybe(_number),
    cuda=_maybe(_bytes()),
)
_position = _record(
    consumed=_count,
    workers=_list_of(_maybe(_random_state)),
    workers_began=_flag,
    epoch=_maybe(_random_state),
    pending=_maybe(_random_state),
    now=_random_state,
)
_process = _record(
    position=_position,
    fusion=_list_of(_dict_of(_maybe(_of((bool, int, float, str, list, tuple), "plain")))),
    losses=_record(sum=_number, count=_number),
)
_schedule = _record(timm=_dict_of(_anything), num_bad_epochs=_count, cooldown_counter=_count, restore_lr=_anything)


def _row(name: str, value: Any) -> None:
    _dict_of(_maybe(_number))(name, value)
    _record(epoch=_count, train_loss=_number, images_per_second=_number)(name, value)


_trainer = _record(
    epoch=_count,
    consumed=_count,
    batches=_list_of(_count, 4),
    processes=_list_of(_process),
    eval_began=_flag,
    history=_list_of(_row),
    schedule=_maybe(_schedule),
    model=_dict_of(_maybe(_count)),
)


def _ranked(name: str, value: Any) -> None:
    _list_of(_anything, 2)(name, value)
    file, metric = value
    # The saver deletes what is listed here.
    if not isinstance(file, str) or not _RANKED.fullmatch(file):
        _fail(f"{name}.0", file, "checkpoint-N.pth.tar")
    _maybe(_number)(f"{name}.1", metric)


_saver = _record(checkpoint_files=_list_of(_ranked), best_epoch=_maybe(_count), best_metric=_maybe(_number))
_optimizer = _record(
    state=_dict_of(_dict_of(_anything), key=int),
    param_groups=_list_of(_record(params=_list_of(_count))),
)
_weights = _dict_of(_of(Tensor, "a tensor"))

# By name: whether it has to be there, and how it is checked.
_ENTRIES: dict[str, tuple[bool, Check]] = {
    "state_dict": (True, _weights),
    "state_dict_ema": (False, _weights),
    "optimizer": (False, _optimizer),
    "saver": (False, _saver),
    "trainer": (False, _trainer),
    "arch": (False, _text),
    "args": (False, _of((Mapping, argparse.Namespace), "the settings of a run")),
}


def check_contents(content: Mapping[str, Any]) -> None:
    """Compare a training checkpoint's entries with what resuming takes from them; CheckpointError naming the first bad.

    What only the run can know (which parameters the optimizer's state is of, say) is checked where it is loaded.
    """
    for name, (needed, check) in _ENTRIES.items():
        value = content.get(name)
        if needed or value is not None:
            check(name, value)
    pending = (content.get("saver") or {}).get("pending") or (None, None)
    _list_of(_maybe(_number), 2)("saver.pending", pending)
    _maybe(_count)("saver.pending.0", pending[0])
    trainer = content.get("trainer")
    if trainer is None:
        epoch = content.get("epoch", -1)
        if type(epoch) is not int or epoch < -1:
            _fail("epoch", epoch, "a whole number")
        return
    if not trainer["processes"]:
        _fail("trainer.processes", trainer["processes"], "a list with an entry for each process")
    if trainer["consumed"] > trainer["batches"][0]:
        _fail("trainer.consumed", trainer["consumed"], f"at most the {trainer['batches'][0]} batches of an epoch")
    _maybe(_row)("trainer.trained", trainer.get("trained"))
    _maybe(_dict_of(_anything))("trainer.data", trainer.get("data"))
    _maybe(_list_of(_text))("trainer.class_names", trainer.get("class_names"))
    for rank, process in enumerate(trainer["processes"]):
        position = process["position"]
        if position["consumed"] and position["epoch"] is None:
            _fail(f"trainer.processes.{rank}.position.epoch", None, "random numbers, within an epoch")


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Where a part of a checkpoint is loaded that libraries check themselves; CheckpointError naming file and part."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its {what} cannot be loaded ({first_line(error)})") from error
