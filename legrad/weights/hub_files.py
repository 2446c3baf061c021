"""Files of repositories on the Hugging Face hub, by way of this machine's cache."""

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
    """Return where the first of these files that the repository has lies on this machine.

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
                raise  # the hub has an answer, only not now: another file is no substitute
            # That the hub could not be asked says more than that another name is not there.
            missing = missing if isinstance(missing, LocalEntryNotFoundError) else error
    raise missing or ValueError("no filenames")


def hub_file_sha256(repository: str, filenames: Sequence[str]) -> str:
    """Return the SHA-256 that `hub_file`'s choice has by the hub's word, without a download where possible.

    The hub, and its cache here, name large files by their SHA-256. What they name otherwise is fetched and
    read.

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
        except Exception:  # no connection, a proxy, a full hub: the cache decides, or its error tells why
            break
        if etag is not None and _is_sha256(etag):
            return etag
        break
    path = hub_file(repository, filenames).resolve()
    return path.name if path.parent.name == "blobs" and _is_sha256(path.name) else file_sha256(path)


def hub_folder(repository: str, patterns: Sequence[str]) -> Path:
    """Return a folder with those files of a repository that match the patterns, and perhaps others.

    Raises:
        LocalEntryNotFoundError: the hub cannot be reached, and nothing is in the cache.
        HfHubHTTPError: the hub answers with an error, and nothing is in the cache.
    """
    return Path(snapshot_download(repository, allow_patterns=list(patterns), tqdm_class=_NoBar))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _NoBar(tqdm):
    """A progress bar that is not shown: the files are small, and many workers fetch them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def _is_sha256(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
