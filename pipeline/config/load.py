"""Load a job's configuration: YAML, keys set by ``section.key=value``, validation, and the config hash."""

from __future__ import annotations

import difflib
import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.config.row_keys import row_keys
from pipeline.config.schema import JobConfig
from pipeline.config.section import Section
from pipeline.config.yaml_text import parse_yaml
from pipeline.errors import UserError
from pipeline.text import printable, received

MAX_FILE_BYTES = 1 << 20
REPORTED_PROBLEMS = 20
# more than `received` shows
SHOWN_ITEMS = 10
URL_KEYS = ("input.shards", "input.maps", "output.dir", "prompts.classes", "prompts.marks")
RENAMED_KEYS = {
    "masks.min_contrast": "masks.min_foreground_contrast",
    "masks.refine_contrast": "masks.refine_sharpness",
}
SHOWN_OVERRIDE_CHARACTERS = 60


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> JobConfig:
    """Read and validate a job's YAML file.

    Args:
        path: the YAML file: a path, s3://, gs:// or http(s):// URL.
        overrides: ``section.key=value`` strings; values are parsed as YAML, and of several values of a key
            the last one counts.

    Returns:
        The validated configuration.

    Raises:
        UserError: the file cannot be read, is not YAML, or has an unknown key (the error names the nearest
            known one) or a wrong value.
    """
    where = storage.shown_url(str(path))
    if Path(path).is_dir():
        command = shlex.join(["legrad", "init", str(path), "--to", "job.yaml"])
        raise UserError(f"{where}: is a folder, not a configuration; for the shards in it: {command}")
    document = parse_yaml(storage.read_text(str(path), MAX_FILE_BYTES), where)
    if not isinstance(document, dict):
        raise UserError(
            f"{where}: expected a mapping with the sections input, model and output; got "
            f"{type(document).__name__}"
        )
    overrides = list(overrides)
    return parse_config(with_overrides(document, overrides), where=where, overrides=overrides)


def parse_config(
    document: Mapping[str, Any], *, where: str = "config", overrides: Sequence[str] = ()
) -> JobConfig:
    """Validate a configuration given as nested mappings.

    Args:
        document: section to key to value.
        where: names the document in errors.
        overrides: what the command line has set in it, as ``section.key=value``; errors name it as such.

    Raises:
        UserError: as `load_config`.
    """
    try:
        return JobConfig.model_validate(document)
    except ValidationError as error:
        problems = error.errors()
        overridden = {key: value for key, _, value in (text.partition("=") for text in overrides)}
        lines = list(dict.fromkeys(_problem_line(problem, overridden) for problem in problems))
        more = [f"  ... and {len(lines) - REPORTED_PROBLEMS} more"] if len(lines) > REPORTED_PROBLEMS else []
        heading = f"{_source_of(problems, where, overridden)}: {len(lines)} problem(s)"
        raise UserError("\n".join([heading, *lines[:REPORTED_PROBLEMS], *more])) from None
    except RecursionError:
        raise UserError(f"{storage.shown_url(where)}: is nested too deeply for a configuration") from None


def config_hash(
    config: JobConfig, weights_digest: str, segmenter_digest: str | None = None, maps_hash: str | None = None
) -> str:
    """Hash the keys that change the rows, and the digest of the weights.

    Args:
        config: the job's configuration, with the content of the files that it names.
        weights_digest: digest of the model's weights.
        segmenter_digest: digest of the segmenter's files; None: there is none.
        maps_hash: hash of the configuration that made the stored maps; None: a model makes them.

    Returns:
        16 hexadecimal digits.
    """
    relevant = {**row_keys(config), "weights": weights_digest}
    if segmenter_digest is not None:
        relevant["segmenter"] = segmenter_digest
    if maps_hash is not None:
        relevant["maps"] = maps_hash
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:16]


def with_overrides(document: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a configuration, given as nested mappings, with keys set by ``section.key=value`` strings.

    Raises:
        UserError: a string is no such pair, or its value is no YAML.
    """
    for override in overrides:
        document = _with_override(document, override)
    return document


def _with_override(document: dict[str, Any], override: str) -> dict[str, Any]:
    dotted_key, separator, text = override.partition("=")
    keys = dotted_key.split(".")
    if not separator or not all(keys) or len(keys) > 2:
        raise UserError(f"expected section.key=value, got {_shown(override)}")
    # @FILE, *.tar and {0..9}.tar are patterns of input.shards, and not YAML
    is_pattern = text.startswith(("@", "*", "{"))
    value = text if is_pattern else parse_yaml(text, f"{dotted_key}=...")
    return _set(document, keys, value)


def _shown(override: str) -> str:
    # the value may carry credentials
    key, separator, _ = override.partition("=")
    return received(f"{key}{separator}..." if separator else storage.shown_url(override))


def _set(document: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    if len(keys) == 1:
        return {**document, keys[0]: value}
    nested = document.get(keys[0]) or {}
    if not isinstance(nested, dict):
        raise UserError(f"{'.'.join(keys)}: the file has a value in place of the section {keys[0]}")
    return {**document, keys[0]: _set(nested, keys[1:], value)}


def _source_of(problems: Sequence[Any], where: str, overridden: Mapping[str, str]) -> str:
    """Return where all problems are: in the file, on the command line, or in what both give together."""
    shown = storage.shown_url(where)
    if all(_is_overridden(problem, overridden) for problem in problems):
        return "command line"
    # problems of several keys together have no location of a key
    is_of_both = bool(overridden) and any(len(_location(problem)) < 2 for problem in problems)
    return f"{shown} with the keys of the command line" if is_of_both else shown


def _location(problem: Any) -> list[str]:
    # deeper parts name alternatives of a type, not keys
    return [printable(str(part))[:80] for part in problem["loc"]][:2]


def _is_overridden(problem: Any, overridden: Mapping[str, str]) -> bool:
    location = _location(problem)
    if not location:
        return False
    # an unknown section is named without the key in it
    is_unknown_section = problem["type"] == "extra_forbidden" and len(location) == 1
    if is_unknown_section and any(key.startswith(f"{location[0]}.") for key in overridden):
        return True
    return location[0] in overridden or ".".join(location) in overridden


def _problem_line(problem: Any, overridden: Mapping[str, str]) -> str:
    location = _location(problem)
    dotted = ".".join(location) or "config"
    origin = " (from the command line)" if _is_overridden(problem, overridden) else ""
    shown_key = f"  {dotted}{_shown_value(dotted, overridden)}{origin}"
    if dotted in RENAMED_KEYS:
        return f"{shown_key}: this key is now called {RENAMED_KEYS[dotted]}"
    if problem["type"] == "extra_forbidden":
        return f"{shown_key}: unknown key{_suggestion(location)}"
    if problem["type"] == "missing":
        return f"{shown_key}: required, but missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"is a section; expected keys in it, as in {dotted}.KEY=VALUE"
    if len(location) < 2 and problem["type"] == "value_error":
        return f"  {message}"
    # URLs may carry credentials or signatures
    value = problem["input"]
    shown_value = type(value).__name__ if dotted in URL_KEYS else received(_without_secrets(value))
    return f"  {dotted}{origin}: {message[0].lower()}{message[1:]}, got {shown_value}"


def _shown_value(dotted: str, overridden: Mapping[str, str]) -> str:
    """Return the value that the command line has set, as it was typed, without secrets; else nothing."""
    text = storage.shown_text(storage.shown_url(overridden.get(dotted, "")))
    is_shown = dotted in overridden and dotted not in URL_KEYS and len(text) <= SHOWN_OVERRIDE_CHARACTERS
    return f"={printable(text)}" if is_shown else ""


def _without_secrets(value: Any) -> Any:
    # before the value is cut: a URL that ends in its password is not recognised as one with a password
    if isinstance(value, str):
        return storage.shown_text(value)
    if isinstance(value, list):
        return [_without_secrets(item) for item in value[:SHOWN_ITEMS]]
    if isinstance(value, dict):
        items = islice(value.items(), SHOWN_ITEMS)
        return {_without_secrets(key): _without_secrets(item) for key, item in items}
    return value


def _suggestion(location: Sequence[str]) -> str:
    known = known_keys()
    dotted = ".".join(location)
    candidates = [key for key in known if len(key.split(".")) == len(location)]
    nearest = difflib.get_close_matches(dotted, candidates, n=1) or difflib.get_close_matches(
        dotted, known, n=1
    )
    return f"; did you mean {nearest[0]}?" if nearest else f"; known: {', '.join(candidates)}"


def known_keys() -> list[str]:
    """Return the names of all sections, then of all keys, such as ``input.shards``."""
    sections = list(JobConfig.model_fields)
    nested = [
        f"{name}.{key}"
        for name, section in JobConfig.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for key in section.annotation.model_fields
    ]
    return sections + nested
