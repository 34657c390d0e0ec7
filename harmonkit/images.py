"""Images in and out: the one way in for pictures and masks, pixels (B, 3, H, W) in [-1, 1], squares, PNG.

Generation crops a square; understanding pads to one, so that nothing is cut off (supplement of the paper).
"""
import io
import os
import re
import warnings
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageChops, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from harmonkit.checkpoints import atomic_write
from harmonkit.colors import from_array, layers, to_rgb

GREY = (127, 127, 127)             # of the padding
LARGEST_SQUARE = 4096              # pixels a side, more than any model sees
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# How files begin that Pillow may not read, and what the message says about them.
OTHER_FILES = (
    (rb"\Z", "it is empty (0 bytes)"),
    (rb"version https://git-lfs", "it is a Git LFS pointer; `git lfs pull` fetches the picture itself"),
    (rb"(?s).{4}ftyp(?:%s)" % b"|".join(HEIC_BRANDS),
     "it is HEIC, damaged or without a decoder; `pip install pillow-heif` adds one"),
    (rb"(?s).{4}ftyp(?:avif|avis)",
     "it is AVIF, damaged or without a decoder; `pip install --upgrade pillow` adds one"),
    (rb"(?s).{4}ftyp", "it is a video"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "it is JPEG XL; save it as PNG or JPEG"),
    (rb"(?is)(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html|head)",
     "it is an HTML page; download the picture itself"),
    (rb"(?is)(?:\xef\xbb\xbf)?\s*<(?:.*<)?svg", "it is an SVG drawing; save it as PNG"),
    (rb"%PDF|%!PS", "it is a document; save its page as PNG"),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|II\*\0|MM\0\*", "it is damaged or cut off"),
    (rb"[\t\r\n\x20-\x7e\x80-\xff]+\Z", "it is text"),
)
# Broken metadata, and pictures above Pillow's first limit of size, are read in silence.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ---- pictures ------------------------------------------------------------------------------------

def open_image(file) -> Image.Image:
    """The picture in a file as people see it: RGB, 8 bits, sRGB, upright, transparency on white, first frame.

    file: a path (~ is expanded), a binary file object, or bytes. Raises FileNotFoundError or ValueError that
    name the file, in one line.
    """
    return read(file, to_rgb)


def as_image(image) -> Image.Image:
    """What callers give as a picture -> RGB like `open_image`.

    image: a PIL image of any mode, a path, a binary file object, bytes, or a numpy array, see
    `colors.from_array`. Raises FileNotFoundError or ValueError.
    """
    is_plain = type(image) is Image.Image and image.mode == "RGB" and not image.info
    return image if is_plain and all(image.size) else convert(image, to_rgb)


def read(file, of_image):
    """of_image(the PIL image in a file), every error in one line that names the file."""
    with binary_file(file) as (stream, name), one_line_errors(name, stream):
        return of_image(identify(stream))


def convert(image, of_image):
    """of_image(what callers give as a picture), every error in one line."""
    if isinstance(image, np.ndarray):
        return of_image(from_array(image))
    if not isinstance(image, Image.Image):
        return read(image, of_image)
    if not all(image.size):
        raise ValueError(f"a picture of {image.width}×{image.height} pixels is empty")
    with one_line_errors(getattr(image, "filename", None) or "the picture"):
        return of_image(image)


@contextmanager
def binary_file(file):
    """(a binary file object, the name for messages) of a path, a file object or bytes."""
    if isinstance(file, (bytes, bytearray, memoryview)):
        yield io.BytesIO(file), "data"
    elif hasattr(file, "read"):
        name = getattr(file, "name", "data")
        if isinstance(file, io.TextIOBase):
            raise ValueError(f"{name}: opened as text; open it in binary mode")
        is_seekable = hasattr(file, "seekable") and file.seekable()
        yield (file if is_seekable else io.BytesIO(file.read())), name
    elif isinstance(file, (str, os.PathLike)):
        with open_path(file) as stream:
            yield stream, file
    else:
        raise ValueError(f"a picture is given as {type(file).__name__}; a path, a binary file, a PIL image "
                         "or a numpy array is expected")


def open_path(file):
    """A path's file, opened in binary mode. Raises FileNotFoundError or ValueError."""
    try:
        return open(os.path.expanduser(file), "rb")
    except FileNotFoundError:
        hint = "; download the picture first" if re.match("https?://", str(file)) else ""
        raise FileNotFoundError(f"{file}: no such file{hint}") from None
    except IsADirectoryError:
        raise ValueError(f"{file}: a folder; the file of a picture is expected") from None
    except (OSError, ValueError) as error:                              # ValueError: a NUL in the path
        raise ValueError(f"{file}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None


@contextmanager
def one_line_errors(name, stream=None):
    """Errors in this block become a ValueError that names the picture."""
    try:
        yield
    except Image.DecompressionBombError:
        limit = f"more than {2 * Image.MAX_IMAGE_PIXELS // 10 ** 6} million pixels"
        raise ValueError(f"{name}: the picture is too large, {limit}; make it smaller first") from None
    except MemoryError:
        raise ValueError(f"{name}: the picture is too large for the memory; make it smaller first") from None
    except Exception as error:  # of any type, because Pillow raises many for damaged files
        reason = why_unreadable(error, stream)
        raise ValueError(f"{name}: not an image that can be read: {reason}") from None


def identify(stream) -> Image.Image:
    """The PIL image of a binary file, not decoded yet. HEIC needs pillow_heif."""
    try:
        return Image.open(stream)
    except UnidentifiedImageError:
        if head_of(stream)[8:12] not in HEIC_BRANDS:
            raise
        import pillow_heif  # optional; why_unreadable says how to install it

        pillow_heif.register_heif_opener()
        return Image.open(stream)


def head_of(stream) -> bytes:
    stream.seek(0)
    return stream.read(1024)


def why_unreadable(error, stream) -> str:
    """Why Pillow cannot read a file, from how the file begins, or in Pillow's words."""
    meaning = None
    if stream is not None:
        head = head_of(stream)
        meaning = next((meaning for pattern, meaning in OTHER_FILES if re.match(pattern, head)), None)
    if isinstance(error, (UnidentifiedImageError, ImportError)):        # says nothing else
        return meaning or "its format is unknown"
    details = " ".join(f"{type(error).__name__}: {error}".split())[:100]
    return f"{meaning or 'it is damaged or cut off'} ({details})"


# ---- masks ---------------------------------------------------------------------------------------

def open_mask(file) -> tuple:
    """The mask in a file -> ("L" image, upright, 255 = redrawn; how it was read, a phrase).

    Without transparency: its light parts are redrawn, where any channel is above one half. With transparency:
    the paint, if all that is painted has one color and leaves some of the border free, as a layer of an image
    editor; otherwise the hole that was erased in a picture. Raises FileNotFoundError or ValueError.
    """
    return read(file, mask_of)


def as_mask(image) -> tuple:
    """`open_mask` of what callers give as a mask: see `as_image`. An array may hold 0 and 1."""
    if isinstance(image, np.ndarray) and image.dtype.kind in "iu" and image.size and image.max() <= 1:
        image = image.astype(bool)
    return convert(image, mask_of)


def mask_of(image) -> tuple:
    """`open_mask` of a PIL image."""
    color, alpha = layers(image)
    strongest = 0 if alpha is None else alpha.getextrema()[1]
    painted = None if alpha is None else np.asarray(alpha) > strongest / 2              # (H, W)
    if painted is None or painted.all():
        red, green, blue = color.split()
        lightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        redrawn, how = np.asarray(lightest) > 127, "its light parts"
    elif is_paint(np.asarray(color), painted):
        redrawn, how = painted, "the paint of the layer"
    else:
        redrawn, how = ~painted, "the hole"
    return Image.fromarray(redrawn.astype(np.uint8) * 255), how


def is_paint(color, painted) -> bool:
    """Whether the painted pixels (H, W) bool of colors (H, W, 3) are a layer's paint, not a holed picture."""
    border = np.concatenate([painted[0], painted[-1], painted[:, 0], painted[:, -1]])
    if border.mean() > 0.9:
        return False
    colors = color[painted]                                             # (pixels, 3)
    if not len(colors):
        return True                                                     # an empty layer: nothing is marked
    colors = colors[::len(colors) // 100_000 + 1].astype(int)           # enough to see whether they differ
    differs = np.abs(colors - np.median(colors, axis=0)).max(axis=1) > 32
    return bool(differs.mean() < 0.02)


# ---- pixels and squares --------------------------------------------------------------------------

def image_to_pixels(image, size) -> torch.Tensor:
    """PIL image -> (1, 3, H, W) in [-1, 1], resized to size = (H, W) without keeping its proportions."""
    H, W = size
    image = as_image(image).resize((W, H), Image.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy())                 # (H, W, 3) uint8
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def pixels_to_images(pixels) -> list:
    """(B, 3, H, W) in [-1, 1], clamped -> list of B PIL images. Raises ValueError for NaN and infinity."""
    if not pixels.isfinite().all():
        raise ValueError("the pixels are not finite: the weights hold NaN or infinity, "
                         "or the dtype overflows")
    pixels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pad_to_square(image) -> Image.Image:
    """The image centred on a grey square: the input of understanding.

    A picture with a side above LARGEST_SQUARE is shrunk to that before the padding, which would take 40 GB
    for one of 100000 × 2 pixels.
    """
    image = as_image(image)
    shrink = LARGEST_SQUARE / max(image.size)
    if shrink < 1:
        image = image.resize([max(1, round(shrink * side)) for side in image.size], Image.BICUBIC)
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop_square(image, x, y) -> Image.Image:
    """The largest square; x and y in [0, 1] are its place, 0 left or top."""
    side = min(image.size)
    left = round(x * (image.width - side))
    top = round(y * (image.height - side))
    return image.crop((left, top, left + side, top + side))


def training_squares(image, task, crops, rng) -> list:
    """The squares that a task trains on: `crops` random ones, 0 = the middle one; understanding pads."""
    if task == "image2text":
        return [pad_to_square(image)]
    if crops == 0:
        return [crop_square(image, 0.5, 0.5)]
    return [crop_square(image, rng.random(), rng.random()) for _ in range(crops)]


def reject_reason(image, task, size) -> str:
    """Why the paper's rules leave an image out of training, or "": it is tiny or very elongated.

    size: side in pixels that the image is resized to for training.
    """
    too_small = 8 if task == "text2image" else min(80, size - 1)
    if min(image.size) <= too_small:
        return f"{image.width}×{image.height} pixels, sides must be above {too_small}"
    if max(image.size) > 10 * min(image.size):
        return f"{image.width}×{image.height} pixels, more than ten times as long as wide"
    return ""


def save_png(path, image, **metadata):
    """Write a PNG atomically, with the texts as metadata."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value).encode(errors="backslashreplace").decode())  # of lone surrogates
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def png_texts(path):
    """The texts that save_png wrote, without decoding the picture; None if the file is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {key: value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def image_grid(images) -> Image.Image:
    """The images in rows and columns on one sheet, nearly square."""
    columns = next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
