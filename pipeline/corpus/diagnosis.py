"""Say why a configuration gives no masks on a corpus, or fails on some samples, and what to change."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from pipeline.config.schema import JobConfig
from pipeline.corpus.contents import Contents, TextField, counted
from pipeline.corpus.probe import MISSING_FIELD, MISSING_KEY, Finding, Probe
from pipeline.errors import SampleFailure
from pipeline.prompts.sample_prompts import SamplePrompts
from pipeline.text import as_share, first_few, printable

SHOWN_SHARDS = 3
SHOWN_NAMES = 5


def problems_of(
    config: JobConfig, sample_prompts: SamplePrompts, found: Probe, contents: Callable[[], Contents]
) -> list[str]:
    """Return why a job would annotate none of the samples that were looked at, each reason in one line.

    Args:
        config: the job's configuration.
        sample_prompts: what finds its prompts.
        found: the samples that were looked at.
        contents: looks at all fields of some samples; called only where it helps to suggest others.

    Returns:
        The reasons, each with the way out; none where at least one sample may be annotated.
    """
    if not found.findings:
        return list(_without_samples(found))
    read = [finding for finding in found.findings if finding.read_failure is None]
    if not read:
        return [f"0 of {found.samples:,} samples can be read: {_most_common_failure(found.findings)}"]
    image_problem = _image_problem(config, found, read, contents)
    prompt_problem = _prompt_problem(config, sample_prompts, found, read, contents)
    # prompts that marks keep may be in other samples
    is_expected = config.prompts.marks is not None or any(map(_may_be_annotated, read))
    if image_problem is None and prompt_problem is None and not is_expected:
        return [f"none of {len(read):,} samples has both a usable image and a prompt"]
    return [problem for problem in (image_problem, prompt_problem) if problem is not None]


def notes_of(config: JobConfig, found: Probe) -> list[str]:
    """Return what is true of some of the samples or shards that were looked at, each in one line.

    Args:
        config: the job's configuration.
        found: the samples that were looked at.
    """
    if not found.findings:
        return []
    notes = [f"cannot be read: {url}: {message}" for url, message in found.unreadable]
    notes += [f"damaged: {url}: {message}" for url, message in found.damaged]
    if found.damaged and not config.run.accept_damaged:
        notes.append(
            "with a damaged shard, whose intact samples are annotated, a job is not complete (exit code 3) "
            "unless run.accept_damaged=true"
        )
    total = found.samples
    images = [finding.image_failure for finding in found.findings if finding.image_failure is not None]
    missing = [failure for failure in images if failure.kind == MISSING_FIELD]
    damaged = [failure for failure in images if failure.kind != MISSING_FIELD]
    captions = [finding.prompt_failure for finding in found.findings if finding.prompt_failure is not None]
    unread = [finding for finding in found.findings if finding.read_failure is not None]
    if unread:
        notes.append(f"{_share(len(unread), total)} cannot be read: {_most_common_failure(unread)}")
    if missing:
        notes.append(f"{_share(len(missing), total)} have no image: {_most_common_message(missing)}")
    if damaged:
        tried = f"{len(damaged):,} of {found.images_decoded + len(damaged):,} images that were tried"
        notes.append(f"{tried} do not decode: {_most_common_message(damaged)}")
    if captions:
        notes.append(
            f"{_share(len(captions), total)} have no usable caption: {_most_common_message(captions)}"
        )
    structured = sum(finding.prompt.lstrip().startswith(("{", "[")) for finding in found.findings)
    if structured * 2 > total:
        field = config.input.caption.partition(":")[0]
        notes.append(
            f"{_share(structured, total)} have JSON as their prompt; name the key that holds the caption, "
            f"such as {_override('input.caption', f'{field}:caption')}"
        )
    empty = sum(not (finding.prompts or finding.fails) for finding in found.findings)
    if empty:
        kept = "" if config.prompts.marks is None else " that prompts.marks keeps"
        notes.append(f"{_share(empty, total)} have no prompt{kept}, and would count as empty")
    failing = sum(finding.fails for finding in found.findings)
    if failing > config.run.error_budget * total:
        notes.append(
            f"{_share(failing, total)} would fail, which is more than run.error_budget "
            f"({as_share(config.run.error_budget)}): such a job is not complete (exit code 3)"
        )
    return notes


def _may_be_annotated(finding: Finding) -> bool:
    return bool(finding.prompts) and finding.image_failure is None


def _without_samples(found: Probe) -> Iterator[str]:
    failed = [*found.unreadable, *found.damaged]
    for url, message in failed[:SHOWN_SHARDS]:
        yield f"{url}: {message}"
    if len(failed) > SHOWN_SHARDS:
        yield f"... and {len(failed) - SHOWN_SHARDS} more shard(s) that cannot be read"
    if found.shards and not failed:
        yield f"the {found.shards} shard(s) looked at have no sample"


def _image_problem(
    config: JobConfig, found: Probe, read: Sequence[Finding], contents: Callable[[], Contents]
) -> str | None:
    failures = [finding.image_failure for finding in read if finding.image_failure is not None]
    if len(failures) < len(read):
        return None
    missing = sum(failure.kind == MISSING_FIELD for failure in failures)
    if missing == len(read):
        looked = contents()
        return (
            f"field {config.input.image} is in 0 of {len(read):,} samples; fields present: "
            f"{counted(found.field_counts())}; {_other_image_field(looked)}"
        )
    tried = [failure for failure in failures if failure.kind != MISSING_FIELD]
    return f"0 of {len(tried):,} images decode: {_most_common_message(tried)}"


def _other_image_field(looked: Contents) -> str:
    if looked.images:
        return f"try {_override('input.image', ';'.join(looked.image_fields))}"
    if looked.unread_images:
        name, kind = next(iter(looked.unread_images.items()))
        return f"field {printable(name)} holds {kind}, which is not read; convert the images to JPEG or PNG"
    return f"no field of {looked.samples:,} samples holds an image"


def _prompt_problem(
    config: JobConfig,
    sample_prompts: SamplePrompts,
    found: Probe,
    read: Sequence[Finding],
    contents: Callable[[], Contents],
) -> str | None:
    failures = [finding.prompt_failure for finding in read if finding.prompt_failure is not None]
    if any(finding.prompts for finding in read) or (config.prompts.marks is not None and not failures):
        return None
    if sample_prompts.field is None:
        return "the list of classes is empty"
    kinds = {failure.kind for failure in failures}
    if not failures and config.prompts.source == "classes":
        return _nothing_mentioned(sample_prompts, len(read), contents())
    name, _, json_key = sample_prompts.field.partition(":")
    if len(failures) == len(read) and kinds == {MISSING_FIELD}:
        present = counted(found.field_counts())
        start = f"field {name} is in 0 of {len(read):,} samples; fields present: {present}"
    elif len(failures) == len(read) and kinds == {MISSING_KEY}:
        start = f"key {json_key} is in the field {name} of 0 of {len(read):,} samples"
    elif failures:
        start = f"0 of {len(read):,} samples have a usable caption: {_most_common_message(failures)}"
    else:
        start = f"0 of {len(read):,} samples have a prompt: the lists in {sample_prompts.field} are empty"
    return f"{start}; {_other_prompts(config, contents())}"


def _nothing_mentioned(sample_prompts: SamplePrompts, samples: int, looked: Contents) -> str:
    names = [prompt.text for prompt in sample_prompts.every_class]
    text = next((field for field in looked.texts if field.spec == sample_prompts.field), None)
    example = f", such as {text.examples[0]!r}," if text is not None else ""
    return (
        f"none of {samples:,} texts in {sample_prompts.field}{example} mentions one of the {len(names):,} "
        f"classes ({first_few(names, SHOWN_NAMES)}); names, synonyms and plurals are matched as whole words: "
        "add synonyms to a classes file in YAML, or explain every class in every image with "
        "prompts.mentioned_in=null"
    )


def _other_prompts(config: JobConfig, looked: Contents) -> str:
    """Return which other field may hold the prompts, as overrides to try."""
    if looked.caption is not None:
        overrides = " ".join(overrides_for(looked.caption, config.prompts.source))
        return f"try {overrides} (it holds {looked.caption.examples[0]!r})"
    if looked.class_field is not None:
        field = looked.class_field
        return (
            f"field {field.spec} holds classes, such as {field.examples[0]!r}; try prompts.source=classes "
            f"prompts.classes=FILE {_override('prompts.mentioned_in', field.spec)}, with a class for each of "
            "them in FILE, a .yaml list whose synonyms are these values"
        )
    return (
        f"no field of {looked.samples:,} samples holds a text; prompts.source=classes prompts.classes=FILE "
        "explains the classes of a list in every image"
    )


def overrides_for(field: TextField, source: str = "caption") -> list[str]:
    """Return the overrides with which a job takes its prompts from a field.

    Args:
        field: the field.
        source: `prompts.source` of the job.
    """
    if source == "classes":
        return [_override("prompts.mentioned_in", field.spec)]
    wanted = "captions" if field.kind == "list of texts" else "caption"
    of_source = [] if wanted == source else [f"prompts.source={wanted}"]
    return [*of_source, _override("input.caption", field.spec)]


def _override(key: str, value: str) -> str:
    return f"{key}={shlex.quote(printable(value))}"


def _share(count: int, total: int) -> str:
    return f"{count:,} of {total:,} samples ({as_share(count / total)})"


def _most_common_message(failures: Sequence[SampleFailure]) -> str:
    (message, count) = Counter(failure.message for failure in failures).most_common(1)[0]
    return f"{message} ({count:,} of {len(failures):,})" if len(failures) > 1 else message


def _most_common_failure(findings: Sequence[Finding]) -> str:
    return str(Counter(finding.read_failure for finding in findings).most_common(1)[0][0])
