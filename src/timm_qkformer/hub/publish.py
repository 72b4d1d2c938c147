"""A converted folder to the Hugging Face Hub, and back again to see that it arrived."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils.sha import git_hash

from ..models.loading import explain, sha256_of
from .folder import check_folder
from .infer import architectures

FILES = ("model.safetensors", "config.json", "README.md")


class PublishError(ValueError):
    """Nothing or not everything was published, and why."""


@dataclass
class _File:
    name: str
    path: Path
    size: int
    sha256: str
    remote: str = "new"


def publish(
    folder: Path, repo: str, *, confirm: Callable[[str], bool], private: bool = False, token: str | None = None
) -> str:
    """Upload a folder that `convert` wrote, read it back and compare.

    Args:
        folder: With model.safetensors, config.json and README.md; nothing else is uploaded.
        repo: Repository on the Hub, "namespace/name". It is made if it does not exist.
        confirm: Asked with the list of what will be uploaded; nothing is written to the Hub unless it says True.
        private: Make a new repository private.
        token: Access token. None: the one of `hf auth login` or HF_TOKEN.

    Returns:
        Address of the commit.

    Raises:
        PublishError: If the folder is not fit to publish, the Hub refuses, or what it holds afterwards differs.
    """
    files = _local_files(folder)
    api = HfApi(token=token, library_name="timm-qkformer")
    try:
        exists = _compare_with_remote(api, repo, files, private)
        if not confirm(_plan(repo, files, exists, private)):
            raise PublishError("not confirmed, nothing was uploaded")
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo,
            operations=[CommitOperationAdd(file.name, file.path) for file in files],
            commit_message="Upload weights, config and model card with timm-qkformer",
        )
        _read_back(api, repo, commit.oid, files)
    except PublishError:
        raise
    except Exception as error:
        reason = explain(error, "hf-hub")
        if reason is None:
            raise
        raise PublishError(f"{repo} at {constants.ENDPOINT}: {reason}") from error
    return str(commit.commit_url)


def _local_files(folder: Path) -> list[_File]:
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise PublishError(f"{folder} has no {', '.join(missing)}; `timm-qkformer convert` writes such folders")
    home = folder.resolve()
    for path in (folder / name for name in FILES):
        if path.resolve() != home / path.name:
            raise PublishError(f"{path} is a link to {path.resolve()}; only files of the folder itself are published")
    try:
        check_folder(folder)
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:
        raise PublishError(f"{folder} does not load with timm: {error}") from error
    architecture = model.pretrained_cfg["architecture"]
    if architecture not in architectures():
        raise PublishError(f"{folder} holds {architecture}, which is none of timm-qkformer's models")
    paths = [folder / name for name in FILES]
    return [_File(path.name, path, path.stat().st_size, sha256_of(path)) for path in paths]


def _compare_with_remote(api: HfApi, repo: str, files: list[_File], private: bool) -> bool:
    """Note for each file what the repository has under its name; returns whether there is a repository."""
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return False
    if private and not info.private:
        raise PublishError(f"{repo} exists and is public; make it private on its settings page first")
    found: dict[str, Any] = {entry.path: entry for entry in api.get_paths_info(repo, [file.name for file in files])}
    for file in files:
        entry = found.get(file.name)
        if entry is not None:
            same = entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == git_hash(file.path.read_bytes())
            file.remote = "already there" if same else f"replaces one of {entry.size:,} bytes"
    return True


def _plan(repo: str, files: list[_File], exists: bool, private: bool) -> str:
    state = "existing" if exists else f"new, {'private' if private else 'public'}"
    lines = [f"{repo} at {constants.ENDPOINT} ({state})"]
    lines += [f"  {f.name:<18} {f.size:>13,} bytes  sha256 {f.sha256[:16]}...  {f.remote}" for f in files]
    return "\n".join(lines)


def _read_back(api: HfApi, repo: str, revision: str, files: list[_File]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        for file in files:
            path = Path(api.hf_hub_download(repo, file.name, revision=revision, cache_dir=cache))
            found = sha256_of(path)
            if found != file.sha256:
                raise PublishError(
                    f"{repo} holds another {file.name} than was uploaded: sha256 {found}, expected {file.sha256}. "
                    "Do not announce it; publish again or delete the commit."
                )
