"""Images on their way to pixels and back: PIL images, tensors (B, 3, H, W) in [-1, 1], and how training cuts one from the other.

Generation crops a square, so that what is asked for is drawn whole; understanding pads to a square, so that nothing is lost to see.
"""
import numpy as np
import torch
from PIL import Image


def image_to_pixels(image, size):
    """PIL image -> (1, 3, H, W) in [-1, 1], resized to size = (H, W) as it is."""
    image = image.convert("RGB").resize((size[1], size[0]), Image.BICUBIC)
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def pixels_to_images(pixels):
    """(B, 3, H, W) -> list of PIL images."""
    pixels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def pad_to_square(image):
    """PIL image centred on a square of grey 127: how images come to be understood."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (127, 127, 127))
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop(image, x, y):
    """The largest square, its place given by x and y in [0, 1]."""
    side = min(image.size)
    left, top = round(x * (image.width - side)), round(y * (image.height - side))
    return image.crop((left, top, left + side, top + side))


def squares(image, task, crops, rng):
    """The squares that a task trains on: `crops` random ones, the middle one for crops = 0; the padded image for understanding."""
    if task == "image2text":
        return [pad_to_square(image)]
    return [crop(image, rng.random(), rng.random()) for _ in range(crops)] or [crop(image, 0.5, 0.5)]


def outside_the_rules(image, task, size):
    """Why an image is not trained on, or "": the paper leaves out tiny images and extreme shapes. size: what it will be resized to, pixels."""
    too_small = 8 if task == "text2image" else min(80, size - 1)
    if min(image.size) <= too_small:
        return f"{image.width}×{image.height} pixels, sides must be above {too_small}"
    if max(image.size) > 10 * min(image.size):
        return f"{image.width}×{image.height} pixels, more than ten times as long as wide"
    return ""

