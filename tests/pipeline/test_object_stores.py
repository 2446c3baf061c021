"""Shards on S3 and on web servers, results on S3: against real servers on loopback."""

import functools
import io
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import pyarrow.parquet as pq
import pytest

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.demo import assets
from pipeline.errors import OutputError, ShardError, ShortReadError, UserError
from pipeline.output.status import read_status
from pipeline.output.writer import ShardWriter
from pipeline.report import write_report
from pipeline.run import job as jobs
from pipeline.storage import ShardSource
from pipeline.storage import publishing as output
from tests.helpers.corpus import demo_job, write_corpus
from tests.helpers.object_servers import (
    SECRET,
    FolderHandler,
    cutting_handler,
    refusing_handler,
    serving,
    uploading_handler,
)
from tests.helpers.report_jobs import varied_rows, write_job

pytestmark = pytest.mark.usefixtures("only_loopback")


@pytest.fixture(autouse=True)
def two_attempts(monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")


@pytest.fixture
def bucket(store, monkeypatch):
    """A new bucket in the store that the environment names."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    store.put(name, b"")
    return name


@pytest.fixture
def rude_bucket(monkeypatch):
    """Names a bucket on a server of the given port; a new one each time, as connections are kept by name."""

    def name(port):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        return f"rude-{uuid.uuid4().hex[:12]}"

    return name


@pytest.fixture(scope="module")
def explainer():
    name = assets.register_demo_model()
    return legrad.LeGrad.from_open_clip(name, str(assets.demo_weights_path()), layers=2)


def keys_of(shards):
    return [shard.canonical_url.split("/", 3)[3] for shard in shards]


def whole(shard):
    with storage.open_shard(shard) as stream:
        return stream.read()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    assert SECRET not in text
    return text


# --- listing


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("in/{0..2}.tar", ["in/0.tar", "in/1.tar", "in/2.tar"]),
        ("in/*.tar", ["in/0.tar", "in/1.tar", "in/2.tar"]),
        ("in/?.tar", ["in/0.tar", "in/1.tar", "in/2.tar"]),
        ("in/[02].tar", ["in/0.tar", "in/2.tar"]),
        ("in/{0,2}*.tar", ["in/0.tar", "in/2.tar"]),
        ("**/*.tar", ["in/0.tar", "in/1.tar", "in/2.tar", "in/sub/a#b c%20.tar", "top.tar"]),
        ("in/*/*.tar", ["in/sub/a#b c%20.tar"]),
        ("*.tar", ["top.tar"]),
    ],
)
def test_patterns_are_spelled_out_with_sizes(store, bucket, pattern, found):
    contents = {f"in/{index}.tar": b"x" * (10 + index) for index in range(3)}
    contents |= {"top.tar": b"y" * 3, "in/sub/a#b c%20.tar": b"odd", "in/note.txt": b"n"}
    for key, content in contents.items():
        store.put(f"{bucket}/{key.replace('%', '%25').replace('#', '%23').replace(' ', '%20')}", content)
    shards = storage.list_shards(f"s3://{bucket}/{pattern}")
    assert sorted(keys_of(shards)) == found
    assert [shard.size_bytes for shard in shards] == [len(contents[key]) for key in keys_of(shards)]
    assert [whole(shard) for shard in shards] == [contents[key] for key in keys_of(shards)]


def test_a_glob_costs_one_listing_whatever_it_finds(store, bucket, caplog):
    for index in range(20):
        store.put(f"{bucket}/in/{index}.tar", b"x" * 10)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="werkzeug"):
        shards = storage.list_shards(f"s3://{bucket}/in/*.tar")
    requests = [record.getMessage() for record in caplog.records if record.name == "werkzeug"]
    assert len(shards) == 20
    assert len(requests) == 1
    assert "list-type=2" in requests[0]


def test_options_of_a_url_hold_for_what_its_glob_finds(store, bucket, monkeypatch):
    store.put(f"{bucket}/in/0.tar", b"content")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    endpoint = store.endpoint.removeprefix("http://")
    pattern = (
        f"s3://testing:{SECRET}@{bucket}/in/?.tar?scheme=http&region=us-east-1&endpoint_override={endpoint}"
    )
    (shard,) = storage.list_shards(pattern)
    assert re.fullmatch(
        rf"s3://{bucket}/in/0\.tar\?endpoint_override=~\w{{16}}&region=~\w{{16}}&scheme=~\w{{16}}",
        shard.canonical_url,
    )
    assert whole(shard) == b"content"


def test_a_missing_bucket_is_an_input_error(bucket):
    with pytest.raises(UserError, match="the bucket 'no-such-bucket' does not exist") as error:
        storage.list_shards("s3://no-such-bucket/{0..3}.tar")
    one_line(error)
    with pytest.raises(UserError, match="nothing matches s3://no-such-bucket/"):
        storage.list_shards("s3://no-such-bucket/*.tar")


def test_a_missing_object_in_a_bucket_that_is_there_is_listed_without_a_size(store, bucket):
    store.put(f"{bucket}/0.tar", b"x")
    shards = storage.list_shards(f"s3://{bucket}/{{0,1}}.tar")
    assert [shard.size_bytes for shard in shards] == [1, None]
    with pytest.raises(ShardError, match=r"1\.tar: cannot be opened"):
        whole(shards[1])


@pytest.mark.parametrize("pattern", ["{0..3}.tar", "*.tar"])
def test_wrong_credentials_for_the_input_are_input_errors(rude_bucket, pattern):
    with (
        serving(refusing_handler("InvalidAccessKeyId")) as port,
        pytest.raises(UserError, match="cannot be") as error,
    ):
        storage.list_shards(f"s3://{rude_bucket(port)}/{pattern}")
    one_line(error)


@pytest.mark.parametrize("url", ["s3://b/0.tar?X-Amz-Signature={}", "s3://id:{}@b/0.tar?nonsense=1"])
def test_an_option_that_is_not_known_is_reported_without_its_secrets(url):
    with pytest.raises(UserError, match=r"s3://b\S*: cannot be used: expected options region") as error:
        storage.list_shards(url.format(SECRET))
    one_line(error)


@pytest.mark.parametrize("bucket", ["*", "bucket*", "bu?ket", "[ab]"])
def test_a_glob_in_a_buckets_name_is_refused(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"expected|cannot be used"):
        storage.list_shards(f"s3://{bucket}/x.tar")


# --- reading


def test_a_shard_on_s3_is_read_byte_for_byte_in_large_pieces(store, bucket, caplog):
    content = os.urandom(3 * storage.READAHEAD_BYTES + 12345)
    store.put(f"{bucket}/0.tar", content)
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    assert shard.size_bytes == len(content)
    read = io.BytesIO()
    caplog.clear()
    with (
        caplog.at_level(logging.INFO, logger="werkzeug"),
        storage.open_shard(shard) as stream,
    ):
        while block := stream.read(10_240):
            read.write(block)
    assert read.getvalue() == content
    assert sum(record.name == "werkzeug" for record in caplog.records) <= 6


def test_an_object_that_shrank_since_it_was_listed_is_a_short_read(store, bucket):
    store.put(f"{bucket}/0.tar", b"x" * 9000)
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    store.put(f"{bucket}/0.tar", b"x" * 5000)
    with pytest.raises(ShortReadError, match="received 5000 of 9000 bytes"):
        whole(shard)


def test_an_object_that_was_replaced_while_it_was_read_is_reported(store, bucket):
    store.put(f"{bucket}/0.tar", b"x" * 9000)
    (shard,) = storage.list_shards(f"s3://{bucket}/0.tar")
    before = storage.version_now(shard)
    storage.require_unchanged(shard, before)
    store.put(f"{bucket}/0.tar", b"x" * 9001)
    with pytest.raises(ShardError, match=r"0\.tar: changed since it was listed"):
        storage.require_unchanged(shard, before)


def test_a_connection_to_s3_that_is_cut_is_never_a_clean_end(rude_bucket):
    content = os.urandom(6_000_000)
    with serving(cutting_handler(content, 4_500_000)) as port:
        (shard,) = storage.list_shards(f"s3://{rude_bucket(port)}/0.tar")
        assert shard.size_bytes == len(content)
        with pytest.raises(ShardError) as error:
            whole(shard)
    one_line(error)


def test_a_shard_on_a_web_server_is_read_byte_for_byte(tmp_path):
    content = os.urandom(9_000_001)
    (tmp_path / "a b.tar").write_bytes(content)
    (tmp_path / "1.tar").write_bytes(b"")
    with serving(functools.partial(FolderHandler, directory=tmp_path)) as port:
        shards = storage.list_shards(f"http://127.0.0.1:{port}/{{a b,1,2}}.tar?X-Amz-Signature={SECRET}")
        assert [shard.size_bytes for shard in shards] == [0, None, 9_000_001]
        assert [whole(shard) for shard in (shards[0], shards[2])] == [b"", content]
        with pytest.raises(ShardError, match=r"2\.tar: cannot be opened: HTTP Error 404") as error:
            whole(shards[1])
    one_line(error)
    assert SECRET not in "".join(shard.canonical_url + shard.shard_id for shard in shards)


def test_user_info_of_a_web_address_becomes_basic_authentication(tmp_path):
    class Locked(FolderHandler):
        def do_GET(self):
            allowed = self.headers.get("Authorization") == "Basic aWQ6aHVudGVyMmh1bnRlcjI="
            super().do_GET() if allowed else self.send_error(401)

    (tmp_path / "0.tar").write_bytes(b"content")
    with serving(functools.partial(Locked, directory=tmp_path)) as port:
        (shard,) = storage.list_shards(f"http://id:{SECRET}@127.0.0.1:{port}/0.tar")
        assert whole(shard) == b"content"
        (closed,) = storage.list_shards(f"http://id:x{SECRET}@127.0.0.1:{port}/0.tar")
        with pytest.raises(ShardError, match="401") as error:
            whole(closed)
    one_line(error)


@pytest.mark.parametrize("head_status", [200, 405])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("sent_bytes", [0, 512, 999_424])
def test_a_web_server_that_hangs_up_is_never_a_clean_end(head_status, chunked, sent_bytes):
    handler = cutting_handler(b"x" * 1_000_000, sent_bytes, chunked=chunked, head_status=head_status)
    with serving(handler) as port:
        (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar?sig={SECRET}")
        assert shard.size_bytes == (1_000_000 if head_status == 200 else None)
        with pytest.raises(ShardError) as error:
            whole(shard)
    one_line(error)


def test_a_web_server_that_is_not_there_is_a_shard_error():
    with serving(FolderHandler) as port:
        pass
    (shard,) = storage.list_shards(f"http://127.0.0.1:{port}/0.tar?sig={SECRET}")
    with pytest.raises(ShardError, match="refused") as error:
        whole(shard)
    one_line(error)


# --- publishing


class BreaksHalfway(io.BytesIO):
    """Content whose source fails after its first bytes."""

    def read(self, size=-1):
        raise OSError("the disk of the private file is gone")


def test_a_published_object_is_whole_listed_and_replaced(store, bucket):
    out = f"s3://{bucket}/out"
    large = os.urandom(25_000_000)
    storage.publish(out, "x.bin", b"one")
    storage.publish(out, "x.bin", io.BytesIO(large))
    storage.publish(out, "empty", b"")
    assert store.get(f"{bucket}/out/x.bin") == large == storage.read_bytes(f"{out}/x.bin")
    assert store.get(f"{bucket}/out/empty") == b""
    assert storage.list_names(out) == {"x.bin", "empty"}
    assert storage.list_names(f"s3://{bucket}") == set()
    assert storage.exists(out, "x.bin")


def test_a_file_too_large_for_the_memory_is_published_from_the_disk(store, bucket, monkeypatch):
    monkeypatch.setattr(output, "IN_MEMORY_BYTES", 1 << 20)
    content = os.urandom(3 << 20)
    with tempfile.SpooledTemporaryFile(max_size=1 << 20) as spooled:
        spooled.write(content)
        storage.publish(f"s3://{bucket}/out", "x.bin", spooled)
    storage.publish(f"s3://{bucket}/out", "y.bin", io.BytesIO(content))
    assert store.get(f"{bucket}/out/x.bin") == store.get(f"{bucket}/out/y.bin") == content


def test_an_object_is_removed_and_removing_nothing_is_no_error(store, bucket):
    out = f"s3://{bucket}/out"
    storage.publish(out, "x.bin", b"one")
    storage.remove(out, "x.bin")
    storage.remove(out, "x.bin")
    assert not storage.exists(out, "x.bin")
    assert store.get(f"{bucket}/out/x.bin") is None
    assert storage.list_names(out) == set()
    assert storage.sweep_staging(out, idle_for_s=0) == 0


def test_content_that_breaks_off_leaves_nothing_under_the_final_name(store, bucket):
    with pytest.raises(OutputError, match=r"out/x\.bin: cannot be written: the disk"):
        storage.publish(f"s3://{bucket}/out", "x.bin", BreaksHalfway(b"half"))
    assert store.get(f"{bucket}/out/x.bin") is None
    storage.publish(f"s3://{bucket}/out", "x.bin", b"before")
    with pytest.raises(OutputError):
        storage.publish(f"s3://{bucket}/out", "x.bin", BreaksHalfway(b"half"))
    assert store.get(f"{bucket}/out/x.bin") == b"before"


def test_a_part_that_the_store_refuses_is_reported_and_the_upload_never_completed(rude_bucket):
    operations = []
    with (
        serving(uploading_handler(operations, part_status=400)) as port,
        pytest.raises(OutputError, match=r"x\.bin: cannot be written") as error,
    ):
        storage.publish(f"s3://{rude_bucket(port)}/out", "x.bin", b"x" * 25_000_000)
    one_line(error)
    assert "part" in {kind for kind, _, _ in operations}
    assert "complete" not in {kind for kind, _, _ in operations}


def test_ctrl_c_during_an_upload_never_publishes_a_part_of_it(rude_bucket):
    operations = []

    def interrupt():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)

    with serving(uploading_handler(operations, start_delay=interrupt)) as port:
        with pytest.raises(KeyboardInterrupt):
            storage.publish(f"s3://{rude_bucket(port)}/out", "x.bin", b"0123456789" * 2_500_000)
        assert [kind for kind, _, _ in operations] == ["start", *["part"] * 3, "complete"]
    assert sum(body.count(b"5") for _, _, body in operations) >= 2_500_000


def test_a_missing_bucket_for_the_output_is_one_line(bucket):
    with pytest.raises(
        OutputError, match=r"s3://no-such-bucket/out/x: cannot be written.*does not exist"
    ) as error:
        storage.publish("s3://no-such-bucket/out", "x", b"1")
    one_line(error)


@pytest.mark.parametrize(
    "action",
    [
        lambda out: storage.publish(out, "x", b"1"),
        storage.list_names,
        lambda out: storage.exists(out, "x"),
        lambda out: storage.remove(out, "x"),
    ],
)
def test_wrong_credentials_for_the_output_are_one_line(rude_bucket, action):
    with serving(refusing_handler("SignatureDoesNotMatch")) as port:
        out = f"s3://id:{SECRET}@{rude_bucket(port)}/out"
        with pytest.raises(OutputError, match=r"s3://rude-\w+/out.*: cannot be") as error:
            action(out)
    one_line(error)


def test_results_are_not_written_to_web_servers():
    with pytest.raises(UserError, match="only for input"):
        storage.publish("http://127.0.0.1:9/out", "x", b"1")


# --- whole jobs


def everything_in(store, bucket):
    listing = store.ask("GET", f"{bucket}?list-type=2").decode()
    keys = re.findall("<Key>(.*?)</Key>", listing)
    return {key: store.get(f"{bucket}/{key}") for key in keys}


def test_a_job_reads_from_s3_and_writes_the_same_rows_to_s3_as_to_a_disk(store, bucket, explainer, tmp_path):
    paths = write_corpus(tmp_path / "in", 2, 5)
    for path in paths:
        store.put(f"{bucket}/in/{path.name}", path.read_bytes())
    config = demo_job([f"s3://{bucket}/in/*.tar"], f"s3://{bucket}/out")
    job = jobs.prepare_job(config)
    assert [shard.size_bytes for shard in job.todo] == [path.stat().st_size for path in paths]
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata=job.metadata)
    annotator.annotate(job.todo[0])
    half = read_status(config.output.dir)
    assert (half.done, half.left) == ((job.shards[0].shard_id,), (job.shards[1].shard_id,))
    again = jobs.prepare_job(config)
    assert again.todo == [job.shards[1]]
    annotator.annotate(again.todo[0])
    status = read_status(config.output.dir)
    assert status.complete
    assert (status.counts.annotated, status.counts.failed, status.mismatched) == (10, 0, ())
    jobs.record_success(job.folder, 2, 0, status.counts)
    assert read_status(config.output.dir).succeeded

    local = demo_job(paths, tmp_path / "out")
    beside = ShardAnnotator(local, explainer, decode_threads=1, metadata={})
    for shard, reference in zip(job.shards, storage.list_shards(local.input.shards), strict=True):
        beside.annotate(reference)
        content = store.get(f"{bucket}/out/annotations/{shard.shard_id}.parquet")
        rows = pq.read_table(io.BytesIO(content)).drop_columns("shard")
        expected = pq.read_table(tmp_path / "out" / "annotations" / f"{reference.shard_id}.parquet")
        assert rows.equals(expected.drop_columns("shard"))
    annotator.close()
    beside.close()


def test_another_configuration_may_overwrite_results_on_s3(store, bucket, tmp_path):
    (path,) = write_corpus(tmp_path / "in", 1, 1)
    out = f"s3://{bucket}/out"
    job = jobs.prepare_job(demo_job([path], out))
    with ShardWriter(job.shards[0], {**job.metadata, "attempt": "a"}) as writer:
        writer.publish(out)
    files = [
        f"{bucket}/out/{folder}/{job.shards[0].shard_id}.parquet" for folder in ("annotations", "errors")
    ]
    assert all(store.get(file) for file in files)
    changed = demo_job([path], out, masks={"rule": "fixed"}, output={"on_mismatch": "overwrite"})
    assert any("removed 2 files" in warning for warning in jobs.prepare_job(changed).warnings)
    assert not any(store.get(file) for file in files)


def test_shards_that_are_not_listed_any_more_are_moved_aside_on_s3(store, bucket, tmp_path):
    paths = write_corpus(tmp_path / "in", 2, 1)
    out = f"s3://{bucket}/out"
    job = jobs.prepare_job(demo_job(paths, out))
    for shard in job.shards:
        with ShardWriter(shard, {**job.metadata, "attempt": shard.shard_id}) as writer:
            writer.publish(out)
    jobs.prepare_job(demo_job(paths[:1], out))
    assert len(read_status(out).done) == 1
    moved = [key for key in everything_in(store, bucket) if "/unlisted/" in key]
    assert len(moved) == 2
    assert all(key.endswith(".parquet.moved") for key in moved)


def test_no_credential_of_input_or_output_is_written_down(store, bucket, explainer, tmp_path):
    (path,) = write_corpus(tmp_path / "in", 1, 2)
    store.put(f"{bucket}/in/0.tar", path.read_bytes())
    options = f"region=us-east-1&scheme=http&endpoint_override={store.endpoint.removeprefix('http://')}"
    config = demo_job(
        [f"s3://testing:{SECRET}@{bucket}/in/0.tar?{options}"],
        f"s3://{bucket}/out?{options}",
    )
    job = jobs.prepare_job(config)
    annotator = ShardAnnotator(config, explainer, decode_threads=1, metadata=job.metadata)
    annotator.annotate(job.todo[0])
    annotator.close()
    jobs.record_failure(job.folder, ShardSource("gone", "s3://x/gone", "s3://x/gone", 1), 1, "m")
    assert read_status(config.output.dir).complete
    written = everything_in(store, bucket)
    assert {key.split("/")[1] for key in written if key.startswith("out/")} == {
        *("job.json", "shards.parquet", "annotations", "errors", "failed")
    }
    for key, content in written.items():
        assert SECRET.encode() not in content, key
        assert store.endpoint.removeprefix("http://").encode() not in content, key


def test_credentials_in_the_outputs_url_are_refused_and_not_shown(tmp_path):
    with pytest.raises(UserError, match=r"output\.dir: credentials come from the environment") as error:
        demo_job([tmp_path / "0.tar"], f"s3://testing:{SECRET}@bucket/out")
    assert SECRET not in str(error.value)


def test_a_job_whose_output_bucket_is_missing_is_reported(bucket, tmp_path):
    (path,) = write_corpus(tmp_path / "in", 1, 1)
    with pytest.raises(OutputError, match="no-such-bucket") as error:
        jobs.prepare_job(demo_job([path], "s3://no-such-bucket/out"))
    one_line(error)
    with pytest.raises(UserError, match=r"holds no job\.json"):
        read_status("s3://no-such-bucket/out")


def test_two_threads_read_and_write_the_same_store(store, bucket):
    contents = {f"{index}.tar": os.urandom(300_000) for index in range(8)}
    barrier = threading.Barrier(8)
    failures = []

    def round_trip(name):
        try:
            barrier.wait(120)
            storage.publish(f"s3://{bucket}/x", name, contents[name])
            (shard,) = storage.list_shards(f"s3://{bucket}/x/{name}")
            assert whole(shard) == contents[name]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=round_trip, args=(name,)) for name in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_program_that_used_s3_ends_cleanly(store, bucket):
    program = (
        "from pipeline import storage\n"
        f"storage.publish('s3://{bucket}/out', 'x', b'1')\n"
        f"print(storage.list_names('s3://{bucket}/out'), "
        f"[s.size_bytes for s in storage.list_shards('s3://{bucket}/out/*')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{'x'} [1]\n", "")


# --- the report


def test_a_report_reads_from_s3_and_is_written_there(store, bucket, tmp_path):
    out = write_job(tmp_path, [varied_rows(5), varied_rows(4)])
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            store.put(f"{bucket}/{path.relative_to(tmp_path)}", path.read_bytes())
    here, there = write_report(str(out)), write_report(f"s3://{bucket}/out", [f"{tmp_path}=s3://{bucket}"])
    assert (there.rows_shown, there.pictures, there.unread_shards) == (9, 9, {})
    assert there.url == f"s3://{bucket}/out/report.html"
    page = store.get(f"{bucket}/out/report.html")
    assert page.count(b"data:image/jpeg") == (out / "report.html").read_bytes().count(b"data:image/jpeg")
    assert SECRET.encode() not in page
    assert here.pictures == 9


def test_a_report_names_shards_that_a_store_does_not_give(bucket, tmp_path):
    out = write_job(tmp_path, [varied_rows(3)])
    moved = write_report(str(out), [f"{tmp_path}=s3://{bucket}/nowhere"], to=str(tmp_path / "page.html"))
    assert (moved.rows_shown, moved.pictures, len(moved.unread_shards)) == (3, 0, 1)


def test_a_dry_run_reads_shards_of_a_store_and_refuses_a_bucket_that_does_not_exist(
    bucket, store, legrad, tmp_path
):
    (tar,) = write_corpus(tmp_path, shards=1, samples_per_shard=2)
    store.put(f"{bucket}/0.tar", tar.read_bytes())
    config = tmp_path / "job.yaml"
    config.write_text(
        f"input: {{shards: 's3://{bucket}/*.tar'}}\n"
        f"model: {{name: {assets.DEMO_MODEL_NAME}, pretrained: demo}}\n"
        f"output: {{dir: s3://{bucket}/out}}\n"
    )
    code, out, err = legrad("annotate", config, "--dry-run")
    assert (code, err) == (0, "")
    assert "samples: about 2, prompts: about 2" in out
    code, _, err = legrad("annotate", config, f"output.dir=s3://{bucket}-gone/out", "--dry-run")
    assert code == 1
    assert f"output.dir: s3://{bucket}-gone/out: the bucket '{bucket}-gone' does not exist" in err


def test_a_page_of_a_web_server_in_place_of_a_shard_is_named_as_such(legrad, tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<!doctype html><title>Sign in</title>" + b" " * 1000)
    with serving(functools.partial(FolderHandler, directory=tmp_path)) as port:
        code, _, err = legrad("init", f"http://127.0.0.1:{port}/0.tar")
    assert code == 1
    assert "none of the shards looked at has a sample" in err
    assert "it is an HTML page; the server sent an answer in place of the file" in err
