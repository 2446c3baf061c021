"""Commands as shards: refused by default, run without a shell, and judged by their exit code."""

import io
import os
import shlex
import sys
import tarfile
import time
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ShardError, UserError
from pipeline.run.job import prepare_job
from pipeline.shards.samples import RawSample, read_samples
from pipeline.storage.pipes import CommandOutput
from tests.helpers.corpus import demo_job, sample, write_shard

SECRET = "s3cr3tTokenValue"


def python(program: str, *arguments) -> str:
    """A command that runs a Python program."""
    return "pipe:" + shlex.join([sys.executable, "-c", program, *map(str, arguments)])


@pytest.fixture
def tar(tmp_path) -> Path:
    return write_shard(tmp_path / "0.tar", [sample("a"), sample("b")])


def listed(*patterns: str, allow_commands: bool = True):
    return storage.list_shards(list(patterns), allow_commands=allow_commands)


def keys_of(shard) -> list:
    with storage.open_shard(shard) as stream:
        return [
            item.key if isinstance(item, RawSample) else item.kind
            for item in read_samples(stream, max_member_bytes=2**20)
        ]


@pytest.mark.parametrize(
    "spelling",
    ["pipe:{0}", " pipe:{0}", "PIPE:{0}", "\tpipe: {0}", "{{pipe:,x}}{0}", "pip{{e:,f}}{0}", "@{1}"],
)
def test_a_command_is_refused_and_not_run_unless_the_configuration_allows_it(spelling, tmp_path):
    trace = tmp_path / "trace"
    command = f"touch {trace} x.tar"
    (tmp_path / "list.txt").write_text(f"pipe:{command}\n")
    with pytest.raises(UserError, match="runs a command, which is not allowed"):
        listed(spelling.format(command, tmp_path / "list.txt"), allow_commands=False)
    assert not trace.exists()


@pytest.mark.parametrize(
    "url",
    [
        "|cat {0}",
        "cat {0} |",
        "ssh://host/0.tar",
        "sftp://host/0.tar",
        "ftp://host/0.tar",
        "data:,x.tar",
        "hdfs://h/0.tar",
    ],
)
@pytest.mark.parametrize("allow_commands", [False, True])
def test_other_ways_to_run_something_or_to_reach_elsewhere_are_no_shards(url, allow_commands, tar):
    try:
        shards = listed(url.format(tar), allow_commands=allow_commands)
    except UserError:
        return
    (shard,) = shards
    assert shard.canonical_url.startswith("file://"), "the name of a file that is not there"
    with pytest.raises(ShardError), storage.open_shard(shard):
        pass


def test_without_the_setting_a_job_with_a_command_does_not_start(tar, tmp_path):
    with pytest.raises(UserError, match="allow_commands"):
        prepare_job(demo_job([f"pipe:cat {tar}"], tmp_path / "out"))
    job = prepare_job(demo_job([f"pipe:cat {tar}"], tmp_path / "out", input={"allow_commands": True}))
    assert [keys_of(shard) for shard in job.shards] == [["a", "b"]]


def test_a_command_writes_the_shard_that_it_names(tar):
    (shard,) = listed(f"pipe:cat {tar}")
    assert shard.canonical_url == f"pipe:{tar.as_uri()}"
    assert shard.shard_id.startswith("0-")
    assert keys_of(shard) == ["a", "b"]
    assert storage.shard_name(shard.canonical_url) == shard.canonical_url


def test_braces_make_many_commands_and_compressed_shards_can_be_read(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", [sample(f"k{number}")])
        with tarfile.open(tmp_path / f"{number}.tar.gz", "w:gz") as packed:
            content = (tmp_path / f"{number}.tar").read_bytes()
            info = tarfile.TarInfo("inner.tar")
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    shards = listed(f"pipe:tar -xOzf {tmp_path}/{{0..2}}.tar.gz")
    assert [keys_of(shard) for shard in shards] == [["k0"], ["k1"], ["k2"]]


def test_a_command_runs_without_a_shell(tar, tmp_path):
    trace = tmp_path / "trace"
    words = f"{tar} ; touch {trace} && $(touch {trace}) `touch {trace}` | touch {trace} > {trace} *"
    (shard,) = listed(python("import sys; sys.stdout.write(repr(sys.argv[2:]))", *shlex.split(words)))
    with storage.open_shard(shard) as stream:
        assert stream.read().decode() == repr(shlex.split(words)[1:])
    assert not trace.exists()


def test_a_command_reads_nothing_from_our_input(tar):
    (shard,) = listed(python("import sys; print(repr(sys.stdin.read()))", tar))
    with storage.open_shard(shard) as stream:
        assert stream.read() == b"''\n"


WRITE = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()[:{}]); sys.stdout.flush();"


@pytest.mark.parametrize("part", ["", "2000", "0"], ids=["all of it", "half a header", "nothing"])
def test_an_exit_code_is_an_error_of_the_shard_however_much_came_before(part, tar):
    (shard,) = listed(python(WRITE.format(part) + "sys.exit(3)", tar))
    with pytest.raises(ShardError, match="exit code 3"):
        keys_of(shard)


def test_a_page_of_errors_is_not_blamed_on_the_data(tar):
    program = "import sys; print('<html>503</html>' * 10_000); sys.exit(22)"
    (shard,) = listed(python(program, tar))
    with pytest.raises(ShardError, match="exit code 22"):
        keys_of(shard)


def test_a_command_that_is_killed_is_an_error_of_the_shard(tar):
    (shard,) = listed(python(WRITE.format("3000") + "import os; os.kill(os.getpid(), 9)", tar))
    with pytest.raises(ShardError, match="exit code -9"):
        keys_of(shard)


def test_a_shard_that_is_cut_by_a_command_that_ends_well_is_the_datas_fault(tar):
    (shard,) = listed(python(WRITE.format("3000"), tar))
    assert keys_of(shard)[-1] == "truncated"


def test_a_program_that_is_not_there_is_an_error_of_the_shard(tar):
    (shard,) = listed(f"pipe:no-such-program-at-all {tar}")
    with pytest.raises(ShardError, match="no-such-program-at-all"):
        keys_of(shard)


def test_what_a_command_says_of_its_failure_is_reported_without_its_arguments(tar, tmp_path):
    fetch = tmp_path / "fetch.py"
    fetch.write_text("import sys; sys.exit('403 Forbidden for ' + ' '.join(sys.argv) + sys.argv[2][-16:])")
    url = f"https://user:{SECRET}@host.example/{tar.name}?X-Amz-Signature={SECRET}&x=1"
    command = [sys.executable, str(fetch), url, f"Authorization: Bearer {SECRET}"]
    (shard,) = listed(f"pipe:{shlex.join(command)}")
    with pytest.raises(ShardError) as caught:
        keys_of(shard)
    assert "403 Forbidden" in str(caught.value)
    assert "exit code 1" in str(caught.value)
    for text in (str(caught.value), repr(shard), shard.canonical_url, shard.shard_id):
        assert SECRET not in text
    assert shard.canonical_url == f"pipe:'https://host.example/{tar.name}?x=~6b86b273ff34fce1'"


def test_no_file_of_a_job_holds_a_commands_arguments(tar, tmp_path):
    command = f"pipe:env TOKEN={SECRET} cat {tar}"
    prepare_job(demo_job([command], tmp_path / "out", input={"allow_commands": True}))
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in written} >= {"job.json", "shards.parquet"}
    assert not any(SECRET.encode() in path.read_bytes() for path in written)


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("pipe:", "expected a command"),
        ("pipe:cat 'x.tar", "cannot be split"),
        ("pipe:cat /dev/stdin", "found 0"),
        ("pipe:cat a.tar b.tar", "found 2"),
    ],
)
def test_a_command_names_one_shard_by_which_its_results_are_known(command, what):
    with pytest.raises(UserError, match=what):
        listed(command)


@pytest.mark.parametrize("name", ["a b.tar", "it's.tar", "0.TAR", "0.tar.gz", "0.tgz", "x.tar.zst"])
def test_the_name_of_a_commands_shard_may_hold_anything_and_is_stable(name, tmp_path):
    (shard,) = listed(f"pipe:cat {shlex.quote(str(tmp_path / name))}")
    assert storage.shard_name(shard.canonical_url) == shard.canonical_url
    assert storage.shard_id(shard.canonical_url) == shard.shard_id
    assert listed(f"pipe:gunzip -c {shlex.quote(str(tmp_path / name))}")[0].shard_id == shard.shard_id


def test_a_command_that_falls_silent_is_ended_with_what_it_started(tar, tmp_path):
    pid_file = tmp_path / "pid"
    program = (
        "import subprocess, sys, time;"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    )
    with CommandOutput(python(program, tar), "pipe:0.tar", start_timeout_s=0.5) as output:
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
        with pytest.raises(ShardError, match=r"wrote nothing for 0\.5 s"):
            output.read(100)
    wait_until_gone(int(pid_file.read_text()))


def test_a_command_whose_reader_stops_is_ended(tar, tmp_path):
    pid_file = tmp_path / "pid"
    program = (
        f"import os, sys; open({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
        "while True: sys.stdout.buffer.write(bytes(65536))"
    )
    (shard,) = listed(python(program, tar))
    with storage.open_shard(shard) as stream:
        assert stream.read(10) == bytes(10)
    wait_until_gone(int(pid_file.read_text()))


def wait_until(condition) -> None:
    deadline_s = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline_s, "waited for 240 s"
        time.sleep(0.02)


def wait_until_gone(pid: int) -> None:
    """Until a process has ended, or is one that only nobody has asked for yet."""

    def is_gone() -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (ProcessLookupError, FileNotFoundError):
            return True

    wait_until(is_gone)
