"""The loss of each task, and the wrappers that training puts on a model's blocks.

Letters: B batch, h×w token grid, N = h·w, C latent channels, D MAR width. A mask (B, N) is True = hidden.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mar import random_mask


class Losses(nn.Module):
    """All losses as one module, so that DistributedDataParallel sees one forward pass."""

    def __init__(self, model, recipe):
        super().__init__()
        self.model = model
        self.recipe = recipe

    def forward(self, task, inputs):
        """A task and its batch, from `harmonkit.data.mixture.loss_arguments` -> the mean loss, a scalar."""
        if "pixels" in inputs and task != "reconstruct":
            inputs = dict(inputs)
            with torch.no_grad():
                inputs["latents"] = self.model.encode(inputs.pop("pixels"))         # (B, h, w, C)
        loss_of = {
            "text": self.answer, "image2text": self.answer, "text2image": self.draw, "reca": self.draw,
            "mar": self.draw_class, "reconstruct": self.reconstruct,
        }
        return loss_of[task](**inputs)

    def answer(self, input_ids, attention_mask, labels, latents=None):
        return self.model.image2text_loss(None, input_ids, attention_mask, labels, latents=latents)

    def draw(self, input_ids, attention_mask, latents):
        mask = self.mask(latents)
        return self.model.text2image_loss(None, input_ids, attention_mask, latents=latents, mask=mask)

    def draw_class(self, labels, latents):
        """MAR alone, as its authors train it: the buffers hold the class, labels (B,), -1 = none."""
        mar, grid = self.model.mar, latents.shape[1:3]
        repeats = mar.config.diffusion_batch_mul
        mask = self.mask(latents)
        x = mar.encode(latents.flatten(1, 2), mask, grid, labels)
        z = mar.decode(x, mask, grid)                                       # (B, N, D)
        return mar.diffloss.loss(
            z.flatten(0, 1).repeat(repeats, 1), latents.flatten(0, 2).repeat(repeats, 1),
            mask.flatten().repeat(repeats))

    def mask(self, latents):
        """(B, N), at the recipe's masking ratio."""
        B, h, w, _ = latents.shape
        ratio = None                                                        # the paper's
        if torch.rand(()) < self.recipe.tiny.all_hidden:
            ratio = 1.0
        elif self.recipe.tiny.cosine_mask:
            ratio = math.cos(math.pi / 2 * torch.rand(()).item())
        return random_mask(B, h * w, ratio, device=latents.device)

    def reconstruct(self, pixels):
        """The VAE's loss: squared error, KL divergence, `locality`. In float32, also under autocast."""
        vae, tiny = self.model.vae, self.recipe.tiny
        with torch.autocast(pixels.device.type, enabled=False):
            posterior = vae.encode(pixels)
            error = (vae.decode(posterior.sample()) - pixels).square().mean()
            kl = posterior.kl().mean(dim=(0, 2, 3)).clamp(min=tiny.free_nats)       # (C,)
            return error + tiny.kl * kl.mean() + tiny.local * locality(pixels, posterior.mean)


def locality(pixels, codes, scale=0.05):
    """How much codes (B, C, h, w) differ where pixels (B, 3, s·h, s·w) do not, a scalar.

    The mean squared difference of all pairs of tokens, weighted by the likeness of their pixels. Without it a
    VAE with attention codes the same patch differently in each image, and a generator has to guess the code.
    """
    patches = F.pixel_unshuffle(pixels, pixels.shape[-1] // codes.shape[-1])
    patches = patches.permute(0, 2, 3, 1).flatten(0, 2)                     # (B·N, 3·s²)
    codes = codes.permute(0, 2, 3, 1).flatten(0, 2)                         # (B·N, C)
    likeness = torch.exp(-squared_differences(patches) / (2 * scale ** 2))
    return (likeness * squared_differences(codes)).sum() / likeness.sum()


def squared_differences(x):
    """Rows (M, C) -> the mean squared difference of each pair of rows, (M, M)."""
    squares = x.square().mean(dim=1)
    differences = squares[:, None] + squares - 2 * x @ x.T / x.shape[1]
    return differences.clamp(min=0)                                         # rounding may give less


def blocks_of(model) -> list:
    """All transformer blocks of a Harmon."""
    return [*model.mar.encoder_blocks, *model.mar.decoder_blocks, *model.llm.model.layers]


def wrap_blocks(model, recipe, backend="inductor"):
    """Put the recipe's torch.compile and activation checkpointing on the blocks, in place."""
    for block in blocks_of(model):
        if recipe.compile:
            block.forward = torch.compile(block.forward, backend=backend)
        # Around the compiled block: of a block that calls `checkpoint` itself, torch compiles nothing.
        if recipe.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if recipe.compile and "vae" in recipe.lr:
        model.vae.encoder.compile(dynamic=False, backend=backend)
        model.vae.decoder.compile(dynamic=False, backend=backend)
