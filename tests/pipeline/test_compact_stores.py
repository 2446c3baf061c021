"""`legrad compact` on S3: from there, to there, and within it."""

import uuid

import pytest

from pipeline.output.folder import OutputFolder
from pipeline.output.status import read_status
from tests.helpers.compacted_jobs import compacted, complete_job, rows_by_shard

pytestmark = [pytest.mark.usefixtures("only_loopback"), pytest.mark.medium]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return complete_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def bucket(store, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    name = f"compact-{uuid.uuid4().hex[:12]}"
    store.ask("PUT", name)
    return f"s3://{name}"


def uploaded(out, url):
    """Copy a local output folder to a store."""
    for path in out.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(out))
            subfolder, _, name = name.rpartition("/")
            OutputFolder(url).publish(name, path.read_bytes(), subfolder)
    return url


def test_a_folder_on_s3_is_compacted_there_and_read_from_there(out, bucket, legrad):
    source = uploaded(out, f"{bucket}/run-1")
    code, printed, shown = legrad("compact", source, f"{bucket}/run-1-compacted")
    assert code == 0, printed + shown
    assert rows_by_shard(f"{bucket}/run-1-compacted") == rows_by_shard(out)
    assert read_status(f"{bucket}/run-1-compacted") == read_status(str(out))
    # repeated, and refused within itself, also where the URLs are written in another way
    assert legrad("compact", source, f"{bucket}/run-1-compacted")[0] == 0
    assert legrad("compact", source, f"{source}/new?region=us-east-1")[0] == 1


def test_a_local_folder_is_compacted_to_s3_and_back(out, bucket, tmp_path):
    there = compacted(out, f"{bucket}/new")
    back = compacted(there, tmp_path / "back")
    assert rows_by_shard(back) == rows_by_shard(out)
    assert (back / "_SUCCESS").exists()


def test_a_compaction_to_s3_that_was_interrupted_is_resumed(out, bucket, legrad, monkeypatch):
    publish = OutputFolder.publish

    def killed(self, name, content, subfolder=""):
        if subfolder == "annotations":
            raise KeyboardInterrupt
        publish(self, name, content, subfolder)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OutputFolder, "publish", killed)
        compacted(out, f"{bucket}/new")
    assert legrad("status", f"{bucket}/new")[0] == 1
    assert legrad("compact", out, f"{bucket}/new")[0] == 0
    assert rows_by_shard(f"{bucket}/new") == rows_by_shard(out)


def test_status_of_a_folder_on_s3_asks_for_unchanged_files_once(out, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.output.footer_cache.SETTLED_AFTER_S", -3600)
    source = uploaded(out, f"{bucket}/run-1")
    expected = read_status(source)
    opened = []
    monkeypatch.setattr("pipeline.output.shard_files.open_table", lambda url, _: opened.append(url))
    assert read_status(source) == expected
    assert not opened
