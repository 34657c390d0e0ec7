"""Inpainting: redraw a part of a picture of any size and leave its other pixels as they are.

The whole picture is drawn at the nearest size of its proportions that the model can draw. The marked part of
the drawing is then pasted back at the picture's own size.

Letters: B batch, H×W pixels, h×w token grid, N = h·w, C latent channels. A mask is a PIL "L" image, 255 =
redrawn.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from harmonkit.images import as_image, as_mask, image_to_pixels


def share(mask) -> float:
    """The part of a mask that is redrawn, 0 to 1."""
    return float(np.count_nonzero(np.asarray(mask)) / (mask.width * mask.height))


def picture_and_mask(image, mask) -> tuple:
    """What callers give as image and mask (see `as_image`, `as_mask`) -> a picture (RGB) and its mask, of
    one size.

    Raises ValueError for a mask of other proportions than the picture, or one that marks nothing.
    """
    picture = as_image(image)
    mask, _ = as_mask(mask)
    if not have_equal_proportions(picture.size, mask.size):
        raise ValueError(f"the mask has {mask.width}×{mask.height} pixels, the picture {picture.width}×"
                         f"{picture.height}: another shape; give a mask of the picture's proportions")
    if mask.size != picture.size:
        mask = mask.resize(picture.size, Image.BILINEAR).point(lambda level: 255 * (level > 127))
    if share(mask) == 0:
        raise ValueError("the mask is black everywhere: nothing to draw; white marks the redrawn part")
    return picture, mask


def have_equal_proportions(size, other_size) -> bool:
    """Whether two (width, height) are one shape at two resolutions, up to a pixel of the smaller one."""
    (w, h), (W, H) = sorted([size, other_size])
    return abs(w * H / W - h) <= 1 or abs(h * W / H - w) <= 1


def nearest_grid(size, grid) -> tuple:
    """The token grid (h, w) that fits a picture of size (width, height), with about as many tokens as `grid`.

    Of the grids with 3/4 to 5/4 as many tokens, the one with the nearest proportions; the number of tokens
    weighs a tenth as much.
    """
    proportions = size[0] / size[1]
    N = grid[0] * grid[1]
    most = N * 5 // 4
    candidates = [(h, w) for h in range(1, most + 1) for w in range(1, most // h + 1) if 4 * h * w >= 3 * N]

    def misfit(candidate):
        h, w = candidate
        return abs(math.log(w / h / proportions)) + 0.1 * abs(math.log(h * w / N))
    return min(candidates, key=misfit)


def hidden_tokens(mask, grid) -> torch.Tensor:
    """A mask -> (1, N) bool: a token is redrawn if any of its pixels is, whole or in part."""
    redrawn = torch.from_numpy(np.asarray(mask) > 0)[None].float()                      # (1, H, W)
    return F.adaptive_max_pool2d(redrawn, grid).bool().flatten(1)                       # (1, N)


def canvas(model, picture, mask, grid, batch_size) -> tuple:
    """The latents (B, h, w, C) of a picture and the mask (B, N) of its tokens, for `Harmon.sample`."""
    s = model.config.vae.stride
    latents = model.encode(image_to_pixels(picture, (grid[0] * s, grid[1] * s)))        # (1, h, w, C)
    hidden = hidden_tokens(mask, grid).to(model.device)                                 # (1, N)
    return latents.expand(batch_size, -1, -1, -1), hidden.expand(batch_size, -1)


def paste(picture, mask, drawn) -> Image.Image:
    """The picture, and where the mask is 255 the drawn image, resized to the picture's size."""
    if drawn.size != picture.size:
        drawn = drawn.resize(picture.size, Image.BICUBIC)
    return Image.composite(drawn, picture, mask)
