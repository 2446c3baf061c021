"""Class prompts between processes: ordinals are sent, since a class may have a hundred templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.annotate.rows import SampleRows
from pipeline.annotate.sample_states import PreparedSample
from pipeline.annotate.stored_samples import StoredSample
from pipeline.prompts.sample_prompts import Prompt

ReadySample = PreparedSample | StoredSample | SampleRows
# a sample without its prompts, and the ordinals of these among all classes; or as it is, and None
SentSample = tuple[ReadySample, tuple[int, ...] | None]


def without_classes(samples: Sequence[ReadySample]) -> list[SentSample]:
    """Replace prompts that are classes by their ordinals; samples that share them share these too."""
    ordinals_of: dict[int, tuple[int, ...]] = {}
    sent: list[SentSample] = []
    for sample in samples:
        if not isinstance(sample, PreparedSample) or sample.prompts[0].class_id is None:
            sent.append((sample, None))
            continue
        if id(sample.prompts) not in ordinals_of:
            ordinals_of[id(sample.prompts)] = tuple(prompt.index for prompt in sample.prompts)
        sent.append((replace(sample, prompts=()), ordinals_of[id(sample.prompts)]))
    return sent


def with_classes(sent: Sequence[SentSample], every_class: tuple[Prompt, ...]) -> list[ReadySample]:
    """Undo `without_classes`; samples with all classes share one tuple."""
    return [
        sample
        if ordinals is None or not isinstance(sample, PreparedSample)
        else replace(sample, prompts=_prompts(ordinals, every_class))
        for sample, ordinals in sent
    ]


def _prompts(ordinals: tuple[int, ...], every_class: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
    if len(ordinals) == len(every_class):
        return every_class
    return tuple(every_class[ordinal] for ordinal in ordinals)
