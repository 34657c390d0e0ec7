"""Cached latents are tied to their images; those of others are refused, or made again."""
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from cached_sources import encode, encode_flat, get, plain_source  # noqa: F401
from data_files import open_lines, png, write_shard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from harmonkit import checkpoints
from harmonkit.data import latents
from harmonkit.data.caching import cache_latents
from harmonkit.data.latents import LatentCache
from harmonkit.data.mixture import MixtureDataset, Source
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source

# ---- latents of other images ---------------------------------------------------------------------------

def rows(count):
    return [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(count)]


@pytest.fixture
def data(tmp_path):
    """-> open(), which opens data/rows.json with its cache. It has 12 images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(14):
        (folder / f"{i}.png").write_bytes(png(i))
        os.utime(folder / f"{i}.png", ns=(10 ** 18, 10 ** 18))
    (folder / "rows.json").write_text(json.dumps(rows(12)))

    def open_with_cache(task="text2image", **changes):
        line = {"path": "data/rows.json", "task": task, "latents": "cache"}
        return open_lines(tmp_path, line | changes)[0]

    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    cache_latents(encode, plain, tmp_path / "cache", 64)
    return open_with_cache


def rewrite(change):
    """A change of the rows in data/rows.json."""
    def apply(folder):
        file = folder / "data" / "rows.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return apply


def replace_image(folder):
    Image.new("RGB", (100, 130)).save(folder / "data" / "7.png")


def touch_image(folder):
    os.utime(folder / "data" / "7.png", ns=(10 ** 18, 10 ** 18 + 1))


CHANGES = {
    "replaced": (replace_image, r"sample 8: 7.png has \d+ bytes, but was \d+ bytes when its latents"),
    "touched": (touch_image, r"sample 8: 7.png was changed at 2001.*\.000000001, but was of 2001.* when"),
    "reordered": (rewrite(lambda rows: rows[::-1]), "image is 11.png, but the latents are of 0.png"),
    "swapped": (rewrite(lambda rows: [*rows[:7], rows[8], rows[7], *rows[9:]]), "sample 8: its image is 8"),
    "appended": (rewrite(lambda _: rows(14)), "12 samples of rows.json, but .* has 14: 2 were added"),
    "removed": (rewrite(lambda rows: rows[:9]), "12 samples of rows.json, but .* has 9: 3 were removed"),
    "renamed": (rewrite(lambda rows: [{"image": "12.png"}, *rows[1:]]), "image is 12.png, but .* of 0.png"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("at_opening", [True, False])
def test_changed_data_are_refused_and_made_again(data, tmp_path, capsys, monkeypatch, name, at_opening):
    change, message = CHANGES[name]
    if not at_opening and name not in ("appended", "removed"):
        with monkeypatch.context() as patch:
            patch.setattr(LatentCache, "compare", lambda *_: None)
            change(tmp_path)
            opened = data()
        with pytest.raises(ValueError, match="cache: sample .*: .*; run .* again, which makes these"):
            MixtureDataset([opened], {"text2image": 1}, 12, 64)[0]
    else:
        change(tmp_path)
    with pytest.raises(ValueError, match=f"mixture.json: source 1: .*cache: .*{message}.*; run .* again"):
        data()

    # The command makes the latents again, and says why.
    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    cache_latents(encode, plain, tmp_path / "cache", 64, everything=True)
    assert "00000.safetensors: made again: " in capsys.readouterr().err
    batch = MixtureDataset([data()], {"text2image": 1}, 9, 64)[0]
    pixels = MixtureDataset([plain], {"text2image": 1}, 9, 64)[0]["pixels"]
    assert torch.allclose(batch["latents"], encode(pixels), atol=0.01)


def test_more_samples_are_compared_where_the_list_has_changed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "LOOKED_AT", 1)
    touch_image(tmp_path)
    data()                                                      # the list is the same: the first sample only
    rewrite(lambda rows: [*rows[:11], rows[11] | {"caption": "edited"}])(tmp_path)
    with pytest.raises(ValueError, match="sample 8: 7.png was changed"):
        data()


def test_words_may_be_edited_data_moved_and_images_deleted(data, tmp_path):
    rewrite(lambda rows: [row | {"caption": "an owl"} for row in rows])(tmp_path)
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "data")
    for i in range(12):
        (tmp_path / "elsewhere" / f"{i}.png").unlink()
    moved = data(path="elsewhere/rows.json")
    batch = MixtureDataset([moved], {"text2image": 1}, 12, 64)[0]
    assert batch["skipped"] == [] and "an owl" in str(batch["turns"])


def test_an_image_that_comes_back_is_made_again(data, tmp_path, capsys):
    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    image = (tmp_path / "data" / "7.png").rename(tmp_path / "7.png")
    shutil.rmtree(tmp_path / "cache")
    cache_latents(encode, plain, tmp_path / "cache", 64)
    assert "rows.json:8: " in capsys.readouterr().err
    with pytest.raises(SkipSample, match="rows.json:8: no such file"):
        get(data().latents, plain, 7)
    image.rename(tmp_path / "data" / "7.png")
    with pytest.raises(ValueError, match="7.png has .* bytes, but was no file when its latents"):
        data()
    cache_latents(encode, plain, tmp_path / "cache", 64, everything=True)
    assert len(get(data().latents, plain, 7)) == 2


def test_only_shards_with_changes_are_made_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latents, "SHARD", 4)
    for i in range(14):
        (tmp_path / f"{i:02d}.png").write_bytes(png(i))
    source, = open_lines(tmp_path, {"path": ".", "task": "reca"})
    shards = [tmp_path / "cache" / f"{k:05d}.safetensors" for k in range(5)]

    def run_again():
        """-> the numbers of the shards that the command has written."""
        before = {file: os.stat(file).st_mtime_ns for file in shards if file.exists()}
        source, = open_lines(tmp_path, {"path": ".", "task": "reca"})
        cache_latents(encode, source, tmp_path / "cache", 64, everything=True)
        LatentCache(tmp_path / "cache").compare(source.samples, "reca")
        return [k for k, file in enumerate(shards)
                if file.exists() and os.stat(file).st_mtime_ns != before.get(file)]

    assert run_again() == [0, 1, 2, 3]
    assert run_again() == []
    (tmp_path / "06.png").write_bytes(png(60))
    assert run_again() == [1]
    (tmp_path / "14.png").write_bytes(png(14))                              # in the last shard
    assert run_again() == [3]
    for i in range(15, 18):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    assert run_again() == [3, 4]
    capsys.readouterr()
    for i in range(15, 18):
        (tmp_path / f"{i}.png").unlink()
    assert run_again() == [3] and not shards[4].exists()
    assert "00003.safetensors: made again: it has 4 samples, and 3 are expected" in capsys.readouterr().err
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(ValueError, match="00000.safetensors: a damaged shard of latents"):
        LatentCache(tmp_path / "cache")
    assert run_again() == [0]


def test_a_cache_of_something_else_is_refused(small, source, tmp_path):
    folder = tmp_path / "cache"
    cache_latents(small.encode, source, folder, 64, crops=0)
    cache = LatentCache(folder)
    with pytest.raises(ValueError, match="another VAE"):
        cache.check(lambda pixels: small.encode(pixels) + 1, 64)
    with pytest.raises(ValueError, match="images of 64 pixels, but 128 are wanted"):
        cache.check(small.encode, 128)
    before = [file.read_bytes() for file in sorted(folder.iterdir())]
    with pytest.raises(ValueError, match="images of 64 pixels, but 32 are wanted"):
        cache_latents(small.encode, source, folder, 32)
    with pytest.raises(ValueError, match="another VAE"):
        cache_latents(lambda pixels: small.encode(pixels) + 1, source, folder, 64, crops=0)
    with pytest.raises(ValueError, match=r"task text2image \(middle squares\), .* \(2 random squares\)"):
        cache_latents(small.encode, source, folder, 64, crops=2)
    with pytest.raises(ValueError, match=r"image2text \(padded squares\) are wanted; give another folder"):
        cache_latents(small.encode, replace(source, task="image2text"), folder, 64, crops=0)
    with pytest.raises(ValueError, match="96×120 pixels is padded to a square for image2text and cropped"):
        cache.compare(source.samples, "image2text")
    other = open_source(write_shard(tmp_path / "b.tar", range(30)))
    with pytest.raises(ValueError, match="of a.tar, but b.tar is another source: its image is b.tar"):
        cache_latents(small.encode, Source("b.tar", "text2image", 1, other), folder, 64, crops=0)
    with pytest.raises(ValueError, match="latents of a.tar, but they do not fit .*b.tar: sample 1: its"):
        cache.compare(other, "text2image")
    assert [file.read_bytes() for file in sorted(folder.iterdir())] == before
    with pytest.raises(FileNotFoundError, match="no latent cache; .python -m harmonkit.data cache. makes"):
        LatentCache(tmp_path)


def test_a_cache_of_the_first_format_is_refused(source, tmp_path):
    (tmp_path / "about.json").write_text(json.dumps({"size": 64, "count": 30, "probe": [0.5]}))
    tensors = {"latents": torch.zeros(30, 2, 2, 2, 4), "index": torch.arange(30)}
    save_file(tensors, tmp_path / "00000.safetensors")
    for use in (lambda: LatentCache(tmp_path), lambda: cache_latents(encode, source, tmp_path, 64)):
        with pytest.raises(ValueError, match="latents of an earlier format, .*; delete the folder"):
            use()


def test_tasks_share_the_latents_of_square_images_only(tmp_path):
    tasks = ("text2image", "image2text", "reca", "mar")
    shapes = open_source("shapes", count=20)
    for task in tasks:
        cache_latents(encode, Source("shapes", task, 1, shapes), tmp_path / "shapes", 64, crops=0)
    for task in tasks:
        LatentCache(tmp_path / "shapes").compare(shapes, task)
    with pytest.raises(ValueError, match="another seed|its image is train-1"):
        LatentCache(tmp_path / "shapes").compare(open_source("shapes", seed="train-1", count=20), "reca")

    # Of 70 pixels a square is used for drawing only, where the rule for other tasks leaves it out.
    Image.new("RGB", (70, 70)).save(tmp_path / "a.png")
    Image.new("RGB", (90, 90)).save(tmp_path / "b.png")
    source, = open_lines(tmp_path, {"path": ".", "task": "text2image"})
    cache_latents(encode, source, tmp_path / "cache", 96)
    with pytest.raises(ValueError, match="70×70 pixels is left out for reca only; give another folder"):
        LatentCache(tmp_path / "cache").compare(source.samples, "reca")


# ---- damage --------------------------------------------------------------------------------------------

def damage(name):
    """Zeros in place of a tensor of the shard, written over its bytes in the file."""
    def apply(file):
        with safe_open(file, "pt") as opened:
            content = opened.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes()
        data = file.read_bytes()
        assert data.count(content) == 1
        file.write_bytes(data.replace(content, bytes(len(content))))
    return apply


@pytest.mark.parametrize("name", ["latents", "crc", "row", "names", "names_ends", "origin", "about"])
def test_a_hole_of_zeros_is_found_and_made_again(data, tmp_path, name):
    file = tmp_path / "cache" / "00000.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    damage(name)(file)
    with pytest.raises(ValueError, match="damaged|of another caching|cache: .* sample"):
        MixtureDataset([data()], {"text2image": 1}, 12, 64)[0]
    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    cache_latents(encode, plain, tmp_path / "cache", 64, everything=True)
    after = load_file(file)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 100])
def test_a_shard_that_is_no_shard(data, tmp_path, content):
    (tmp_path / "cache" / "00000.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="00000.safetensors: a damaged shard of latents .*; run .* again"):
        data()


@pytest.mark.parametrize("change, message", [
    ({"count": 0}, "count"), ({"count": "12"}, "count"), ({"probe": 3}, "probe"), ({"task": None}, "task")])
def test_a_damaged_about(data, tmp_path, change, message):
    file = tmp_path / "cache" / "about.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"about.json: damaged, {message} cannot be right; delete"):
        data()


def test_shards_of_two_cachings_are_not_mixed(data, tmp_path):
    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    cache_latents(encode, plain, tmp_path / "other", 32)
    shutil.copy(tmp_path / "other" / "00000.safetensors", tmp_path / "cache")
    with pytest.raises(ValueError, match="00000.safetensors: of another caching than about.json; run"):
        data()


# ---- interruptions -------------------------------------------------------------------------------------

def test_a_cache_that_was_not_made_again_to_its_end_is_refused(data, tmp_path, monkeypatch):
    rewrite(lambda _: rows(14))(tmp_path)
    plain, = open_lines(tmp_path, {"path": "data/rows.json", "task": "text2image"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def interrupt(*_):
            raise KeyboardInterrupt
        patch.setattr(checkpoints, "write", interrupt)
        cache_latents(encode, plain, tmp_path / "cache", 64, everything=True)
    with pytest.raises(ValueError, match="00000.safetensors: of another caching than about.json; run"):
        data()
    cache_latents(encode, plain, tmp_path / "cache", 64)
    data()
