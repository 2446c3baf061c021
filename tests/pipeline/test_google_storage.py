"""``gs://`` against a store on loopback that speaks as much of Google's protocol as is needed."""

import io
import os
import threading
from datetime import timedelta

import pytest

from pipeline import storage
from pipeline.errors import OutputError, ShardError, UserError
from pipeline.storage import attempts, filesystems, reading
from tests.helpers.google_storage import google_handler
from tests.helpers.object_servers import Fault, faulty_proxy, serving

MEBIBYTE = 1 << 20

pytestmark = pytest.mark.usefixtures("only_loopback")


@pytest.fixture
def objects():
    return {}


@pytest.fixture
def url(objects):
    """Makes URLs on a store that holds `objects`, behind a proxy with faults; `url.log` is the proxy's."""
    with serving(google_handler(objects)) as store_port:
        proxies = []

        def make(pattern, *faults):
            if not proxies:
                proxies.append(faulty_proxy(store_port, *faults))
                make.port, make.log = proxies[0].__enter__()
            return f"gs://anonymous@bucket/{pattern}?scheme=http&endpoint_override=127.0.0.1:{make.port}"

        yield make
        for proxy in proxies:
            proxy.__exit__(None, None, None)


def whole(shard):
    with storage.open_shard(shard) as stream:
        return stream.read()


def hurt(log):
    return [method for method, _, what in log if what == "hurt"]


def test_shards_are_listed_with_sizes_and_read_byte_for_byte(objects, url):
    content = os.urandom(9 * MEBIBYTE)
    objects |= {("bucket", "in/0.tar"): content, ("bucket", "in/1.tar"): b"x", ("bucket", "in/note"): b"n"}
    shards = storage.list_shards([url("in/*.tar"), url("in/{1,2}.tar")])
    assert [(shard.canonical_url.partition("?")[0], shard.size_bytes) for shard in shards] == [
        ("gs://bucket/in/0.tar", 9 * MEBIBYTE),
        ("gs://bucket/in/1.tar", 1),
        ("gs://bucket/in/2.tar", None),
    ]
    assert whole(shards[0]) == content
    with pytest.raises(ShardError, match=r"gs://bucket/in/2\.tar\S*: cannot be opened"):
        whole(shards[2])


def test_a_shard_whose_reads_hang_is_opened_again_where_it_was_left(objects, url, monkeypatch):
    content = os.urandom(1000)
    objects["bucket", "in/0.tar"] = content
    opened, over = reading._open_object, threading.Event()

    def hangs_first(where, position):
        stream = opened(where, position)
        return Hanging(stream, over) if position == 0 else stream

    monkeypatch.setattr(reading, "_open_object", hangs_first)
    (shard,) = storage.list_shards(url("in/0.tar"))
    try:
        with storage.open_shard(shard, storage.ReadLimits(min_bytes_per_s=200, window_s=1)) as stream:
            assert stream.read() == content
    finally:
        over.set()


class Hanging:
    """Passes 100 bytes on, then hangs."""

    def __init__(self, stream, over):
        self.stream, self.over, self.reads = stream, over, 0

    def read(self, size):
        self.reads += 1
        if self.reads > 1:
            self.over.wait()
        return self.stream.read(100)

    def close(self):
        self.stream.close()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "alt=media", status=503),
        Fault("GET", "alt=media", status=429),
        Fault("GET", "alt=media", sent_bytes=5 * MEBIBYTE),
        Fault("GET", "alt=media", drip_s=0.01),
    ],
    ids=["down", "throttled", "cut halfway", "slow"],
)
def test_a_shard_is_read_whole_in_spite_of(fault, objects, url):
    objects["bucket", "0.tar"] = os.urandom(9 * MEBIBYTE)
    (shard,) = storage.list_shards(url("0.tar", fault))
    assert whole(shard) == objects["bucket", "0.tar"]
    assert hurt(url.log) == ["GET"]


def test_a_published_object_is_whole_listed_replaced_and_removed(objects, url):
    content = os.urandom(20 * MEBIBYTE)
    out = url("out")
    storage.publish(out, "x.bin", b"one")
    storage.publish(out, "x.bin", io.BytesIO(content))
    storage.publish(out, "empty", b"")
    assert objects == {("bucket", "out/x.bin"): content, ("bucket", "out/empty"): b""}
    assert storage.read_bytes(storage.join_url(out, "x.bin")) == content
    assert storage.list_names(out) == {"x.bin", "empty"}
    storage.remove(out, "x.bin")
    storage.remove(out, "x.bin")
    assert not storage.exists(out, "x.bin")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", status=503),
        Fault("PUT", status=503),
        Fault("PUT", received_bytes=1000),
        Fault("PUT", sent_bytes=0),
    ],
    ids=["start down", "down", "cut in the body", "cut before the answer"],
)
def test_an_object_is_published_whole_in_spite_of(fault, objects, url):
    content = os.urandom(9 * MEBIBYTE)
    storage.publish(url("out", fault), "x.bin", content)
    assert objects == {("bucket", "out/x.bin"): content}
    assert hurt(url.log) == [fault.method]


def test_an_upload_that_never_ends_leaves_the_earlier_object(objects, url, monkeypatch):
    monkeypatch.setattr(filesystems, "BRIEF_GCS_RETRY_TIME", timedelta(seconds=1))
    monkeypatch.setattr(attempts, "TOTAL_S", 0)
    objects["bucket", "out/x.bin"] = b"before"
    out = url("out", Fault("PUT", status=503, times=999))
    for name in ("x.bin", "new.bin"):
        with pytest.raises(OutputError, match=rf"gs://bucket/out/{name}\S*: cannot be written"):
            storage.publish(out, name, os.urandom(9 * MEBIBYTE))
    assert objects == {("bucket", "out/x.bin"): b"before"}


def test_a_missing_bucket_is_named(url):
    gone = url("{0,1}.tar").replace("@bucket", "@gone")
    with pytest.raises(UserError, match="the bucket 'gone' does not exist"):
        storage.list_shards(gone)


def test_credentials_in_a_url_are_refused_and_not_shown():
    with pytest.raises(UserError, match="gs://bucket: credentials come from the environment") as error:
        storage.list_shards("gs://id:hunter2@bucket/0.tar")
    assert "hunter2" not in str(error.value)
