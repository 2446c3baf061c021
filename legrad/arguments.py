"""Convert texts, images, indices and sizes from what callers pass to what the method computes with.

A notebook holds texts in Series and arrays, and images as files and arrays. What means one thing is
converted; everything else is an InputError that names the argument, the position in it, and what to pass.
"""

import math
import operator
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from legrad.errors import ImageFileError, InputError
from legrad.image_files.levels import as_8_bits
from legrad.image_files.opener import open_image

# An image, the path of its file, or its pixels; see `as_image`.
ImageInput: TypeAlias = Image.Image | str | os.PathLike[str] | np.ndarray

MAX_FILE_BYTES = 256 << 20
MAX_IMAGE_PIXELS = 100_000_000
_CHANNELS = (1, 3, 4)
_IMAGE_FORMS = "a PIL image, a path, or a uint8 array [height, width, 3]"


def as_texts(texts: Any, where: str = "texts", *, numbers_too: bool = False) -> list[str]:
    """Return texts from a list, tuple, Series, array or generator, in order.

    Args:
        texts: of the caller.
        where: name of the argument; messages begin with it.
        numbers_too: also take whole numbers, such as the indices of classes; they become their digits.

    Raises:
        InputError: a single text, no ordered collection, or an element that is no text.
    """
    if isinstance(texts, str):
        raise InputError(f"{where}: expected a list of texts, received the text {texts!r}; pass [{texts!r}]")
    listed = list(elements(texts, where, "texts"))
    if numbers_too:
        listed = [str(operator.index(each)) if _is_whole(each) else each for each in listed]
    for position, text in enumerate(listed):
        place = f"{where}[{position}]"
        if isinstance(text, bytes):
            raise InputError(f"{place}: expected a text (str), received bytes; decode them first")
        if not isinstance(text, str):
            raise InputError(f"{place}: expected a text (str), received {shown(text)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{place}: expected Unicode text, received the surrogate {text[error.start]!r} at character "
                f"{error.start}"
            ) from None
    return [str(text) for text in listed]


def _is_whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not (value.is_floating_point() or value.is_complex())
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def each_image(images: Any, where: str = "images") -> Iterator[Image.Image]:
    """Yield the images of a list, array, Series or generator, one after the other, as `as_image` does."""
    for position, image in enumerate(each_of_images(images, where)):
        yield as_image(image, f"{where}[{position}]")


def each_of_images(images: Any, where: str = "images") -> Iterable[Any]:
    """Return what a list, array, Series or generator of images iterates over, not yet decoded.

    Raises:
        InputError: a tensor, one image, or no ordered collection.
    """
    if isinstance(images, Tensor):
        raise InputError(
            f"{where}: expected a list of images, received a tensor {list(images.shape)}; `encode` takes "
            f"preprocessed tensors, and `preprocess` takes {_IMAGE_FORMS}"
        )
    is_one_array = isinstance(images, np.ndarray) and images.ndim in (2, 3) and images.dtype != object
    if isinstance(images, str | os.PathLike | Image.Image) or is_one_array:
        raise InputError(f"{where}: expected a list of images, received one image; pass [image]")
    return elements(images, where, "images")


def as_image(image: Any, where: str = "image") -> Image.Image:
    """Return an image, decoded, of 8 bits a channel.

    A file is decoded upright, by its EXIF data, if it is a JPEG, PNG, WebP, BMP or GIF of one frame and at
    most 100 million pixels. A PIL image is taken as it is. Grey of more than 8 bits is scaled to 8 bits.

    Args:
        image: a PIL image, the path of a file, or an array: uint8 or uint16 [height, width], uint8 [height,
            width, channels] with 1, 3 (RGB) or 4 (RGBA) channels.
        where: name of the argument; messages begin with it.

    Raises:
        ImageFileError: a file holds no image that is read.
        InputError: another object, an image without pixels, or one that cannot be decoded.
    """
    if isinstance(image, str | os.PathLike):
        return _opened(Path(image), where)
    if isinstance(image, np.ndarray):
        return _of_array(image, where)
    if not isinstance(image, Image.Image):
        raise InputError(f"{where}: expected {_IMAGE_FORMS}, received {_as_no_image(image)}")
    if not image.width or not image.height:
        raise InputError(f"{where}: expected pixels, received an image of {image.width} x {image.height}")
    try:
        image.load()
    except Exception as error:  # decoders raise almost any type; a closed file an AttributeError
        raise InputError(
            f"{where}: the image cannot be decoded ({type(error).__name__}: {error}); was its file closed or "
            "cut? Pass its path instead"
        ) from error
    return _of_8_bits(image, where)


def as_index(image_index: Any) -> Tensor | None:
    """Return an index of images as a tensor; lists, arrays and Series of whole numbers are converted.

    Raises:
        InputError: the index is no collection of whole numbers.
    """
    if image_index is None or isinstance(image_index, Tensor):
        return image_index
    rows = elements(image_index, "image_index", "rows of images, one for each prompt")
    try:
        array = np.asarray(list(rows))
    except ValueError as error:  # lists of several lengths
        raise InputError(f"image_index: expected whole numbers, received {shown(image_index)}") from error
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"image_index: expected whole numbers, received {shown(image_index)}")
    return torch.from_numpy(array.astype(np.int64))


def check_rows_of_images(image_index: Tensor, batch: int) -> None:
    """Raise an InputError unless an index holds whole numbers that name images of a batch.

    Args:
        image_index: for each prompt or class the row of its image.
        batch: number of images.
    """
    if image_index.is_floating_point() or image_index.is_complex() or image_index.dtype == torch.bool:
        raise InputError(f"image_index: expected an integer dtype, received {image_index.dtype}")
    if not len(image_index):
        return
    lowest, highest = (int(extreme) for extreme in image_index.aminmax())
    if lowest < 0 or highest >= batch:
        raise InputError(f"image_index: expected rows from 0 to {batch - 1}, received {lowest} to {highest}")


def as_path(path: Any, where: str) -> Path:
    """Return a path; raise an InputError for what is none."""
    try:
        return Path(path)
    except TypeError:
        raise InputError(f"{where}: expected a path, received {shown(path)}") from None


def as_model_name(name: Any) -> str:
    """Return the name of a model, or the path of its folder, as text; raise an InputError for others."""
    if not isinstance(name, str | os.PathLike):
        raise InputError(f"name: expected the name of a model, received {shown(name)}")
    return name if isinstance(name, str) else str(Path(name).absolute())


def sides_of(size: Any, where: str) -> tuple[int, int]:
    """Return (height, width) in pixels from two numbers, or from one number for both.

    Raises:
        InputError: the size is something else, or a side is below 1.
    """
    given = tuple(size) if isinstance(size, list | tuple) else (size, size)
    try:
        if any(isinstance(side, bool) for side in given):
            raise TypeError
        height, width = map(operator.index, given)
    except (TypeError, ValueError):
        raise InputError(
            f"{where}: expected (height, width) or one number for both, in whole pixels, received {size!r}"
        ) from None
    if height < 1 or width < 1:
        raise InputError(f"{where}: expected at least 1 x 1 pixels, received {height} x {width}")
    return height, width


def as_output_sizes(output_size: Any, images: int) -> tuple[int, int] | list[tuple[int, int]] | None:
    """Return one (height, width) for all images, or one for each.

    Args:
        output_size: see `legrad.LeGrad.heatmaps`.
        images: number of images.

    Raises:
        InputError: a size is invalid, or their number is not that of the images.
    """
    if output_size is None:
        return None
    if isinstance(output_size, str) or not hasattr(output_size, "__iter__"):
        return sides_of(output_size, "output_size")
    given = list(output_size)
    if len(given) == 2 and not any(hasattr(side, "__len__") for side in given):
        return sides_of(given, "output_size")
    if len(given) != images:
        raise InputError(
            f"output_size: expected one (height, width), or one for each of {images} images, "
            f"received {len(given)}"
        )
    return [sides_of(size, f"output_size[{position}]") for position, size in enumerate(given)]


def check_share(value: Any, where: str) -> float:
    """Return a number from 0 to 1; raise an InputError for anything else."""
    try:
        number = float(value) if not isinstance(value, str | bytes | bool) else math.nan
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        number = math.nan
    if not 0 <= number <= 1:
        raise InputError(f"{where}: expected a value from 0 to 1, received {value!r}")
    return number


def check_budget(memory_budget_bytes: Any) -> int | None:
    """Return a positive number of bytes, or None; raise an InputError for anything else."""
    if memory_budget_bytes is None:
        return None
    is_whole = isinstance(memory_budget_bytes, int | np.integer) and not isinstance(memory_budget_bytes, bool)
    if not is_whole or memory_budget_bytes < 1:
        raise InputError(
            "memory_budget_bytes: expected a positive whole number of bytes, "
            f"received {memory_budget_bytes!r}"
        )
    return int(memory_budget_bytes)


def shown(value: Any) -> str:
    """Describe a value that is not what was expected, in a few words."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return str(value)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"a {type(value).__name__} {list(shape)}"
    plain = repr(value)
    return f"{plain if len(plain) <= 60 else plain[:57] + '...'} ({type(value).__name__})"


def kind_of(value: Any) -> str:
    """Describe what was passed in place of a tensor, in a few words."""
    if isinstance(value, list | tuple) and value:
        return f"a {type(value).__name__} of {len(value)} ({type(value[0]).__name__}, ...)"
    return shown(value)


def elements(values: Any, where: str, what: str) -> Iterable[Any]:
    """Return what an ordered collection of any kind iterates over."""
    kind = type(values).__name__
    if hasattr(values, "columns"):
        raise InputError(f"{where}: expected {what}, received a {kind}; pass one column")
    if isinstance(values, Mapping | Set | bytes | str):
        raise InputError(f"{where}: expected a list of {what}, received a {kind}")
    try:
        each: Iterable[Any] = iter(values)
    except TypeError:
        raise InputError(f"{where}: expected a list of {what}, received {shown(values)}") from None
    return each


def _as_no_image(value: Any) -> str:
    if isinstance(value, Tensor):
        return (
            f"a tensor {list(value.shape)} of {value.dtype}; pass preprocessed tensors to `encode`, or a "
            "uint8 tensor [3, height, width] as tensor.permute(1, 2, 0).cpu().numpy()"
        )
    if isinstance(value, bytes):
        return "bytes; pass PIL.Image.open(io.BytesIO(data))"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return shown(value)


def _opened(path: Path, where: str) -> Image.Image:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{where}: {path} is no regular file")
        if found.st_size > MAX_FILE_BYTES:
            raise InputError(f"{where}: {path} has {found.st_size} bytes; the limit is {MAX_FILE_BYTES}")
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = getattr(error, "strerror", None) or error
        hint = "; URLs are not opened, download the image first" if "://" in os.fspath(path) else ""
        raise InputError(f"{where}: cannot read {path} ({reason}){hint}") from error
    try:
        return open_image(data, max_image_pixels=MAX_IMAGE_PIXELS)
    except ImageFileError as error:
        raise ImageFileError(error.kind, f"{where}: {path}: {error}") from error


def _of_array(pixels: np.ndarray, where: str) -> Image.Image:
    shape = list(pixels.shape)
    if pixels.ndim == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS:
        raise InputError(
            f"{where}: expected [height, width, channels], received {shape}; pass array.transpose(1, 2, 0)"
        )
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and shape[2] not in _CHANNELS) or not pixels.size:
        raise InputError(
            f"{where}: expected pixels [height, width] or [height, width, 1, 3 or 4], "
            f"received an array {shape}"
        )
    is_grey = pixels.ndim == 2 or shape[2] == 1
    if pixels.dtype == np.uint8 or (pixels.dtype == np.uint16 and is_grey):
        grey_or_colour = pixels.reshape(shape[:2]) if is_grey else pixels
        return _of_8_bits(Image.fromarray(np.ascontiguousarray(grey_or_colour)), where)
    fix = "(255 * array).round()" if pixels.dtype.kind == "f" else "array"
    raise InputError(
        f"{where}: expected an array of uint8 (0 to 255; grey also uint16), "
        f"received {pixels.dtype}{_range(pixels)}; pass {fix}.astype(numpy.uint8) if that is its range"
    )


def _range(pixels: np.ndarray) -> str:
    return f" from {pixels.min():g} to {pixels.max():g}" if pixels.dtype.kind in "fiu" else ""


def _of_8_bits(image: Image.Image, where: str) -> Image.Image:
    try:
        return as_8_bits(image)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
