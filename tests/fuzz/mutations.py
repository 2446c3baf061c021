"""Damage done to good inputs: to bytes, texts and JSON trees, at random places that follow from a seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Sequence
from typing import Any

NUMBERS = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"\xff" * 8,
)
MOST_BYTES = 1 << 16
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**53, 2**64, 10**400, -(2**63), 0.5, -1.5, 1e308),
    *(float("nan"), float("inf"), -float("inf"), "", "a", "x" * 5000, "\0", "\x1b[2J", "\u202e", "\ud800"),
    *(
        "../../etc/passwd",
        "/etc/passwd",
        "1",
        "nan",
        "true",
        [],
        [[]],
        {},
        {"a": 1},
        [1, 2],
        [None],
        {"": {}},
    ),
    *([[[[[[[[0]]]]]]]], list(range(2000))),
)


def mutated(rng: random.Random, data: bytes, tokens: Sequence[bytes] = NUMBERS) -> bytes:
    """The data with one to four changes."""
    for _ in range(rng.randint(1, 4)):
        data = _changed(rng, data, tokens)[:MOST_BYTES]
    return data


def _changed(rng: random.Random, data: bytes, tokens: Sequence[bytes]) -> bytes:
    start = rng.randint(0, len(data))
    stop = min(len(data), start + rng.choice((1, 2, 4, 16, 100, 512, 1024)))
    token = rng.choice(tokens)
    match rng.randrange(8):
        case 0 if start < len(data):
            return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
        case 1:
            return data[:start] + token + data[start + len(token) :]
        case 2:
            return data[:start] + token + data[start:]
        case 3:
            return data[:start] + data[stop:]
        case 4:
            return data[:start]
        case 5:
            return data[:start] + data[start:stop] * rng.choice((2, 3, 50)) + data[stop:]
        case 6:
            return data[:start] + rng.randbytes(stop - start) + data[stop:]
    return data[:start] + bytes(stop - start) + data[stop:]


def mutated_text(rng: random.Random, text: str, tokens: Sequence[str]) -> bytes:
    """The text with changes among which are the words of its language; may be no UTF-8."""
    return mutated(rng, text.encode(), [token.encode() for token in tokens])


def mutated_tree(rng: random.Random, document: Any) -> Any:
    """A JSON document of which one to three values are others, gone, or there twice."""
    changed = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3)):
        _change_place(rng, changed)
    return changed


def _change_place(rng: random.Random, tree: Any) -> None:
    while True:
        if not isinstance(tree, dict | list) or not tree:
            return
        place = rng.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        if isinstance(tree[place], dict | list) and tree[place] and rng.random() < 0.8:
            tree = tree[place]
            continue
        match rng.randrange(4):
            case 0:
                del tree[place]
            case 1 if isinstance(tree, list):
                tree.append(copy.deepcopy(tree[place]))
            case 2 if isinstance(tree, dict):
                tree[rng.choice(("", "extra", "\x1b", "id"))] = copy.deepcopy(rng.choice(VALUES))
            case _:
                tree[place] = copy.deepcopy(rng.choice(VALUES))
        return


def as_json(document: Any) -> bytes:
    """JSON as others may write it, with NaN, and half of surrogate pairs spelled out."""
    return json.dumps(document).encode()


def with_other_chunk(rng: random.Random, png: bytes) -> bytes:
    """A PNG of which one chunk is another, with the checksum that it should have."""
    from tests.helpers.pictures import png_chunk

    chunks, place = [], 8
    while place + 12 <= len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        chunks.append((png[place + 4 : place + 8], png[place + 8 : place + 8 + length]))
        place += 12 + length
    chosen = rng.randrange(len(chunks))
    kind, content = chunks[chosen]
    chunks[chosen] = (kind, mutated(rng, content))
    return png[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)
