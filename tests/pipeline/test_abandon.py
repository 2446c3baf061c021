"""A shard that is abandoned is certainly not published, and nothing waits for what still works on it."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import legrad
from pipeline import storage
from pipeline.annotate.annotator import ShardAnnotator
from pipeline.annotate.attempt import AttemptsInFlight
from pipeline.demo import assets
from pipeline.errors import ShardAbandoned, ShardError
from pipeline.output.counts import ShardCounts
from pipeline.output.writer import ShardWriter
from pipeline.storage import ShardSource
from tests.helpers.corpus import demo_job, write_corpus
from tests.helpers.stream_bench import SOON_S, Bench, explained, numbered, wait_until


class Hanging:
    """A call that hangs until the test ends."""

    def __init__(self):
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self):
        self.begun.set()
        self.end.wait(SOON_S)


@pytest.fixture
def hanging():
    call = Hanging()
    yield call
    call.end.set()


@contextmanager
def running(function, *arguments):
    with ThreadPoolExecutor(1) as hands:
        yield hands.submit(function, *arguments)


def hang_at(hanging, place, shard="bad"):
    """Steps of a stream, and the samples of a shard; one of them hangs at a place of a shard."""

    def prepare(sample):
        if place == "prepare" and sample == (shard, 5):
            hanging()
        return sample

    def finish(sample):
        if place == "finish" and sample == (shard, 5):
            hanging()

    def explain(batch):
        if place == "explain" and (shard, 5) in batch:
            hanging()

    def samples():
        for sample in numbered(shard, 8):
            if place == "read" and sample[1] == 5:
                hanging()
            yield sample

    return {"prepare": prepare, "finish": finish, "explain": explain}, samples()


@pytest.mark.parametrize("place", ["read", "prepare", "explain", "finish"])
def test_a_shard_that_hangs_holds_nothing_once_it_has_failed_and_others_go_on(hanging, place):
    hooks, samples = hang_at(hanging, place)
    here = Bench(max_samples=8, max_readers=2, device_threads=2, **hooks)
    stream = here.stream
    with running(here.stream.run, samples, lambda parts: here.written.setdefault("bad", []), "bad") as run:
        assert hanging.begun.wait(SOON_S)
        stream.fail("bad", ShardAbandoned("bad"))
        assert (stream._samples_in_flight, stream._bytes_in_flight, stream._explained_bytes) == (0, 0, 0)
        assert (stream._readers, stream._preparing, stream._finishing) == (0, 0, 0)
        if place == "explain":
            # the device is shared, so others wait for a slow step, but its result is dropped
            hanging.end.set()
        # a batch that is not full is passed on at once, since nothing that counts could join it
        here.run("good", numbered("good", 30))
        assert here.written["good"] == explained("good", 30)
        stream.wait_for_room()
        hanging.end.set()
        assert isinstance(run.exception(SOON_S), ShardAbandoned)
    here.stream.close()


def test_failing_a_shard_that_is_not_in_the_stream_changes_nothing():
    here = Bench()
    here.stream.fail("unknown", ShardAbandoned("unknown"))
    here.run("a", numbered("a", 5))
    assert here.written["a"] == explained("a", 5)
    here.stream.close()


def shard_of(name):
    return ShardSource(name, f"file:///{name}", f"file:///{name}", 100)


def attempt_steps(attempts, shard, published):
    """Yield between the steps of an attempt, so that a test decides what happens there."""
    with attempts.begun(shard, ShardCounts) as attempt:
        yield
        yield
        attempt.begin_publishing()
        yield
        published.append(shard.shard_id)
        yield


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["go on", "go on", "abandon"]))))
def test_a_shard_is_published_if_and_only_if_abandoning_it_was_refused(actions):
    published, refused, abandoned = [], set(), set()
    attempts = AttemptsInFlight()
    steps = {name: attempt_steps(attempts, shard_of(name), published) for name in "ab"}
    begun, ended = set(), set()

    def go_on(name):
        begun.add(name)
        try:
            next(steps[name])
        except StopIteration:
            ended.add(name)
        except ShardAbandoned:
            assert name in abandoned
            ended.add(name)

    for name, action in actions:
        if action == "go on" and name not in ended:
            go_on(name)
        elif action == "abandon" and attempts.abandon(name):
            assert name in begun - ended
            abandoned.add(name)
        elif action == "abandon" and name in begun:
            refused.add(name)
    for name in "ab":
        while name not in ended:
            go_on(name)
    assert sorted(published) == sorted({"a", "b"} - abandoned)
    assert not refused & abandoned - ended
    assert (len(attempts), list(attempts)) == (0, [])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3))
def test_threads_that_abandon_and_publish_at_once_agree(abandoning, spins):
    attempts, published, shard = AttemptsInFlight(), [], shard_of("a")
    together = threading.Barrier(abandoning + 1)

    def publish():
        with attempts.begun(shard, ShardCounts) as attempt:
            together.wait(SOON_S)
            for _ in range(50 * spins):
                pass
            attempt.begin_publishing()
            published.append(shard)

    def abandon():
        together.wait(SOON_S)
        return attempts.abandon("a")

    with ThreadPoolExecutor(abandoning + 1) as hands:
        run = hands.submit(publish)
        answers = [hands.submit(abandon) for _ in range(abandoning)]
        error = run.exception(SOON_S)
    assert bool(published) == (error is None)
    assert (error is None) != any(answer.result() for answer in answers)


class HangingFile(io.BytesIO):
    """A tar whose server stops answering after so many bytes."""

    def __init__(self, content, hanging, after_bytes):
        super().__init__(content)
        self._hanging, self._after_bytes = hanging, after_bytes

    def read(self, size=-1):
        if self.tell() >= self._after_bytes:
            self._hanging()
            raise ShardError("the connection was closed")
        return super().read(size)


@pytest.fixture(scope="module")
def explainer():
    return legrad.LeGrad.from_open_clip(
        assets.register_demo_model(), str(assets.demo_weights_path()), layers=2
    )


@pytest.fixture
def annotator(explainer, tmp_path):
    config = demo_job(write_corpus(tmp_path / "in", 2, 12), tmp_path / "out", run={"batch_size": 4})
    here = ShardAnnotator(config, explainer, decode_threads=2, metadata={"config_hash": "h"})
    here.shards = storage.list_shards(config.input.shards)
    yield here
    here.close()


def published(tmp_path):
    return sorted(path.name for path in (tmp_path / "out" / "annotations").glob("*"))


def hang_while(place, hanging, shard, monkeypatch):
    """Let a shard hang while it is opened or read."""
    opened = storage.open_shard

    @contextmanager
    def open_shard(source, *arguments, **options):
        with opened(source, *arguments, **options) as stream:
            if source != shard:
                yield stream
            elif place == "opened":
                hanging()
                raise ShardError("cannot be opened")
            else:
                yield HangingFile(stream.read(), hanging, 0 if place == "begun" else shard.size_bytes // 2)

    monkeypatch.setattr(storage, "open_shard", open_shard)


@pytest.mark.parametrize("place", ["opened", "begun", "read"])
def test_a_shard_whose_server_hangs_can_be_abandoned_while_others_are_annotated(
    annotator, hanging, monkeypatch, tmp_path, place
):
    bad, good = annotator.shards
    hang_while(place, hanging, bad, monkeypatch)
    with running(annotator.annotate, bad) as run:
        assert hanging.begun.wait(SOON_S)
        assert list(annotator.progress()) == [bad.shard_id]
        assert annotator.abandon(bad.shard_id)
        assert annotator.progress() == {}
        # it has not ended, and the answer stays the same
        assert annotator.abandon(bad.shard_id)
        annotator.wait_for_room()
        assert annotator.annotate(good).counts.samples_in == 12
        hanging.end.set()
        assert isinstance(run.exception(SOON_S), ShardAbandoned)
    assert published(tmp_path) == [f"{good.shard_id}.parquet"]
    assert not annotator.abandon(bad.shard_id)
    # it may be annotated again
    monkeypatch.undo()
    annotator.annotate(bad)
    assert len(published(tmp_path)) == 2


def test_a_shard_that_is_being_published_or_was_published_cannot_be_abandoned(
    annotator, hanging, monkeypatch, tmp_path
):
    shard, publish = annotator.shards[0], ShardWriter.publish

    def slow_publish(*arguments):
        hanging()
        return publish(*arguments)

    monkeypatch.setattr(ShardWriter, "publish", slow_publish)
    with running(annotator.annotate, shard) as run:
        assert hanging.begun.wait(SOON_S)
        assert annotator.progress()[shard.shard_id].done_share == pytest.approx(1.0)
        assert not annotator.abandon(shard.shard_id)
        hanging.end.set()
        assert run.result(SOON_S).counts.samples_in == 12
    assert not annotator.abandon(shard.shard_id)
    assert not annotator.abandon("unknown")
    assert published(tmp_path) == [f"{shard.shard_id}.parquet"]


def test_the_share_that_is_done_grows_with_bytes_read_and_samples_finished(annotator, hanging, monkeypatch):
    shard = annotator.shards[0]
    hang_while("read", hanging, shard, monkeypatch)
    with running(annotator.annotate, shard) as run:
        assert hanging.begun.wait(SOON_S)
        wait_until(lambda: annotator.progress()[shard.shard_id].counts.samples_in >= 4)
        assert 0.1 < annotator.progress()[shard.shard_id].done_share <= 0.6
        hanging.end.set()
        assert isinstance(run.exception(SOON_S), ShardError)
