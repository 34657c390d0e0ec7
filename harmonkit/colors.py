"""PIL images and arrays as people bring them -> upright 8-bit sRGB: depth, transparency, color profiles.

Pixels that are already 8-bit RGB, without transparency and profile, stay as they are. torch is not needed.
"""
import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageCms

WHITE = (255, 255, 255)
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262        # EXIF and TIFF tags
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
PNG_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}         # from the file's depth to 8 bits
TO_8_BITS = ((np.arange(2 ** 16) + 128) // 257).astype(np.uint8)    # 65535 -> 255, rounded


def to_rgb(image) -> Image.Image:
    """A PIL image of any mode -> RGB, upright, transparency laid on white. The result carries no metadata."""
    color, alpha = layers(image)
    if alpha is None:
        return color
    on_white = Image.new("RGB", color.size, WHITE)
    on_white.paste(color, mask=alpha)
    return on_white


def layers(image) -> tuple:
    """A PIL image of any mode -> its upright colors (RGB) and its alpha ("L"), or None if it has none."""
    scale_png_key(image)
    image.load()
    color, alpha = split_alpha(image)
    color = to_srgb(color, image.info.get("icc_profile"))
    method = TRANSPOSITIONS.get(orientation(image))
    if method is not None:
        color = color.transpose(method)
        alpha = alpha and alpha.transpose(method)
    color.info = {}                                     # or a profile or orientation would be applied again
    return color, alpha


def orientation(image) -> int:
    """1 to 8, of EXIF or XMP; 1 = upright, also where the metadata is broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow raises many types for broken metadata
        return 1


# ---- depth and transparency ----------------------------------------------------------------------

def scale_png_key(image):
    """Scale the transparent color of a PNG that is not loaded yet as Pillow scales its pixels to 8 bits."""
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    scale = PNG_KEY_SCALES.get(tiles[0][3]) if tiles and isinstance(tiles[0][3], str) else None
    if key is None or scale is None:
        return
    image.info["transparency"] = tuple(int(k * scale) for k in key) if isinstance(key, tuple) else key * scale


def split_alpha(image) -> tuple:
    """The colors in a mode without alpha, 8 bits a channel, and the alpha ("L") or None."""
    if image.mode.startswith(("I", "F")):
        return split_deep_grey(image)
    if not image.has_transparency_data:
        return (image.convert("RGB") if image.mode in ("P", "RGBX") else image), None
    is_grey = image.mode in ("1", "L", "LA", "La")
    image = image.convert("LA" if is_grey else "RGBA")
    return image.convert("L" if is_grey else "RGB"), image.getchannel("A")


def split_deep_grey(image) -> tuple:
    """`split_alpha` of grey with 16 or 32 bits, or of floats."""
    values = np.asarray(image)
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    tags = getattr(image, "tag_v2", {})
    if tags.get(BITS_PER_SAMPLE) == (12,):
        values = values.astype(np.uint32) * 65535 // 4095
    grey = to_8_bits(values)
    if tags.get(PHOTOMETRIC) == 0:                      # 0 is white; Pillow inverts 8 bits only
        grey = 255 - grey
    return Image.fromarray(grey), alpha


def to_8_bits(values) -> np.ndarray:
    """Integers 0 … 65535 -> uint8; or floats, whose range is the smallest of 0 … 1, 255 and 65535 that holds
    them. Up to twice the range counts as overshoot, and is clipped; NaN is 0.
    """
    if values.dtype.kind in "iu":
        return TO_8_BITS[np.clip(values, 0, 65535)]
    values = np.nan_to_num(values, posinf=0, neginf=0)
    top = next((top for top in (1, 255) if values.max() <= 2 * top), 65535)
    return (np.clip(values / top, 0, 1) * 255 + 0.5).astype(np.uint8)


def from_array(array) -> Image.Image:
    """A numpy array (H, W) or (H, W, 1 | 3 | 4) -> PIL "L", "RGB" or "RGBA".

    bool, uint8, uint16, other integers 0 … 255, or floats as in `to_8_bits`. Raises ValueError.
    """
    given = f"an array of shape {array.shape} and type {array.dtype}"
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not array.size or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (3, 4)):
        raise ValueError(f"{given} is no picture; (H, W), (H, W, 3) or (H, W, 4) is expected")
    kind = array.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"{given} is no picture; numbers are expected: uint8, uint16, or floats from 0 to 1")
    if kind == "f" and not (np.isfinite(array).all() and array.min() > -0.5):
        raise ValueError(f"{given} holds values from {array.min():g} to {array.max():g}; "
                         "floats from 0 to 1 are expected")
    if kind == "b":
        array = array * np.uint8(255)
    elif kind == "f" or (kind, array.itemsize) == ("u", 2):
        array = to_8_bits(array)
    elif array.dtype != np.uint8:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{given} holds values from {array.min()} to {array.max()}; integers from 0 to "
                             "255 are expected, or uint16")
        array = array.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))


# ---- color profiles ------------------------------------------------------------------------------

def to_srgb(color, profile) -> Image.Image:
    """A PIL image without alpha -> RGB, a copy. profile: bytes of its ICC profile, or None.

    A profile that is broken or for another kind of colors is ignored.
    """
    transform, mode = srgb_transform(profile) if profile else (None, None)
    is_for_it = color.mode == mode or (color.mode, mode) == ("L", "RGB")
    if transform is None or not is_for_it:
        return color.convert("RGB")
    return transform.apply(color if color.mode == mode else color.convert(mode))


@lru_cache(maxsize=8)
def srgb_transform(profile: bytes) -> tuple:
    """The ImageCms transform from a profile to sRGB, and the PIL mode of its input.

    None instead of the transform if the profile is broken, or is sRGB: it moves none of 6³ colors by more
    than 2 levels.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError, ImportError):
        return None, None                               # ImportError: a Pillow without LittleCMS
    probe = color_probe().convert(mode)
    difference = ImageChops.difference(transform.apply(probe), probe.convert("RGB"))
    is_srgb = max(high for _, high in difference.getextrema()) <= 2
    return None if is_srgb else transform, mode


def color_probe() -> Image.Image:
    """6³ colors in a row."""
    levels = np.arange(0, 256, 51, dtype=np.uint8)
    colors = np.stack(np.meshgrid(levels, levels, levels), axis=-1)                    # (6, 6, 6, 3)
    return Image.fromarray(colors.reshape(1, -1, 3))
