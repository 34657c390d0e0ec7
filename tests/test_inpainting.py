"""Inpainting: redrawn is what the mask marks, at the picture's own size; the rest stays to the bit."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from harmonkit.images import image_to_pixels, pixels_to_images
from harmonkit.inpainting import (
    canvas,
    have_equal_proportions,
    hidden_tokens,
    nearest_grid,
    picture_and_mask,
    share,
)


def noise(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def boxed(size, *boxes):
    """A black mask with white boxes (left, top, right, bottom)."""
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


def test_inpainting_redraws_what_the_mask_marks(small):
    """The mask covers 2 × 2 tokens and one pixel of a fifth, which is drawn whole and shown at that pixel."""
    photo, mask = noise(32, 32), boxed((32, 32), (8, 0, 24, 16), (31, 31, 32, 32))
    redrawn = torch.zeros(4, 4, dtype=torch.bool)
    redrawn[:2, 1:3] = True
    redrawn[3, 3] = True
    known = small.encode(image_to_pixels(photo, (32, 32)))[0]
    steps = []
    results = small.generate_image(["a star", "a circle"], image=photo, mask=mask, num_iter=3,
                                   on_step=lambda k, tokens, mask: steps.append((tokens, mask)))
    for tokens, hidden in steps:
        for image in range(2):
            assert torch.equal(tokens[image][~redrawn], known[~redrawn])
            assert not hidden[image].view(4, 4)[~redrawn].any()
    assert (steps[-1][0] != known).any(dim=-1).tolist() == [redrawn.tolist()] * 2
    with torch.no_grad():
        drawn = pixels_to_images(small.decode(steps[-1][0]))
    marked = np.asarray(mask) > 0
    for result, image in zip(results, drawn):
        assert np.array_equal(np.asarray(result)[~marked], np.asarray(photo)[~marked])
        assert np.array_equal(np.asarray(result)[marked], np.asarray(image)[marked])
    assert results[0].tobytes() != results[1].tobytes()


def test_a_picture_of_another_size_keeps_it_and_its_pixels(small, tmp_path):
    """Drawn is the nearest size of the proportions 10 : 7, here 3 × 4 tokens."""
    photo, mask = noise(70, 100), boxed((100, 70), (60, 0, 100, 30))
    steps = []
    result, = small.generate_image("a star", image=photo, mask=mask, num_iter=3,
                                   on_step=lambda k, tokens, mask: steps.append(tokens))
    assert result.size == (100, 70) and steps[-1].shape[1:3] == (3, 4)
    marked = np.asarray(mask) > 0
    assert np.array_equal(np.asarray(result)[~marked], np.asarray(photo)[~marked])
    with torch.no_grad():
        drawn = pixels_to_images(small.decode(steps[-1]))[0].resize((100, 70), Image.BICUBIC)
    assert np.array_equal(np.asarray(result)[marked], np.asarray(drawn)[marked])

    photo.save(tmp_path / "photo.png")
    layer = Image.new("RGBA", (50, 35))                         # the same mask as paint, at half the size
    layer.paste((255, 0, 0, 255), (30, 0, 50, 15))
    layer.save(tmp_path / "layer.png")
    for image, marks in ((tmp_path / "photo.png", tmp_path / "layer.png"), (np.asarray(photo), marked)):
        again, = small.generate_image("a star", image=image, mask=marks, num_iter=3)
        assert again.tobytes() == result.tobytes()


def test_a_picture_with_a_hole_is_its_own_mask(small, tmp_path):
    photo = noise(32, 32).convert("RGBA")
    photo.putalpha(Image.eval(boxed((32, 32), (8, 8, 16, 24)), lambda level: 255 - level))
    photo.save(tmp_path / "holed.png")
    file = tmp_path / "holed.png"
    result, = small.generate_image("a star", image=file, mask=file, num_iter=2)
    changed = (np.asarray(result) != np.asarray(photo.convert("RGB"))).any(axis=2)
    assert changed[8:24, 8:16].mean() > 0.95 and changed.sum() == changed[8:24, 8:16].sum()


def test_size_says_how_much_is_drawn(small):
    photo, mask = noise(32, 64), boxed((64, 32), (0, 0, 9, 9))
    grids = []
    for size in (16, 32, 64):
        small.generate_image("a", image=photo, mask=mask, size=size, num_iter=1,
                             on_step=lambda k, tokens, mask: grids.append(tuple(tokens.shape[1:3])))
    assert grids == [(1, 3), (3, 6), (6, 12)]


@pytest.mark.parametrize("size, grid, expected", [
    ((512, 512), (16, 16), (16, 16)), ((1000, 700), (16, 16), (14, 20)), ((700, 1000), (16, 16), (20, 14)),
    ((1000, 700), (8, 8), (7, 10)), ((3000, 4000), (32, 32), (36, 27)), ((1920, 1080), (16, 16), (12, 21)),
    ((5, 5), (16, 16), (16, 16)), ((100_000, 2), (4, 4), (1, 20))])
def test_the_nearest_grid_of_the_proportions(size, grid, expected):
    assert nearest_grid(size, grid) == expected


def test_nearest_grids_are_near():
    """Up to 1 : 8, proportions are met to 8%, with 3/4 to 5/4 as many tokens."""
    for width in range(128, 1025, 7):
        h, w = nearest_grid((width, 128), (16, 16))
        assert abs(math.log(w / h * 128 / width)) < 0.08 and 192 <= h * w <= 320


def test_a_token_is_hidden_if_any_of_its_pixels_is_marked():
    corner = boxed((1000, 700), (999, 699, 1000, 700))
    assert hidden_tokens(corner, (7, 10)).nonzero().tolist() == [[0, 69]]
    across = boxed((1000, 700), (99, 100, 101, 101))
    assert hidden_tokens(across, (7, 10)).nonzero().tolist() == [[0, 10], [0, 11]]
    shared_by_four = boxed((10, 10), (2, 2, 3, 3))              # tokens are 2.5 pixels wide and high
    assert hidden_tokens(shared_by_four, (4, 4)).nonzero().tolist() == [[0, 0], [0, 1], [0, 4], [0, 5]]


def test_the_canvas_of_another_size(small):
    photo, mask = noise(16, 24), boxed((24, 16), (0, 8, 8, 16))
    latents, hidden = canvas(small, photo, mask, (2, 3), 3)
    assert latents.shape == (3, 2, 3, 4)
    assert torch.equal(latents[2], small.encode(image_to_pixels(photo, (16, 24)))[0])
    assert hidden.tolist() == [[False, False, False, True, False, False]] * 3


def test_the_share_that_is_redrawn():
    assert share(boxed((10, 10), (0, 0, 5, 5))) == 0.25 and share(boxed((3, 3))) == 0


@pytest.mark.parametrize("size, other, equal", [
    ((100, 70), (100, 70), True), ((1000, 700), (333, 233), True), ((333, 233), (1000, 700), True),
    ((64, 64), (512, 512), True), ((100, 70), (70, 100), False), ((64, 64), (64, 48), False),
    ((1000, 700), (1000, 697), False), ((4000, 3000), (400, 299), True)])
def test_proportions(size, other, equal):
    assert have_equal_proportions(size, other) == equal


def test_images_and_masks_that_do_not_go_together(small):
    photo = noise(32, 32)
    with pytest.raises(ValueError, match="the mask is black everywhere"):
        small.generate_image(["a star"], image=photo, mask=Image.new("L", (32, 32)))
    with pytest.raises(ValueError, match="the mask has 32×24 pixels, the picture 32×32: another shape"):
        small.generate_image(["a star"], image=photo, mask=Image.new("L", (32, 24), 255))
    for given in ({"image": photo}, {"mask": photo}):
        with pytest.raises(ValueError, match="image and mask go together"):
            small.generate_image("a star", **given)


def test_a_mask_of_another_resolution_is_resized():
    picture, mask = picture_and_mask(noise(64, 64), boxed((32, 32), (8, 8, 16, 24)))
    assert mask.size == picture.size and np.array_equal(np.asarray(mask), boxed((64, 64), (16, 16, 32, 48)))
