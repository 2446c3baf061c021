"""Find the table in a folder that holds its captions, where the user named none."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.corpus.folders import IMAGE_ENDINGS
from pipeline.datasets.caption_tables import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    TEXT_TABLE_ENDINGS,
    Values,
    header_advice,
    readings_of_table,
)
from pipeline.errors import UserError
from pipeline.text import printable

LOOKED_AT_ROWS = 20
NO_TABLE = "none"


@dataclass(frozen=True)
class UnnamedTable:
    """A table whose rows name images.

    Attributes:
        path: the file.
        root: the folder in which its rows name images.
        image_column: column with the names; None: the first line is a row, not the names of columns.
        caption_column: column that most likely holds the captions; None: no other column holds texts.
    """

    path: Path
    root: Path
    image_column: str | None
    caption_column: str | None

    def problem(self, root: Path) -> str:
        """Return why a folder is not converted without captions, and the two ways on.

        Args:
            root: the folder that the user named.
        """
        column = "" if self.image_column is None else f" (column {printable(self.image_column)})"
        found = f"{root}: no captions were named, and {self.path} names images{column}"
        without = f"or with --captions {NO_TABLE} to convert the images without captions"
        if self.root != root:
            command = shlex.join(["legrad", "shards", "images", str(self.root), "DEST", *self._options()])
            found += f" of the folder {self.root}; convert that folder: {command}; {without}"
        else:
            found += f"; run the same command with {shlex.join(self._options())}, {without}"
        return found if self.image_column is not None else f"{found}; {header_advice()}"

    def _options(self) -> list[str]:
        options = ["--captions", str(self.path)]
        if self.image_column not in (None, *IMAGE_COLUMNS):
            options += ["--image-column", printable(str(self.image_column))]
        if self.image_column is not None and self.caption_column not in CAPTION_COLUMNS:
            options += ["--caption-column", printable(self.caption_column or "NAME")]
        return options


def find_unnamed_table(tables: Sequence[Path], roots: Sequence[Path]) -> UnnamedTable | None:
    """Return the first table whose first rows name images; None where there is none.

    Args:
        tables: files that may be tables by the ends of their names.
        roots: folders in which rows may name images, the likeliest first.
    """
    return next((found for path in tables for found in _readings(path, roots)), None)


def _readings(path: Path, roots: Sequence[Path]) -> Iterator[UnnamedTable]:
    try:
        # a named pipe would never end
        for columns, rows in readings_of_table(path) if path.is_file() else ():
            looked_at = [row for row in islice(rows, LOOKED_AT_ROWS) if isinstance(row, dict)]
            for root in roots:
                found = _reading(path, root, columns, looked_at)
                if found is not None:
                    yield found
    # no table; what is one, and damaged, is an error when it is named
    except (UserError, OSError, ValueError, RecursionError):
        return


def _reading(path: Path, root: Path, columns: Sequence[str], rows: Sequence[Values]) -> UnnamedTable | None:
    names_image = _naming_images_of(root)
    if path.suffix.lower() in TEXT_TABLE_ENDINGS and any(map(names_image, columns)):
        return UnnamedTable(path, root, None, None)
    image = next((name for name in columns if any(names_image(row.get(name)) for row in rows)), None)
    if image is None:
        return None
    lengths = {name: sum(len(text) for row in rows for text in _texts(row.get(name))) for name in columns}
    others = [name for name in columns if name != image and lengths[name]]
    known = [name for name in CAPTION_COLUMNS if name in others]
    caption = next(iter(known or sorted(others, key=lambda name: -lengths[name])), None)
    return UnnamedTable(path, root, image, caption)


def _naming_images_of(root: Path) -> Callable[[object], bool]:
    def names_image(value: object) -> bool:
        if not isinstance(value, str) or posixpath.splitext(value.strip())[1].lower() not in IMAGE_ENDINGS:
            return False
        try:
            return (root / value.strip()).is_file()
        # a name that no file can have, or a longer one
        except (OSError, ValueError):
            return False

    return names_image


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str)]
