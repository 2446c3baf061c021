"""What the samples of a chunk add to their shard: order that does not depend on how they were shared out."""

import io
import tarfile

import pytest

from pipeline.annotate.chunk_rows import add_chunk
from pipeline.annotate.sample_work import outcome_of
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import read_samples


class Collected:
    def __init__(self):
        self.errors = []

    def add(self, rows, errors, outcomes):
        self.errors += errors


def archive(names):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    sink.seek(0)
    return sink


@pytest.mark.parametrize("chunk_samples", [1, 2, 5, 100])
def test_errors_without_a_sample_keep_their_place_whatever_the_chunks(chunk_samples):
    names = ["README", "a.txt", "stray1", "a.json", "b.txt", "stray2", "stray3", "c.txt", "a.cls", "stray4"]
    items = list(read_samples(archive(names), max_member_bytes=100))
    outcomes = [
        outcome_of(
            item if isinstance(item, SampleError) else SampleError("decode", "bad", "", item.key, item.index)
        )
        for item in items
    ]
    written = Collected()
    for start in range(0, len(outcomes), chunk_samples):
        chunk = outcomes[start : start + chunk_samples]
        # errors of samples may come last, as those of masks do
        chunk.sort(key=lambda outcome: outcome.is_sample)
        add_chunk(written, chunk)
    assert [error.key for error in written.errors][:-1] == [
        "README",
        "stray1",
        "a",
        "stray2",
        "stray3",
        "b",
        "c",
        "stray4",
    ]
    assert written.errors[-1].kind == "members_apart"
