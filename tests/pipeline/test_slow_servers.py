"""Servers, disks and commands that are silent or too slow: each costs one error after bounded attempts."""

import io
import shlex
import sys
import threading
import time
import uuid

import pytest

from pipeline import storage
from pipeline.config.schema import RunConfig
from pipeline.errors import OutputError, ShardError, UserError
from pipeline.storage import ReadLimits, ShardSource, attempts, filesystems, listing, web
from pipeline.storage.limits import RateMeter, TooSlowError, WatchedFile
from tests.helpers.object_servers import Fault, faulty_proxy
from tests.helpers.slow_servers import HEADERS, OK, dripping

pytestmark = pytest.mark.usefixtures("only_loopback")

# what takes a minute takes a moment
SHORT = ReadLimits(min_bytes_per_s=1e6, window_s=0.4, answer_timeout_s=0.4, total_s=0.6)
TOO_SLOW = (
    r"received \d[\d,]* bytes in 0\.4 s .* the limit is 1e\+06 bytes per second \(run\.min_read_bytes_per_s\)"
)


def source(url):
    return ShardSource("0", url, url, None)


def read_whole(url, limits=SHORT):
    with storage.open_shard(source(url), limits) as stream:
        return stream.read()


# what a server sends once, and what in drops
SLOW_ANSWERS = {
    "nothing": (b"", b""),
    "a status line": (OK, b""),
    "a drip of a status line": (b"", b"H"),
    "a drip of headers": (OK, b"X: y\r\n"),
}
SLOW_BODIES = {
    "no byte": (HEADERS, b""),
    "a drip of bytes": (HEADERS, b"x"),
    "a drip of chunks": (OK + b'ETag: "1"\r\nTransfer-Encoding: chunked\r\n\r\n', b"1\r\nx\r\n"),
    "a drip of the size of a chunk": (OK + b'ETag: "1"\r\nTransfer-Encoding: chunked\r\n\r\n', b"0"),
}


@pytest.mark.parametrize(("once", "drop"), SLOW_ANSWERS.values(), ids=SLOW_ANSWERS.keys())
def test_a_web_server_that_does_not_answer_is_left_after_two_requests(once, drop):
    with (
        dripping(once, drop) as (address, requests),
        pytest.raises(ShardError, match=r"0\.tar: cannot be opened: .*no answer for 0\.4 s"),
    ):
        read_whole(f"http://{address}/0.tar")
    assert len(requests) == 2


@pytest.mark.parametrize(("once", "drop"), SLOW_ANSWERS.values(), ids=SLOW_ANSWERS.keys())
def test_a_size_that_a_server_does_not_send_is_asked_for_once(once, drop):
    with dripping(once, drop) as (address, requests):
        with pytest.raises(TimeoutError):
            web.ask(f"http://{address}/0.tar", timeout_s=0.2)
        assert len(requests) == 1


@pytest.mark.parametrize(("once", "drop"), SLOW_BODIES.values(), ids=SLOW_BODIES.keys())
def test_a_body_that_arrives_too_slowly_is_resumed_once_and_then_an_error(once, drop):
    with dripping(once, drop) as (address, requests), pytest.raises(ShardError, match=TOO_SLOW):
        read_whole(f"http://{address}/0.tar")
    assert len(requests) == 2


def test_a_slow_body_that_cannot_be_resumed_is_an_error_at_once():
    without_etag = OK + b"Content-Length: 1000\r\n\r\n"
    with dripping(without_etag, b"x") as (address, requests), pytest.raises(ShardError, match=TOO_SLOW):
        read_whole(f"http://{address}/0.tar")
    assert len(requests) == 1


@pytest.mark.parametrize("no_limit", [None, 0])
def test_without_a_limit_a_drip_is_read_to_its_end(no_limit):
    body = OK + b"Content-Length: 30\r\n\r\n"
    limits = ReadLimits(min_bytes_per_s=no_limit, window_s=10)
    with dripping(body, b"x") as (address, requests):
        assert read_whole(f"http://{address}/0.tar", limits) == b"x" * 30
    assert len(requests) == 1


def test_the_time_in_which_a_reader_does_not_read_does_not_count():
    limits = ReadLimits(min_bytes_per_s=10_000, window_s=1)
    body = OK + b"Content-Length: 6000\r\n\r\n" + bytes(5000)
    with (
        dripping(body, bytes(100)) as (address, _),
        web.WebObject(f"http://{address}/0.tar", limits) as found,
    ):
        received = found.read(3000)
        time.sleep(1.5)
        while piece := found.read(3000):
            received += piece
    assert len(received) == 6000


def test_a_server_that_never_answers_is_not_asked_about_each_of_many_shards():
    with dripping() as (address, requests):
        found = storage.find_shards(f"http://{address}/{{000..299}}.tar", size_timeout_s=0.5)
    assert len(found.shards) == 300
    assert {shard.size_bytes for shard in found.shards} == {None}
    assert len(requests) <= listing.MOST_UNANSWERED + listing.REQUESTS_AT_ONCE
    (warning,) = found.warnings
    assert warning.startswith(f"input.shards: {address} did not answer ")


def test_a_server_that_leaves_a_few_requests_unanswered_is_asked_about_all_shards(monkeypatch):
    asked = []

    def ask(url, *, timeout_s):
        asked.append(url)
        if len(asked) % 2:
            raise TimeoutError
        return storage.InputVersion(10)

    monkeypatch.setattr(web, "ask", ask)
    monkeypatch.setattr(listing, "REQUESTS_AT_ONCE", 1)
    found = storage.find_shards("http://host/{000..099}.tar")
    assert len(asked) == 100
    assert found.warnings == ()


# --- commands


def command(program):
    return "pipe:" + shlex.join([sys.executable, "-u", "-c", program, "0.tar"])


@pytest.mark.parametrize("rest", ["time.sleep(60)", "drip()"], ids=["silent", "drip"])
def test_a_command_that_becomes_too_slow_is_ended(rest):
    program = (
        "import sys, time\n"
        "def drip():\n    while True: sys.stdout.write('x'); time.sleep(0.02)\n"
        f"print('begun')\n{rest}"
    )
    with pytest.raises(ShardError, match=TOO_SLOW):
        read_whole(command(program))


def test_a_command_may_take_longer_to_start_than_a_window():
    limits = ReadLimits(min_bytes_per_s=1e6, window_s=0.1)
    assert read_whole(command("import time; time.sleep(0.5); print('x')"), limits) == b"x\n"


# --- local files and object stores: a read that hangs cannot be interrupted, only left


class Hanging(io.BytesIO):
    """A file whose reads of more than so many bytes never return, until the test ends."""

    def __init__(self, content, longest, over):
        super().__init__(content)
        self.longest, self.over = longest, over

    def read(self, size=-1, /):
        if size > self.longest:
            self.over.wait()
        return super().read(size)


@pytest.fixture
def watched():
    """Opens a hanging file; returns it watched, and the positions at which it was opened."""
    over = threading.Event()

    def start(content, longest, limits):
        positions = []

        def opened(position):
            positions.append(position)
            stream = Hanging(content, longest, over)
            stream.seek(position)
            return stream

        return WatchedFile(opened, limits, block_bytes=1 << 20), positions

    yield start
    over.set()


def test_a_file_whose_large_reads_hang_is_left_after_a_second_attempt_with_small_ones(watched):
    file, positions = watched(bytes(100), -1, ReadLimits(min_bytes_per_s=100, window_s=0.2))
    with pytest.raises(TooSlowError, match=r"received 0 bytes in 0\.2 s"):
        file.read(1 << 20)
    assert positions == [0, 0]


def test_a_file_that_is_slow_but_fast_enough_is_read_whole_in_small_blocks(watched):
    content = bytes(700)
    # blocks grow again up to 800 bytes
    file, positions = watched(content, 1000, ReadLimits(min_bytes_per_s=50, window_s=1))
    assert b"".join(iter(lambda: file.read(1 << 20), b"")) == content
    assert positions == [0, 0]


def test_an_open_that_hangs_is_an_error_of_the_shard(tmp_path, monkeypatch):
    over = threading.Event()
    monkeypatch.setattr("pipeline.storage.reading._open_local", lambda url, position: over.wait())
    try:
        with pytest.raises(ShardError, match=r"0\.tar: cannot be opened: no answer for 0\.6 s"):
            read_whole(str(tmp_path / "0.tar"))
    finally:
        over.set()


@pytest.fixture
def impatient_stores(monkeypatch):
    """Requests to stores that are given up after a second, and not repeated."""
    monkeypatch.setattr(filesystems, "SILENCE_TIMEOUT_S", 5)
    monkeypatch.setattr(filesystems, "BRIEF_SILENCE_TIMEOUT_S", 1)
    monkeypatch.setattr(attempts, "TOTAL_S", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")


@pytest.mark.usefixtures("impatient_stores")
def test_an_object_that_falls_silent_is_read_again_in_a_small_block_and_then_an_error(
    store, moto_port, monkeypatch
):
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    store.put(bucket, b"")
    store.put(f"{bucket}/0.tar", bytes(1 << 20))
    limits = ReadLimits(min_bytes_per_s=1000, window_s=1)
    with faulty_proxy(moto_port, Fault("GET", "0.tar", sent_bytes=10, silent=True, times=99)) as (port, log):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        with pytest.raises(ShardError, match=r"received 0 bytes in 1 s .*run\.min_read_bytes_per_s"):
            read_whole(f"s3://{bucket}/0.tar", limits)
    assert sum(what == "hurt" for _, _, what in log) == 2


STORE_REQUESTS = {
    "open": (ShardError, lambda url: read_whole(f"{url}/0.tar")),
    "version": (ShardError, lambda url: storage.version_now(source(f"{url}/0.tar"))),
    "list": (UserError, lambda url: storage.list_shards(f"{url}/*.tar")),
    "look up": (UserError, lambda url: storage.list_shards(f"{url}/0.tar")),
    "put": (OutputError, lambda url: storage.publish(url, "x.bin", b"x")),
    "exists": (OutputError, lambda url: storage.exists(url, "x.bin")),
    "list names": (OutputError, storage.list_names),
    "remove": (OutputError, lambda url: storage.remove(url, "x.bin")),
    "move": (OutputError, lambda url: storage.move(url, "x.bin", url, "y.bin")),
}


@pytest.mark.usefixtures("impatient_stores")
@pytest.mark.parametrize(("kind", "work"), STORE_REQUESTS.values(), ids=STORE_REQUESTS.keys())
def test_every_request_to_a_store_that_does_not_answer_ends(kind, work, monkeypatch):
    with dripping() as (address, requests):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with pytest.raises(kind):
            work(f"s3://bucket-{uuid.uuid4().hex[:12]}/folder")
        assert len(requests) <= 2


@pytest.mark.usefixtures("impatient_stores")
def test_a_shard_on_a_store_that_drips_its_headers_is_left(monkeypatch):
    with dripping(OK + b"X: ", b"y") as (address, requests):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        with pytest.raises(ShardError, match=r"cannot be opened: no answer for 0\.6 s"):
            read_whole(f"s3://bucket-{uuid.uuid4().hex[:12]}/0.tar")
    assert len(requests) == 1


# --- the measure itself


def test_the_rate_is_measured_in_windows_of_waiting():
    meter = RateMeter(ReadLimits(min_bytes_per_s=10, window_s=60))
    for _ in range(100):
        meter.add(59, 600)
        meter.add(1, 0)
    meter.add(59, 599)
    assert meter.patience_s == 1
    with pytest.raises(TooSlowError, match=r"received 599 bytes in 60 s .* 10 bytes per second"):
        meter.add(1, 0)


def test_a_full_window_is_followed_by_a_whole_one():
    meter = RateMeter(ReadLimits(min_bytes_per_s=10, window_s=60))
    meter.add(10, 600)
    assert meter.patience_s == 110
    assert "received 0 bytes in 60 s" in str(meter.too_slow())


def test_the_configured_rate_is_the_one_that_readers_have_by_default():
    assert RunConfig().min_read_bytes_per_s == ReadLimits().min_bytes_per_s == 1024
