"""Shards with one fault each, and what must become of their samples. No two images or captions are alike."""

import bz2
import gzip
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.helpers.corpus import image_bytes
from tests.helpers.pictures import png_chunk

BLOCK = 512
END = bytes(2 * BLOCK)
KEYS = "abcdef"


@dataclass(frozen=True)
class Fault:
    """A shard, and what must become of it.

    Attributes:
        make: the shard's bytes.
        annotated: keys of the samples that have rows.
        failed: (key, kind) of the samples that have error rows alone, in order.
        lost: keys that no row names, since the archive ends before.
        shard_errors: kinds of the errors that belong to no sample.
        samples_in: how many samples were put in.
    """

    make: Callable[[], bytes]
    annotated: tuple[str, ...] = tuple(KEYS)
    failed: tuple[tuple[str, str], ...] = ()
    lost: tuple[str, ...] = ()
    shard_errors: tuple[str, ...] = ()
    samples_in: int = len(KEYS)


def image_height(key: str) -> int:
    """Rows of a sample's image, by which a row shows which image it was made from."""
    return 40 + ord(key.rpartition("/")[2][0]) - ord("a")


def caption(key: str) -> str:
    """A sample's caption."""
    return f"a dog named {key}"


def image(key: str, file_format: str = "JPEG") -> bytes:
    """A sample's image."""
    height = image_height(key)
    return image_bytes(height, height, 64, file_format)


def header(name: str, size: int, **attributes) -> bytes:
    """A GNU header as given."""
    info = tarfile.TarInfo(name)
    info.size = size
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def member(name: str, content: bytes, **attributes) -> bytes:
    """A header and its body, filled up to whole blocks."""
    return header(name, len(content), **attributes) + content + bytes(-len(content) % BLOCK)


def pair(key: str, **fields: bytes) -> bytes:
    """A sample of image and caption; given fields take the place of its own, underscores are dots."""
    members = {"jpg": image(key), "txt": caption(key).encode()} | fields
    return b"".join(member(f"{key}.{name.replace('_', '.')}", content) for name, content in members.items())


def good(keys: str) -> bytes:
    """Samples without fault."""
    return b"".join(pair(key) for key in keys)


def pax(name: bytes) -> bytes:
    """A PAX header that names the next member, whatever the name."""
    record = b" path=" + name + b"\n"
    length = len(record) + 1
    while len(str(length)) + len(record) != length:
        length += 1
    return member("pax", str(length).encode() + record, type=tarfile.XHDTYPE)


def with_bad(**fields: bytes | Callable[[], bytes]) -> Callable[[], bytes]:
    """The good samples, of which c has other fields than its own."""

    def make() -> bytes:
        made = {name: content() if callable(content) else content for name, content in fields.items()}
        return good("ab") + pair("c", **made) + good("def") + END

    return make


def with_names(names: Mapping[str, str]) -> Callable[[], bytes]:
    """The good samples, some with their keys spelled otherwise."""
    return lambda: (
        b"".join(
            member(f"{names.get(key, key)}.{extension}", content)
            for key in KEYS
            for extension, content in (("jpg", image(key)), ("txt", caption(key).encode()))
        )
        + END
    )


def by_tarfile(prefix: str, tar_format: int) -> Callable[[], bytes]:
    """The good samples in long folders, written by the standard library."""

    def make() -> bytes:
        sink = io.BytesIO()
        with tarfile.open(fileobj=sink, mode="w", format=tar_format) as tar:
            for key in KEYS:
                for extension, content in (("jpg", image(key)), ("txt", caption(key).encode())):
                    info = tarfile.TarInfo(f"{prefix}{key}.{extension}")
                    info.size, info.mtime = len(content), 1.5
                    tar.addfile(info, io.BytesIO(content))
        return sink.getvalue()

    return make


def cut(*, after: str, into_next: int = 0) -> bytes:
    """The good samples up to the end of one member, and some bytes of the next."""
    whole = good(KEYS)
    start = whole.index(header(after, len(_content(after))))
    stop = start + len(member(after, _content(after)))
    return whole[: stop + into_next]


def _content(name: str) -> bytes:
    key, _, extension = name.partition(".")
    return image(key) if extension == "jpg" else caption(key).encode()


def corrupt_header_of(name: str) -> bytes:
    """The good samples, with one header whose checksum does not fit."""
    whole = good(KEYS)
    start = whole.index(header(name, len(_content(name))))
    return whole[: start + 130] + b"\x55" + whole[start + 131 :] + END


class LeavesATrace:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def harmful_pickle(trace: Path) -> bytes:
    """What would make a file if anybody unpickled it."""
    return pickle.dumps(LeavesATrace(trace))


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""
    ihdr = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + png_chunk(b"IDAT", zlib.compress(bytes(10_000)))


def png_with_texts(count: int) -> bytes:
    """A PNG beside whose pixels a megabyte of text swells, so many times."""
    whole = image("c", "PNG")
    return whole[:33] + png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 1))) * count + whole[33:]


def flipped(data: bytes, position: int) -> bytes:
    """One bit is another."""
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def zero_tail(data: bytes, count: int) -> bytes:
    """So many zeros in place of the last bytes."""
    return data[:-count] + bytes(count)


def with_hole(data: bytes, start: int, count: int) -> bytes:
    """So many zeros somewhere in the middle."""
    return data[:start] + bytes(count) + data[start + count :]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG that refines its pixels again and again."""
    sink = io.BytesIO()
    Image.new("L", (64, image_height("c"))).save(sink, "JPEG", progressive=True)
    data = sink.getvalue()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def animation() -> bytes:
    """A GIF of three frames."""
    frames = [Image.new("L", (64, 42), shade) for shade in (0, 100, 200)]
    sink = io.BytesIO()
    frames[0].save(sink, "GIF", save_all=True, append_images=frames[1:])
    return sink.getvalue()


def odd(mode: str, file_format: str) -> bytes:
    """The image of c in another mode."""
    picture = Image.open(io.BytesIO(image("c")))
    converted = Image.new(mode, picture.size, 3000) if mode == "I;16" else picture.convert(mode)
    sink = io.BytesIO()
    converted.save(sink, file_format)
    return sink.getvalue()


def c_fails(kind: str) -> dict[str, tuple]:
    """What becomes of the good samples around a bad c."""
    return {"annotated": tuple("abdef"), "failed": (("c", kind),)}


def nothing_is_read(kind: str) -> dict[str, tuple]:
    """What becomes of a shard that cannot be read at all."""
    return {"annotated": (), "lost": tuple(KEYS), "shard_errors": (kind,)}


LINKS = {
    "a symbolic link to a file of ours": (tarfile.SYMTYPE, "link"),
    "a hard link": (tarfile.LNKTYPE, "link"),
    "a character device": (tarfile.CHRTYPE, "special_file"),
    "a block device": (tarfile.BLKTYPE, "special_file"),
    "a named pipe": (tarfile.FIFOTYPE, "special_file"),
    "a sparse file": (tarfile.GNUTYPE_SPARSE, "sparse"),
}
NAMES = {
    "an absolute name": ("/etc/c", "unsafe_name"),
    "a name that leaves its folder": ("../../c", "unsafe_name"),
    "a name with .. in the middle": ("x/../c", "unsafe_name"),
    "a name with control characters": ("x\x1b[2J\r/c", "unsafe_name"),
    "a name that turns the writing direction": ("x\u202e/c", "unsafe_name"),
    "a name that is not UTF-8": ("caf\udce9/c", "name_not_utf8"),
}
NO_IMAGES = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
    "PSD": b"8BPS\x00\x01" + bytes(6) + struct.pack(">HIIHH", 3, 10, 10, 8, 3) + bytes(200),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "PDF": b"%PDF-1.4\n1 0 obj <</Type/Catalog>> endobj",
    "HTML": b"<!doctype html><script>1</script>",
    "TIFF": b"II*\x00\x08\x00\x00\x00" + bytes(100),
    "a tar": END,
}

TAR_FAULTS = {
    "none": Fault(lambda: good(KEYS) + END),
    "tar cut between two samples": Fault(
        lambda: cut(after="c.txt"), tuple("abc"), lost=tuple("def"), shard_errors=("truncated",)
    ),
    "tar cut at a member boundary within a sample": Fault(
        lambda: cut(after="d.jpg"),
        tuple("abc"),
        (("d", "missing_field"),),
        lost=tuple("ef"),
        shard_errors=("truncated",),
    ),
    "tar cut inside a header": Fault(
        lambda: cut(after="d.jpg", into_next=100),
        tuple("abc"),
        (("d", "missing_field"),),
        lost=tuple("ef"),
        shard_errors=("truncated",),
    ),
    "tar cut inside a caption": Fault(
        lambda: cut(after="d.jpg", into_next=BLOCK + 5),
        tuple("abc"),
        (("d", "truncated"),),
        lost=tuple("ef"),
        shard_errors=("truncated",),
    ),
    "tar cut inside an image": Fault(
        lambda: cut(after="c.txt", into_next=BLOCK + 300),
        tuple("abc"),
        (("d", "truncated"),),
        lost=tuple("ef"),
        shard_errors=("truncated",),
    ),
    "tar cut in the blocks that mark its end": Fault(
        lambda: good(KEYS) + bytes(BLOCK), shard_errors=("truncated",)
    ),
    "corrupt header of an image": Fault(
        lambda: corrupt_header_of("d.jpg"), tuple("abc"), lost=tuple("def"), shard_errors=("corrupt_header",)
    ),
    "corrupt header of a caption": Fault(
        lambda: corrupt_header_of("d.txt"),
        tuple("abc"),
        (("d", "missing_field"),),
        lost=tuple("ef"),
        shard_errors=("corrupt_header",),
    ),
    "zero bytes": Fault(lambda: b"", **nothing_is_read("zero_bytes")),
    "not a tar": Fault(lambda: b"\xff\xd8\xff" + bytes(range(256)) * 20, **nothing_is_read("not_a_tar")),
    "gzip": Fault(lambda: gzip.compress(good(KEYS) + END)),
    "gzip cut in its check sum": Fault(
        lambda: gzip.compress(good(KEYS) + END)[:-6], shard_errors=("truncated",)
    ),
    "a gzip of a thousand times its size": Fault(
        lambda: gzip.compress(bytes(2**27)), **nothing_is_read("expands_too_much")
    ),
    "bzip2": Fault(lambda: bz2.compress(good(KEYS) + END), **nothing_is_read("compressed")),
    "a second archive behind the end": Fault(
        lambda: good("abc") + END + good("def") + END,
        tuple("abc"),
        lost=tuple("def"),
        shard_errors=("data_after_end",),
    ),
    "members out of order": Fault(
        lambda: (
            b"".join(member(f"{key}.jpg", image(key)) for key in "ab")
            + b"".join(member(f"{key}.txt", caption(key).encode()) for key in "ab")
            + good("cdef")
            + END
        ),
        tuple("cdef"),
        (("a", "missing_field"), ("b", "missing_field")),
        shard_errors=("members_apart",),
    ),
    "a sample whose caption is behind all others": Fault(
        lambda: (
            member("a.jpg", image("a"))
            + b"".join(
                member(f"{key}.txt", caption(key).encode()) + member(f"{key}.jpg", image(key))
                for key in "bcdef"
            )
            + member("a.txt", caption("a").encode())
            + END
        ),
        tuple("bcdef"),
        (("a", "missing_field"),),
        shard_errors=("members_apart",),
    ),
    "the same key twice, side by side": Fault(
        lambda: (
            good("abc")
            + member("c.jpg", image("f"))
            + member("c.txt", caption("f").encode())
            + good("def")
            + END
        ),
        **c_fails("duplicate_field"),
    ),
    "the same key twice, far apart": Fault(
        lambda: good("abc") + good("def") + member("c.jpg", image("f")) + END,
        failed=(("c", "duplicate_key"),),
        samples_in=7,
    ),
    "several dots in names": Fault(
        lambda: good("ab") + pair("c", v2_jpg=image("f"), old_txt=b"wrong", seg_png=b"") + good("def") + END
    ),
    "upper-case extensions": Fault(
        lambda: (
            good("ab")
            + member("c.JPG", image("c"))
            + member("c.Txt", caption("c").encode())
            + good("def")
            + END
        )
    ),
    "the same names in two folders": Fault(
        with_names({"b": "x/a", "c": "y/a", "d": "v1.5/z/a"}),
        ("a", "x/a", "y/a", "v1.5/z/a", "e", "f"),
    ),
    **{
        what: Fault(
            lambda kind=kind: (
                good("ab")
                + header("c.jpg", 0, type=kind, linkname="/etc/passwd")
                + member("c.txt", caption("c").encode())
                + good("def")
                + END
            ),
            **c_fails(error),
        )
        for what, (kind, error) in LINKS.items()
    },
    **{
        what: Fault(
            with_names({"c": name}),
            tuple("abdef"),
            ((name, error),),
        )
        for what, (name, error) in NAMES.items()
    },
    "a name with a NUL": Fault(
        lambda: (
            good("ab")
            + pax(b"c\0c.jpg")
            + member("x", image("c"))
            + pax(b"c\0c.txt")
            + member("x", b"a dog")
            + good("def")
            + END
        ),
        tuple("abdef"),
        (("c\0c", "unsafe_name"),),
    ),
    "long names, PAX": Fault(
        by_tarfile("n" * 200 + "/", tarfile.PAX_FORMAT), tuple("n" * 200 + f"/{key}" for key in KEYS)
    ),
    "long names, GNU": Fault(
        by_tarfile("n" * 200 + "/", tarfile.GNU_FORMAT), tuple("n" * 200 + f"/{key}" for key in KEYS)
    ),
    "accented names, PAX": Fault(
        by_tarfile("\u00e9\u72ac/", tarfile.PAX_FORMAT), tuple(f"\u00e9\u72ac/{key}" for key in KEYS)
    ),
    "a PAX header of a gigabyte": Fault(
        lambda: good("abc") + header("pax", 2**30, type=tarfile.XHDTYPE) + good("def") + END,
        tuple("abc"),
        lost=tuple("def"),
        shard_errors=("corrupt_header",),
    ),
    "a member of a terabyte": Fault(
        lambda: good("ab") + header("c.jpg", 2**40) + pair("c") + good("def") + END,
        tuple("ab"),
        (("c", "member_too_large"),),
        lost=tuple("def"),
        shard_errors=("truncated",),
    ),
    "a member over input.max_member_bytes": Fault(
        with_bad(jpg=image("c") + bytes(2**22)), **c_fails("member_too_large")
    ),
    "a file without extension within a sample": Fault(
        lambda: (
            good("ab")
            + member("c.jpg", image("c"))
            + member("README", b"hello")
            + member("c.txt", caption("c").encode())
            + good("def")
            + END
        ),
        shard_errors=("no_key",),
    ),
}

IMAGE_FAULTS = {
    **{
        f"{what} named .jpg": Fault(with_bad(jpg=data), **c_fails("format_not_allowed"))
        for what, data in NO_IMAGES.items()
    },
    "no image": Fault(
        lambda: good("ab") + member("c.txt", b"a dog") + good("def") + END, **c_fails("missing_field")
    ),
    "an image of no bytes": Fault(with_bad(jpg=b""), **c_fails("empty")),
    "an image cut in half": Fault(with_bad(jpg=image("c")[:400]), **c_fails("truncated")),
    "a magic number with rubbish behind it": Fault(
        with_bad(jpg=b"\xff\xd8\xff" + bytes(range(200))), **c_fails("unreadable")
    ),
    "a PNG of 10^10 pixels": Fault(with_bad(jpg=png_claiming(10**5, 10**5)), **c_fails("too_many_pixels")),
    "a PNG of one row of 10^8 pixels": Fault(
        with_bad(jpg=png_claiming(10**8, 1)), **c_fails("side_too_long")
    ),
    "a PNG with 100 texts that swell": Fault(with_bad(jpg=lambda: png_with_texts(100))),
    "a PNG without its end": Fault(with_bad(jpg=lambda: image("c", "PNG")[:-12]), **c_fails("truncated")),
    "a PNG with a wrong checksum": Fault(
        with_bad(jpg=lambda: flipped(image("c", "PNG"), 60)), **c_fails("corrupt")
    ),
    "a JPEG without its end mark": Fault(with_bad(jpg=image("c")[:-2]), **c_fails("truncated")),
    "a JPEG with zeros in place of its end": Fault(
        with_bad(jpg=zero_tail(image("c"), 100)), **c_fails("truncated")
    ),
    "a JPEG with a hole": Fault(with_bad(jpg=with_hole(image("c"), 700, 80)), **c_fails("corrupt")),
    "a WebP with zeros in place of its end": Fault(
        with_bad(jpg=lambda: zero_tail(image("c", "WEBP"), 60)), **c_fails("corrupt")
    ),
    "a WebP shorter than it says": Fault(
        with_bad(jpg=lambda: image("c", "WEBP")[:-2]), **c_fails("truncated")
    ),
    "a BMP shorter than it says": Fault(with_bad(jpg=lambda: image("c", "BMP")[:-2]), **c_fails("truncated")),
    "a JPEG of 5000 scans": Fault(with_bad(jpg=lambda: jpeg_with_scans(5000)), **c_fails("too_many_parts")),
    "a JPEG of 300,000 comments": Fault(
        with_bad(jpg=b"\xff\xd8" + b"\xff\xfe\0\2" * 300_000 + image("c")[2:]), **c_fails("too_many_parts")
    ),
    "an animation": Fault(with_bad(jpg=animation), **c_fails("animated")),
    "CMYK": Fault(with_bad(jpg=lambda: odd("CMYK", "JPEG"))),
    "grey of 16 bits": Fault(with_bad(jpg=lambda: odd("I;16", "PNG"))),
    "a palette": Fault(with_bad(jpg=lambda: odd("P", "PNG"))),
    "alpha": Fault(with_bad(jpg=lambda: odd("RGBA", "PNG"))),
    "a PNG named .jpg": Fault(with_bad(jpg=lambda: image("c", "PNG"))),
}

CAPTION_FAULTS = {
    "no caption": Fault(
        lambda: good("ab") + member("c.jpg", image("c")) + good("def") + END, **c_fails("missing_field")
    ),
    "an empty caption": Fault(with_bad(txt=b" \n"), **c_fails("empty")),
    "a caption that is not UTF-8": Fault(with_bad(txt=b"caf\xe9"), **c_fails("not_utf8")),
    "half a surrogate pair": Fault(with_bad(txt=b"\xed\xa0\xbd"), **c_fails("not_utf8")),
    "a caption of a megabyte": Fault(with_bad(txt=b"a dog " * 170_000), **c_fails("too_long")),
    "a caption of 16,000 letters in a row": Fault(with_bad(txt=b"x" * 16_000), **c_fails("too_long")),
    "a caption longer than the context": Fault(with_bad(txt=b"a dog named c" + b" dog" * 2000)),
    "a caption of control characters": Fault(with_bad(txt=b"a dog named c\0\x1b[2J")),
}


def with_json(document: bytes) -> Callable[[], bytes]:
    """The good samples with captions in JSON, of which c has a document of its own."""

    def make() -> bytes:
        documents = {key: b'{"caption": "%s"}' % caption(key).encode() for key in KEYS} | {"c": document}
        return b"".join(pair(key, json=documents[key]) for key in KEYS) + END

    return make


JSON_FAULTS = {
    "JSON of 2,000,000 nested lists": Fault(with_json(b"[" * 2_000_000), **c_fails("not_json")),
    "JSON of 100,000 nested objects": Fault(with_json(b'{"a":' * 100_000), **c_fails("not_json")),
    "JSON of 5 MiB": Fault(with_json(b'{"caption": "x"' + b" " * 5 * 2**20 + b"}"), **c_fails("too_long")),
    "a number of 4,000,000 digits": Fault(
        with_json(b'{"caption": ' + b"9" * 4_000_000 + b"}"), **c_fails("wrong_type")
    ),
    "JSON cut short": Fault(with_json(b'{"caption": "a d'), **c_fails("not_json")),
    "JSON without the key": Fault(with_json(b"{}"), **c_fails("missing_key")),
    "half a surrogate pair in JSON": Fault(with_json(b'{"caption": "\\ud83d"}'), **c_fails("not_utf8")),
}
