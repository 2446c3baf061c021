"""Waiting for what must come. A busy machine may take long: only a hang ends at the limit."""

import shlex
import sys
import time
from pathlib import Path

PATIENCE_S = 600
# of a test that waits several times
TEST_PATIENCE_S = 3 * PATIENCE_S


def wait_until(condition, describe, process=None):
    """Return once a condition holds.

    Args:
        condition: asked again and again.
        describe: returns what to show if it never holds.
        process: whose end would mean that it never will.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None, f"ended with {process.returncode}: {describe()}"
        assert time.monotonic() < deadline_s, describe()
        time.sleep(0.05)


def descendants(ancestor):
    """Process ids below a process, with their command lines."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
    found, fresh = set(), {ancestor}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return {child: Path(f"/proc/{child}/cmdline").read_bytes().decode() for child in found}


def published(out):
    """The shards whose annotations are there."""
    return list((Path(out) / "annotations").glob("*.parquet"))


def wait_for_first_shard(out, process, log):
    """Return once a job has published a shard."""
    wait_until(lambda: published(out), log.read_text, process)


def held_shard(tar, go):
    """How a job lists a tar whose content comes only when a file is there: until then it is not done.

    Args:
        tar: path of the tar.
        go: path of the file.
    """
    return f"pipe:{shlex.join([sys.executable, __file__, str(go), str(tar)])}"


def main():
    """Write a tar to stdout once a file is there: GO TAR."""
    go, tar = map(Path, sys.argv[1:])
    while not go.exists():
        time.sleep(0.05)
    sys.stdout.buffer.write(tar.read_bytes())


if __name__ == "__main__":
    main()
