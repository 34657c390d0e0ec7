"""Images to pixels and back, and the squares and rules of training."""
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from harmonkit.images import image_to_pixels, open_image, pixels_to_images, reject_reason, training_squares


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


def test_images_are_opened_from_paths_and_from_binary_files(wide, tmp_path):
    wide.save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for file in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO(content)):
        image = open_image(file)
        assert image.mode == "RGB" and image.tobytes() == wide.tobytes()
    with pytest.raises(FileNotFoundError, match="b.png: no such file"):
        open_image(tmp_path / "b.png")
    for length in (10, len(content) // 2):
        (tmp_path / "c.png").write_bytes(content[:length])
        with pytest.raises(ValueError, match="c.png: not an image"):
            open_image(tmp_path / "c.png")
        with pytest.raises(ValueError, match="not an image"):
            open_image(io.BytesIO(content[:length]))
