"""Pictures as people bring them: orientation, depth, transparency, color modes and profiles."""
import io
import struct
import zlib

import numpy as np
import pytest
from color_profiles import GREEN, RED, cmyk_profile, gamma, grey_profile, rgb_profile, srgb_curve, xyz
from PIL import Image, ImageCms, features

from harmonkit.colors import from_array
from harmonkit.images import as_image, open_image


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def colors(image):
    """The pixels of an image in raster order, as tuples."""
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def greys(image):
    assert len({pixel.count(pixel[0]) for pixel in colors(image)} - {3}) == 0, "not grey"
    return [pixel[0] for pixel in colors(image)]


def image_of(pixels, mode=None):
    """One row of pixels."""
    return Image.fromarray(np.array([pixels], dtype=np.uint8), mode)


def raw_png(depth, color_type, width, row, transparent=None):
    """A PNG of one row, for the depths that Pillow does not write."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, 1, depth, color_type, 0, 0, 0)
    middle = b"" if transparent is None else chunk(b"tRNS", transparent)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + middle
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


# ---- plain pictures --------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_plain_rgb_is_what_pillow_gives_to_the_bit(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    content = encoded(noise, format)
    image = open_image(content)
    assert image.tobytes() == Image.open(io.BytesIO(content)).convert("RGB").tobytes()
    assert type(image) is Image.Image and image.mode == "RGB" and image.info == {}


# ---- orientation -----------------------------------------------------------------------------------------

UPRIGHT = np.zeros((16, 24, 3), dtype=np.uint8)
UPRIGHT[:8, :8] = (250, 0, 0)                                   # a red corner, and a blue one beside it
UPRIGHT[:8, 16:] = (0, 0, 250)
STORED = {                                                      # how a file holds it under each orientation
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2), 6: np.rot90(UPRIGHT), 7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1)}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_comes_upright(format, orientation):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(format, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    content = encoded(stored, format, exif=exif, **options)
    image = open_image(content)
    assert image.size == (24, 16)
    difference = np.abs(np.asarray(image).astype(int) - UPRIGHT)
    for place in ((slice(2, 6), slice(2, 6)), (slice(2, 6), slice(18, 22)), (slice(10, 16), slice(24))):
        assert difference[place].max() < 40                     # JPEG and AVIF are lossy, most at edges
    assert as_image(image).size == (24, 16), "turned twice"
    assert as_image(Image.open(io.BytesIO(content))).tobytes() == image.tobytes()


def test_transparency_is_turned_with_the_picture():
    """The left half of a red picture is transparent, which is its lower half as stored."""
    stored = np.full((6, 4, 4), (255, 0, 0, 255), dtype=np.uint8)
    stored[3:, :, 3] = 0
    exif = Image.Exif()
    exif[0x0112] = 6
    image = np.asarray(open_image(encoded(Image.fromarray(stored), exif=exif)))
    assert image.shape == (4, 6, 3)
    assert (image[:, :3] == (255, 255, 255)).all() and (image[:, 3:] == (255, 0, 0)).all()


def test_the_orientation_in_xmp_counts_and_broken_exif_does_not():
    stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert open_image(encoded(stored, "JPEG", xmp=xmp)).size == (24, 16)
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(9)):
        assert open_image(encoded(stored, "JPEG", exif=exif)).size == (16, 24)


# ---- transparency ----------------------------------------------------------------------------------------

def test_transparency_is_laid_on_white():
    """Half of red on white is (255, 127, 127); whatever color hides under it, the transparent is white."""
    half_red, white = (255, 127, 127), (255, 255, 255)
    rgba = image_of([[9, 9, 9, 0], [255, 0, 0, 128], [7, 8, 9, 255]])
    for image in (rgba, rgba.convert("RGBa")):
        assert colors(as_image(image))[:2] == [white, half_red]
    for format in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if format == "WEBP" else {}
        assert colors(open_image(encoded(rgba, format, **options))) == [white, half_red, (7, 8, 9)]
    la = image_of([[9, 0], [0, 128], [7, 255]], "LA")
    assert greys(open_image(encoded(la))) == [255, 127, 7]
    assert greys(as_image(la.convert("La")))[:2] == [255, 127]


def test_palettes_with_transparent_entries():
    palette = Image.new("P", (4, 1))
    palette.putpalette([9, 9, 9, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2, 3])
    plain = [(9, 9, 9), (255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert colors(open_image(encoded(palette))) == plain
    by_bytes = open_image(encoded(palette, transparency=bytes([0, 128])))
    assert colors(by_bytes) == [(255, 255, 255), (255, 127, 127), *plain[2:]]
    for format in ("PNG", "GIF"):
        assert colors(open_image(encoded(palette, format, transparency=1))) == [
            plain[0], (255, 255, 255), *plain[2:]]
    pa = palette.convert("PA")
    pa.putalpha(image_of([255, 255, 0, 255]))
    assert colors(as_image(pa)) == [*plain[:2], (255, 255, 255), plain[3]]


def test_a_transparent_color_key():
    rgb = image_of([[10, 20, 30], [1, 2, 3]])
    assert colors(open_image(encoded(rgb, transparency=(10, 20, 30)))) == [(255, 255, 255), (1, 2, 3)]
    assert greys(open_image(encoded(image_of([10, 20]), transparency=10))) == [255, 20]
    deep = Image.fromarray(np.array([[0, 257, 514]], dtype=np.uint16))
    assert greys(open_image(encoded(deep, transparency=257))) == [0, 255, 2]
    bits = image_of([0, 255]).convert("1")
    assert greys(open_image(encoded(bits, transparency=0))) == [255, 255]


def test_a_transparent_color_key_of_another_depth():
    """The key is in the file's depth, Pillow's pixels are in 8 bits."""
    four_bits = raw_png(4, 0, 2, bytes([0x5F]), struct.pack(">H", 5))
    assert greys(open_image(four_bits)) == [255, 255]
    assert greys(open_image(raw_png(4, 0, 2, b"\x5f"))) == [85, 255]
    two_bits = raw_png(2, 0, 4, bytes([0b00011011]), struct.pack(">H", 1))
    assert greys(open_image(two_bits)) == [0, 255, 170, 255]
    sixteen_bits = raw_png(16, 2, 2, struct.pack(">6H", 1000, 2000, 3000, 60000, 0, 0),
                           struct.pack(">3H", 1000, 2000, 3000))
    assert colors(open_image(sixteen_bits)) == [(255, 255, 255), (234, 0, 0)]


# ---- depth -----------------------------------------------------------------------------------------------

DEEP = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("content", [
    encoded(Image.fromarray(DEEP)), encoded(Image.fromarray(DEEP), "TIFF"),
    encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
    encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
    b"P5 4 1 65535\n" + DEEP.astype(">u2").tobytes()], ids=["png", "tiff", "big-endian", "int32", "pgm"])
def test_deep_grey_is_scaled_from_65535(content):
    assert greys(open_image(content)) == [0, 1, 128, 255]


def test_dark_deep_grey_stays_dark():
    assert greys(open_image(encoded(Image.fromarray(DEEP // 100)))) == [0, 0, 1, 3]


def test_deep_colors_and_deep_grey_with_alpha():
    assert colors(open_image(raw_png(16, 2, 1, struct.pack(">3H", 65535, 32768, 300)))) == [(255, 128, 1)]
    grey = raw_png(16, 4, 2, struct.pack(">4H", 30000, 0, 30000, 65535))
    assert greys(open_image(grey)) == [255, 117]


def tiff_of(bits, row, white_is_zero=False):
    """A grey TIFF of 4 × 1 pixels, for the forms that Pillow does not write."""
    entries = [(256, 3, 4), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1),
               (273, 4, 200), (277, 3, 1), (278, 3, 1), (279, 4, len(row))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4)
    return head.ljust(200, b"\0") + row


def test_forms_of_deep_tiff():
    assert greys(open_image(tiff_of(16, DEEP.tobytes()))) == [0, 1, 128, 255]
    assert greys(open_image(tiff_of(16, DEEP.tobytes(), white_is_zero=True))) == [255, 254, 127, 0]
    twelve_bits = bytes([0x00, 0x00, 0x10, 0x80, 0x0F, 0xFF])           # 0, 16, 2048, 4095
    assert greys(open_image(tiff_of(12, twelve_bits))) == [0, 1, 128, 255]


@pytest.mark.parametrize("values, expected", [
    ([0, 0.25, 0.5, 1], [0, 64, 128, 255]), ([0, 0, 0, 0.5], [0, 0, 0, 128]),
    ([-0.1, 0.5, 1.1, np.nan], [0, 128, 255, 0]),
    ([0, 64, 128, 255], [0, 64, 128, 255]), ([0, 16448, 32896, 65535], [0, 64, 128, 255])])
def test_float_grey_has_the_smallest_range_that_holds_it(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert greys(as_image(image)) == expected and greys(open_image(encoded(image, "TIFF"))) == expected


def test_arrays():
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    deep = picture.astype(np.uint16) * 257
    for array in (picture, picture.astype(np.int64), deep, deep.astype(">u2"), picture / 255,
                  picture.astype(np.float32) / 255, picture[:, ::-1][:, ::-1]):
        assert as_image(array).tobytes() == picture.tobytes(), array.dtype
    alpha = np.full((3, 4, 1), 255, dtype=np.uint8)
    alpha[0] = 0
    assert (np.asarray(as_image(np.concatenate([picture, alpha], axis=2)))[0] == 255).all()
    assert greys(as_image(np.array([[False, True]]))) == [0, 255]
    assert from_array(picture[:, :, :1]).mode == "L"


@pytest.mark.parametrize("array, message", [
    (np.zeros((3, 4, 7)), r"shape \(3, 4, 7\)"), (np.zeros((0, 4)), r"shape \(0, 4\)"),
    (np.zeros(4), r"shape \(4,\)"), (np.full((2, 2), 300), "from 300 to 300; integers from 0 to 255"),
    (np.full((2, 2), -1.0), "from -1 to -1"), (np.full((2, 2), np.nan), "nan"),
    (np.array([["a"]]), "numbers are expected")])
def test_arrays_that_are_no_picture(array, message):
    with pytest.raises(ValueError, match=message):
        as_image(array)


# ---- color modes and profiles ----------------------------------------------------------------------------

@pytest.mark.parametrize("mode, formats", [
    ("CMYK", ("JPEG", "TIFF")), ("YCbCr", ("JPEG", "TIFF")), ("LAB", ("TIFF",)), ("HSV", ())])
def test_color_modes(mode, formats):
    image = Image.new("RGB", (16, 16), (200, 30, 60)).convert(mode)
    opened = [as_image(image), *(open_image(encoded(image, format)) for format in formats)]
    for image in opened:
        assert np.abs(np.array(image.getpixel((8, 8))) - (200, 30, 60)).max() <= 2


SWAPPED = rgb_profile(red=GREEN, green=RED)                     # its first channel is green


def test_colors_are_converted_from_their_profile():
    image = image_of([[255, 0, 0], [0, 255, 0], [0, 0, 0], [255, 255, 255]])
    expected = [(0, 255, 0), (255, 0, 0), (0, 0, 0), (255, 255, 255)]
    for format in ("PNG", "TIFF"):
        assert colors(open_image(encoded(image, format, icc_profile=SWAPPED))) == expected
    palette = encoded(image.quantize(4), icc_profile=SWAPPED)
    assert colors(open_image(palette)) == expected
    jpeg = open_image(encoded(image.resize((64, 16), Image.NEAREST), "JPEG", icc_profile=SWAPPED, quality=95))
    assert jpeg.getpixel((4, 4))[1] > 240 > 20 > jpeg.getpixel((4, 4))[0]
    transparent = image.convert("RGBA")
    transparent.putalpha(image_of([255, 0, 255, 255]))
    assert colors(open_image(encoded(transparent, icc_profile=SWAPPED))) == [
        expected[0], (255, 255, 255), *expected[2:]]
    assert open_image(encoded(image, icc_profile=SWAPPED)).info == {}, "the profile would be applied again"


def test_grey_and_cmyk_profiles():
    """A linear half is level 188 of sRGB; three quarters of the lightness L* are level 185."""
    grey = image_of([0, 128, 255])
    assert greys(open_image(encoded(grey, icc_profile=grey_profile(1.0)))) == [0, 188, 255]
    deep = Image.fromarray(np.array([[0, 128 * 257, 65535]], dtype=np.uint16))
    assert greys(open_image(encoded(deep, icc_profile=grey_profile(1.0)))) == [0, 188, 255]
    assert greys(open_image(encoded(grey, icc_profile=rgb_profile(curve=gamma(1.0))))) == [0, 188, 255]
    inks = image_of([[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]], "CMYK")
    white, cyan, black = colors(open_image(encoded(inks, "TIFF", icc_profile=cmyk_profile())))
    assert (white, black) == ((255, 255, 255), (0, 0, 0)) and all(abs(level - 185) <= 2 for level in cyan)
    assert colors(open_image(encoded(inks, "TIFF")))[1] == (0, 255, 255)


def test_srgb_and_useless_profiles_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    others_srgb = rgb_profile(red=xyz(0.4340, 0.2215, 0.0139), curve=srgb_curve())      # rounded otherwise
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for profile in (srgb, others_srgb, b"garbage", SWAPPED[:200], grey_profile(1.0), cmyk_profile()):
        assert open_image(encoded(noise, icc_profile=profile)).tobytes() == noise.tobytes()
    inks = image_of([[0, 255, 0, 0]], "CMYK")
    assert colors(open_image(encoded(inks, "TIFF", icc_profile=SWAPPED))) == [(255, 0, 255)]


# ---- animations ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert set(colors(open_image(content))) == {(255, 0, 0)}
