"""Recordings as spikingjelly's data sets keep them, `events_np`: found, or made from the original files.

spikingjelly's own preparation downloads what is missing, deletes what is damaged and has to be cleaned up by hand after
an interruption. So its steps are called one by one, into temporary folders that are renamed when complete.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def find_events_np(root: Path) -> Path | None:
    """`root/events_np`, if it is there.

    Raises:
        ValueError: If spikingjelly was interrupted while it made it.
    """
    events = root / "events_np"
    marker = root / "events_np.building"
    if marker.exists():
        raise ValueError(
            f"{marker}: spikingjelly was interrupted here; delete {events}, {root / 'extract'} and this file, then "
            "try again"
        )
    return events if events.is_dir() else None


def unpack_downloads(dataset: Any, title: str, root: Path) -> Path:
    """Unpack the archives in `root/download` to `root/extract`, as spikingjelly's `dataset` does.

    Raises:
        FileNotFoundError: If some are missing or damaged: which, and where to get them.
    """
    extracted = root / "extract"
    if not extracted.is_dir():
        _check_downloads(dataset, title, root)
        build_folder(
            extracted,
            f"{title}: spikingjelly could",
            lambda target: dataset.extract_downloaded_files(root / "download", target),
        )
    return extracted


def make_events_np(dataset: Any, title: str, root: Path) -> Path:
    """`root/events_np`, made by spikingjelly's `dataset` from the archives if it is not there."""
    events = find_events_np(root)
    if events is not None:
        return events
    extracted = unpack_downloads(dataset, title, root)
    build_folder(
        root / "events_np",
        f"{title}: spikingjelly could",
        lambda target: dataset.create_raw_from_extracted(extracted, target),
    )
    return root / "events_np"


def _check_downloads(dataset: Any, title: str, root: Path) -> None:
    from torchvision.datasets.utils import check_integrity

    download = root / "download"
    wanted = dataset.resource_url_md5()
    problems = []
    for file, url, md5 in wanted:
        if not (download / file).is_file():
            problems.append(f"  {file} is missing; it is at {url}")
        elif not check_integrity(download / file, md5):
            problems.append(f"  {file} is damaged (its MD5 is not {md5}); it is at {url}")
    if problems:
        raise FileNotFoundError(
            f"{title} is not in {root}: there are no unpacked recordings, no events_np, and of the {len(wanted)} files "
            f"expected in {download}\n"
            + "\n".join(problems)
            + f"\nDownload them to {download} and call this again; they are unpacked and converted then."
        )


def build_folder(folder: Path, who: str, build: Callable[[Path], None]) -> None:
    """Make a folder under a temporary name, and rename it when it is complete; `who` begins the error, "X could"."""
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        try:
            build(temporary)
        except Exception as error:
            raise ValueError(f"{who} not make {folder} ({error!r})") from error
        temporary.chmod(0o755)  # mkdtemp makes it private
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
