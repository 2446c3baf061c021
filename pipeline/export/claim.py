"""What DEST holds: the record of an export, so that another one is not mixed with it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pipeline import storage
from pipeline.errors import OutputError, UserError
from pipeline.export.shard_files import RECORDS_FOLDER

EXPORT_FILE = "export.json"
_log = logging.getLogger(__name__)


@contextmanager
def claimed(dest: str, format_name: str, job_url: str, identity: Sequence[object]) -> Iterator[None]:
    """Record in DEST what is written there; a failure before the first finished shard removes the record.

    Args:
        dest: local path, s3:// or gs://.
        format_name: recorded for people.
        job_url: recorded for people, as it may be shown.
        identity: what an export must share with an earlier one to continue it; can be written as JSON.

    Raises:
        UserError: the folder holds something else.
        OutputError: the record cannot be written.
    """
    record = {
        "format": format_name,
        "job": storage.shown_url(job_url),
        "fingerprint": hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16],
    }
    if _is_to_be_claimed(dest, record["fingerprint"]):
        storage.publish(dest, EXPORT_FILE, json.dumps(record, indent=1).encode())
    try:
        yield
    except BaseException:
        _release(dest)
        raise


def _is_to_be_claimed(dest: str, fingerprint: str) -> bool:
    shown = storage.shown_url(dest)
    if not storage.exists(dest, EXPORT_FILE):
        if present := storage.list_names(dest):
            raise UserError(f"{shown}: expected an empty folder or an earlier export, found {min(present)}")
        return True
    where = storage.join_url(dest, EXPORT_FILE)
    try:
        earlier = json.loads(storage.read_text(where))["fingerprint"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{storage.shown_url(where)}: is no record of an export: {error}") from error
    if earlier == fingerprint:
        return False
    # a killed export that has written nothing else blocks nobody
    if storage.list_paths(dest) == {EXPORT_FILE}:
        return True
    raise UserError(
        f"{shown}: holds an export of another job, with other options, or of other shards; choose another "
        "folder, or remove this one"
    )


def _release(dest: str) -> None:
    try:
        if not storage.list_names(storage.join_url(dest, RECORDS_FOLDER)):
            storage.remove(dest, EXPORT_FILE)
    except OutputError as error:
        _log.warning("cannot remove the record of the failed export: %s", error)
