"""YAML of people and of other hosts: plain values, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from pipeline.errors import UserError

# sections, lists and mappings within each other; a configuration has five
MAX_DEPTH = 16


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that holds texts, numbers, lists and mappings of texts.

    Args:
        text: the document; whoever reads it bounds its length.
        where: named in errors.

    Raises:
        UserError: it is no YAML; or has aliases, which a few lines multiply to billions of values, a key
            twice or a key that is no text, or is nested more than MAX_DEPTH deep.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML: {error}") from None
    # a number or date that Python cannot hold
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: is not valid YAML: a value cannot be read: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that neither repeats nor overwrites anything."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            message = "aliases (*name) are not read; write the value out"
            raise _refused(message, event)
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            is_text = isinstance(key, ScalarNode) and key.tag == "tag:yaml.org,2002:str"
            if not is_text:
                shown = key.value if isinstance(key, ScalarNode) else key.id
                message = f"expected a text as key, got {shown[:40]!r}; a text in quotes is one"
                raise _refused(message, key)
            if key.value in seen:
                raise _refused(f"the key {key.value[:40]!r} stands twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _refused(what: str, where: Any) -> ConstructorError:
    return ConstructorError(None, None, what, where.start_mark)
