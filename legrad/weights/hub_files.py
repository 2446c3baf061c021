"""Get files of repositories on the Hugging Face hub, through the local cache."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

BLOCK_BYTES = 1 << 22


def hub_file(repository: str, filenames: Sequence[str]) -> Path:
    """Return the local path of the first of these files that the repository has.

    Args:
        repository: `organisation/name`.
        filenames: candidates, in order of preference.

    Raises:
        EntryNotFoundError: the repository has none of them.
        LocalEntryNotFoundError: the hub cannot be reached, and none is in the cache.
        HfHubHTTPError: the hub answers with an error, and the file is not in the cache.
    """
    missing: EntryNotFoundError | None = None
    for filename in filenames:
        try:
            return Path(hf_hub_download(repository, filename))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
                raise  # a temporary error of the hub: another file is no substitute
            # An unreachable hub is a better explanation than a missing file.
            missing = missing if isinstance(missing, LocalEntryNotFoundError) else error
    raise missing or ValueError("no filenames")


def hub_file_sha256(repository: str, filenames: Sequence[str]) -> str:
    """Return the SHA-256 of the file that `hub_file` would choose, without a download if possible.

    The hub and its local cache name large files by their SHA-256. Other files are downloaded and read.

    Raises:
        EntryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError: as `hub_file` does.
    """
    for filename in filenames:
        try:
            etag = get_hf_file_metadata(hf_hub_url(repository, filename)).etag
        except LocalEntryNotFoundError:
            break
        except EntryNotFoundError:
            continue
        except Exception:  # no connection, a proxy, an overloaded hub: use the cache, or its error
            break
        if etag is not None and _is_sha256(etag):
            return etag
        break
    path = hub_file(repository, filenames).resolve()
    return path.name if path.parent.name == "blobs" and _is_sha256(path.name) else file_sha256(path)


def hub_folder(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Return a local folder with at least the files of a repository that match the patterns.

    Raises:
        LocalEntryNotFoundError: the hub cannot be reached, and nothing is in the cache.
        HfHubHTTPError: the hub answers with an error, and nothing is in the cache.
    """
    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=list(patterns), tqdm_class=_NoBar)
    )


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _NoBar(tqdm):
    """A progress bar that is not shown, as the files are small and many workers fetch them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
