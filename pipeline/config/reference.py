"""Make the reference of all configuration keys from the configuration's own model.

``python -m pipeline.config.reference`` prints it; with the path of a Markdown page, it renews
the reference in that page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.schema import JobConfig

BEGIN = "<!-- keys: made by python -m pipeline.config.reference configs/README.md -->"
END = "<!-- end of keys -->"


def keys_as_markdown() -> str:
    """Return a table for each section: key, values, default, meaning."""
    schema = JobConfig.model_json_schema()
    sections = [
        _section(name, schema["$defs"][reference["$ref"].rpartition("/")[2]])
        for name, reference in schema["properties"].items()
    ]
    return "\n\n".join(sections)


def with_keys(page: str) -> str:
    """Return a page with the reference between its two marks renewed; raise ValueError if it has no marks."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN!r} and {END!r} in the page")
    return f"{before}{BEGIN}\n\n{keys_as_markdown()}\n\n{END}{after}"


def _section(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{name}.{key}` | {_values(field)} | {_default(key, field, required)} "
        f"| {_cell(field['description'])} |"
        for key, field in schema["properties"].items()
    ]
    head = ["| key | values | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"### {name}", "", schema["description"], "", *head, *rows])


def _values(field: Mapping[str, Any]) -> str:
    return " or ".join(dict.fromkeys(_alternatives(field)))


def _alternatives(field: Mapping[str, Any]) -> Iterator[str]:
    if "anyOf" in field:
        for alternative in field["anyOf"]:
            yield from _alternatives(alternative)
    elif "const" in field:
        yield f"`{field['const']}`"
    elif "enum" in field:
        yield from (f"`{value}`" for value in field["enum"])
    elif "$ref" in field:
        yield "mapping"
    elif field["type"] == "array":
        yield _array(field)
    else:
        yield field["type"] + _bounds(field)


def _array(field: Mapping[str, Any]) -> str:
    if "prefixItems" in field:
        return f"[{', '.join(_values(item) for item in field['prefixItems'])}]"
    return f"list of {_values(field['items'])}"


def _bounds(field: Mapping[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    return f" {', '.join(bounds)}" if bounds else ""


def _default(key: str, field: Mapping[str, Any], required: list[str]) -> str:
    if key in required:
        return "required"
    value = field["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Print the reference, or renew it in the page whose path is given."""
    if len(sys.argv) == 1:
        print(keys_as_markdown())
        return
    page = Path(sys.argv[1])
    page.write_text(with_keys(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
