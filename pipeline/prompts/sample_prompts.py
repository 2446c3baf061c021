"""Which prompts a sample gets: its caption, its captions, or classes; and the texts that stand for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Literal, TypeVar

from pipeline.config.classes import read_class_list
from pipeline.config.schema import JobConfig, PromptsConfig
from pipeline.errors import SampleFailure
from pipeline.prompts.mentions import MentionFinder
from pipeline.shards.captions import read_captions

Element = TypeVar("Element")
Ensemble = tuple[str, ...]

# of a sample whose list of prompts is not known before it is read
USUAL_PROMPTS = 4


@dataclass(frozen=True)
class Prompt:
    """One thing to explain.

    Attributes:
        index: ordinal in the sample; of a class: in the classes file.
        text: what its rows are named by.
        class_id: of a class, from 1.
        texts: what is embedded, averaged to one unit row; none: `text` itself.
    """

    index: int
    text: str
    class_id: int | None = None
    texts: Ensemble = ()

    @property
    def ensemble(self) -> Ensemble:
        """What is embedded: at least one text."""
        return self.texts or (self.text,)


@dataclass(frozen=True)
class Companions:
    """Texts that are explained beside every sample's own prompts.

    Attributes:
        background: what competes with the prompts for pixels, each as the texts that are averaged.
        max_background: of those, the most similar to an image get a map.
        neutral: a text that names nothing; None: no such correction.
        neutral_threshold: where its min-maxed grid exceeds this, in [0, 1], grids are zeroed.
    """

    background: tuple[Ensemble, ...] = ()
    max_background: int = 4
    neutral: str | None = None
    neutral_threshold: float = 0.8

    @property
    def most_maps(self) -> int:
        """Maps of an image beside those of its prompts, at most."""
        return min(len(self.background), self.max_background) + (self.neutral is not None)


@dataclass(frozen=True)
class FoundPrompts:
    """A sample's prompts, perhaps none.

    Attributes:
        prompts: in order; one and the same tuple for all samples that get all classes.
        failures: elements of a list that could not be read, each with its prompt index where it has one.
    """

    prompts: tuple[Prompt, ...]
    failures: tuple[tuple[int | None, SampleFailure], ...] = ()


class SamplePrompts:
    """Finds the prompts of samples, as a configuration says.

    Args:
        config: the job's configuration; a classes file that it names is read here.

    Attributes:
        field: of a sample, where its prompts are found; None: they need none.
        usual_number: prompts of a sample that get maps, as far as that can be told beforehand.

    Raises:
        UserError: the classes file cannot be read, or is wrong.
    """

    def __init__(self, config: JobConfig) -> None:
        self._settings = with_files_read(config.prompts)
        self._templates = _listed(self._settings.templates)
        self._every_class = _class_prompts(self._settings)
        takes_classes = self._settings.source == "classes"
        self.field = self._settings.mentioned_in if takes_classes else config.input.caption
        found = 1 if self._settings.source == "caption" else USUAL_PROMPTS
        usual = len(self._every_class) if self.field is None else found
        self.usual_number = min(usual, self._settings.max_per_sample)
        mentions = takes_classes and self.field is not None
        self._finder = MentionFinder(_listed(self._settings.classes)) if mentions else None

    def of(self, fields: Mapping[str, bytes]) -> FoundPrompts:
        """Find a sample's prompts.

        Args:
            fields: the sample's, by lower-cased extension.

        Raises:
            SampleFailure: stage `caption`: the field of its prompts is missing or cannot be read.
        """
        if self.field is None:
            return FoundPrompts(self._every_class)
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
        return FoundPrompts(
            tuple(self._every_class[ordinal] for ordinal in sorted(ordinals)), tuple(failures)
        )

    def _ensemble(self, text: str) -> tuple[str, ...]:
        return () if self._templates == ("{}",) else in_templates([text], self._templates)


def with_files_read(prompts: PromptsConfig) -> PromptsConfig:
    """Put the content of files and of named lists in the place of their names.

    What a job writes down, hashes and sends to its workers is the content.

    Raises:
        UserError: the classes file cannot be read, or is wrong.
    """
    changes: dict[str, object] = {}
    if isinstance(prompts.classes, str):
        changes["classes"] = read_class_list(prompts.classes)
    if isinstance(prompts.background, str):
        changes["background"] = default_background() if prompts.background == "default" else ()
    if isinstance(prompts.templates, str):
        changes["templates"] = _open_clip_templates(prompts.templates)
    return prompts.model_copy(update=changes)


def default_background() -> tuple[str, ...]:
    """The shipped list of what pictures commonly have behind their subjects."""
    listed = resources.files("pipeline.prompts").joinpath("background.txt").read_text("utf-8")
    return tuple(listed.splitlines())


def companions_of(prompts: PromptsConfig) -> Companions:
    """The texts explained beside every sample's own: backgrounds that name no class, and the neutral text.

    Raises:
        UserError: the classes file cannot be read, or is wrong.
    """
    settings = with_files_read(prompts)
    texts = list(dict.fromkeys(_listed(settings.background)))
    if texts and settings.source == "classes":
        finder = MentionFinder(_listed(settings.classes))
        texts = [text for text in texts if not finder.names_a_class(text)]
    return Companions(
        tuple(in_templates([text], _listed(settings.templates)) for text in texts),
        settings.max_background,
        settings.neutral,
        settings.neutral_threshold,
    )


def in_templates(names: Iterable[str], templates: Iterable[str]) -> tuple[str, ...]:
    """Each name in the place of {} of each template."""
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
    # imported here: it brings torch, and few jobs need it
    from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

    templates = OPENAI_IMAGENET_TEMPLATES if name == "openai-imagenet" else SIMPLE_IMAGENET_TEMPLATES
    return tuple(template("{}") for template in templates)


def _listed(value: str | tuple[Element, ...] | None) -> tuple[Element, ...]:
    """What a setting lists, once files are read."""
    return value if isinstance(value, tuple) else ()
