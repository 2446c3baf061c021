"""Push a finished export to a dataset repository on the Hugging Face Hub, as one commit."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pipeline import storage
from pipeline.errors import OutputError, UserError
from pipeline.export.claim import EXPORT_FILE
from pipeline.export.shard_files import RECORDS_FOLDER
from pipeline.storage.urls import is_local, local_path
from pipeline.text import received

CARD_FILE = "README.md"
# records with paths of this machine, and files of killed exports
_NOT_PUSHED = (EXPORT_FILE, f"{RECORDS_FOLDER}/*", f"*{storage.TEMPORARY_SUFFIX}")
_TARGET = re.compile(r"hf://datasets/([A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96})/?")


def repository_of(target: str, dest: str) -> str:
    """Return USER/NAME of hf://datasets/USER/NAME; check that DEST can be pushed.

    Raises:
        UserError: the target is another one, DEST is not on this machine, or there is no token.
    """
    found = _TARGET.fullmatch(target)
    if found is None:
        raise UserError(f"--push: expected hf://datasets/USER/NAME, got {received(target)}")
    if not is_local(dest):
        raise UserError(
            f"--push: expected DEST on this machine, got {storage.shown_url(dest)}; export to a local "
            "folder, and push that"
        )
    # imported here: most exports do not need it
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(found[1])
    except HFValidationError as error:
        raise UserError(f"--push: {error}") from None
    if get_token() is None:
        raise UserError("--push: there is no token; set HF_TOKEN, or run `hf auth login`")
    return found[1]


def push(dest: str, repository: str, card: str) -> str:
    """Upload DEST as one commit; return its address.

    The repository is created, private, if there is none. The card is not uploaded where the repository has
    one, so that what its owner wrote there stays. The token is that of huggingface_hub: HF_TOKEN, or that of
    `hf auth login`.

    Args:
        dest: local folder of the export.
        repository: USER/NAME.
        card: text of README.md, written to DEST first, unless DEST has one.

    Raises:
        UserError: there is no token, or the Hub refuses it, the name or a file.
        OutputError: the Hub cannot be reached, or fails.
    """
    # imported here: most exports do not need it
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if not storage.exists(dest, CARD_FILE):
        storage.publish(dest, CARD_FILE, card.encode())
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=True, exist_ok=True)
        has_card = api.file_exists(repository, CARD_FILE, repo_type="dataset")
        commit = api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=local_path(storage.absolute(dest)),
            commit_message="Add masks exported by legrad",
            ignore_patterns=[*_NOT_PUSHED, *([CARD_FILE] if has_card else [])],
        )
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise UserError(f"--push: {error}") from None
    except HfHubHTTPError as error:
        raise _refusal(error, repository) from None
    except Exception as error:
        # httpx or requests, by release of huggingface_hub; their texts may repeat headers
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        host = urlsplit(api.endpoint).hostname
        raise OutputError(
            f"cannot reach {host} ({type(error).__name__}); the export itself is complete: run the same "
            "command again to push it"
        ) from None
    return str(commit.commit_url)


def _refusal(error: Exception, repository: str) -> UserError | OutputError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = str(getattr(error, "server_message", None) or type(error).__name__)
    if status in (401, 403):
        return UserError(
            f"--push: the Hub refuses to write {repository} (HTTP {status}: {reason}); set HF_TOKEN to a "
            "token that may write it, or run `hf auth login`"
        )
    if status is not None and status < 500 and status != 429:
        return UserError(f"--push: the Hub refuses {repository} (HTTP {status}: {reason})")
    return OutputError(
        f"the Hub failed (HTTP {status}: {reason}); the export itself is complete: run the same command "
        "again to push it"
    )
