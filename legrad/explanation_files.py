"""Write explanations of many images to a folder, and read them again.

The folder is complete once `manifest.json` is there, which is written last. Files are named by positions of
images and texts. Reading runs no code: JSON, arrays without pickled objects, and PNG.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from legrad.arguments import as_path
from legrad.errors import InputError
from legrad.explanations import ExplainedImage, Explanations, png_bytes

if TYPE_CHECKING:
    from legrad.heatmaps import Normalisation

FORMAT = "legrad explanations 1"
MANIFEST, GRIDS = "manifest.json", "grids.npz"
MAX_MANIFEST_BYTES = 2**28
MAX_PICTURE_PIXELS = 2**26
_OURS = re.compile(r"\d{5,}-image\.png|\d{5,}-\d{3,}-(heatmap|overlay)\.png|grids\.npz")
_HEADER_BYTES = 1024  # of an array in grids.npz


def save_explanations(
    explanations: Explanations,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool,
    pictures: bool,
    model_name: str,
) -> Path:
    """Write the files of `Explanations.save`, the manifest last.

    Args:
        explanations: of at least one image.
        folder: see `Explanations.save`.
        overwrite: see `Explanations.save`.
        pictures: see `Explanations.save`.
        model_name: see `Explanations.save`.

    Returns:
        The folder.

    Raises:
        InputError: the folder is not empty, or a file cannot be written.
    """
    target = as_path(folder, "folder")
    try:
        _clear(target, overwrite)
        files = {}
        for name, content in _contents(explanations, pictures):
            _publish(target / name, content)
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest = _manifest(explanations, files, model_name)
        _publish(target / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"folder: cannot write {target} ({error})") from error
    return target


def load_explanations(folder: str | os.PathLike[str]) -> Explanations:
    """Read what `save_explanations` wrote.

    Args:
        folder: see `Explanations.load`.

    Raises:
        InputError: the folder is not complete, or a file is damaged.
    """
    source = as_path(folder, "folder")
    manifest = _read_manifest(source)
    try:
        for name, facts in manifest["files"].items():
            _check_size(source, name, facts)
        arrays = _read_arrays(source, manifest)
        images = tuple(
            _loaded_image(source, manifest, position, arrays) for position in range(len(manifest["images"]))
        )
        normalisation: Normalisation = "grid" if manifest["normalisation"] == "grid" else "upsampled"
        return Explanations(images, normalisation, dict(manifest["made_by"]))
    except InputError:
        raise
    except Exception as error:  # what the pieces of a damaged file raise is of many types
        raise InputError(f"folder: {source} is damaged ({type(error).__name__}: {error})") from error


def _clear(target: Path, overwrite: bool) -> None:
    """Make the folder, without files of an earlier save; raise an InputError if it has files to keep."""
    target.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in target.iterdir())
    if present and not overwrite:
        raise InputError(
            f"folder: {target} is not empty ({len(present)} entries, such as {present[0]!r}); choose a new "
            "folder, or pass overwrite=True"
        )
    # the manifest first: without it, no file that is left counts
    for name in [MANIFEST, *filter(_OURS.fullmatch, present)]:
        (target / name).unlink(missing_ok=True)


def _contents(explanations: Explanations, pictures: bool) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each file but the manifest, made one at a time."""
    arrays: dict[str, Any] = {}
    for position, image in enumerate(explanations.images):
        arrays[f"grids_{position:05d}"] = image.grids.numpy()
        arrays[f"similarities_{position:05d}"] = image.similarities.numpy()
    sink = io.BytesIO()
    np.savez(sink, **arrays)
    yield GRIDS, sink.getvalue()
    for position, image in enumerate(explanations.images):
        yield _picture_name(position), png_bytes(image.picture)
        if pictures:
            yield from _maps_of_image(explanations, position)


def _maps_of_image(explanations: Explanations, position: int) -> Iterator[tuple[str, bytes]]:
    overlays = explanations.overlays(position)
    for number, (heatmap, over) in enumerate(zip(explanations.maps[position], overlays, strict=True)):
        stem = f"{position:05d}-{number:03d}"
        yield f"{stem}-heatmap.png", png_bytes(_as_grey(heatmap))
        yield f"{stem}-overlay.png", png_bytes(over)


def _picture_name(position: int) -> str:
    return f"{position:05d}-image.png"


def _as_grey(heatmap: Float[Tensor, "height width"]) -> Image.Image:
    return Image.fromarray((heatmap * 255).round().to(torch.uint8).contiguous().numpy())


def _publish(path: Path, content: bytes) -> None:
    """Write a file at once; a link of that name is replaced, never followed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as sink:
        sink.write(content)
    partial.replace(path)


def _manifest(
    explanations: Explanations, files: Mapping[str, Mapping[str, Any]], model_name: str
) -> dict[str, Any]:
    made_by = dict(explanations.made_by)
    if model_name:
        made_by["model"] = made_by.get("model", {}) | {"name": model_name}
    images = [
        {
            "name": image.name,
            "height": image.height,
            "width": image.width,
            "input_size": list(image.input_size),
            "grid_size": list(image.grids.shape[1:]),
            "texts": list(image.texts),
        }
        for image in explanations.images
    ]
    return {
        "format": FORMAT,
        "made_by": made_by,
        "normalisation": explanations.normalisation,
        "images": images,
        "files": files,
    }


def _read_manifest(source: Path) -> dict[str, Any]:
    path = source / MANIFEST
    if not path.is_file():
        raise InputError(
            f"folder: {source} has no {MANIFEST}: Explanations.save has not written it, or did not finish"
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise InputError(f"folder: {path} has more than {MAX_MANIFEST_BYTES} bytes")
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"folder: {path} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"folder: {path} is of another format, expected {FORMAT!r}")
    return manifest


def _check_size(source: Path, name: str, facts: Mapping[str, Any]) -> None:
    if not _OURS.fullmatch(name):
        raise InputError(f"folder: {source / MANIFEST} names a file {name!r:.80}, which save never writes")
    path = source / name
    if not path.is_file():
        raise InputError(f"folder: {path} is missing; the manifest lists it")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise InputError(f"folder: {path} has {size} bytes; the manifest says {facts['bytes']}")


def _verified(source: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    """Return the bytes of a file, which have the digest that the manifest names."""
    content = (source / name).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
        raise InputError(f"folder: {source / name} is damaged: its SHA-256 is not the manifest's")
    return content


def _read_arrays(source: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the arrays of all images, whose shapes are those of the manifest."""
    content = io.BytesIO(_verified(source, manifest, GRIDS))
    shapes = {}
    for position, image in enumerate(manifest["images"]):
        texts = len(image["texts"])
        shapes[f"grids_{position:05d}"] = (texts, *image["grid_size"])
        shapes[f"similarities_{position:05d}"] = (texts,)
    with zipfile.ZipFile(content) as archive:
        for name, shape in shapes.items():
            # checked before decompression
            if archive.getinfo(f"{name}.npy").file_size > 4 * int(np.prod(shape)) + _HEADER_BYTES:
                raise InputError(f"folder: {source / GRIDS}: {name} is larger than its shape {list(shape)}")
    with np.load(content, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in shapes}
    for name, array in arrays.items():
        if array.shape != shapes[name] or array.dtype != np.float32:
            raise InputError(
                f"folder: {source / GRIDS}: {name}: expected float32 {list(shapes[name])}, "
                f"received {array.dtype} {list(array.shape)}"
            )
    return arrays


def _loaded_image(
    source: Path, manifest: Mapping[str, Any], position: int, arrays: Mapping[str, np.ndarray]
) -> ExplainedImage:
    facts = manifest["images"][position]
    content = _verified(source, manifest, _picture_name(position))
    with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise InputError(f"folder: {source / _picture_name(position)} has too many pixels")
        rgb = picture.convert("RGB")
    input_height, input_width = map(int, facts["input_size"])
    return ExplainedImage(
        str(facts["name"]),
        int(facts["height"]),
        int(facts["width"]),
        (input_height, input_width),
        tuple(map(str, facts["texts"])),
        torch.from_numpy(arrays[f"grids_{position:05d}"]),
        torch.from_numpy(arrays[f"similarities_{position:05d}"]),
        rgb,
    )
