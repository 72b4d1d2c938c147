"""Released training files on the Hub: a model's tensors between an optimizer's, kept apart so that they are read once.

A training dict of SpiLiFormer has 830 MB, of which the model's tensors are a third. The first load writes those into a
safetensors file beside the download, in the cache's own folder for that revision; later loads read it and nothing else.
"""

import logging
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from safetensors.torch import save_file
from timm.models._hub import hf_split
from timm.models._pretrained import PretrainedCfg
from torch import Tensor

from ..torch_files import check_file, load_restricted
from .checkpoints import unwrap_checkpoint

_logger = logging.getLogger(__name__)

_ENDINGS = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")


def with_kept_tensors(cfg: PretrainedCfg, cache_dir: Any, check: Callable[[Path], None]) -> PretrainedCfg:
    """The config with the tensors of its training file as the source; other configs come back as they are.

    Args:
        cfg: Weights of a released model.
        cache_dir: Cache for downloads, huggingface_hub's own if None.
        check: Called with a fresh download before it is read; raises for one that did not arrive as it was sent.

    Raises:
        OSError, huggingface_hub.errors: If the file cannot be had.
        pickle.UnpicklingError, RuntimeError: If it is no checkpoint, or holds what could run code.
        ValueError: If it holds no tensors.
    """
    kept_name = _kept_name(cfg)
    if kept_name is None:
        return cfg
    kept = kept_file(cfg, cache_dir)
    if kept is not None:
        return replace(cfg, file=str(kept))
    repo, revision = hf_split(cfg.hf_hub_id)
    file: Any = cfg.hf_hub_filename
    known = try_to_load_from_cache(repo, file, cache_dir=cache_dir, revision=revision)
    path = Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    (check_file if str(path) == known else check)(path)
    # Whatever is no zip gets the error that it deserves.
    tensors = unwrap_checkpoint(load_restricted(path, mmap=zipfile.is_zipfile(path)))
    target = path.with_name(Path(kept_name).name)
    try:
        _save(tensors, target)
    except OSError as error:  # a cache that others own, or a full disk
        _logger.warning("The tensors of %s cannot be kept in %s (%s): it is read whole each time", file, target, error)
        return replace(cfg, state_dict=tensors)
    return replace(cfg, file=str(target))


def kept_file(cfg: PretrainedCfg, cache_dir: Any) -> Path | None:
    """Where the cache has the tensors of a config's training file, if they are kept already."""
    name = _kept_name(cfg)
    if name is None:
        return None
    repo, revision = hf_split(cfg.hf_hub_id)
    found = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _kept_name(cfg: PretrainedCfg) -> str | None:
    """What the tensors' own file is called; None for weights that are not in a training file on the Hub."""
    file = cfg.hf_hub_filename
    if cfg.url or cfg.file or cfg.state_dict or not cfg.hf_hub_id or not file or not file.endswith(_ENDINGS):
        return None
    ending = next(ending for ending in _ENDINGS if file.endswith(ending))
    return f"{file.removesuffix(ending)}.safetensors"


def _save(tensors: dict[str, Tensor], target: Path) -> None:
    """All of the file, or nothing."""
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
