"""Images to pixels and back: PIL images, and tensors (B, 3, H, W) in [-1, 1].

Generation crops a square; understanding pads to one, so that nothing is cut off (supplement of the paper).
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from harmonkit.checkpoints import atomic_write

GREY = (127, 127, 127)             # of the padding


def open_image(file) -> Image.Image:
    """The RGB image in a file, given as a path or as a binary file object.

    Raises FileNotFoundError or ValueError that name the file.
    """
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:   # SyntaxError: a broken PNG
        name = file if isinstance(file, (str, Path)) else getattr(file, "name", "data")
        raise ValueError(f"{name}: not an image that can be read ({type(error).__name__})") from None


def image_to_pixels(image, size) -> torch.Tensor:
    """PIL image -> (1, 3, H, W) in [-1, 1], resized to size = (H, W) without keeping its proportions."""
    H, W = size
    image = image.convert("RGB").resize((W, H), Image.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy())                 # (H, W, 3) uint8
    return pixels.permute(2, 0, 1)[None].float() / 127.5 - 1


def pixels_to_images(pixels) -> list:
    """(B, 3, H, W) in [-1, 1], clamped -> list of B PIL images."""
    pixels = (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def pad_to_square(image) -> Image.Image:
    """The image centred on a grey square: the input of understanding."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), GREY)
    square.paste(image.convert("RGB"), ((side - image.width) // 2, (side - image.height) // 2))
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
        info.add_itxt(key, str(value))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def image_grid(images) -> Image.Image:
    """The images in rows and columns on one sheet, nearly square."""
    columns = next(c for c in range(1, len(images) + 1) if c * c >= len(images))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet
