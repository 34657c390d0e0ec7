"""Shared by the tests of latent caches: a source of plain images and a quick VAE."""

import pytest
import torch
from data_files import color, write_shard

from harmonkit.data.mixture import Source
from harmonkit.data.sources import open_source


@pytest.fixture(name="source")
def plain_source(tmp_path):
    """30 images of one color each; image 3 is corrupt."""
    samples = open_source(write_shard(tmp_path / "a.tar", range(30), corrupt=(3,)))
    return Source("a.tar", "text2image", 1, samples)


def encode(pixels):
    """A quick VAE."""
    return pixels[:, :, ::16, ::16].permute(0, 2, 3, 1)


def encode_flat(encode, i):
    """The latents (8, 8, 4) of image i of the source: its color fills every crop."""
    pixels = torch.tensor(color(i)).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
    return encode(pixels)[0]


def get(cache, source, i):
    return cache.get(i, source.samples[i])
