"""Read COCO's records one by one; count and name those that are malformed, dangling or repeated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.datasets.truth_dataset import SkippedRecords, unique_names

Record = Mapping[str, Any]
Read = TypeVar("Read")


@dataclass(frozen=True)
class ImageRecord:
    """The record of an image file.

    Attributes:
        image_id: the smallest id, if several records name the file.
        height, width: in pixels.
        doubt: why it is not clear which objects belong to the image; empty if it is.
    """

    image_id: int
    height: int
    width: int
    doubt: str = ""


@dataclass(frozen=True)
class CocoRecords:
    """The records of the two files.

    Attributes:
        images: by file name, in the order of their ids.
        objects: annotations by image id.
        sentences: captions by image id, oldest first.
        class_ids: by category id.
        class_names: names of class ids 1, 2 and so on.
    """

    images: dict[str, ImageRecord]
    objects: dict[int, list[Record]]
    sentences: dict[int, list[str]]
    class_ids: dict[int, int]
    class_names: tuple[str, ...]


def read_records(instances: Any, captions: Any, skipped: SkippedRecords) -> CocoRecords:
    """Group the records of the two files by image.

    Args:
        instances: content of instances_*.json.
        captions: content of captions_*.json.
        skipped: collects the records that belong to no image.

    Raises:
        ValueError: they do not have COCO's layout; the error names what was expected and what was found.
    """
    class_ids, class_names = _categories(_listed(instances, "categories"))
    images = _images(_listed(instances, "images"), skipped)
    known = {image.image_id for image in images.values() if not image.doubt}
    objects: dict[int, list[Record]] = defaultdict(list)
    for image_id, annotation in _annotations(_listed(instances, "annotations"), known, skipped):
        objects[image_id].append(annotation)
    sentences: dict[int, list[str]] = defaultdict(list)
    for image_id, sentence in _captions(_listed(captions, "annotations"), known, skipped):
        sentences[image_id].append(sentence)
    return CocoRecords(images, objects, sentences, class_ids, class_names)


def whole_number(record: Record, name: str) -> int:
    """Return a field that holds a whole number; raise ValueError, naming what it holds, otherwise."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"expected a whole number as {name}, found {_shown(record, name)}")
    return int(value)


def _listed(document: Any, name: str) -> list[Any]:
    if not isinstance(document, dict):
        raise ValueError(f"expected a JSON object with a list {name!r}, found a {type(document).__name__}")
    if not isinstance(document.get(name), list):
        raise ValueError(f"expected a list {name!r}, found {_shown(document, name)}")
    listed: list[Any] = document[name]
    return listed


def _categories(records: list[Any]) -> tuple[dict[int, int], tuple[str, ...]]:
    # class ids are ranks among all categories, so none may be skipped
    named = [(whole_number(_object(record), "id"), _text(record, "name")) for record in records]
    named.sort()
    ids = [identity for identity, _ in named]
    if repeated := sorted(identity for identity, count in Counter(ids).items() if count > 1):
        raise ValueError(f"expected categories of different ids, found {repeated[0]} more than once")
    if not named:
        raise ValueError("expected categories, found none")
    names = unique_names([name for _, name in named], [str(identity) for identity in ids])
    return {identity: rank for rank, identity in enumerate(ids, 1)}, names


def _images(records: list[Any], skipped: SkippedRecords) -> dict[str, ImageRecord]:
    def read(record: Record) -> tuple[int, str, int, int]:
        height, width = whole_number(record, "height"), whole_number(record, "width")
        if height < 1 or width < 1:
            raise ValueError(f"expected sides of at least one pixel, found {width} x {height}")
        return whole_number(record, "id"), _text(record, "file_name"), height, width

    names_of_id: dict[int, set[str]] = defaultdict(set)
    ids_of_name: dict[str, set[int]] = defaultdict(set)
    sides: dict[str, tuple[int, int]] = {}
    for image_id, name, height, width in _each(records, read, "images_malformed", skipped):
        if image_id in ids_of_name[name] and sides[name] == (height, width):
            skipped.add("images_listed_twice", f"image {image_id}, {name}")
        names_of_id[image_id].add(name)
        ids_of_name[name].add(image_id)
        sides[name] = (height, width)
    return {
        name: ImageRecord(min(ids_of_name[name]), *sides[name], _doubt(ids_of_name[name], names_of_id))
        for name in sorted(ids_of_name, key=lambda name: (min(ids_of_name[name]), name))
    }


def _doubt(ids: set[int], names_of_id: Mapping[int, set[str]]) -> str:
    if len(ids) > 1:
        return f"{len(ids)} images have this file name, with the ids {', '.join(map(str, sorted(ids)[:5]))}"
    (image_id,) = ids
    names = sorted(names_of_id[image_id])
    return (
        f"{len(names)} images have the id {image_id}: {', '.join(names[:3]):.200}" if len(names) > 1 else ""
    )


def _annotations(
    records: list[Any], known: set[int], skipped: SkippedRecords
) -> Iterator[tuple[int, Record]]:
    def read(record: Record) -> tuple[int, Record]:
        return whole_number(record, "image_id"), record

    first_of_id: dict[int, Record] = {}
    for image_id, record in _each(records, read, "annotations_malformed", skipped):
        identity = record.get("id")
        first = first_of_id.setdefault(identity, record) if isinstance(identity, int) else record
        if image_id not in known:
            name = f"annotation {identity!r:.40} of image {image_id}"
            skipped.add("annotations_of_unknown_or_ambiguous_image", name)
        elif first is not record and first == record:
            skipped.add("annotations_listed_twice", f"annotation {identity!r:.40} of image {image_id}")
        else:
            yield image_id, record


def _captions(records: list[Any], known: set[int], skipped: SkippedRecords) -> list[tuple[int, str]]:
    def read(record: Record) -> tuple[int, int, str]:
        sentence = _text(record, "caption").strip()
        if not sentence:
            raise ValueError("expected a caption, found only white space")
        return whole_number(record, "id"), whole_number(record, "image_id"), sentence

    kept: dict[tuple[int, int, str], None] = {}
    for found in _each(records, read, "captions_malformed", skipped):
        name = f"caption {found[0]} of image {found[1]}"
        if found[1] not in known:
            skipped.add("captions_of_unknown_or_ambiguous_image", name)
        elif found in kept:
            skipped.add("captions_listed_twice", name)
        else:
            kept[found] = None
    return [(image_id, sentence) for _, image_id, sentence in sorted(kept, key=lambda found: found[0])]


def _each(
    records: Iterable[Any], read: Callable[[Record], Read], kind: str, skipped: SkippedRecords
) -> Iterator[Read]:
    """Yield what is read from each record; count those that cannot be read, with their place in the list."""
    for place, record in enumerate(records):
        try:
            found = read(_object(record))
        except RecursionError:
            skipped.add(kind, f"record {place}: is nested too deeply")
        except (ValueError, OverflowError) as error:
            identity = record.get("id") if isinstance(record, dict) else None
            skipped.add(kind, f"record {place} (id {identity!r:.40}): {error}")
        else:
            yield found


def _object(record: Any) -> Record:
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {record!r:.40}")
    return record


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected a text as {name}, found {_shown(record, name)}")
    return value


def _shown(record: Record, name: str) -> str:
    if name not in record:
        return "none"
    return "null" if record[name] is None else f"{record[name]!r:.60}"
