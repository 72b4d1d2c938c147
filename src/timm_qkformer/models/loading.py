"""Pretrained weights: configs that wait for their upload, downloads that are whole or not there, errors that help.

timm loads weights by itself; `loading_weights` stands around that. It fetches a `url` into torch.hub's cache first,
because torch.hub knows no timeout and takes a transfer that broke off for a complete one; it compares what came from
the Hugging Face Hub with the hash that the server announced; it lets `argparse.Namespace`, which training checkpoints
carry, through torch's restricted unpickler; and it turns every failure into a `WeightsError`.
"""

import hashlib
import http.client
import logging
import os
import pickle
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors import SafetensorError
from timm.models import _builder as timm_builder
from timm.models import get_arch_pretrained_cfgs, is_model
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME, get_cache_dir, hf_split
from timm.models._pretrained import PretrainedCfg
from torch import nn
from torch.hub import HASH_REGEX
from tqdm import tqdm

from ..torch_files import DamagedFileError, check_file, namespaces_allowed
from .checkpoints import in_float32
from .conventions import check_features_only
from .training_files import kept_file, with_kept_tensors

_logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=nn.Module)

URL_ATTEMPTS = 3
_CHUNK = 1 << 20


@dataclass
class PendingCfg(PretrainedCfg):
    """Config of weights whose place on the Hub is settled but not filled.

    `timm.list_pretrained` leaves it out; `create_model(..., pretrained=True)` still looks there.
    """

    @property
    def has_weights(self) -> bool:
        """Whether there is something to load."""
        return False


class WeightsError(OSError, RuntimeError):
    """Pretrained weights could not be had: what was tried, why it failed and what else there is."""


class _DamagedError(Exception):
    """A file did not arrive as it was sent."""


def check_tag(name: str) -> None:
    """Refuse a registered model's name with a tag that it does not have (ValueError, with those that it has)."""
    model, dot, tag = name.partition(".")
    if dot and is_model(model):
        tags = [cfg.tag for cfg in get_arch_pretrained_cfgs(model).values()]
        if tag not in tags:
            known = ", ".join(f"{model}.{one}" for one in tags if one) or "none"
            raise ValueError(f"{name!r}: the model {model} has no pretrained tag {tag!r}; those that it has: {known}")


def create(
    model_cls: type[ModelT],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[[dict[str, Any], nn.Module], dict[str, Any]],
    tag_args: Mapping[str, Mapping[str, Any]] | None = None,
    stages: int = 3,
    **kwargs: Any,
) -> ModelT:
    """Build a registered model, with its weights if `pretrained`: timm's builder, and what all our models share.

    Args:
        model_cls: Class of the model.
        variant: Registered name, without a tag.
        pretrained: Load the weights of the pretrained tag.
        filter_fn: The model module's `checkpoint_filter_fn`.
        tag_args: Model arguments that belong to a pretrained tag, such as the time steps that its weights were
            trained with, by "variant.tag". They give way to arguments in `kwargs`.
        stages: Stages of the model, each of which gives a feature map.
        **kwargs: Arguments of the model and of timm's `build_model_with_cfg`.

    Raises:
        WeightsError: If the weights cannot be downloaded or read, with the other ways to have them.
        ValueError: For `features_only` with a `feature_cls` that would give sequences, or `out_indices` of more feature
            maps than there are.
    """
    levels = stages + kwargs.get("pooled_levels", 0)
    if kwargs.get("features_only"):
        check_features_only(levels, kwargs.get("feature_cls", "getter"), kwargs.get("out_indices"))
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    if overlay and not {"url", "hf_hub_id"}.isdisjoint(overlay):
        overlay = {"file": None, **overlay}  # or timm would take the file that comes with the package
    cfg = resolve_pretrained_cfg(variant, kwargs.pop("pretrained_cfg", None), overlay)
    model_args = dict((tag_args or {}).get(f"{variant}.{cfg.tag}", {}), **kwargs)
    cache_dir, source = kwargs.get("cache_dir"), cfg
    with loading_weights(variant, cfg, cache_dir) if pretrained else nullcontext():
        if pretrained:
            source = with_kept_tensors(cfg, cache_dir, _check_hub_hash)
        model: ModelT = build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            pretrained_cfg=source,  # timm resolves it once more, which changes nothing
            pretrained_filter_fn=lambda state_dict, model: in_float32(filter_fn(state_dict, model)),
            feature_cfg={"out_indices": tuple(range(levels)), "feature_cls": "getter"},
            **model_args,
        )
    if source is not cfg:  # the model says where its weights come from, not where they are kept
        for name in ("pretrained_cfg", "default_cfg"):
            kept = getattr(model, name)
            setattr(model, name, {k: v for k, v in kept.items() if k not in ("file", "state_dict")})
    return model


@contextmanager
def loading_weights(variant: str, cfg: PretrainedCfg, cache_dir: Any = None) -> Iterator[None]:
    """Stand around a call of timm's `build_model_with_cfg` that loads the weights of `cfg`.

    Args:
        variant: Registered name of the model, without a tag.
        cfg: Where its weights are, as timm resolves it.
        cache_dir: Cache for downloads, timm's own if None.

    Raises:
        WeightsError: If the weights cannot be downloaded or read. Weights that do not fit the model are not its
            business: those errors pass through.
    """
    handled = sys.exception()  # what the caller is handling already, which is none of ours
    source, location = timm_builder._resolve_pretrained_source(vars(cfg))
    if not source:
        raise WeightsError(f"{_name(variant, cfg)} has no pretrained weights to download.{_other_ways(variant)}")
    hub_files: dict[str, Path | None] = {}
    fetched: Path | None = None
    try:
        if source == "url" and fetch_url(location, _url_cache_file(location, cache_dir)):
            fetched = _url_cache_file(location, cache_dir)
        elif source == "hf-hub":
            hub_files = _hub_cache_files(location, cache_dir)
            kept = kept_file(cfg, cache_dir)
            if kept is None and not any(hub_files.values()) and not hub_constants.HF_HUB_OFFLINE:
                _ask_hub(location, next(iter(hub_files)))
        for path in _local_files(source, location, cache_dir, hub_files):
            check_file(path)
        try:
            with namespaces_allowed():
                yield
        finally:
            for path in _new_files(hub_files, location, cache_dir):
                _check_hub_hash(path)
    except Exception as error:
        reason = explain(error, source, handled)
        if reason is None:
            raise
        if fetched is not None:  # a fresh file that is no checkpoint, such as a proxy's error page
            fetched.unlink(missing_ok=True)
        pending = (
            " These weights have not been uploaded yet: whoever holds the authors' checkpoint can publish them with "
            "`timm-qkformer convert` and `timm-qkformer publish`."
            if isinstance(cfg, PendingCfg) and source == "hf-hub"
            else ""
        )
        raise WeightsError(
            f"{_name(variant, cfg)}: no weights from {_place(source, location, cache_dir)}: {reason}"
            f"{pending}{_other_ways(variant)}"
        ) from error


def fetch_url(url: str, target: Path) -> bool:
    """Download `url` to `target`, unless it is there; returns whether it did.

    A broken transfer is resumed where it broke, and `target` appears only when every announced byte is there. A
    file name in torch.hub's convention, `name-<8 or more hex digits of the sha256>.ext`, is held to its hash. The
    server may be silent for HF_HUB_DOWNLOAD_TIMEOUT seconds, as it may be in huggingface_hub.

    Raises:
        OSError: If the server cannot be reached or refuses (`urllib.error.HTTPError` has its status).
        _DamagedError: If the transfer keeps breaking off or the hash is another one.
    """
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
    _logger.info("Downloading %s to %s", url, target)
    try:
        with partial.open("w+b") as file:
            transfer = _Transfer(url, file)
            for attempt in range(1, URL_ATTEMPTS + 1):
                try:
                    transfer.receive()
                    break
                except (http.client.HTTPException, TimeoutError, ConnectionError, _DamagedError) as error:
                    if attempt == URL_ATTEMPTS:
                        raise
                    _logger.warning("Transfer of %s broke off at byte %d (%s), trying again", url, file.tell(), error)
        expected = HASH_REGEX.search(target.name)
        if expected is not None:
            _check_hash(partial, expected.group(1))
        partial.replace(target)
        return True
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class _Transfer:
    """What has arrived of a url, and the ETag of the version that it is of."""

    url: str
    file: BinaryIO
    etag: str | None = None

    def receive(self) -> None:
        """Append the rest; from the start, if the server has another version by now or sends no parts."""
        headers = {"User-Agent": "timm-qkformer"}
        if self.etag is not None and self.file.tell() > 0:
            headers |= {"Range": f"bytes={self.file.tell()}-", "If-Range": self.etag}
        with urlopen(Request(self.url, headers=headers), timeout=hub_constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
            if answer.status != 206:
                self.file.seek(0)
                self.file.truncate()
            start = self.file.tell()
            self.etag = answer.headers.get("ETag")
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            with tqdm(
                total=total, initial=start, unit="B", unit_scale=True, disable=not timm_builder._DOWNLOAD_PROGRESS
            ) as bar:
                while chunk := answer.read(_CHUNK):
                    self.file.write(chunk)
                    bar.update(len(chunk))
        if total is not None and self.file.tell() != total:
            raise _DamagedError(f"the transfer broke off after {self.file.tell()} of {total} bytes")


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if not found.startswith(expected):
        raise _DamagedError(f"the file that arrived has the sha256 {found}, announced was {expected}")


def _check_hub_hash(path: Path) -> None:
    """Compare a fresh download with the hash that names it in the cache (large files; small ones have a git hash)."""
    blob = path.resolve()
    if len(blob.name) != 64:
        return
    try:
        _check_hash(blob, blob.name)
    except _DamagedError:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise


def _url_cache_file(url: str, cache_dir: Any) -> Path:
    return Path(cache_dir or get_cache_dir()) / os.path.basename(urlparse(url).path)


def _hub_cache_files(location: Any, cache_dir: Any) -> dict[str, Path | None]:
    """The weight files that timm looks for in a repository, and where the cache has them."""
    model_id, *names = [location] if isinstance(location, str) else location
    repo_id, revision = hf_split(model_id)
    files: dict[str, Path | None] = {}
    for name in names or (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME):
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache_dir, revision=revision)
        files[name] = Path(found) if isinstance(found, str) else None
    return files


def _ask_hub(location: Any, name: str) -> None:
    """One request, for a Hub that cannot be reached to be an error at once: huggingface_hub asks for half a minute."""
    repo_id, revision = hf_split(location if isinstance(location, str) else location[0])
    get_session().head(
        hf_hub_url(repo_id, name, revision=revision),
        headers=build_hf_headers(),
        timeout=hub_constants.HF_HUB_ETAG_TIMEOUT,
    )


def _new_files(before: dict[str, Path | None], location: Any, cache_dir: Any) -> list[Path]:
    if not before:
        return []
    after = _hub_cache_files(location, cache_dir)
    return [path for name, path in after.items() if path is not None and path != before[name]]


def _local_files(source: str, location: Any, cache_dir: Any, hub_files: Mapping[str, Path | None]) -> list[Path]:
    """The weights that are on this disk already, where bits may have rotted since they were written."""
    paths: list[Path | None] = list(hub_files.values())
    if source == "url":
        paths = [_url_cache_file(location, cache_dir)]
    elif source == "file":
        paths = [Path(location)]
    return [path for path in paths if path is not None and path.is_file()]


def _name(variant: str, cfg: PretrainedCfg) -> str:
    return f"{variant}.{cfg.tag}" if cfg.tag else variant


def _place(source: str, location: Any, cache_dir: Any) -> str:
    if source == "hf-hub":
        repo = location if isinstance(location, str) else "/".join(location)
        return f"the Hub repository {repo} at {hub_constants.ENDPOINT}"
    if source == "url":
        return f"{location} (kept as {_url_cache_file(location, cache_dir)})"
    return "the given state dict" if source == "state_dict" else str(location)


def _other_ways(variant: str) -> str:
    return (
        "\nOther ways to weights:"
        f"\n- a checkpoint file: timm.create_model({variant!r}, pretrained=True, "
        "pretrained_cfg_overlay=dict(file='checkpoint.pth'))"
        "\n- a folder: `timm-qkformer convert checkpoint.pth FOLDER` once, then "
        "timm.create_model('local-dir:FOLDER', pretrained=True)"
        "\n- none: pretrained=False starts from random weights"
    )


def explain(error: BaseException, source: str, handled: BaseException | None = None) -> str | None:
    """Why a transfer failed, in sentences for the user; None if the error is not about getting or reading a file.

    Args:
        error: Whatever was raised, by urllib, huggingface_hub or a reader of files.
        source: timm's word for where the file should come from: "url", "hf-hub", "file" or "local-dir".
        handled: An exception that was being handled before the transfer began; its causes are not looked at.
    """
    chain = list(_chain(error, handled))
    for link in chain:
        if isinstance(link, _DamagedError):
            return f"{link}. It was not kept; try again."
    for link in chain:
        status = link.code if isinstance(link, HTTPError) else _status(link)
        if status is not None:
            return _status_reason(status)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled) or (hub_constants.HF_HUB_OFFLINE and _is(link, "LocalEntryNotFound")):
            return (
                "the cache has no copy and HF_HUB_OFFLINE=1 forbids a download. Load it once with a network, or point "
                "HF_HOME at a cache that has it."
            )
    # The HTTP libraries under huggingface_hub and urllib share no base class, but they share these names.
    if any(_is(link, "Timeout") for link in chain):
        return (
            "the server did not answer in time. Try again; HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT give the "
            "Hub more seconds."
        )
    if any(_is(link, "Connect", "URLError", "ProtocolError", "RemoteDisconnected") for link in chain):
        return f"no connection ({_last_words(chain)}). Check the network and the proxy settings."
    if source in ("file", "local-dir") and any(isinstance(link, FileNotFoundError) for link in chain):
        return "there is no such file."
    if any(_is_unreadable(link) for link in chain):
        advice = {
            "url": "Delete the kept file, if it is still there, and try again.",
            "hf-hub": "Delete it from the cache (`hf cache rm`) and try again.",
        }.get(source, "`timm-qkformer convert` says more about checkpoint files.")
        return (
            f"the file cannot be read as a checkpoint, it is damaged or something else ({_last_words(chain)}). {advice}"
        )
    if any(_is(link, "LocalEntryNotFound", "EntryNotFound", "HfHubHTTPError") for link in chain):
        return f"{_last_words(chain)}."
    if any("Consistency check failed" in str(link) for link in chain):
        return "the transfer broke off. It was not kept; try again."
    return None


def _status_reason(status: int) -> str:
    """What an HTTP status of 400 and above means for the user, in a sentence."""
    if status == 401:
        return (
            "the server wants to know who asks (401). The repository is private or, which the Hub answers in the same "
            "way, does not exist. `hf auth login` or HF_TOKEN give access to private ones."
        )
    if status == 403:
        return "access is forbidden (403). The token lacks the right, or the repository's terms were not accepted yet."
    if status == 404:
        return "there is nothing at that address (404)."
    if status == 429:
        return "the server has had too many requests (429). Wait a few minutes and try again."
    if status >= 500:
        return f"the server failed ({status}). That is not your doing; try again later."
    return f"the server refused ({status})."


def _chain(error: BaseException | None, handled: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, outermost first."""
    seen = {id(handled)}
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        reason = getattr(error, "reason", None)  # urllib wraps the socket's error so
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context or (reason if isinstance(reason, BaseException) else None)


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _is(error: BaseException, *fragments: str) -> bool:
    names = [cls.__name__ for cls in type(error).__mro__]
    return any(fragment in name for fragment in fragments for name in names)


def _is_unreadable(error: BaseException) -> bool:
    if isinstance(error, (pickle.UnpicklingError, SafetensorError, EOFError, DamagedFileError)):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and ("PytorchStreamReader" in words or "weights_only" in words)


def _last_words(chain: list[BaseException]) -> str:
    lines = (str(chain[-1]) or type(chain[-1]).__name__).strip().splitlines()
    return lines[0].rstrip(".")
