"""Pictures from pictures: the model looks at a whole picture and draws it anew.

It sees all tokens of the picture through MAR's encoder, as features in the prompt: `<image>`, then a request.
Reconstruction alignment (2509.07295) trains exactly this, with the request DESCRIBE and the picture itself as
the target. Guidance leaves out picture and request.

Letters: B batch, h×w token grid, N = h·w, n buffer tokens, H LLM width.
"""
import torch
from PIL import Image

from harmonkit.chat_template import DESCRIBE
from harmonkit.images import as_image, image_to_pixels


def prompts_and_pictures(prompts, like) -> tuple:
    """What callers give as prompts and like -> two lists of one length: prompts, RGB pictures.

    One picture serves all prompts, and one prompt all pictures; prompts None: DESCRIBE. Raises ValueError.
    """
    several = isinstance(like, (list, tuple))
    prompts = DESCRIBE if prompts is None else prompts
    if isinstance(prompts, str):
        prompts = [prompts] * (len(like) if several else 1)
    prompts = list(prompts)
    pictures = list(like) if several else [like] * len(prompts)
    if len(pictures) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(pictures)} pictures in like; give one for each "
                         "prompt, or one for all")
    # What several prompts share is opened once, so that `features` sees it once.
    opened = {id(picture): as_image(picture) for picture in pictures}
    return prompts, [opened[id(picture)] for picture in pictures]


def middle(image, size) -> Image.Image:
    """The largest part of the proportions of size = (H, W) from the image's middle.

    For a square it is the middle one of `training_squares`.
    """
    H, W = size
    width = max(1, min(image.width, round(image.height * W / H)))
    height = max(1, min(image.height, round(image.width * H / W)))
    left, top = round(0.5 * (image.width - width)), round(0.5 * (image.height - height))
    return image.crop((left, top, left + width, top + height))


@torch.no_grad()
def features(model, pictures, grid) -> torch.Tensor:
    """z_enc (B, N+n, H) of the middles of B pictures: what a model in evaluation mode sees, grid (h, w).

    Each different picture is seen alone, so that none depends on its batch.
    """
    size = grid[0] * model.config.vae.stride, grid[1] * model.config.vae.stride
    seen = {}
    for picture in pictures:
        if id(picture) not in seen:
            latents = model.encode(image_to_pixels(middle(picture, size), size))        # (1, h, w, C)
            _, seen[id(picture)] = model.visual_features(latents)                       # (1, N+n, H)
    return torch.cat([seen[id(picture)] for picture in pictures])


def beside(original, drawings, size) -> Image.Image:
    """The original's middle, enlarged to the height of a sheet of drawings of size (H, W), left of them."""
    H, W = size
    width = round(drawings.height * W / H)
    sheet = Image.new("RGB", (width + drawings.width, drawings.height), "white")
    sheet.paste(middle(original, size).resize((width, drawings.height), Image.BICUBIC), (0, 0))
    sheet.paste(drawings, (width, 0))
    return sheet
