"""What images with captions have in common, wherever they come from: the members of their samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.datasets.conversion import Members
from pipeline.datasets.truth_dataset import MAX_IMAGE_PIXELS
from pipeline.errors import SampleFailure
from pipeline.shards.captions import MAX_CAPTIONS, MAX_JSON_BYTES, check_caption
from pipeline.shards.images import image_format

# those that `input.image` reads by default; formats are recognised by content whatever their field
FIELDS_BY_FORMAT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "png", "GIF": "png"}
CAPTION, CAPTIONS, FILE_NAME = "caption", "captions", "file_name"

Scalar = str | int | float | bool | None


def sample_members(
    image: bytes, captions: Sequence[object] | None, columns: Mapping[str, Scalar], file_name: str | None
) -> Members:
    """Return the members of a sample: the image, its captions as text and JSON.

    Args:
        image: the image's file, which becomes a member as it is.
        captions: what the owner has as captions; None: the images have none.
        columns: further values for the JSON; one named like a key of it gets an underscore at its end.
        file_name: the owner's name of the image.

    Raises:
        SampleFailure: the headers of the image are not those of an image that is read; or of stage
            `caption`, kind `no_caption` or `caption_` and a kind of `check_caption`.
    """
    field = FIELDS_BY_FORMAT[image_format(image, max_image_pixels=MAX_IMAGE_PIXELS)]
    document: dict[str, object] = {} if file_name is None else {FILE_NAME: file_name}
    members = {field: image}
    if captions is not None:
        document[CAPTION] = caption = _first_caption(captions)
        members["txt"] = caption.encode()
        document[CAPTIONS] = list(captions)
    for name, value in columns.items():
        document[_free_name(name, document)] = _json_value(value)
    members["json"] = json.dumps(document).encode()
    if len(members["json"]) > MAX_JSON_BYTES:
        message = f"the row has {len(members['json'])} bytes as JSON; the limit is {MAX_JSON_BYTES}"
        raise SampleFailure("read", "row_too_large", message)
    return members


def _first_caption(captions: Sequence[object]) -> str:
    """Return the first caption that can be used; an element of several is checked again when it is read."""
    if len(captions) > MAX_CAPTIONS:
        message = f"the image has {len(captions)} captions; the limit is {MAX_CAPTIONS}"
        raise SampleFailure("caption", "caption_too_many", message)
    failure = SampleFailure("caption", "empty", "the image has no caption")
    for index, caption in enumerate(captions):
        try:
            return check_caption(caption)
        except SampleFailure as error:
            failure = error if not index else failure
    is_missing = failure.kind == "empty" or captions[0] is None
    kind = "no_caption" if is_missing else f"caption_{failure.kind}"
    raise SampleFailure("caption", kind, failure.message)


def _free_name(name: str, document: Mapping[str, object]) -> str:
    while name in (CAPTION, CAPTIONS, FILE_NAME) or name in document:
        name += "_"
    return name


def _json_value(value: Any) -> Scalar:
    # JSON has neither infinity nor NaN
    return None if isinstance(value, float) and not math.isfinite(value) else value
