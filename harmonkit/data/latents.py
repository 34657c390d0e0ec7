"""VAE latents of a source's images, computed once: training then needs neither the pixels nor the VAE.

A cache is a folder of about.json and safetensors shards of 1,000 samples. A shard has `latents` in bfloat16,
(images, crops, h, w, C), and `index` (images,), the samples' numbers in the source.

Letters: B batch, S image side in pixels, h×w token grid, C latent channels.
"""
import json
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from harmonkit import checkpoints
from harmonkit.config import HarmonConfig, read_json
from harmonkit.data.records import SkipSample, usable_image
from harmonkit.images import image_to_pixels, training_squares
from vae import AutoencoderKL, VAEConfig

SHARD = 1000                        # samples
COMMAND = "`python -m harmonkit.data cache`"


class LatentCache:
    """A complete folder of `cache_latents`. Raises FileNotFoundError if files are missing."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "about.json").is_file():
            raise FileNotFoundError(f"{folder}: no about.json, so no latent cache; {COMMAND} makes one")
        self.about = read_json(self.folder / "about.json")
        files = [shard_file(folder, k) for k in range(-(-self.about["count"] // SHARD))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file, {len(missing)} shards are missing; "
                                    f"run {COMMAND} again, it adds them")

    def get(self, index):
        """The latents (crops, h, w, C) of a sample. Raises SkipSample if it was not usable for the cache."""
        file, row_of = open_shard(shard_file(self.folder, index // SHARD))
        if index not in row_of:
            raise SkipSample(f"{self.folder}:{index}", "was unusable when the latents were cached", bad=False)
        return file.get_slice("latents")[row_of[index]]

    def check(self, encode, size):
        """Raises ValueError unless `encode` made the latents, from images of this size."""
        check(self.folder, encode, size, self.about["count"])


def shard_file(folder, k):
    return Path(folder) / f"{k:05d}.safetensors"


@cache
def open_shard(path):
    file = safe_open(path, "pt")
    return file, {int(index): row for row, index in enumerate(file.get_tensor("index"))}


def check(folder, encode, size, count):
    about = read_json(Path(folder) / "about.json")
    if (about["size"], about["count"]) != (size, count):
        raise ValueError(f"{folder}: latents of {about['count']} images of {about['size']} pixels, "
                         f"but {count} of {size} are wanted; give another folder")
    if not np.allclose(about["probe"], probe(encode), atol=0.1):
        raise ValueError(f"{folder}: these latents come from another VAE; delete the folder or give another")


def probe(encode):
    """Some latents of a fixed image; they differ between VAEs."""
    ramp = torch.linspace(-1, 1, 64).expand(64, 64)
    latents = encode(torch.stack([ramp, ramp.T, -ramp])[None])
    return latents.float().flatten()[::7].tolist()


@torch.no_grad()
def cache_latents(encode, source, folder, size, *, crops=2, batch=50, rank=0, world_size=1):
    """Write the latents of a source's images to a folder. Existing shards stay; each rank writes its own.

    encode: pixels (B, 3, S, S) -> latents (B, h, w, C). size: S. batch: the B from which `encode` is called.
    crops: random squares of each image, 0 = the middle one; for understanding one padded image instead.
    Raises ValueError if the folder's latents come from another size, source or VAE.
    """
    about = Path(folder) / "about.json"
    count = len(source.samples)
    if about.exists():
        check(folder, encode, size, count)
    elif rank == 0:
        checkpoints.write_text(about, json.dumps({"size": size, "count": count, "probe": probe(encode)}))
    shards = range(rank, -(-count // SHARD), world_size)
    for k in tqdm(shards, desc=f"latents of {source.path}", disable=None, leave=False):
        if not shard_file(folder, k).exists():
            samples = range(k * SHARD, min(count, (k + 1) * SHARD))
            tensors = encode_samples(encode, source, samples, size, crops, batch)
            checkpoints.write(shard_file(folder, k), tensors)


def encode_samples(encode, source, samples, size, crops, batch) -> dict:
    """The tensors of a shard. Raises ValueError if none of its samples is usable."""
    index, pixels, latents = [], [], []
    for i in samples:
        try:
            image = usable_image(source.samples[i], source.task, size)
            squares = training_squares(image, source.task, crops, random.Random(i))
            pixels += [image_to_pixels(square, (size, size)) for square in squares]
            index.append(i)
        except SkipSample as error:
            tqdm.write(f"skipped {error}", file=sys.stderr)
        if len(pixels) >= batch or (pixels and i == samples[-1]):
            latents.append(encode(torch.cat(pixels)).to("cpu", torch.bfloat16))
            pixels = []
    if not index:
        raise ValueError(f"{source.path}: not one of samples {samples[0]} … {samples[-1]} is usable")
    return {"latents": torch.cat(latents).unflatten(0, (len(index), -1)), "index": torch.tensor(index)}


def vae_encoder(path, device):
    """The scaled `encode` of a VAE file of the official form (kl16.ckpt), for `cache_latents`."""
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    tensors = {name.removeprefix("vae."): tensor for name, tensor in checkpoints.read(path).items()}
    checkpoints.load_strict(vae, tensors, path, device=device, dtype=torch.float32)

    def encode(pixels):
        return vae.encode(pixels.to(device)).mode().permute(0, 2, 3, 1) * HarmonConfig.vae_scale

    return encode
