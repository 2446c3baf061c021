"""Which keys of a configuration change the rows of a job.

The config hash covers these keys, and an error names those that changed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from legrad.masks.sharpness import PUBLISHED_SHARPNESS
from pipeline import storage
from pipeline.config.classes import ClassEntry
from pipeline.config.marks import marks_of
from pipeline.config.masks import RULE_KEYS
from pipeline.config.schema import JobConfig
from pipeline.text import printable

# other keys count, unless they do nothing in a configuration: see _ACTS_IF
NEVER_COUNT_SECTIONS = ("run",)
# weights count by their digest, wherever their file is
NEVER_COUNT = (
    *("input.shards", "input.allow_commands", "model.pretrained", "output.dir", "output.on_mismatch"),
    *("masks.segmenter", "masks.segmenter_revision"),
)
STORED_MAPS = "uint16, with distances and the maps of background texts"
MAX_KEYS_NAMED = 10
MAX_VALUE_CHARACTERS = 80
_NEXT_LINE = "\n           "
_NOT_COUNTED = object()


def row_keys(config: JobConfig) -> dict[str, Any]:
    """Return each key that changes the rows, with its value.

    Keys that do nothing in this configuration, such as `masks.quantile` under `masks.rule` fixed, are
    omitted, and values that mean the same are replaced by one of them.

    Args:
        config: with the content of the files that it names, see
            `pipeline.prompts.sample_prompts.with_files_read`.

    Returns:
        Dotted key to value, of the types of JSON.
    """
    return {
        key: _MEANING[key](config) if key in _MEANING else value
        for key, value in _flat(config.model_dump(mode="json")).items()
        if _counts(key, config)
    }


def describe_differences(
    earlier: Mapping[str, Any],
    config: JobConfig,
    weights_digest: str,
    segmenter_digest: str | None = None,
    maps_hash: str | None = None,
    *,
    most: int = MAX_KEYS_NAMED,
) -> str:
    """Describe why the rows of an earlier configuration are not those of this one.

    Args:
        earlier: the content of a folder's job.json, which may be damaged, or written by another version.
        config: the configuration now, with the content of the files that it names.
        weights_digest: digest of its weights.
        segmenter_digest: digest of its segmenter's files, if it has one.
        maps_hash: hash of the configuration that made the maps it takes, if it takes stored ones.
        most: largest number of keys that are named.

    Returns:
        One line for each key that changed and counts before or now, with both values; indented to follow
        "  changed: ".
    """
    lines = [
        *_weights_line(earlier, config, weights_digest),
        *_segmenter_line(earlier, config, segmenter_digest),
        *_maps_line(earlier, maps_hash),
        *_changed_key_lines(earlier.get("config"), config),
    ]
    if not lines:
        # the hashes differ, but nothing that they cover
        lines = ["nothing in the configuration; another version of this program wrote the folder"]
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return _NEXT_LINE.join([*lines[:most], *more])


def _counts(key: str, config: JobConfig) -> bool:
    if key in NEVER_COUNT or key.partition(".")[0] in NEVER_COUNT_SECTIONS:
        return False
    return key not in _ACTS_IF or _ACTS_IF[key](config)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{key}": value for section, values in document.items() for key, value in values.items()
    }


def _weights_line(earlier: Mapping[str, Any], config: JobConfig, digest: str) -> Iterator[str]:
    before = earlier.get("weights_digest")
    if before != digest:
        pretrained = _at(earlier, "config", "model", "pretrained")
        yield (
            "the model's files (weights, configuration or tokenizer): "
            f"{_shown(pretrained)} ({_shown(before)}) before, "
            f"{_shown(config.model.pretrained)} ({_shown(digest)}) now"
        )


def _segmenter_line(earlier: Mapping[str, Any], config: JobConfig, digest: str | None) -> Iterator[str]:
    before = earlier.get("segmenter_digest")
    if before != digest:
        named = _at(earlier, "config", "masks", "segmenter")
        yield (
            f"the segmenter's files: {_shown(named)} ({_shown(before)}) before, "
            f"{_shown(config.masks.segmenter)} ({_shown(digest)}) now"
        )


def _maps_line(earlier: Mapping[str, Any], maps_hash: str | None) -> Iterator[str]:
    before = earlier.get("maps_hash")
    if None not in (before, maps_hash) and before != maps_hash:
        yield (
            "the stored maps (input.maps): made by the configuration "
            f"{_shown(before)} before, {_shown(maps_hash)} now"
        )


def _at(document: Any, *keys: str) -> Any:
    for key in keys:
        document = document.get(key) if isinstance(document, Mapping) else None
    return document


def _changed_key_lines(earlier: Any, config: JobConfig) -> Iterator[str]:
    try:
        before = JobConfig.model_validate(earlier)
    except RecursionError:
        yield "the earlier configuration, which cannot be read: it is nested too deeply"
        return
    except ValidationError as error:
        keys = dict.fromkeys(".".join(str(part) for part in problem["loc"][:2]) for problem in error.errors())
        yield f"the earlier configuration, which this version cannot read: {_shown(list(keys))}"
        return
    raw_before, raw_now = _flat(before.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    counted_before, counted_now = row_keys(before), row_keys(config)
    for key in raw_now:
        means_another = counted_before.get(key, _NOT_COUNTED) != counted_now.get(key, _NOT_COUNTED)
        if means_another and raw_before[key] != raw_now[key]:
            yield f"{key}: {_change(raw_before[key], raw_now[key])}"


def _change(before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list) and len(_json(before) + _json(now)) > 80:
        pairs = zip(before, now, strict=False)
        place = next(
            (place for place, (old, new) in enumerate(pairs) if old != new), min(len(before), len(now))
        )
        old, new = (_shown(items[place]) if place < len(items) else "none" for items in (before, now))
        return f"{len(before)} entries before, {len(now)} now; entry {place + 1}: {old} before, {new} now"
    return f"{_shown(before)} before, {_shown(now)} now"


def _shown(value: Any) -> str:
    """Return a value as it may be printed: short, printable, without credentials."""
    try:
        text = storage.shown_url(value) if isinstance(value, str) else _json(value)
    except ValueError:
        # an invalid URL, of which nobody knows what is secret
        text = "a value that cannot be shown"
    text = printable(text)
    return text if len(text) <= MAX_VALUE_CHARACTERS else f"{text[: MAX_VALUE_CHARACTERS - 1]}…"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _classes(config: JobConfig) -> tuple[ClassEntry, ...] | None:
    """Return the classes; None if there are none, or if their file has not been read yet."""
    found = config.prompts.classes
    return found if isinstance(found, tuple) else None


def _by_classes(config: JobConfig) -> bool:
    return config.prompts.source == "classes"


def _some_class(config: JobConfig, has: Callable[[ClassEntry], object]) -> bool:
    classes = _classes(config)
    return _by_classes(config) and (classes is None or any(has(entry) for entry in classes))


def backgrounds_act(config: JobConfig) -> bool:
    """Return whether there are background texts, and anything that they change.

    Where maps are stored, theirs are stored too, so that masks can be made from them by other settings.
    """
    masks = config.masks
    acts = masks.combine == "argmax" or config.contrast_share > 0 or masks.min_lead not in (None, -2)
    return (acts or config.output.heatmap) and bool(_background(config))


def _background(config: JobConfig) -> str | list[str]:
    listed = config.prompts.background
    if isinstance(listed, str):
        return "" if listed == "none" else listed
    return list(dict.fromkeys(listed))


def _backgrounds_are_chosen(config: JobConfig) -> bool:
    listed = _background(config)
    return backgrounds_act(config) and (
        isinstance(listed, str) or len(listed) > config.prompts.max_background
    )


def _has_several_prompts(config: JobConfig) -> bool:
    """Return whether an image may have more than one prompt."""
    if config.prompts.source == "caption" or config.prompts.max_per_sample == 1:
        return False
    classes = _classes(config)
    return classes is None or len(classes) > 1


def _contrasts(config: JobConfig) -> bool:
    by_prompts = config.masks.contrast_with == "all" and _has_several_prompts(config)
    return config.contrast_share > 0 and (by_prompts or bool(_background(config)))


def _limits_leads(config: JobConfig) -> bool:
    """Return whether a prompt may fall short of `masks.min_lead`; no lead is below -2."""
    return config.masks.min_lead not in (None, -2) and (
        bool(_background(config)) or _has_several_prompts(config)
    )


def _prompts_are_chosen(config: JobConfig) -> bool:
    if config.prompts.source == "caption":
        return False
    classes = _classes(config)
    return classes is None or len(classes) > config.prompts.max_per_sample


def _tiles(config: JobConfig) -> bool:
    # a single window is the whole image
    return config.model.fit == "tile" and config.views.max_tiles > 1


def _rule_reads(key: str) -> Callable[[JobConfig], bool]:
    return lambda config: key in RULE_KEYS[config.masks.rule]


def _refines(config: JobConfig) -> bool:
    return config.masks.refine != "none"


def _class_rows(config: JobConfig) -> Any:
    """Return what of each class changes the rows."""
    classes, prompts = _classes(config), config.prompts
    if classes is None:
        return prompts.classes
    is_looked_for = prompts.mentioned_in is not None or backgrounds_act(config)
    unused = set() if is_looked_for else {"plurals"}
    if not (is_looked_for or prompts.embed_synonyms):
        unused.add("synonyms")
    return [entry.model_dump(mode="json", exclude=unused) for entry in classes]


def _acting_marks(config: JobConfig) -> Any:
    """Return the marks that decide which prompts are kept, in any order the same."""
    marks, keep = config.prompts.marks, config.prompts.keep_marked
    if not isinstance(marks, tuple):
        return marks
    acting = marks_of(marks, keep).acting.values()
    return sorted([*entry.row, entry.prompt or ""] for entry in acting)


def _marks_act(config: JobConfig) -> bool:
    marks = config.prompts.marks
    return marks is not None and (config.prompts.keep_marked == "good" or bool(_acting_marks(config)))


def _unit_sharpness(config: JobConfig) -> float:
    own = config.masks.refine_sharpness
    return PUBLISHED_SHARPNESS[config.masks.refine] if own is None else own


def _image_size(config: JobConfig) -> list[int] | None:
    size = config.model.image_size
    return [size, size] if isinstance(size, int) else size and list(size)


def _field(spec: str | None) -> str | None:
    """Return a field's name as samples are searched for it: the case of extensions does not matter."""
    extensions, colon, name = (spec or "").partition(":")
    return extensions.lower() + colon + name or None


# when a key does something; keys that are not here always do
_ACTS_IF: Mapping[str, Callable[[JobConfig], bool]] = {
    "input.maps": lambda config: config.input.maps is not None,
    "input.caption": lambda config: not _by_classes(config),
    "model.affinity": lambda config: config.model.affinity != "none",
    "views.tile_zoom": _tiles,
    "views.tile_overlap": _tiles,
    "views.max_tiles": _tiles,
    "prompts.max_per_sample": _prompts_are_chosen,
    "prompts.classes": _by_classes,
    "prompts.mentioned_in": _by_classes,
    "prompts.templates": lambda config: (
        not _by_classes(config)
        or backgrounds_act(config)
        # distances between texts are stored with the maps
        or config.output.heatmap
        or _contrasts(config)
        or _some_class(config, lambda entry: not entry.templates)
    ),
    "prompts.embed_synonyms": lambda config: _some_class(config, lambda entry: entry.synonyms),
    "prompts.background": backgrounds_act,
    "prompts.max_background": _backgrounds_are_chosen,
    "prompts.neutral_threshold": lambda config: config.prompts.neutral is not None,
    "prompts.marks": _marks_act,
    "prompts.keep_marked": _marks_act,
    **{f"masks.{key}": _rule_reads(key) for keys in RULE_KEYS.values() for key in keys},
    "masks.contrast": _contrasts,
    "masks.contrast_with": lambda config: _contrasts(config) and _has_several_prompts(config),
    "masks.min_lead": _limits_leads,
    "masks.instances": lambda config: config.masks.has_instances,
    "masks.min_peak_drop": lambda config: config.masks.has_instances or config.masks.segmenter is not None,
    "masks.segmenter_min_iou": lambda config: config.masks.segmenter is not None,
    "masks.refine_iterations": _refines,
    "masks.refine_dilations": _refines,
    "masks.refine_sharpness": _refines,
}

# the value that counts, where several mean the same
_MEANING: Mapping[str, Callable[[JobConfig], Any]] = {
    # which maps they are is said by the hash of the configuration that made them
    "input.maps": lambda _: STORED_MAPS,
    "input.image": lambda config: config.input.image.lower(),
    "input.caption": lambda config: _field(config.input.caption),
    "model.image_size": _image_size,
    "model.fit": lambda config: (
        "stretch" if config.model.fit == "tile" and not _tiles(config) else config.model.fit
    ),
    "prompts.classes": _class_rows,
    "prompts.mentioned_in": lambda config: _field(config.prompts.mentioned_in),
    "prompts.background": _background,
    "prompts.marks": _acting_marks,
    "masks.contrast": lambda config: config.contrast_share,
    "masks.refine_sharpness": _unit_sharpness,
    # nothing falls short of these
    "masks.min_similarity": lambda config: (
        None if config.masks.min_similarity == -1 else config.masks.min_similarity
    ),
    "masks.min_peak": lambda config: config.masks.min_peak or None,
    "masks.min_foreground_contrast": lambda config: config.masks.min_foreground_contrast or None,
    "masks.min_area": lambda config: config.masks.min_area or None,
    "output.rows": lambda config: config.rows_written,
    # earlier versions stored fewer bits, and nothing of background texts
    "output.heatmap": lambda config: STORED_MAPS if config.output.heatmap else False,
}
