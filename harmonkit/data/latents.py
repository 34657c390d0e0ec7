"""VAE latents of a source's images, computed once and kept on disk: training then skips the pixels and the VAE.

A cache is a folder of safetensors shards, `latents` (n, crops, h, w, C) in bfloat16 and `index` (n,), and an about.json.
"""
import json
import random
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from harmonkit import checkpoints
from harmonkit.images import image_to_pixels, training_squares
from pretrained import HarmonConfig
from harmonkit.data.sources import SkipSample, usable_image
from vae import AutoencoderKL, VAEConfig

SHARD = 1000        # samples


class LatentCache:
    """A folder of `cache`: latents (crops, h, w, C) by sample index, read from disk one by one."""

    def __init__(self, folder):
        self.folder = Path(folder)
        if not (self.folder / "about.json").is_file():
            raise FileNotFoundError(f"{folder}: no about.json, so no latent cache; `python data.py cache` makes one")
        self.about = json.loads((self.folder / "about.json").read_text())
        missing = [k for k in range(-(-self.about["count"] // SHARD)) if not self.file(self.folder, k).is_file()]
        if missing:
            raise FileNotFoundError(f"{self.file(folder, missing[0])}: no such file, {len(missing)} shards are missing; run `python data.py cache` again, it goes on")

    @staticmethod
    def file(folder, shard):
        return Path(folder) / f"{shard:05d}.safetensors"

    def get(self, index):
        file, rows = open_shard(self.file(self.folder, index // SHARD))
        if index not in rows:
            raise SkipSample(f"{self.folder}:{index}", "was unusable when the latents were cached", bad=False)
        return file.get_slice("latents")[rows[index]]

    def check(self, encode, size):
        """ValueError unless `encode` made the latents, from pictures of this size."""
        check(self.folder, self.about, encode, size, self.about["count"])


def check(folder, about, encode, size, count):
    if (about["size"], about["count"]) != (size, count):
        raise ValueError(f"{folder}: latents of {about['count']} pictures of {about['size']} pixels, and {count} of {size} are wanted; give another folder")
    if not np.allclose(about["probe"], probe(encode), atol=0.1):
        raise ValueError(f"{folder}: these latents come from another VAE; delete the folder or give another")


@lru_cache(maxsize=None)
def open_shard(path):
    file = safe_open(path, "pt")
    return file, {int(index): row for row, index in enumerate(file.get_tensor("index"))}


def probe(encode):
    """Latents of a fixed picture, to tell one VAE from another."""
    ramp = torch.linspace(-1, 1, 64)
    return encode(torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), -ramp.expand(64, 64)])[None]).float().flatten()[::7].tolist()


@torch.no_grad()
def cache_latents(encode, source, folder, size, *, crops=2, batch=50, rank=0, ranks=1):
    """Write the latents of a source's samples to a folder, in shards; those that exist are kept, each rank makes its own.

    encode: pixels (B, 3, S, S) -> latents (B, h, w, C). crops: random squares of each image, or 0 for the middle one (understanding pads instead).
    """
    folder, n = Path(folder), len(source.samples)
    if (folder / "about.json").exists():
        check(folder, json.loads((folder / "about.json").read_text()), encode, size, n)
    elif rank == 0:
        with checkpoints.atomic_write(folder / "about.json") as temporary:
            Path(temporary).write_text(json.dumps({"size": size, "count": n, "probe": probe(encode)}))
    for shard in tqdm(range(rank, -(-n // SHARD), ranks), desc=f"latents of {source.path}", disable=None, leave=False):
        if LatentCache.file(folder, shard).exists():
            continue
        kept, pixels, latents = [], [], []
        for index in range(shard * SHARD, min(n, (shard + 1) * SHARD)):
            try:
                image = usable_image(source.samples[index], source.task, size)
                pixels += [image_to_pixels(cut, (size, size)) for cut in training_squares(image, source.task, crops, random.Random(index))]
                kept.append(index)
            except SkipSample as error:
                tqdm.write(f"skipped {error}", file=sys.stderr)
            if len(pixels) >= batch or index + 1 in (n, (shard + 1) * SHARD):
                latents += [encode(torch.cat(pixels)).to("cpu", torch.bfloat16)] if pixels else []
                pixels = []
        if not kept:
            raise ValueError(f"{source.path}: not one of samples {shard * SHARD} … {index} is usable")
        latents = torch.cat(latents)
        checkpoints.write(LatentCache.file(folder, shard), {"latents": latents.unflatten(0, (len(kept), -1)), "index": torch.tensor(kept)})


def vae_encoder(path, device):
    """The encoding half of a VAE file of the official form (kl16.ckpt): pixels (B, 3, S, S) -> scaled latents (B, h, w, C)."""
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    tensors = {k.removeprefix("vae."): v for k, v in checkpoints.read(path).items()}
    checkpoints.load_strict(vae, tensors, path, device=device, dtype=torch.float32)
    return lambda pixels: vae.encode(pixels.to(device)).mode().permute(0, 2, 3, 1) * HarmonConfig.vae_scale
