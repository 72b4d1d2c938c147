"""Upstream checkpoint in, timm folder out."""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from timm.models._hub import save_for_hf
from torch import nn

from .. import inference
from ..errors import printable
from .card import write_card
from .checkpoints import Checkpoint, CheckpointError, read_checkpoint
from .data_config import pretrained_overlay
from .infer import RELEASES, InferredModel, Release, architectures, find_asset, find_release, infer_architecture
from .publish import FILES
from .verify import coupled_layers, takes_coupling

# Of a pretrained config: what is true of its file alone.
_OF_THE_FILE = (
    "url", "file", "hf_hub_id", "hf_hub_filename", "label_names", "label_descriptions", "label_offset", "license",
    "description", "notes",
)  # fmt: skip
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_QUANTIZED = "weights rounded to 8 bits, one step per output channel"


@dataclass
class Conversion:
    """What `convert` did."""

    folder: Path
    model: str
    tag: str
    model_args: dict[str, Any]
    release: Release | None
    report: list[str]  # what was found, for the user


def convert(
    source: Path,
    folder: Path,
    *,
    model: str | None = None,
    time_steps: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    tag: str | None = None,
    input_size: int | None = None,
    batch_coupled: bool = False,
    ema: bool | None = None,
    dtype: str = "float32",
    quantize_weights: bool = False,
    force: bool = False,
    measure: Callable[[Path], list[dict[str, Any]]] | None = None,
) -> Conversion:
    """Turn a checkpoint into a folder for timm: model.safetensors, config.json and README.md.

    The folder loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`, and when it is on the Hub with
    "hf-hub:REPOSITORY". It appears complete or not at all.

    Args:
        source: Checkpoint of one of the authors' releases, of STEP or of this package.
        folder: Where the result goes; must be new or empty unless `force`.
        model: Registered name, if the tensors alone should not decide.
        time_steps: Time steps T that images are shown for. None: what the checkpoint says, else the model's default.
        model_args: Arguments of the model that the tensors do not show, such as `num_heads`; they go before what the
            file says.
        tag: Pretrained tag to write down, of letters, digits, "_", "-" and ".". None: the one of the file that it is by
            md5 or name, else "custom". The names of the classes and the licence of a registered tag are written down
            only for that tag's own file.
        input_size: Pixels per side that the weights were trained for. None: what is known of the file.
        batch_coupled: Let the folder's model be created with coupled neurons, also if its training does not say so.
        ema: Take the moving average (True), the weights themselves (False), or the former where there is one (None).
        dtype: "float16", "float32" or "float64" for the floating-point tensors, which are widened exactly or rounded.
            A model that loads them computes in its own dtype all the same.
        quantize_weights: Round weights to 8 bits first, see `timm_qkformer.quantize_weights`. By that, an authors'
            checkpoint loses its tag and its published accuracy.
        force: Replace what is in `folder`.
        measure: Called with the finished folder before it is moved to its place; its results go into the card.

    Raises:
        CheckpointError: If the file cannot be read safely or fits no model.
        FileExistsError: If `folder` has something in it and `force` is off.
        ValueError: For an argument outside its range.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown, choose one of {sorted(_DTYPES)}")
    if input_size is not None and input_size < 1:
        raise ValueError(f"input_size={input_size} must be a number of pixels")
    if tag is not None and not _TAG.fullmatch(tag):
        raise ValueError(f"tag={tag!r} needs to be up to 64 letters, digits, '_', '-' and '.'")
    _check_target(folder, force)
    checkpoint = read_checkpoint(source, ema)
    release = find_release(checkpoint.md5)
    found = infer_architecture(checkpoint, model or (release.model if release else None), time_steps, model_args)
    asset = find_asset(source.name)
    own = None if release or quantize_weights else _shipped_tag(found.model, checkpoint)
    if tag is None and not quantize_weights:
        tag = release.tag if release else own or (asset[1] if asset and asset[0] == found.model else None)
    cfg = {"tag": tag or "custom", **pretrained_overlay(found, checkpoint, release, tag, input_size)}
    if (own is None or own != tag) and not (release and release.tag == tag and not quantize_weights):
        cfg |= dict.fromkeys(_OF_THE_FILE)  # what is known of another file of the same model
    names = checkpoint.class_names
    if names is not None and len(names) != _class_count(found):
        names = None
    built = _build(found, cfg, batch_coupled, _DTYPES[dtype], quantize_weights)
    source_facts = _source_facts(checkpoint, release)
    if quantize_weights:
        source_facts["Quantization"] = _QUANTIZED

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save_for_hf(built, str(staging), safe_serialization=True)
        config = _tidied(staging / "config.json", names)
        measured = measure(staging) if measure is not None else None
        params = sum(p.numel() for p in built.parameters())
        write_card(staging, config, source_facts, params, None if quantize_weights else release, measured)
        staging.chmod(0o755)  # what tempfile and safetensors write is private
        for path in staging.iterdir():
            path.chmod(0o644)
        _put(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report = _report(checkpoint, found, release, config, dtype)
    if quantize_weights:
        report.append(_QUANTIZED)
    return Conversion(folder, found.model, tag or "custom", config["model_args"], release, report)


def _check_target(folder: Path, force: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(f"{folder} is in the way, it is not a folder")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise FileExistsError(f"{folder} is not empty; choose another folder or replace it with --force")
        if _architecture(folder) not in architectures():
            raise FileExistsError(f"{folder} holds something other than a converted model and is not replaced")
        if others := sorted({path.name for path in folder.iterdir()} - set(FILES)):
            raise FileExistsError(
                f"{folder} holds {', '.join(others[:3])} besides a converted model and is not replaced"
            )


def _architecture(folder: Path) -> str | None:
    """Name of the model in a folder; None if there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(config.get("architecture")) if isinstance(config, dict) else None


def _put(staging: Path, folder: Path) -> None:
    """Give a finished folder its place, and what was there back if that fails."""
    if not folder.exists():
        staging.rename(folder)
        return
    former = staging.with_name(f"{staging.name}.former")
    folder.rename(former)
    try:
        staging.rename(folder)
    except OSError:
        former.rename(folder)
        raise
    shutil.rmtree(former)


def _class_count(found: InferredModel) -> int:
    default: Any = timm.get_pretrained_cfg(found.model)
    return int(found.model_args.get("num_classes", default.num_classes))


def _shipped_tag(model: str, checkpoint: Checkpoint) -> str | None:
    """The tag whose weights come with the package in this very file."""
    for cfg in get_arch_pretrained_cfgs(model).values():
        path = Path(cfg.file) if cfg.file else None
        if path is not None and path.is_file():
            with path.open("rb") as file:
                if hashlib.file_digest(file, "md5").hexdigest() == checkpoint.md5:
                    return str(cfg.tag)
    return None


def _build(
    found: InferredModel, cfg: dict[str, Any], batch_coupled: bool, dtype: torch.dtype, quantized: bool
) -> nn.Module:
    args = dict(found.model_args, time_steps=found.time_steps)
    plain = timm.create_model(found.model, device="meta")
    if coupled_layers(plain) or (batch_coupled and takes_coupling(plain)):
        args["batch_coupled"] = batch_coupled or args.get("batch_coupled", False)
    elif batch_coupled:
        raise ValueError(f"batch_coupled=True: {found.model} has no coupled neurons, its release has none either")
    # Rounded once: not to half precision first.
    first = torch.float64 if quantized else dtype
    built = timm.create_model(found.model, pretrained_cfg_overlay=cfg, dtype=first, **args)
    try:
        built.load_state_dict(found.state_dict, strict=True)
    except RuntimeError as error:  # infer_architecture has compared names and shapes
        raise CheckpointError(f"{found.model} does not take the tensors: {error}") from error
    if quantized:
        inference.quantize_weights(built)
        built.to(dtype)
    overflow = [name for name, value in built.state_dict().items() if not bool(torch.isfinite(value).all())]
    if overflow:
        raise CheckpointError(f"{overflow[0]} has values too large for {dtype}; convert with dtype float64")
    return built


def _tidied(path: Path, names: Sequence[str] | None) -> dict[str, Any]:
    """Take the class count out of `model_args`: transformers would hand the model it and the one that stands above.
    The names of the classes go to the top, where transformers looks for them."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)
    of_the_tag = config["pretrained_cfg"].pop("label_names", None)
    names = names or of_the_tag
    if names is not None:
        config["label_names"] = list(names)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return config


def _source_facts(checkpoint: Checkpoint, release: Release | None) -> dict[str, str]:
    name = printable(checkpoint.path.name).replace("`", "'")
    facts = {"File": f"`{name}`, {checkpoint.weights}"}
    if checkpoint.epoch is not None:
        facts["Epoch"] = str(checkpoint.epoch)
    known = f"the authors' {release.name}" if release else "not one of the authors' known files"
    facts["md5"] = f"`{checkpoint.md5}`, {known}"
    return facts


def _report(
    checkpoint: Checkpoint, found: InferredModel, release: Release | None, config: dict[str, Any], dtype: str
) -> list[str]:
    tag = config["pretrained_cfg"]["tag"]
    args = ", ".join(f"{k}={v}" for k, v in {"num_classes": config["num_classes"], **config["model_args"]}.items())
    lines = [
        f"{printable(checkpoint.path.name)}: {checkpoint.weights}, {len(checkpoint.tensors)} tensors",
        f"md5 {checkpoint.md5}: "
        + (
            f"the authors' {release.name}, {release.top1:.2f} % top-1 as published (coupled neurons)"
            if release
            else "not one of the authors' known files"
        ),
        f"model {found.model} ({args}); T = {found.time_steps} {found.time_steps_from}",
    ]
    wanted = next((known for known in RELEASES if known.name == f"{found.model}.{tag}"), None)
    if wanted is not None and wanted != release:
        lines.append(
            f"the authors' {wanted.name} has the md5 {wanted.md5}; this file is another, its card has no accuracy"
        )
    if found.also_fits:
        lines.append(f"warning: {found.ambiguity} (--model)")
    narrowed = {str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values() if t.is_floating_point()}
    if narrowed != {dtype}:
        lines.append(f"tensors were {', '.join(sorted(narrowed))}, written as {dtype}")
    return lines
