"""Which failures of stores and folders are tried again, and how often."""

import errno
import os
import uuid
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.storage import attempts
from pipeline.storage.attempts import store_error_may_pass
from tests.helpers.object_servers import Fault, faulty_proxy, refusing_handler, serving

pytestmark = pytest.mark.usefixtures("only_loopback")

# as pyarrow words them, shortened
PASSING = [
    "When completing multiple part upload for key 'x' in bucket 'b': AWS Error SLOW_DOWN during "
    "CompleteMultipartUpload operation: Please reduce your request rate.",
    "AWS Error SERVICE_UNAVAILABLE during PutObject operation: Unable to parse ExceptionName",
    "AWS Error INTERNAL_FAILURE during PutObject operation: We encountered an internal error.",
    "AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.",
    "AWS Error UNKNOWN (HTTP status 500) during PutObject operation: No response body.",
    "AWS Error UNKNOWN (HTTP status 429) during PutObject operation: Too Many Requests",
    "AWS Error UNKNOWN (HTTP status 408) during PutObject operation: No response body.",
    "AWS Error THROTTLING during ListObjectsV2 operation: Rate exceeded",
    "AWS Error REQUEST_TIMEOUT during PutObject operation: Your socket connection was not read from",
    "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 28, Timeout was reached",
    "AWS Error NETWORK_CONNECTION during HeadBucket operation: curlCode: 6, Couldn't resolve host name",
    "AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 56, Failure when receiving data",
    "google::cloud::Status(UNAVAILABLE: Retry policy exhausted in InsertObjectMedia)",
    "google::cloud::Status(RESOURCE_EXHAUSTED: Too many requests)",
    "google::cloud::Status(INTERNAL: server error)",
    "an error that nobody has seen yet",
]
LASTING = [
    "When uploading key 'x' in bucket 'b': AWS Error ACCESS_DENIED during PutObject operation: Access Denied",
    "AWS Error UNKNOWN (HTTP status 403) during HeadObject operation: No response body.",
    "AWS Error UNKNOWN (HTTP status 400) during PutObject operation: ExpiredToken",
    "AWS Error UNKNOWN (HTTP status 507) during PutObject operation: XMinioStorageFull",
    "AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist",
    "AWS Error NO_SUCH_KEY during CopyObject operation: The specified key does not exist.",
    "AWS Error RESOURCE_NOT_FOUND during HeadBucket operation: No response body.",
    "AWS Error INVALID_ACCESS_KEY_ID during PutObject operation: The Access Key Id does not exist",
    "AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: it does not match",
    "Bucket 'gone' not found",
    "google::cloud::Status(PERMISSION_DENIED: Permanent error in InsertObjectMedia: no access)",
    "google::cloud::Status(UNAUTHENTICATED: invalid token)",
    "google::cloud::Status(NOT_FOUND: the specified bucket does not exist)",
    "google::cloud::Status(INVALID_ARGUMENT: bad name)",
]


@pytest.mark.parametrize("message", PASSING)
def test_a_failure_that_may_pass_is_known_by_its_words(message):
    assert store_error_may_pass(OSError(message))


@pytest.mark.parametrize("message", LASTING)
def test_a_failure_that_lasts_is_known_by_its_words(message):
    assert not store_error_may_pass(OSError(message))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("Path does not exist 'b/x'"),
        PermissionError("no"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EACCES, "Permission denied"),
        ValueError("a bug"),
    ],
    ids=lambda error: type(error).__name__ + str(getattr(error, "errno", "")),
)
def test_a_failure_that_lasts_is_known_by_its_kind(error):
    assert not store_error_may_pass(error)


@pytest.fixture
def bucket(store):
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    store.put(name, b"")
    return name


def hurt(log):
    return sum(what == "hurt" for _, _, what in log)


REQUESTS = {
    "put": ("PUT", lambda out: storage.publish(out, "x.bin", b"new")),
    "exists": ("HEAD", lambda out: storage.exists(out, "old.bin")),
    "list": ("GET", storage.list_names),
    "list below": ("GET", storage.list_paths),
    "remove": ("DELETE", lambda out: storage.remove(out, "old.bin")),
    "move": ("PUT", lambda out: storage.move(out, "old.bin", out, "x.bin")),
}


@pytest.mark.parametrize(("method", "work"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_is_throttled_for_longer_than_pyarrow_repeats_it_succeeds(
    method, work, store, bucket, moto_port, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    store.put(f"{bucket}/out/old.bin", b"old")
    with faulty_proxy(moto_port, Fault(method, bucket, times=4, status=503)) as (port, log):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        work(f"s3://{bucket}/out")
    assert hurt(log) == 4


def test_a_store_that_throttles_for_good_is_an_error_after_the_attempts_allowed(
    bucket, moto_port, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with faulty_proxy(moto_port, Fault("PUT", bucket, times=99, status=503)) as (port, log):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(OutputError, match=r"out/x\.bin: cannot be written: .*503"):
            storage.publish(f"s3://{bucket}/out", "x.bin", b"new")
    assert hurt(log) == attempts.ATTEMPTS


def test_attempts_end_before_the_time_for_them_is_used_up(bucket, moto_port, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(attempts, "TOTAL_S", 0)
    with faulty_proxy(moto_port, Fault("PUT", bucket, times=99, status=503)) as (port, log):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(OutputError):
            storage.publish(f"s3://{bucket}/out", "x.bin", b"new")
    assert hurt(log) == 1


@pytest.mark.parametrize("code", ["AccessDenied", "NoSuchBucket", "InvalidAccessKeyId"])
def test_a_refusal_is_not_tried_again(code, monkeypatch):
    asked = []

    class Counting(refusing_handler(code)):
        def parse_request(self):
            is_valid = super().parse_request()
            # the rest of a body that was not read is no request
            asked.extend([self.command] if is_valid else [])
            return is_valid

    with serving(Counting) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(OutputError, match=r"x\.bin: cannot be written"):
            storage.publish(f"s3://bucket-{uuid.uuid4().hex[:12]}/out", "x.bin", b"new")
    assert asked == ["PUT"]


@pytest.fixture
def failing_fsync(monkeypatch):
    """Let fsync fail a number of times; returns the numbers of the errors raised."""
    fsync, raised = os.fsync, []

    def start(number, times):
        def fails(descriptor):
            if len(raised) < times:
                raised.append(number)
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fails)
        return raised

    return start


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_hiccup_of_a_network_file_system_is_tried_again(number, failing_fsync, tmp_path):
    raised = failing_fsync(number, 2)
    storage.publish(str(tmp_path), "x.bin", b"whole")
    assert raised == [number] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]
    assert Path(tmp_path, "x.bin").read_bytes() == b"whole"


def test_a_disk_that_stays_broken_is_an_error_after_three_attempts(failing_fsync, tmp_path):
    raised = failing_fsync(errno.EIO, 99)
    with pytest.raises(OutputError, match=r"x\.bin: cannot be written: .*Input/output error"):
        storage.publish(str(tmp_path), "x.bin", b"whole")
    assert len(raised) == attempts.LOCAL_ATTEMPTS
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_full_or_forbidden_disk_is_an_error_at_once(number, failing_fsync, tmp_path):
    raised = failing_fsync(number, 99)
    with pytest.raises(OutputError, match=r"x\.bin: cannot be written"):
        storage.publish(str(tmp_path), "x.bin", b"whole")
    assert len(raised) == 1
