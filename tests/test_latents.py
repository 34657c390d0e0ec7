"""Cached latents are those of the pixels, and a cache of another VAE, size or source is refused."""
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from conftest import SMALL
from data_files import color, open_lines, write_shard
from every_form import write_every_form

from harmonkit import checkpoints
from harmonkit.config import HarmonConfig
from harmonkit.data import latents
from harmonkit.data.latents import LatentCache, cache_latents, vae_encoder
from harmonkit.data.mixture import MixtureDataset, Source
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source
from vae import AutoencoderKL


@pytest.fixture
def source(tmp_path):
    """30 images of one color each; image 3 is corrupt."""
    samples = open_source(write_shard(tmp_path / "a.tar", range(30), corrupt=(3,)))
    return Source("a.tar", "text2image", 1, samples)


def encode_flat(encode, i):
    """The latents (8, 8, 4) of image i of the source: its color fills every crop."""
    pixels = torch.tensor(color(i)).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1
    return encode(pixels)[0]


def test_cached_latents_are_those_of_the_pixels(small, source, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 8)
    for rank in (0, 1):
        cache_latents(small.encode, source, tmp_path / "cache", 64, crops=2, batch=5, rank=rank, world_size=2)
    cache = LatentCache(tmp_path / "cache")
    cache.check(small.encode, 64)
    for i in set(range(30)) - {3}:
        assert cache.get(i).shape == (2, 8, 8, 4) and cache.get(i).dtype == torch.bfloat16
        assert torch.allclose(cache.get(i)[1].float(), encode_flat(small.encode, i), atol=0.02)
    with pytest.raises(SkipSample, match="cache:3: .*unusable") as error:
        cache.get(3)
    assert not error.value.bad
    cached = Source("a.tar", "text2image", 1, source.samples, cache)
    batch = MixtureDataset([cached], {"text2image": 1}, 4, 64)[0]
    assert batch["latents"].shape == (4, 8, 8, 4) and "pixels" not in batch


def test_every_form_trains_alike_from_pixels_and_from_a_cache(tmp_path):
    def encode(pixels):
        return pixels[:, :, ::16, ::16].permute(0, 2, 3, 1)

    written = write_every_form(tmp_path, count=3, with_parquet=find_spec("pyarrow") is not None)
    for number, source in enumerate(open_lines(tmp_path, *(line for line, _, _ in written))):
        batch = MixtureDataset([source], {source.task: 1}, 3, 64)[0]
        assert batch["skipped"] == []
        if source.task == "text":
            continue
        folder = tmp_path / f"cache{number}"
        cache_latents(encode, source, folder, 64, crops=2)
        cached = MixtureDataset([replace(source, latents=LatentCache(folder))], {source.task: 1}, 3, 64)[0]
        assert torch.allclose(cached["latents"], encode(batch["pixels"]), atol=0.01), source.path
        assert "pixels" not in cached and len(cached["turns"]) == 3


@pytest.mark.parametrize("task, crops, count", [("reca", 3, 3), ("reca", 0, 1), ("image2text", 3, 1)])
def test_the_number_of_crops(source, tmp_path, task, crops, count):
    source = Source("a.tar", task, 1, source.samples)
    cache_latents(lambda pixels: pixels.permute(0, 2, 3, 1), source, tmp_path / "cache", 64, crops=crops)
    assert LatentCache(tmp_path / "cache").get(5).shape == (count, 64, 64, 3)


def test_each_rank_writes_its_own_shards_once(small, source, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 10)
    cache_latents(small.encode, source, tmp_path / "cache", 64, crops=0, rank=0, world_size=2)
    with pytest.raises(FileNotFoundError, match="00001.safetensors: no such file, 1 shards are missing"):
        LatentCache(tmp_path / "cache")
    before = (tmp_path / "cache" / "00000.safetensors").stat().st_mtime_ns
    cache_latents(small.encode, source, tmp_path / "cache", 64, crops=0)
    assert (tmp_path / "cache" / "00000.safetensors").stat().st_mtime_ns == before
    latents_of_12 = LatentCache(tmp_path / "cache").get(12)[0].float()
    assert torch.allclose(latents_of_12, encode_flat(small.encode, 12), atol=0.02)


def test_a_cache_of_something_else_is_refused(small, source, tmp_path):
    cache_latents(small.encode, source, tmp_path / "cache", 64, crops=0)
    cache = LatentCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="another VAE"):
        cache.check(lambda pixels: small.encode(pixels) + 1, 64)
    with pytest.raises(ValueError, match="images of 64 pixels, but 30 of 128 are wanted"):
        cache.check(small.encode, 128)
    with pytest.raises(ValueError, match="images of 64 pixels, but 30 of 32 are wanted"):
        cache_latents(small.encode, source, tmp_path / "cache", 32)
    with pytest.raises(FileNotFoundError, match="no latent cache; .python -m harmonkit.data cache. makes"):
        LatentCache(tmp_path)


def test_a_shard_without_one_usable_image(small, tmp_path):
    corrupt = open_source(write_shard(tmp_path / "a.tar", range(3), corrupt=range(3)))
    without_images = open_source("shapes-text", count=3)
    for samples in (corrupt, without_images):
        with pytest.raises(ValueError, match="a.tar: not one of samples 0 … 2 is usable"):
            cache_latents(small.encode, Source("a.tar", "text2image", 1, samples), tmp_path / "cache", 64)


def test_a_vae_file_encodes_as_the_model_does(small, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "AutoencoderKL", lambda config: AutoencoderKL(SMALL.vae))
    checkpoints.write(tmp_path / "vae.safetensors", small.vae.state_dict())
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = small.encode(pixels) / SMALL.vae_scale * HarmonConfig.vae_scale
    assert torch.allclose(vae_encoder(tmp_path / "vae.safetensors", "cpu")(pixels), expected, atol=1e-5)
