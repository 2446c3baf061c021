"""Sprites and background photos: fetched with npm, read from the packages' archives, cached as arrays.

Sprites are images with alpha, so every scene composed of them has exact masks, and their code points name
them. The packages' licences are in pipeline/demo/README.md.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.demo.making.concepts import CONCEPTS, DISTRACTOR_CODES, FIRST_STUFF_ID, STUFF
from pipeline.demo.making.icons import FXEMOJI_NAMES, read_icons
from pipeline.demo.making.textures import draw_bank

Photo = np.ndarray
Sprite = np.ndarray


@dataclass(frozen=True)
class Artist:
    """A set of sprites: the npm package, and the place of the sprites in it.

    A package of vector drawings has their names by code point instead of a folder and a suffix.
    """

    package: str
    version: str
    folder: str = ""
    suffix: str = ""
    icon_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def archive_name(self) -> str:
        """The file name of the archive that `npm pack` writes."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


TRAIN_ARTISTS: dict[str, Artist] = {
    "fluent": Artist("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/", ".webp"),
    "noto": Artist("emoji-datasource-google", "16.0.0", "package/img/google/64/", ".png"),
    "noto-2017": Artist("emoji-datasource-google", "3.0.0", "package/img/google/64/", ".png"),
    "emojione": Artist("emojione", "2.2.7", "package/assets/png_128x128/", ".png"),
}
UNSEEN_ARTISTS: dict[str, Artist] = {
    "twemoji": Artist("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/", ".png"),
}
THIRD_ARTISTS: dict[str, Artist] = {
    "fxemoji": Artist("@iconify-json/fxemoji", "1.2.2", icon_names=FXEMOJI_NAMES),
}

# scikit-image's bundled photos whose statement is CC0, public domain or "no known copyright restrictions",
# and which show none of the named concepts. What is evaluated on is never trained on.
TRAIN_PHOTOS = ("brick", "grass", "gravel", "coins", "hubble_deep_field", "immunohistochemistry", "retina")
# In scenes of the training that show stuff, these are stuff of the named class; they have no name otherwise.
STUFF_PHOTOS = {"grass": "grass", "brick": "wall", "gravel": "gravel"}
TEXTURES_PER_CLASS = 24
HELDOUT_PHOTOS = ("camera", "cell", "coffee")

# The photographer and his camera are cut away: "camera" is a named concept. Left, top, right, bottom in px.
_PHOTO_BOXES = {"camera": (352, 0, 512, 512)}
_MAX_PHOTO_SIDE = 384
_MAX_MEMBER_BYTES = 1 << 20


@dataclass(frozen=True)
class ArtBox:
    """The parts of scenes: sprites by (artist, code point), photos by name, textures of stuff by name.

    `stuff` has the names of textures by class id.
    """

    sprites: Mapping[tuple[str, str], Sprite]
    photos: Mapping[str, Photo]
    textures: Mapping[str, Photo] = field(default_factory=dict)
    stuff: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def pictures(self) -> dict[str, Photo]:
        """Photos and textures by name."""
        return {**self.photos, **self.textures}

    def artists_of(self, code: str) -> list[str]:
        """Return the artists who drew a code point, in a fixed order."""
        return sorted(artist for artist, drawn in self.sprites if drawn == code)


def wanted_codes() -> frozenset[str]:
    """Return the code points of every concept and every distractor."""
    return frozenset(code for concept in CONCEPTS for code in concept.codes) | frozenset(DISTRACTOR_CODES)


def load_art(cache_dir: Path, artists: Mapping[str, Artist], photo_names: Collection[str]) -> ArtBox:
    """Return sprites of the artists and the named photos; packages not in the cache are fetched with npm.

    Args:
        cache_dir: Folder for the packages' archives and the decoded sprites.
        artists: By the name that sprites are keyed with.
        photo_names: Names of functions in skimage.data.

    Returns:
        Sprites as RGBA uint8 [height, width, 4], cropped to what is visible; photos as RGB uint8.

    Raises:
        RuntimeError: npm is missing, or could not fetch a package.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    sprites = {
        (name, code): sprite
        for name, artist in artists.items()
        for code, sprite in _artist_sprites(cache_dir, name, artist).items()
    }
    return ArtBox(sprites, {name: _load_photo(name) for name in photo_names})


def with_stuff(art: ArtBox, *, per_class: int, seed: int, is_heldout: bool) -> ArtBox:
    """Return the art with textures of stuff; photos that show stuff become textures.

    Args:
        art: Sprites and photos.
        per_class: Number of drawn textures of each class.
        seed: Decides all textures.
        is_heldout: Draw textures in the way that no training sees.
    """
    class_ids = {stuff.name: class_id for class_id, stuff in enumerate(STUFF, start=FIRST_STUFF_ID)}
    textures, names = {}, dict[int, tuple[str, ...]]()
    for class_id, name, texture in draw_bank(per_class, seed, is_heldout=is_heldout):
        textures[name], names[class_id] = texture, (*names.get(class_id, ()), name)
    for photo in STUFF_PHOTOS.keys() & art.photos.keys():
        class_id = class_ids[STUFF_PHOTOS[photo]]
        # As often as a quarter of the drawn ones.
        textures[photo] = art.photos[photo]
        names[class_id] += (photo,) * max(1, per_class // 4)
    photos = {name: photo for name, photo in art.photos.items() if name not in STUFF_PHOTOS}
    return replace(art, photos=photos, textures=textures, stuff=names)


def _artist_sprites(cache_dir: Path, name: str, artist: Artist) -> dict[str, Sprite]:
    decoded_path = cache_dir / f"{name}-{artist.version}.npz"
    if decoded_path.exists():
        with np.load(decoded_path, allow_pickle=False) as stored:
            return {code: stored[code] for code in sorted(stored.files)}
    archive = _fetch(cache_dir, artist)
    if artist.icon_names:
        drawn = read_icons(archive, artist.icon_names, wanted_codes())
        sprites = {code: _crop_to_visible(pixels) for code, pixels in drawn}
    else:
        sprites = dict(sorted(read_sprites(archive, artist, wanted_codes())))
    np.savez(decoded_path, **sprites)  # type: ignore[arg-type]
    return sprites


def _fetch(cache_dir: Path, artist: Artist) -> Path:
    archive = cache_dir / artist.archive_name
    if archive.exists():
        return archive
    command = ["npm", "pack", "--silent", f"{artist.package}@{artist.version}"]
    try:
        subprocess.run(command, cwd=cache_dir, check=True, capture_output=True, text=True)  # noqa: S603
    except FileNotFoundError as error:
        raise RuntimeError("npm is needed to fetch the sprites; it was not found") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)} failed: {error.stderr.strip()[-500:]}") from error
    if not archive.exists():
        raise RuntimeError(f"{' '.join(command)} left no {archive.name} in {cache_dir}")
    return archive


def read_sprites(archive: Path, artist: Artist, codes: Collection[str]) -> Iterator[tuple[str, Sprite]]:
    """Return the wanted sprites of a package, decoded from its archive; nothing is extracted to disk.

    Args:
        archive: A gzipped tar, as `npm pack` writes it.
        artist: Whose folder and suffix the sprites have.
        codes: Code points without fe0f.

    Yields:
        Code point and RGBA uint8 [height, width, 4], cropped to what is visible.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            is_sprite = member.name.startswith(artist.folder) and member.name.endswith(artist.suffix)
            if not (is_sprite and member.isfile() and member.size <= _MAX_MEMBER_BYTES):
                continue
            code = member.name[len(artist.folder) : -len(artist.suffix)].lower().replace("-fe0f", "")
            stream = tar.extractfile(member) if code in codes else None
            if stream is not None:
                with Image.open(io.BytesIO(stream.read()), formats=("PNG", "WEBP")) as image:
                    yield code, _crop_to_visible(np.asarray(image.convert("RGBA")))


def _crop_to_visible(pixels: Sprite) -> Sprite:
    rows = np.flatnonzero((pixels[..., 3] > 8).any(axis=1))
    columns = np.flatnonzero((pixels[..., 3] > 8).any(axis=0))
    return np.ascontiguousarray(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _load_photo(name: str) -> Photo:
    from skimage import data

    image = Image.fromarray(getattr(data, name)()).convert("RGB")
    if name in _PHOTO_BOXES:
        image = image.crop(_PHOTO_BOXES[name])
    image.thumbnail((_MAX_PHOTO_SIDE, _MAX_PHOTO_SIDE))
    return np.asarray(image)
