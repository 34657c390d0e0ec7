"""Samples: what a source yields, and how a record becomes one.

A record is a dictionary {field: value}: an object of a JSON file, a row of a table, or the files of one stem.
words.py reads its captions and conversations; here are its image, and the errors of both.
"""
import base64
import contextlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import unquote, urlparse

from harmonkit.data.words import (
    NOT_UNICODE,
    decode,
    image_parts,
    is_conversation,
    is_missing,
    normalized,
    parse_json,
    words_of,
)
from harmonkit.images import open_image, reject_reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".heic",
                  ".heif", ".avif")
IMAGE_FIELDS = ("image", "images", "file_name", "filename", "file", "img", "image_path", "img_path",
                "image_file", "image_name", "filepath", "file_path", "path", "jpg", "jpeg", "png", "webp")
EMPTY = {"bytes": None, "path": None}                           # Hugging Face's for no image
LINK_FIELDS = ("url", "image_url", "coco_url")
BASE64 = re.compile(r"(/9j/|iVBORw0KGgo|UklGR|R0lGOD)[A-Za-z0-9+/=\s]{200,}")       # JPEG, PNG, WebP, GIF
JUNK = ("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin")


class SkipSample(Exception):
    """A sample that cannot be used. bad: the sample is broken; otherwise it is only outside the rules.

    The reason is counted, so names of files stand in the name. Both can be printed, whatever a disk holds.
    """

    def __init__(self, name, reason, bad=True):
        super().__init__(name, reason, bad)                     # pickle restores it from these
        self.name = printable(name)
        self.reason = printable(reason)
        self.bad = bad

    def __str__(self):
        return f"{self.name}: {self.reason}"


def printable(text) -> str:
    """A text with escapes for bytes that are not UTF-8, as names of files have them."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Sample:
    """The parts of a sample are functions, so that only the needed ones are read; None = no such part."""
    name: str                                                   # for messages
    image: Callable | None                                      # () -> PIL image; raises SkipSample
    caption: Callable | None = None                             # (rng) -> text
    turns: Callable | None = None                               # (rng) -> [(question, answer), …]
    label: int = -1                                             # class of the image, -1 = none
    dropped_system: int = 0                                     # system turns left out of `turns`
    fields: tuple = ()                                          # of its record, for messages
    origin: Callable | None = None                              # see ImageAt


@dataclass(frozen=True)
class ImageAt:
    """A sample's image, read when it is called, and where its bytes come from, which is found without them.

    origin: () -> (name, size, mtime_ns). name: as the data write it, so it stays when the data are moved; of
    bytes inside a record their CRC-32. size: bytes; -1 if the file is gone. mtime_ns: of the file on the disk
    that holds the bytes; 0 if there is none. It never raises.
    """
    read: Callable                                              # () -> PIL image; raises SkipSample
    origin: Callable

    def __call__(self):
        return self.read()


@contextlib.contextmanager
def skip_errors(name, file=None):
    """Errors in this block become SkipSample; of any type, because Pillow raises many for corrupt files.

    file: a path with which messages may begin; it goes from the reason to the name.
    """
    try:
        yield
    except SkipSample:
        raise
    except Exception as error:
        reason = reason_of(error)
        if file is not None and reason.startswith(f"{file}: "):
            reason = reason.removeprefix(f"{file}: ")
            name = name if name == str(file) else f"{name}: {file}"
        raise SkipSample(name, reason) from None


def reason_of(error) -> str:
    """An error as a reason that is the same for all samples with the same fault."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg})"
    if isinstance(error, KeyError):
        return f"no {error} in it"
    if isinstance(error, UnicodeError):
        return NOT_UNICODE
    if isinstance(error, OSError) and error.strerror:           # its own text has the file's name
        return error.strerror.lower()
    kind = "" if type(error) in (ValueError, FileNotFoundError) else f"{type(error).__name__}: "
    return f"{kind}{error}"


def is_junk(name) -> bool:
    """Whether a path inside a folder or an archive is no part of the data: `._x`, `__MACOSX/x`, `.x`."""
    parts = name.replace("\\", "/").split("/")
    return any(part.lower() in JUNK or part.startswith(".") for part in parts if part not in (".", ".."))


def sample_of(name, fields, image=None, *, text=None, label=-1) -> Sample:
    """The Sample of a record. Raises ValueError.

    image: () -> PIL image, from image_of or from the format; an ImageAt also says where it comes from.
    text: the field with the words (words.py).
    """
    if not isinstance(fields, dict):
        raise ValueError(f"an object with fields is expected, not {type(fields).__name__}")
    words = words_of(fields, text)
    names = tuple(map(str, fields))
    if image is None and not words.turns:
        raise ValueError(f"neither an image nor a conversation in it; its fields are {', '.join(names[:12])}")
    caption = partial(draw, words.captions) if words.captions else None
    turns = partial(all_turns, words.turns) if words.turns else None
    origin = getattr(image, "origin", None)
    return Sample(name, image, caption, turns, label, words.dropped_system, names, origin)


def fields_of_files(files) -> dict:
    """The record in files of one stem. files: {suffix: () -> bytes}; used are .json, .caption and .txt."""
    fields = {}
    if ".json" in files:
        fields = fields_of_json(parse_json(files[".json"]()))
    for suffix in (".caption", ".txt"):
        if suffix in files:
            fields[suffix] = decode(files[suffix]())
    if not fields and files:
        raise ValueError("its .json holds no object, caption or conversation")
    return fields


def fields_of_json(content) -> dict:
    """The record in a JSON file of one sample: an object, a caption, captions or a conversation."""
    if is_conversation(content):
        return {"conversations": content}
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        return content[0]
    if isinstance(content, dict):
        return dict(content)
    if isinstance(content, str) or (isinstance(content, list) and all(isinstance(c, str) for c in content)):
        return {"caption": content}
    return {}


def draw(captions, rng) -> str:
    """One of the captions. rng: random.Random, not used for a single caption."""
    return captions[0] if len(captions) == 1 else rng.choice(captions)


def all_turns(turns, rng) -> list:
    return list(turns)


# ---- images --------------------------------------------------------------------------------------------

def image_of(name, fields, *folders):
    """The ImageAt of a record, or None if it has no image. folders: where paths are looked for.

    Raises ValueError for several images.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"an object with fields is expected, not {type(fields).__name__}")
    fields = normalized(fields)
    value = image_field(fields)
    links = [fields[field] for field in LINK_FIELDS if str(fields.get(field)).startswith("http")]
    if value is None and links:
        value = links[0]
    if value is None:
        return None
    return ImageAt(partial(read_reference, name, value, folders), partial(origin_of, value, folders))


def image_field(fields):
    """The image of a normalized record: a path or address, bytes, or {"bytes", "path"}; None without one.

    Raises ValueError for several images.
    """
    found = []
    for value in map(fields.get, IMAGE_FIELDS):
        values = value if isinstance(value, list) else [value]
        found = found or [value for value in values if not is_missing(value) and value != EMPTY]
    found = found or image_parts(fields)
    if any(value != found[0] for value in found):
        raise ValueError("several images in one sample; one is expected")
    return found[0] if found else None


def read_reference(name, value, folders):
    """The RGB image that `image_field` found. Raises SkipSample."""
    with skip_errors(name):
        file = locate(value, folders)
    return read_image(name, file)


def origin_of(value, folders) -> tuple:
    """The origin of what `image_field` found, see ImageAt."""
    try:
        file = locate(value, folders)
        if callable(file):
            content = file().read()
            return f"crc32 {zlib.crc32(content):08x}", len(content), 0
    except Exception:                                           # reading the image will say what is wrong
        return printable(str(value)[:200]), -1, 0
    written = reference_in(value).strip()
    around = [f"{folder}{os.sep}" for folder in folders if written.startswith(f"{folder}{os.sep}")]
    return origin_of_file(written.removeprefix(max(around, key=len, default="")), file)


def origin_of_file(name, path) -> tuple:
    """The origin of a file that the data call `name`, see ImageAt."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return printable(name), -1, 0
    return printable(name), state.st_size, state.st_mtime_ns


def reference_in(value):
    """The bytes, path or address in what `image_field` found."""
    return value.get("bytes") or value.get("path") or value.get("url") if isinstance(value, dict) else value


def locate(value, folders):
    """A path, or a function that opens a binary file. Raises ValueError."""
    value = reference_in(value)
    if isinstance(value, bytes):
        return partial(io.BytesIO, value)
    if not isinstance(value, str):
        raise ValueError(f"its image is of type {type(value).__name__}; a path is expected")
    value = value.strip()
    if value.startswith("data:") or BASE64.fullmatch(value):
        try:
            content = base64.b64decode(value.partition(",")[2] or value)
        except ValueError:
            raise ValueError("its image is not valid base64") from None
        return partial(io.BytesIO, content)
    if value.startswith(("http:", "https:")):
        raise ValueError("its image is on the web; download it first, with img2dataset for example")
    if value.startswith("file:"):
        value = unquote(urlparse(value).path)
    paths = [os.path.join(folder, os.path.expanduser(value)) for folder in folders]
    paths += [os.path.join(folder, value.replace("\\", "/")) for folder in folders if "\\" in value]
    return next(filter(os.path.exists, paths), paths[0])


def read_image(name, file):
    """The RGB image in a file: a path, or a function that opens a binary file. Raises SkipSample."""
    with skip_errors(name):
        opened = file() if callable(file) else file
    path = opened if isinstance(opened, (str, Path)) else getattr(opened, "name", "data")
    try:
        with skip_errors(name, path):
            return open_image(opened)
    except SkipSample as error:
        raise SkipSample(name if callable(file) else error.name, error.reason) from None


def usable_image(sample, task, size):
    """The sample's image. Raises SkipSample if there is none, or the paper's rules leave it out."""
    if sample.image is None:
        raise SkipSample(sample.name, lacking("image", sample))
    image = sample.image()
    reason = reject_reason(image, task, size)
    if reason:
        raise SkipSample(sample.name, reason, bad=False)
    return image


def lacking(part, sample) -> str:
    """The reason why a sample without a part is skipped."""
    fields = f"; its fields are {', '.join(sample.fields[:12])}" if sample.fields else ""
    return f"no {part}, and the task needs one{fields}"
