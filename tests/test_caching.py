"""Latent caches are those of the pixels, and written whole, whatever stops the writer."""
import pickle
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from cached_sources import encode, encode_flat, get, plain_source  # noqa: F401
from conftest import SMALL
from data_files import open_lines, png, write_shard
from every_form import write_every_form
from PIL import Image

from harmonkit import checkpoints
from harmonkit.config import HarmonConfig
from harmonkit.data import caching, latents
from harmonkit.data.caching import cache_latents, vae_encoder
from harmonkit.data.latents import LatentCache
from harmonkit.data.mixture import MixtureDataset, SampleCounts, Source
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source
from vae import AutoencoderKL

# ---- what a cache holds --------------------------------------------------------------------------------

def test_cached_latents_are_those_of_the_pixels(small, source, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 8)
    for rank in (0, 1):
        cache_latents(small.encode, source, tmp_path / "cache", 64, crops=2, batch=5, rank=rank, world_size=2)
    cache = LatentCache(tmp_path / "cache")
    cache.compare(source.samples, source.task)
    cache.check(small.encode, 64)
    for i in set(range(30)) - {3}:
        assert get(cache, source, i).shape == (2, 8, 8, 4) and get(cache, source, i).dtype == torch.bfloat16
        assert torch.allclose(get(cache, source, i)[1].float(), encode_flat(small.encode, i), atol=0.02)
    with pytest.raises(SkipSample, match="a.tar:000003: not an image") as error:
        get(cache, source, 3)
    assert error.value.bad
    cached = Source("a.tar", "text2image", 1, source.samples, cache)
    batch = MixtureDataset([cached], {"text2image": 1}, 4, 64)[0]
    assert batch["latents"].shape == (4, 8, 8, 4) and "pixels" not in batch
    assert torch.equal(get(pickle.loads(pickle.dumps(cache)), source, 29), get(cache, source, 29))
    assert len(pickle.dumps(cache)) < 2000                      # a data reader maps the shards itself


def test_every_form_trains_alike_from_pixels_and_from_a_cache(tmp_path):
    written = write_every_form(tmp_path, count=3, with_parquet=find_spec("pyarrow") is not None)
    for number, source in enumerate(open_lines(tmp_path, *(line for line, _, _ in written))):
        batch = MixtureDataset([source], {source.task: 1}, 3, 64)[0]
        assert batch["skipped"] == []
        if source.task == "text":
            continue
        folder = tmp_path / f"cache{number}"
        cache_latents(encode, source, folder, 64, crops=2)
        LatentCache(folder).compare(source.samples, source.task)
        cached = MixtureDataset([replace(source, latents=LatentCache(folder))], {source.task: 1}, 3, 64)[0]
        assert torch.allclose(cached["latents"], encode(batch["pixels"]), atol=0.01), source.path
        assert "pixels" not in cached and len(cached["turns"]) == 3


@pytest.mark.parametrize("task, crops, count", [("reca", 3, 3), ("reca", 0, 1), ("image2text", 3, 1)])
def test_the_number_of_crops(source, tmp_path, task, crops, count):
    source = replace(source, task=task)
    cache_latents(lambda pixels: pixels.permute(0, 2, 3, 1), source, tmp_path / "cache", 64, crops=crops)
    assert get(LatentCache(tmp_path / "cache"), source, 5).shape == (count, 64, 64, 3)


def test_each_rank_writes_its_own_shards_once(small, source, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 10)
    cache_latents(small.encode, source, tmp_path / "cache", 64, crops=0, rank=0, world_size=2)
    with pytest.raises(FileNotFoundError, match="00001.safetensors: no such file, 1 shards are missing"):
        LatentCache(tmp_path / "cache")
    before = (tmp_path / "cache" / "00000.safetensors").stat().st_mtime_ns
    cache_latents(small.encode, source, tmp_path / "cache", 64, crops=0)
    assert (tmp_path / "cache" / "00000.safetensors").stat().st_mtime_ns == before
    latents_of_12 = get(LatentCache(tmp_path / "cache"), source, 12)[0].float()
    assert torch.allclose(latents_of_12, encode_flat(small.encode, 12), atol=0.02)


def test_a_vae_file_encodes_as_the_model_does(small, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "AutoencoderKL", lambda config: AutoencoderKL(SMALL.vae))
    checkpoints.write(tmp_path / "vae.safetensors", small.vae.state_dict())
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = small.encode(pixels) / SMALL.vae_scale * HarmonConfig.vae_scale
    assert torch.allclose(vae_encoder(tmp_path / "vae.safetensors", "cpu")(pixels), expected, atol=1e-5)


# ---- unusable samples ----------------------------------------------------------------------------------

def test_a_shard_without_one_usable_image_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 10)
    samples = open_source(write_shard(tmp_path / "a.tar", range(21), corrupt=(20,)))
    source = Source("a.tar", "text2image", 1, samples)
    cache_latents(encode, source, tmp_path / "cache", 64)
    cached = replace(source, latents=LatentCache(tmp_path / "cache"))
    dataset, counts = MixtureDataset([cached], {"text2image": 1}, 7, 64), SampleCounts([cached])
    for number in range(3):
        counts.add(dataset[number], lambda line: None)
    assert (counts.used, counts.bad) == ([21], [1])


def test_a_source_without_one_usable_image(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 2)
    corrupt = open_source(write_shard(tmp_path / "a.tar", range(3), corrupt=range(3)))
    without_images = open_source("shapes-text", count=3)
    for name, samples, reason in (("a", corrupt, "not an image"), ("b", without_images, "no image, and the")):
        with pytest.raises(ValueError, match=f"a.tar: not one of its images is usable, the first: {reason}"):
            cache_latents(encode, Source("a.tar", "text2image", 1, samples), tmp_path / name, 64)
        with pytest.raises(ValueError, match=f"not one of 3 images was usable .*, the first: {reason}"):
            LatentCache(tmp_path / name)


def test_too_many_bad_samples_stop_a_run_from_a_cache_as_from_pixels(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(200), corrupt=range(0, 200, 10)))
    source = Source("a.tar", "text2image", 1, samples)
    cache_latents(encode, source, tmp_path / "cache", 32)
    messages = []
    for form in (source, replace(source, latents=LatentCache(tmp_path / "cache"))):
        dataset, counts, said = MixtureDataset([form], {"text2image": 1}, 25, 32), SampleCounts([form]), []
        with pytest.raises(ValueError, match="a.tar: .* of the first 1.. samples are bad") as error:
            for number in range(8):
                counts.add(dataset[number], said.append)
        messages.append([str(error.value), *said])
    assert messages[0] == messages[1]


def test_images_outside_the_rules_are_not_bad_in_a_cache(tmp_path):
    Image.new("RGB", (9, 400)).save(tmp_path / "long.png")
    (tmp_path / "a.png").write_bytes(png(1))
    source, = open_lines(tmp_path, {"path": ".", "task": "reca"})
    cache_latents(encode, source, tmp_path / "cache", 64)
    with pytest.raises(SkipSample, match="long.png: 9×400 pixels, sides must be above 63") as error:
        get(LatentCache(tmp_path / "cache"), source, 1)
    assert not error.value.bad


def test_latents_that_are_not_finite_are_not_written(source, tmp_path):
    with pytest.raises(ValueError, match="a.tar: the VAE's latents are not finite"):
        cache_latents(lambda pixels: encode(pixels) * torch.nan, source, tmp_path / "cache", 64)
    with pytest.raises(ValueError, match="a.tar: the latents of sample 26 or .* are not finite"):
        cache_latents(lambda pixels: encode(pixels) / (len(pixels) < 9), source, tmp_path / "cache", 64)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["about.json"]


# ---- stops and other processes -------------------------------------------------------------------------

def test_what_a_kill_left_is_removed(source, tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in (".00000.safetensors.abc123.safetensors", ".about.json.abc.json", ".nfs00001", "notes.txt"):
        (folder / name).write_bytes(b"half")
    cache_latents(encode, source, folder, 64)
    assert {file.name for file in folder.iterdir()} == {".nfs00001", "notes.txt", "about.json",
                                                        "00000.safetensors"}


def test_a_temporary_file_that_another_process_removed_is_written_again(source, tmp_path, monkeypatch):
    write, calls = checkpoints.write, []

    def write_disturbed(path, tensors):
        calls.append(path)
        if len(calls) < 3:
            raise FileNotFoundError(f"{path}.tmp")
        write(path, tensors)

    monkeypatch.setattr(checkpoints, "write", write_disturbed)
    cache_latents(encode, source, tmp_path / "cache", 64)
    assert len(calls) == 3 and len(get(LatentCache(tmp_path / "cache"), source, 5)) == 2


def test_a_full_disk_is_named(source, tmp_path, monkeypatch):
    def write_full(path, tensors):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", write_full)
    with pytest.raises(OSError, match="00000.safetensors: could not be written .*No space left on device.*;"):
        cache_latents(encode, source, tmp_path / "cache", 64)
