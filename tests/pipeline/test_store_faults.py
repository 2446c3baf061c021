"""Object stores and web servers that throttle, hang up, fall silent or dawdle: a proxy makes them."""

import logging
import os
import sys
import time
import uuid

import pytest
import yaml

from pipeline import storage
from pipeline.cli import main as cli
from pipeline.config.load import load_config
from pipeline.errors import OutputError, ShardError, UserError
from pipeline.storage import attempts, filesystems
from tests.helpers.corpus import demo_job
from tests.helpers.object_servers import Fault, FolderHandler, faulty_proxy, serving

MEBIBYTE = 1 << 20


pytestmark = pytest.mark.usefixtures("only_loopback")


@pytest.fixture
def bucket(store):
    """A new bucket; a new name each time, as connections are kept by name."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    store.put(name, b"")
    return name


@pytest.fixture
def proxied(moto_port, monkeypatch):
    """Puts a proxy with faults before the store, and leads S3 through it."""

    def start(*faults):
        proxy = faulty_proxy(moto_port, *faults)
        port, log = proxy.__enter__()
        opened.append(proxy)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return log

    opened = []
    yield start
    for proxy in opened:
        proxy.__exit__(None, None, None)


def whole(shard):
    with storage.open_shard(shard) as stream:
        return stream.read()


def hurt(log):
    return [(method, path.partition("?")[0]) for method, path, what in log if what == "hurt"]


# --- S3


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "0.tar", status=503),
        Fault("GET", "0.tar", status=429),
        Fault("GET", "0.tar", sent_bytes=2 * MEBIBYTE),
        Fault("GET", "0.tar", sent_bytes=0),
        Fault("GET", "0.tar", drip_s=0.01, times=3),
    ],
    ids=["down", "throttled", "cut halfway", "cut at once", "slow"],
)
def test_a_shard_on_s3_is_read_whole_in_spite_of(fault, store, bucket, proxied):
    content = os.urandom(9 * MEBIBYTE)
    store.put(f"{bucket}/0.tar", content)
    log = proxied(fault)
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    assert whole(shard) == content
    assert len(hurt(log)) == fault.times


def test_a_store_that_throttles_listings_and_lookups_is_asked_again(store, bucket, proxied):
    store.put(f"{bucket}/in/0.tar", b"x" * 10)
    log = proxied(Fault("GET", "list-type", status=503), Fault("HEAD", "0.tar", status=503))
    (by_glob,) = storage.list_shards(f"s3://{bucket}/in/*.tar")
    (by_name,) = storage.list_shards(f"s3://{bucket}/in/0.tar")
    assert by_glob == by_name
    assert [method for method, _ in hurt(log)] == ["GET", "HEAD"]


def test_a_store_that_falls_silent_is_left_and_asked_again(store, bucket, proxied, monkeypatch):
    monkeypatch.setattr(filesystems, "SILENCE_TIMEOUT_S", 1)
    content = os.urandom(MEBIBYTE)
    store.put(f"{bucket}/0.tar", content)
    log = proxied(Fault("GET", "0.tar", sent_bytes=1000, silent=True))
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    assert whole(shard) == content
    assert len(hurt(log)) == 1


def test_a_store_that_stays_down_is_a_shard_error_after_the_attempts_allowed(
    store, bucket, proxied, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store.put(f"{bucket}/0.tar", b"x" * 1000)
    log = proxied(Fault("GET", "0.tar", status=503, times=99))
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    with pytest.raises(ShardError, match=r"0\.tar: cannot be read"):
        whole(shard)
    assert len(hurt(log)) == 2


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "x.bin", status=503),
        Fault("PUT", "x.bin", received_bytes=0),
        Fault("PUT", "x.bin", received_bytes=5000),
        Fault("PUT", "x.bin", sent_bytes=0),
    ],
    ids=["down", "cut before the body", "cut in the body", "cut before the answer"],
)
@pytest.mark.parametrize("size_bytes", [20_000, 12 * MEBIBYTE], ids=["one put", "parts"])
def test_an_object_is_published_whole_in_spite_of(fault, size_bytes, store, bucket, proxied):
    content = os.urandom(size_bytes)
    fault.met = 0
    log = proxied(fault)
    storage.publish(f"s3://{bucket}/out", "x.bin", content)
    assert store.get(f"{bucket}/out/x.bin") == content
    assert len(hurt(log)) == 1


def test_a_small_file_is_published_by_a_single_request(bucket, proxied):
    log = proxied()
    storage.publish(f"s3://{bucket}/out", "x.bin", b"x" * 1000)
    assert [(method, path) for method, path, _ in log] == [("PUT", f"/{bucket}/out/x.bin")]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "partNumber=1", status=503, times=99),
        Fault("PUT", "partNumber=2", status=503, times=99),
        Fault("PUT", "partNumber=2", status=400, times=99),
        Fault("PUT", "partNumber=5", status=503, times=99),
        Fault("POST", "uploadId=", status=503, times=99),
    ],
    ids=["first part", "middle part", "middle part for good", "last part", "the end"],
)
def test_an_upload_that_never_ends_leaves_the_earlier_object_and_nothing_new(
    fault, store, bucket, proxied, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(attempts, "TOTAL_S", 0)
    store.put(f"{bucket}/out/x.bin", b"before")
    proxied(fault)
    for name in ("x.bin", "new.bin"):
        with pytest.raises(OutputError, match=rf"out/{name}: cannot be written"):
            storage.publish(f"s3://{bucket}/out", name, b"x" * (45 * MEBIBYTE))
    assert store.get(f"{bucket}/out/x.bin") == b"before"
    assert store.get(f"{bucket}/out/new.bin") is None
    assert storage.list_names(f"s3://{bucket}/out") == {"x.bin"}


def test_a_configuration_and_the_list_of_shards_it_names_are_read_from_s3(
    store, bucket, proxied, monkeypatch, capsys, tmp_path
):
    proxied(Fault("GET", "job.yaml", status=503), Fault("GET", "list.txt", sent_bytes=3))
    store.put(f"{bucket}/in/0.tar", b"x")
    store.put(f"{bucket}/list.txt", f"# one\ns3://{bucket}/in/0.tar\n".encode())
    config = demo_job([f"@s3://{bucket}/list.txt"], tmp_path / "out")
    store.put(f"{bucket}/job.yaml", yaml.safe_dump(config.model_dump(mode="json")).encode())
    assert load_config(f"s3://{bucket}/job.yaml") == config
    monkeypatch.setattr(sys, "argv", ["legrad", "annotate", f"s3://{bucket}/job.yaml", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    # the shard is found, and is no tar
    assert ended.value.code == 1
    assert "shards: 1 in total," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "problem"), [("gone.yaml", "cannot be read: "), ("odd.yaml", "is not text in UTF-8: ")]
)
def test_a_configuration_that_cannot_be_read_is_an_input_error_and_shows_no_secret(name, problem, served):
    handler, port = served
    handler.content = b"\xff"
    with (
        faulty_proxy(port, Fault("GET", "gone", status=404)) as (proxy_port, _),
        pytest.raises(UserError, match=rf"^http://127[^ ]*/{name}: {problem}") as error,
    ):
        load_config(f"http://127.0.0.1:{proxy_port}/{name}?X-Amz-Signature=hunter2")
    assert "hunter2" not in str(error.value)


# --- web servers


class RangeHandler(FolderHandler):
    """A file server that sends parts of files, and distinguishes their versions."""

    content = b""
    etag = '"1"'

    def do_GET(self):
        first = 0
        is_part = "Range" in self.headers and self.headers.get("If-Range") == self.etag
        if is_part:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if is_part else 200)
        if is_part:
            self.send_header("Content-Range", f"bytes {first}-{len(self.content) - 1}/{len(self.content)}")
        self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(self.content) - first))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(self.content[first:])

    do_HEAD = do_GET


@pytest.fixture
def served():
    handler = type("Serving", (RangeHandler,), {"content": os.urandom(3 * MEBIBYTE)})
    with serving(handler) as port:
        yield handler, port


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", status=503),
        Fault("GET", status=429, headers={"Retry-After": "1"}),
        Fault("GET", sent_bytes=MEBIBYTE),
        Fault("GET", sent_bytes=0, times=3),
        Fault("GET", drip_s=0.02),
    ],
    ids=["down", "throttled", "cut halfway", "cut at once", "slow"],
)
def test_a_shard_on_a_web_server_is_read_whole_in_spite_of(fault, served):
    handler, upstream_port = served
    with faulty_proxy(upstream_port, fault) as (port, log):
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar?X-Amz-Signature=hunter2")
        assert whole(shard) == handler.content
    assert len(hurt(log)) == fault.times


def test_the_wait_that_a_server_asks_for_is_kept(served, monkeypatch):
    handler, upstream_port = served
    monkeypatch.setattr(attempts, "LONGEST_WAIT_S", 0.5)
    asked = Fault("GET", status=503, headers={"Retry-After": "1"})
    with faulty_proxy(upstream_port, asked) as (port, _):
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
        started_s = time.monotonic()
        assert whole(shard) == handler.content
    # a random wait alone would be shorter
    assert time.monotonic() - started_s >= 0.5


def test_no_signature_or_password_is_logged_or_shown(served, caplog):
    _, upstream_port = served
    faults = Fault("GET", status=503), Fault("GET", sent_bytes=MEBIBYTE)
    with faulty_proxy(upstream_port, *faults) as (port, _), caplog.at_level(logging.DEBUG):
        (shard,) = storage.list_shards(f"http://id:hunter2@127.0.0.1:{port}/0.tar?X-Amz-Signature=hunter2")
        whole(shard)
    assert "hunter2" in shard.url
    assert "hunter2" not in caplog.text + repr(shard)


def test_what_changed_on_the_server_meanwhile_is_not_read_on(served):
    handler, upstream_port = served
    with faulty_proxy(upstream_port, Fault("GET", sent_bytes=MEBIBYTE)) as (port, _):
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
        with storage.open_shard(shard) as stream:
            stream.read(1000)
            handler.etag = '"2"'
            with pytest.raises(ShardError, match="the server does not resume there"):
                stream.read()


def test_a_web_server_that_stays_down_is_a_shard_error_after_the_attempts_allowed(served):
    _, upstream_port = served
    with faulty_proxy(upstream_port, Fault("GET", status=503, times=99)) as (port, log):
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
        with pytest.raises(ShardError, match="cannot be opened: HTTP Error 503"):
            whole(shard)
    assert len(hurt(log)) == attempts.ATTEMPTS


def test_a_server_whose_answer_may_be_cut_unnoticed_is_refused(tmp_path):
    class Vague(FolderHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def do_HEAD(self):
            self.send_error(405)

    with serving(Vague) as port:
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
        with pytest.raises(ShardError, match="does not announce the size"):
            whole(shard)


def test_what_a_web_server_refuses_for_good_is_not_asked_again(served):
    _, upstream_port = served
    with faulty_proxy(upstream_port, Fault("GET", status=403, times=99)) as (port, log):
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar")
        with pytest.raises(ShardError, match="HTTP Error 403"):
            whole(shard)
    assert len(hurt(log)) == 1
