"""Find the prompts of a sample: its caption, its captions, or classes; and the texts embedded for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Literal, TypeVar

from pipeline.config.classes import read_class_list
from pipeline.config.marks import Marks, marks_of, read_mark_list
from pipeline.config.row_keys import backgrounds_act
from pipeline.config.schema import JobConfig, PromptsConfig
from pipeline.errors import SampleFailure, UserError
from pipeline.prompts.mentions import MentionFinder
from pipeline.shards.captions import read_captions

Element = TypeVar("Element")
Ensemble = tuple[str, ...]

# assumed for a sample whose prompts are not known before it is read
USUAL_PROMPTS = 4


@dataclass(frozen=True)
class Prompt:
    """One thing to explain.

    Attributes:
        index: ordinal in the sample; for a class: in the classes file.
        text: the prompt as its rows name it.
        class_id: id of the class, from 1; None for a caption.
        texts: texts that are embedded and averaged to one unit row; empty: `text` itself.
    """

    index: int
    text: str
    class_id: int | None = None
    texts: Ensemble = ()

    @property
    def ensemble(self) -> Ensemble:
        """Texts that are embedded, at least one."""
        return self.texts or (self.text,)


@dataclass(frozen=True)
class Companions:
    """Texts that are explained for every sample beside its own prompts.

    Attributes:
        background: background texts, each as the texts averaged: they compete with the prompts for pixels,
            take relevance from them, and count for their lead, as the configuration's masks say.
        max_background: number of background texts that get a map: those most similar to the image.
        neutral: a text that names nothing; None: grids are not corrected.
        neutral_threshold: grids are zeroed where the min-maxed grid of the neutral text exceeds this, in
            [0, 1].
        centre: texts of all kinds, whose mean embedding is the centre for distances between texts.
        background_names: each background text without templates.
    """

    background: tuple[Ensemble, ...] = ()
    max_background: int = 4
    neutral: str | None = None
    neutral_threshold: float = 0.8
    centre: tuple[Ensemble, ...] = ()
    background_names: tuple[str, ...] = ()

    def name_of(self, ensemble: Ensemble) -> str:
        """Return a background text without its templates, or the neutral text."""
        names = dict(zip(self.background, self.background_names, strict=False))
        return names.get(ensemble, ensemble[0])


@dataclass(frozen=True)
class FoundPrompts:
    """The prompts of a sample, perhaps none.

    Attributes:
        prompts: in order; the same tuple for all samples that get all classes.
        failures: elements of a list that could not be read, each with its prompt index if it has one.
    """

    prompts: tuple[Prompt, ...]
    failures: tuple[tuple[int | None, SampleFailure], ...] = ()


class SamplePrompts:
    """Finds the prompts of samples as configured.

    Args:
        config: configuration of the job; a classes file that it names is read here.

    Attributes:
        every_class: prompts of all classes, in their order; none where captions are the prompts.
        field: field of a sample that holds its prompts; None: no field is needed.
        usual_number: estimated number of prompts of a sample that get maps.

    Raises:
        UserError: the classes file or the marks cannot be read, or are invalid.
    """

    def __init__(self, config: JobConfig) -> None:
        self._settings = with_files_read(config.prompts)
        self._templates = _listed(self._settings.templates)
        self.every_class = _class_prompts(self._settings)
        takes_classes = self._settings.source == "classes"
        self.field = self._settings.mentioned_in if takes_classes else config.input.caption
        found = 1 if self._settings.source == "caption" else USUAL_PROMPTS
        usual = len(self.every_class) if self.field is None else found
        self.usual_number = min(usual, self._settings.max_per_sample)
        mentions = takes_classes and self.field is not None
        self._finder = MentionFinder(_listed(self._settings.classes)) if mentions else None
        self._marks = job_marks(self._settings)

    def of(self, fields: Mapping[str, bytes], *, shard: str = "", key: str = "") -> FoundPrompts:
        """Find the prompts of a sample, without those that `prompts.marks` does not keep.

        Args:
            fields: fields of the sample by lower-cased extension.
            shard: canonical URL of its shard, by which marks name it.
            key: its key.

        Raises:
            SampleFailure: stage `caption`: the field with its prompts is missing or cannot be read, or a mark
                is of another prompt (kind `other_prompt_marked`).
        """
        found = self._of(fields)
        return found if self._marks is None else _kept(found, self._marks, shard, key)

    def _of(self, fields: Mapping[str, bytes]) -> FoundPrompts:
        if self.field is None:
            return FoundPrompts(self.every_class)
        if self._finder is not None:
            return self._mentioned(read_captions(fields, self.field, several=None), self._finder)
        captions = read_captions(fields, self.field, several=self._settings.source == "captions")
        return FoundPrompts(
            tuple(
                Prompt(index, text, texts=self._ensemble(text))
                for index, text in enumerate(captions)
                if isinstance(text, str)
            ),
            tuple((index, found) for index, found in enumerate(captions) if isinstance(found, SampleFailure)),
        )

    def _mentioned(self, texts: Iterable[str | SampleFailure], finder: MentionFinder) -> FoundPrompts:
        ordinals: set[int] = set()
        failures: list[tuple[int | None, SampleFailure]] = []
        for text in texts:
            if isinstance(text, SampleFailure):
                failures.append((None, text))
            else:
                ordinals |= finder.mentioned(text)
        return FoundPrompts(tuple(self.every_class[ordinal] for ordinal in sorted(ordinals)), tuple(failures))

    def _ensemble(self, text: str) -> tuple[str, ...]:
        return () if self._templates == ("{}",) else in_templates([text], self._templates)


def _kept(found: FoundPrompts, marks: Marks, shard: str, key: str) -> FoundPrompts:
    try:
        kept = tuple(prompt for prompt in found.prompts if marks.keeps(shard, key, prompt.index, prompt.text))
    except UserError as error:
        raise SampleFailure("caption", "other_prompt_marked", str(error)) from None
    # samples with all classes share one tuple
    return found if len(kept) == len(found.prompts) else replace(found, prompts=kept)


def job_marks(prompts: PromptsConfig) -> Marks | None:
    """Return the marks of a job, whose file has been read, as a filter; None without marks.

    Raises:
        UserError: a row has both marks.
    """
    return None if prompts.marks is None else marks_of(_listed(prompts.marks), prompts.keep_marked)


def with_files_read(prompts: PromptsConfig) -> PromptsConfig:
    """Replace the names of files and of built-in lists by their content.

    The content is what a job records, hashes and sends to its workers.

    Raises:
        UserError: the classes file or the marks cannot be read, or are invalid.
    """
    changes: dict[str, object] = {}
    if isinstance(prompts.marks, str):
        changes["marks"] = read_mark_list(prompts.marks)
    if isinstance(prompts.classes, str):
        changes["classes"] = read_class_list(prompts.classes)
    if isinstance(prompts.background, str):
        changes["background"] = default_background() if prompts.background == "default" else ()
    if isinstance(prompts.templates, str):
        changes["templates"] = _open_clip_templates(prompts.templates)
    return prompts.model_copy(update=changes)


def default_background() -> tuple[str, ...]:
    """Return the built-in list of things that are common in the background of pictures."""
    listed = resources.files("pipeline.prompts").joinpath("background.txt").read_text("utf-8")
    return tuple(listed.splitlines())


def job_companions(config: JobConfig) -> Companions:
    """Return the texts explained for every sample of a job, without background texts that change nothing.

    Raises:
        UserError: the classes file cannot be read, or is invalid.
    """
    companions = companions_of(config.prompts)
    return companions if backgrounds_act(config) else replace(companions, background=())


def companions_of(prompts: PromptsConfig) -> Companions:
    """Return the texts explained for every sample: backgrounds that name no class, and the neutral text.

    Raises:
        UserError: the classes file cannot be read, or is invalid.
    """
    settings = with_files_read(prompts)
    texts = list(dict.fromkeys(_listed(settings.background)))
    if texts and settings.source == "classes":
        finder = MentionFinder(_listed(settings.classes))
        texts = [text for text in texts if not finder.names_a_class(text)]
    templates = _listed(settings.templates)
    return Companions(
        tuple(in_templates([text], templates) for text in texts),
        settings.max_background,
        settings.neutral,
        settings.neutral_threshold,
        # the same for every job, whatever its prompts and backgrounds
        tuple(in_templates([text], templates) for text in default_background()),
        tuple(texts),
    )


def in_templates(names: Iterable[str], templates: Iterable[str]) -> tuple[str, ...]:
    """Return each template with each name in the place of {}."""
    return tuple(template.replace("{}", name) for name in names for template in templates)


def _class_prompts(settings: PromptsConfig) -> tuple[Prompt, ...]:
    job_templates = _listed(settings.templates)
    return tuple(
        Prompt(
            ordinal,
            entry.name,
            entry.class_id,
            in_templates(
                (entry.name, *(entry.synonyms if settings.embed_synonyms else ())),
                entry.templates or job_templates,
            ),
        )
        for ordinal, entry in enumerate(_listed(settings.classes))
    )


def _open_clip_templates(name: Literal["openai-imagenet", "simple-imagenet"]) -> tuple[str, ...]:
    # imported here: it imports torch, and few jobs need it
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if name == "openai-imagenet" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in templates)


def _listed(value: str | tuple[Element, ...] | None) -> tuple[Element, ...]:
    """Return the elements of a setting whose file has been read; none for other values."""
    return value if isinstance(value, tuple) else ()
