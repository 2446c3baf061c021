"""Parse untrusted YAML: plain values only, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from pipeline.errors import UserError

# levels of sections, lists and mappings; a configuration has five
MAX_DEPTH = 16


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML that holds texts, numbers, lists and mappings of texts.

    Args:
        text: the document; the caller limits its length.
        where: names the document in errors.

    Raises:
        UserError: it is not YAML; or it has aliases (with which a few lines make billions of values), the
            same key twice, a key that is not a text, or more than MAX_DEPTH levels.
    """
    try:
        return yaml.load(text, _PlainLoader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: is not valid YAML: {_problem(error)}") from None
    # a number or date that Python cannot hold
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: is not valid YAML: a value cannot be read: {error}") from None


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases and repeated keys."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if isinstance(event, yaml.AliasEvent):
            message = "aliases (*name) are not supported; write the value out"
            raise _refused(message, event)
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            is_text = isinstance(key, ScalarNode) and key.tag == "tag:yaml.org,2002:str"
            if not is_text:
                shown = key.value if isinstance(key, ScalarNode) else key.id
                message = f"expected a text as key, got {shown[:40]!r}; put it in quotes"
                raise _refused(message, key)
            if key.value in seen:
                raise _refused(f"the key {key.value[:40]!r} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text around it, which may hold credentials."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error)
    what = " ".join(filter(None, (error.context, error.problem)))
    mark = error.problem_mark or error.context_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else what


def _refused(what: str, where: Any) -> ConstructorError:
    return ConstructorError(None, None, what, where.start_mark)
