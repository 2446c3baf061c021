"""Read the first samples of a few shards as a job would: find prompts, decode some images, count both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from pipeline import storage
from pipeline.config.schema import JobConfig
from pipeline.corpus.contents import one_line, without_url
from pipeline.corpus.first_items import BoundedStream, first_items
from pipeline.corpus.folders import look_into_folder
from pipeline.errors import PipelineError, SampleFailure
from pipeline.prompts.sample_prompts import SamplePrompts
from pipeline.shards.fields import find_field
from pipeline.shards.images import open_image
from pipeline.shards.sample_error import SampleError
from pipeline.shards.samples import RawSample
from pipeline.storage import ShardSource
from pipeline.storage.urls import is_local, local_path

PROBED_SAMPLES = 200
# of a shard: decoding goes on only until so many images were decoded
DECODED_IMAGES = 8
MISSING_FIELD, MISSING_KEY = "missing_field", "missing_key"


@dataclass(frozen=True)
class Finding:
    """What a job would make of a sample.

    Attributes:
        key: key of the sample.
        fields: names of the fields present, as far as they are kept.
        prompts: number of prompts, at most `prompts.max_per_sample`.
        prompt: text of the first prompt; empty where there is none.
        prompt_failure: why it has no usable caption; None where it has, or where it could not be read.
        image_failure: why it has no usable image; None where it has, or where decoding was not tried.
        is_decoded: whether its image was decoded.
        read_failure: why its members could not be read; None where they could.
    """

    key: str
    fields: tuple[str, ...] = ()
    prompts: int = 0
    prompt: str = ""
    prompt_failure: SampleFailure | None = None
    image_failure: SampleFailure | None = None
    is_decoded: bool = False
    read_failure: str | None = None

    @property
    def fails(self) -> bool:
        """Whether the sample becomes an error."""
        return any((self.prompt_failure, self.image_failure, self.read_failure is not None))


@dataclass(frozen=True)
class Probe:
    """The first samples of a few shards.

    Attributes:
        shards: number of shards read.
        findings: what a job would make of each sample.
        bytes_read: bytes of the tars, up to the last sample read.
        unreadable: canonical URL and error of each shard that could not be opened or read.
        damaged: canonical URL and error of each shard whose archive is damaged, as far as it was read.
    """

    shards: int = 0
    findings: tuple[Finding, ...] = ()
    bytes_read: int = 0
    unreadable: tuple[tuple[str, str], ...] = ()
    damaged: tuple[tuple[str, str], ...] = ()

    @property
    def samples(self) -> int:
        """Number of samples read, failed ones included."""
        return len(self.findings)

    @property
    def prompts(self) -> int:
        """Number of prompts of those samples."""
        return sum(finding.prompts for finding in self.findings)

    @property
    def images_decoded(self) -> int:
        """Number of images that were decoded; others were not tried, or failed."""
        return sum(finding.is_decoded for finding in self.findings)

    @property
    def example(self) -> str | None:
        """The first prompt of those samples, in one line; None where there is none."""
        return next((one_line(finding.prompt) for finding in self.findings if finding.prompt), None)

    def field_counts(self) -> list[tuple[str, int]]:
        """Return the number of samples with each field, the most frequent first."""
        return Counter(name for finding in self.findings for name in finding.fields).most_common()


def probe_shards(
    config: JobConfig,
    sample_prompts: SamplePrompts,
    shards: Sequence[ShardSource],
    wanted_fields: Collection[str],
) -> Probe:
    """Read at most the first PROBED_SAMPLES samples of each shard.

    Args:
        config: the job's configuration.
        sample_prompts: finds the prompts.
        shards: the shards.
        wanted_fields: fields of a sample that the job reads.
    """
    findings: list[Finding] = []
    unreadable: list[tuple[str, str]] = []
    damaged: list[tuple[str, str]] = []
    bytes_read = shards_read = 0
    for shard in shards:
        try:
            with storage.open_shard(shard) as stream:
                bounded = BoundedStream(stream)
                items = first_items(
                    bounded,
                    max_member_bytes=config.input.max_member_bytes,
                    most=PROBED_SAMPLES,
                    wanted_fields=wanted_fields,
                )
                found, damage = _findings(config, sample_prompts, items, shard.canonical_url)
        except (PipelineError, OSError, pa.ArrowException) as error:
            unreadable.append((shard.canonical_url, _why_unreadable(shard, error)))
            continue
        damaged += [] if damage is None else [(shard.canonical_url, damage)]
        findings += found
        # of an archive that is cut, what precedes the cut counts
        shards_read += damage is None or bool(found)
        bytes_read += bounded.bytes_read
    return Probe(shards_read, tuple(findings), bytes_read, tuple(unreadable), tuple(damaged))


def _why_unreadable(shard: ShardSource, error: Exception) -> str:
    if is_local(shard.url) and (path := local_path(shard.url)).is_dir():
        return f"is a folder, and a shard is a tar; {look_into_folder(str(path)).way_out()}"
    return without_url(shard, str(error))


def _findings(
    config: JobConfig,
    sample_prompts: SamplePrompts,
    items: Iterator[RawSample | SampleError],
    shard_url: str,
) -> tuple[list[Finding], str | None]:
    """Return the findings of a shard, and why its archive is damaged; None as far as it was read."""
    findings: list[Finding] = []
    damage: str | None = None
    decoded = 0
    for item in items:
        if isinstance(item, SampleError):
            damage = item.message if item.damages_shard else damage
            if item.sample_index is not None:
                findings.append(Finding(item.key or "", read_failure=item.message))
            continue
        sample = replace(item, shard=shard_url)
        finding = _finding(config, sample_prompts, sample, is_to_be_decoded=decoded < DECODED_IMAGES)
        decoded += finding.is_decoded
        findings.append(finding)
    return findings, damage


def _finding(
    config: JobConfig, sample_prompts: SamplePrompts, sample: RawSample, *, is_to_be_decoded: bool
) -> Finding:
    image_failure = prompt_failure = None
    is_decoded, prompts, prompt = False, 0, ""
    try:
        content = find_field(sample.fields, config.input.image)
        if is_to_be_decoded:
            open_image(content, max_image_pixels=config.input.max_image_pixels)
            is_decoded = True
    except SampleFailure as failure:
        image_failure = failure
    try:
        found = sample_prompts.of(sample.fields, shard=sample.shard, key=sample.key)
        prompts = min(len(found.prompts), config.prompts.max_per_sample)
        prompt = found.prompts[0].text if found.prompts else ""
        if not prompts and found.failures:
            prompt_failure = found.failures[0][1]
    except SampleFailure as failure:
        prompt_failure = failure
    fields = tuple(dict.fromkeys([*sample.fields, *sample.fields.skipped]))
    return Finding(sample.key, fields, prompts, prompt, prompt_failure, image_failure, is_decoded)
