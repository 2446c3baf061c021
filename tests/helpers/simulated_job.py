"""A job in memory for a simulated run: shards that are only sizes, and an output folder without files."""

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from pipeline.config.load import parse_config
from pipeline.errors import DamagedFileError
from pipeline.output.counts import ShardCounts
from pipeline.output.folder import OutputFolder
from pipeline.output.records import CountsRecord, FooterRecord, JobStamp
from pipeline.output.runs import RunState
from pipeline.output.schema import ShardRow
from pipeline.run.job import Job
from pipeline.storage import ShardSource
from tests.helpers.simulated_worker import BYTES_PER_SAMPLE, samples_of

CONFIG_HASH = "simulated"


def simulated_shards(samples: Iterable[int]) -> list[ShardSource]:
    """Return a shard for each number of samples; its size says how many it has."""
    return [
        ShardSource(f"s{number:06d}", f"s{number}.tar", f"file:///s{number}.tar", count * BYTES_PER_SAMPLE)
        for number, count in enumerate(samples)
    ]


@dataclass(frozen=True)
class SimulatedFolder(OutputFolder):
    """The output folder of a simulated job: what workers have published, and the other files by name.

    Attributes:
        is_published: whether a shard was published; SimulatedHost knows.
        files: contents of what the driver has published.
    """

    is_published: Callable[[str], bool] = field(default=lambda shard_id: False, kw_only=True)
    files: dict[tuple[str, str], bytes] = field(default_factory=dict, kw_only=True)

    def checked_footer(self, row: ShardRow, config_hash: str) -> FooterRecord:
        if not self.is_published(row["shard_id"]):
            raise DamagedFileError(row["shard_id"], "does not exist")
        samples = samples_of(ShardSource(row["shard_id"], "", "", row["size_bytes"]))
        counts = ShardCounts(annotated=samples, rows=samples)
        return FooterRecord.model_construct(
            **{name: getattr(counts, name) for name in CountsRecord.model_fields},
            layout=1,
            attempt=uuid.uuid4().hex,
            config_hash=config_hash,
            shard=row["shard"],
            state="done",
            content_digest="",
        )

    def publish(self, name: str, content: IO[bytes] | bytes, subfolder: str = "") -> None:
        self.files[subfolder, name] = content if isinstance(content, bytes) else content.read()

    def remove(self, name: str, subfolder: str = "") -> None:
        self.files.pop((subfolder, name), None)

    def close(self) -> None:
        pass


def simulated_job(
    shards: Sequence[ShardSource],
    is_published: Callable[[str], bool],
    run: Mapping[str, Any] | None = None,
) -> Job:
    """Return a job of which nothing is done.

    Args:
        shards: of the job.
        is_published: whether a shard was published.
        run: settings of the section `run`.
    """
    config = parse_config(
        {
            "input": {"shards": "/simulated/*.tar"},
            "model": {"name": "ViT-B-16", "pretrained": "openai"},
            "output": {"dir": "/simulated/out"},
            "run": dict(run or {}),
        }
    )
    rows: tuple[ShardRow, ...] = tuple(
        {
            "shard_id": shard.shard_id,
            "shard": shard.canonical_url,
            "size_bytes": shard.size_bytes,
            "mtime_ns": None,
            "etag": None,
            "moved_from": None,
        }
        for shard in shards
    )
    return Job(
        config=config,
        stamp=JobStamp(CONFIG_HASH, "simulated", {}),
        folder=SimulatedFolder(config.output.dir, is_published=is_published),
        shards=tuple(shards),
        rows=rows,
        done=frozenset(),
        damaged=frozenset(),
        given_up=frozenset(),
    )


class KeptProgress:
    """Keep the messages of a run and its last state."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.states: list[RunState] = []

    def update(self, state: RunState) -> None:
        self.states[:] = [*self.states[-1:], state]

    def say(self, message: str) -> None:
        self.messages.append(message)
