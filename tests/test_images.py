"""Pictures and masks from files, images to pixels and back, the squares and rules of training."""
import ast
import io
import random
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import harmon
from harmonkit.images import (
    as_image,
    as_mask,
    image_to_pixels,
    open_image,
    open_mask,
    pad_to_square,
    pixels_to_images,
    reject_reason,
    save_png,
    training_squares,
)


@pytest.fixture
def wide():
    """100 × 50 pixels, the left half red."""
    image = Image.new("RGB", (100, 50))
    image.paste((255, 0, 0), (0, 0, 50, 50))
    return image


def test_pixels_are_between_minus_one_and_one_and_come_back(wide):
    pixels = image_to_pixels(wide, (50, 100))
    assert pixels.shape == (1, 3, 50, 100)
    assert pixels[0, :, 0, 0].tolist() == [1, -1, -1] and pixels[0, :, 0, 99].tolist() == [-1, -1, -1]
    assert pixels_to_images(pixels)[0].tobytes() == wide.tobytes()
    assert image_to_pixels(wide, (8, 16)).shape == (1, 3, 8, 16)


def test_pixels_are_clamped_and_rounded():
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert np.asarray(pixels_to_images(pixels)[0])[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_not_finite_are_no_picture(value):
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(ValueError, match="the pixels are not finite: the weights hold NaN or infinity"):
        pixels_to_images(pixels)


def test_pixels_of_any_picture_are_those_of_open_image(wide, tmp_path):
    transparent = wide.convert("RGBA")
    transparent.putalpha(0)
    assert (image_to_pixels(transparent, (8, 8)) == 1).all() and (image_to_pixels(wide, (8, 8)) == 1).any()
    wide.save(tmp_path / "a.png")
    for given in (tmp_path / "a.png", np.asarray(wide), (tmp_path / "a.png").read_bytes()):
        assert torch.equal(image_to_pixels(given, (8, 8)), image_to_pixels(wide, (8, 8)))


def test_squares_for_generation_are_cropped(wide):
    crops = [training_squares(wide, "text2image", 1, random.Random(i))[0] for i in range(9)]
    assert {crop.size for crop in crops} == {(50, 50)}
    assert len({crop.tobytes() for crop in crops}) > 3                                  # at random places
    assert len(training_squares(wide, "text2image", 3, random.Random(0))) == 3
    middle, = training_squares(wide, "text2image", 0, None)
    assert sorted(middle.getcolors()) == [(1250, (0, 0, 0)), (1250, (255, 0, 0))]
    assert middle.getpixel((0, 0)) == (255, 0, 0)


def test_squares_for_understanding_are_padded_with_grey(wide):
    padded, = training_squares(wide, "image2text", 2, None)
    assert padded.size == (100, 100)
    column = [padded.getpixel((0, y)) for y in range(100)]
    assert column == [(127, 127, 127)] * 25 + [(255, 0, 0)] * 50 + [(127, 127, 127)] * 25
    padded, = training_squares(Image.new("L", (4, 10), 255), "image2text", 2, None)
    assert padded.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("size, side, thickness", [
    ((100_000, 2), 4096, 1), ((2, 100_000), 4096, 1), ((6144, 4096), 4096, 2731), ((4096, 100), 4096, 100)])
def test_a_very_large_picture_is_shrunk_before_it_is_padded(size, side, thickness, monkeypatch):
    new, areas = Image.new, []

    def count(mode, size, *color):
        areas.append(size[0] * size[1])
        return new(mode, size, *color)
    image = new("RGB", size, "red")
    monkeypatch.setattr(Image, "new", count)
    square = pad_to_square(image)
    assert square.size == (side, side) and max(areas) == side * side
    middle = np.asarray(square)[side // 2] if size[0] < size[1] else np.asarray(square)[:, side // 2]
    assert (middle == (255, 0, 0)).all(axis=1).sum() == thickness


@pytest.mark.parametrize("size, task, fits", [
    ((8, 20), "text2image", False), ((9, 20), "text2image", True),
    ((80, 90), "image2text", False), ((81, 90), "image2text", True),
    ((100, 1001), "text2image", False), ((100, 1000), "image2text", True),
])
def test_tiny_and_elongated_images_are_rejected(size, task, fits):
    assert (reject_reason(Image.new("RGB", size), task, 256) == "") == fits


def test_small_training_sizes_take_small_images():
    assert reject_reason(Image.new("RGB", (64, 64)), "image2text", 64) == ""
    assert "sides must be above 63" in reject_reason(Image.new("RGB", (63, 64)), "image2text", 64)


# ---- files -----------------------------------------------------------------------------------------------

def content_of(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def test_images_are_opened_from_paths_and_from_binary_files(wide, tmp_path, monkeypatch):
    wide.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    monkeypatch.setenv("HOME", str(tmp_path))
    read_once = types.SimpleNamespace(read=io.BytesIO(content).read)            # as of a network
    with open(tmp_path / "a.png", "rb") as binary:
        files = (tmp_path / "a.png", str(tmp_path / "a.png"), "~/a.png", io.BytesIO(content), content, binary,
                 read_once)
        for file in files:
            image = open_image(file)
            assert image.mode == "RGB" and image.tobytes() == wide.tobytes()
    assert harmon.open_image is open_image
    with pytest.raises(FileNotFoundError, match="b.png: no such file$"):
        open_image(tmp_path / "b.png")
    with pytest.raises(FileNotFoundError, match="a.png: no such file; download the picture first"):
        open_image("https://somewhere.org/a.png")
    for length in (10, len(content) // 2):
        (tmp_path / "c.png").write_bytes(content[:length])
        with pytest.raises(ValueError, match="c.png: not an image"):
            open_image(tmp_path / "c.png")
        with pytest.raises(ValueError, match="data: not an image"):
            open_image(io.BytesIO(content[:length]))


JPEG = content_of(Image.effect_noise((64, 64), 90), "JPEG")
FTYP = b"\0\0\0\x18ftyp"
NOT_IMAGES = {
    b"": r"it is empty \(0 bytes\)",
    b"\n<!DOCTYPE html>\n<html><body><svg></svg>": "it is an HTML page; download the picture itself",
    b"<?xml version='1.0'?>\n<svg xmlns='x'></svg>": "it is an SVG drawing; save it as PNG",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1": "it is a Git LFS pointer; `git lfs pull`",
    "not an image, naïve".encode(): "it is text",
    JPEG[:10]: "it is damaged or cut off", JPEG[:len(JPEG) // 2]: "it is damaged or cut off .*truncated",
    FTYP + b"heic\0\0\0\0mif1heic" + bytes(50): "it is HEIC, .* `pip install pillow-heif` adds one",
    FTYP + b"avif\0\0\0\0mif1avif" + bytes(50): "it is AVIF, .* `pip install --upgrade pillow` adds one",
    FTYP + b"isom" + bytes(50): "it is a video",
    b"\xff\x0a" + bytes(50): "it is JPEG XL",
    b"%PDF-1.4\n": "it is a document",
    bytes(100): "its format is unknown",
}


@pytest.mark.parametrize("content", NOT_IMAGES, ids=[message[:20] for message in NOT_IMAGES.values()])
def test_what_is_not_an_image_is_said_in_one_line(content, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)               # cannot be imported
    (tmp_path / "a.jpg").write_bytes(content)
    message = f"a.jpg: not an image that can be read: {NOT_IMAGES[content]}"
    for read in (open_image, open_mask, as_image):
        with pytest.raises(ValueError, match=message) as raised:
            read(tmp_path / "a.jpg")
        assert "\n" not in str(raised.value)


def test_heic_is_known_by_its_content_and_opened_by_pillow_heif(tmp_path, monkeypatch):
    """A stand-in for pillow_heif registers an opener with Pillow, like the real one."""
    def register_heif_opener():
        def accept(prefix):
            return prefix[8:12] == b"heic"
        Image.register_open("HEIF", lambda file, name: HeicFile(), accept)

    class HeicFile(Image.Image):
        def __init__(self):
            super().__init__()
            drawn = Image.new("RGB", (5, 7), (10, 20, 30))
            self.im, self._mode, self._size = drawn.im, drawn.mode, drawn.size
    stand_in = types.SimpleNamespace(register_heif_opener=register_heif_opener)
    monkeypatch.setitem(sys.modules, "pillow_heif", stand_in)
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    (tmp_path / "photo.jpg").write_bytes(FTYP + b"heic" + bytes(50))
    image = open_image(tmp_path / "photo.jpg")
    assert image.size == (5, 7) and image.getpixel((0, 0)) == (10, 20, 30)


def test_folders_odd_paths_and_other_things_are_named(tmp_path, monkeypatch):
    cases = [(tmp_path, "a folder"), ("a\0b", "null byte"), ("x" * 300, "File name too long"),
             (5, "given as int"), (None, "given as NoneType"), (io.StringIO("x"), "opened as text"),
             (Image.new("RGB", (0, 5)), "0×5 pixels is empty")]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            as_image(given)

    def refuse(path, mode):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"a.png: cannot be opened \(Permission denied\)"):
        open_image("a.png")


LARGE = """
import io, resource
from PIL import Image
from harmonkit.images import open_image, pad_to_square
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def file_of(*size):
    file = io.BytesIO()
    Image.new("L", size).save(file, "PNG")
    return file
pad_to_square(open_image(file_of(100000, 2)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
Image.MAX_IMAGE_PIXELS = 1_500_000
print(open_image(file_of(1300, 1200)).size)
try:
    open_image(file_of(3000, 1200))
except ValueError as error:
    print(error)
"""


def test_large_pictures_take_little_memory_and_no_warning_and_too_large_ones_are_refused():
    """Pillow warns above its limit of size, and refuses above twice the limit."""
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=ROOT, capture_output=True, text=True)
    megabytes, size, error = done.stdout.splitlines()
    assert int(megabytes) < 200 and size == "(1300, 1200)" and done.stderr == ""
    assert error == "data: the picture is too large, more than 3 million pixels; make it smaller first"


def test_an_image_that_pillow_opened_and_cannot_decode_is_named(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(JPEG[:len(JPEG) // 2])
    with Image.open(tmp_path / "cut.jpg") as lazy, pytest.raises(ValueError, match="cut.jpg: not an image"):
        as_image(lazy)


def calls_of_image_open(path):
    """Line numbers of `Image.open(…)` in a file, and of imports of the function."""
    calls = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr == "open":
            owner = ast.unparse(node.value)
            if owner in ("Image", "PIL.Image"):
                calls.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            calls.append(node.lineno)
    return calls


def test_only_open_image_opens_images():
    """The NumPy port stands alone and has its own."""
    paths = [*ROOT.glob("*.py"), *ROOT.glob("harmonkit/**/*.py"), *ROOT.glob("porting/*.py"),
             *ROOT.glob("notebooks/*.py")]
    found = {str(path.relative_to(ROOT)) for path in paths if calls_of_image_open(path)}
    assert found == {"harmonkit/images.py", "porting/numpy_harmon.py"}
    notebooks = [path.name for path in ROOT.glob("notebooks/*.ipynb") if "Image.open(" in path.read_text()]
    assert notebooks == []


# ---- masks -----------------------------------------------------------------------------------------------

def mask_with(background, mark):
    """16 × 16 pixels of a background, and a mark of 4 × 4, a sixteenth."""
    pixels = np.full((16, 16, len(mark)), background, dtype=np.uint8)
    pixels[4:8, 8:12] = mark
    return Image.fromarray(pixels)


MARK = np.zeros((16, 16), dtype=bool)
MARK[4:8, 8:12] = True


@pytest.mark.parametrize("background, mark, marked", [
    ((0, 0, 0), (255, 0, 0), True), ((0, 0, 0), (0, 255, 0), True), ((0, 0, 0), (0, 0, 255), True),
    ((0, 0, 0), (255, 255, 255), True), ((100, 100, 100), (200, 200, 200), True),
    ((0, 0, 0), (128, 0, 0), True), ((0, 0, 0), (127, 127, 127), False), ((0, 0, 0), (100, 60, 0), False)])
def test_light_parts_of_a_mask_are_redrawn_whatever_their_color(background, mark, marked, tmp_path):
    given = mask_with(background, mark)
    given.save(tmp_path / "m.png")
    given.quantize(8).save(tmp_path / "palette.png")
    opaque = given.convert("RGBA")
    for mask, how in (open_mask(tmp_path / "m.png"), open_mask(tmp_path / "palette.png"), as_mask(opaque)):
        assert (mask.mode, how) == ("L", "its light parts")
        assert np.array_equal(np.asarray(mask), 255 * (MARK & marked))


@pytest.mark.parametrize("paint", [
    (255, 0, 0, 255), (0, 0, 0, 255), (255, 255, 255, 255), (0, 0, 255, 80)])
def test_the_paint_of_a_layer_is_redrawn(paint):
    """On any invisible color, in any color and opacity."""
    for under in ((0, 0, 0, 0), (255, 255, 255, 0)):
        mask, how = as_mask(mask_with(under, paint))
        assert how == "the paint of the layer" and np.array_equal(np.asarray(mask) == 255, MARK)
    soft = np.asarray(mask_with((0, 0, 0, 0), paint)).copy()
    soft[4:8, 7] = soft[4:8, 12] = (*paint[:3], paint[3] // 3)              # a brush with a soft border
    assert np.array_equal(np.asarray(as_mask(Image.fromarray(soft))[0]) == 255, MARK)


def test_the_hole_of_a_picture_is_redrawn():
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    photo[..., 3] = 255 * ~MARK
    flat = mask_with((30, 60, 90, 255), (0, 0, 0, 0))                       # one color, but all of the border
    for given in (Image.fromarray(photo), flat):
        mask, how = as_mask(given)
        assert how == "the hole" and np.array_equal(np.asarray(mask) == 255, MARK)
    photo[..., 3] = 255
    photo[8:, :, 3] = 0                                                     # half of it, at the border
    mask, how = as_mask(Image.fromarray(photo))
    assert how == "the hole" and np.array_equal(np.asarray(mask)[:, 0] == 255, np.arange(16) >= 8)


def test_an_empty_layer_marks_nothing():
    mask, how = as_mask(Image.new("RGBA", (16, 16)))
    assert how == "the paint of the layer" and not np.asarray(mask).any()


def test_masks_lie_upright_and_come_as_arrays(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(np.rot90(np.asarray(mask_with((0, 0, 0), (255, 255, 255)))[:, :14]).copy())
    turned.save(tmp_path / "m.png", exif=exif)
    mask, _ = open_mask(tmp_path / "m.png")
    assert np.array_equal(np.asarray(mask) == 255, MARK[:, :14])
    for array in (MARK, MARK.astype(np.uint8), MARK.astype(np.uint8) * 255, MARK.astype(np.float32)):
        assert np.array_equal(np.asarray(as_mask(array)[0]) == 255, MARK)


# ---- PNG files -------------------------------------------------------------------------------------------

def test_metadata_of_a_png_may_hold_lone_surrogates(wide, tmp_path):
    save_png(tmp_path / "a.png", wide, prompt="a \ud83d star \udcff ü", seed=3)
    with Image.open(tmp_path / "a.png") as image:
        assert (image.text["prompt"], image.text["seed"]) == ("a \\ud83d star \\udcff ü", "3")
