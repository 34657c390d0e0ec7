import io
import json
import os
import random
import subprocess
import sys
import tarfile
from collections import Counter

import pytest
import torch
from conftest import ROOT
from PIL import Image

from harmonkit.data import mixture as data
from harmonkit.data import sources
from harmonkit.data.mixture import Batches, Ledger, Source, open_mixture, to_model
from harmon import IGNORE_INDEX, IMAGE_TOKEN_ID
from harmonkit.images import reject_reason, training_squares
from harmonkit.data.latents import LatentCache, cache_latents
from harmonkit.data.sources import SkipSample, open_source


def jpeg(color, size=(96, 120)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return file.getvalue()


def color(i):
    return (i * 37 % 256, i * 91 % 256, i * 53 % 256)


def shard(path, count, start=0, corrupt=(), words=lambda i: {"txt": f"caption {i}".encode()}):
    with tarfile.open(path, "w") as tar:
        for i in range(start, start + count):
            for suffix, content in {"png": b"not a picture" if i in corrupt else jpeg(color(i)), **words(i)}.items():
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    """One source of each format."""
    (tmp_path / "images").mkdir()
    (tmp_path / "captions").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(jpeg(color(i)))
        (tmp_path / "captions" / f"{i}.json").write_text(json.dumps({"caption": f"caption {i}"}))
    (tmp_path / "data_info.json").write_text(json.dumps([{"image": f"{i}.png", "annotation": f"{i}.json"} for i in range(6)]))
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a color"}, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
    (tmp_path / "llava.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "conversations": said}) + "\n" for i in range(6)))
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": [{"from": "human", "value": f"Is it {i}?"}, {"from": "gpt", "value": f"yes, {i}"}]} for i in range(6)]))
    for name in ("tree_frog", "owl"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "a.png").write_bytes(jpeg(color(3)))
    shard(tmp_path / "00000.tar", 5)
    shard(tmp_path / "00001.tar", 5, start=5)
    return tmp_path


def mixture(folder, *lines):
    (folder / "mixture.json").write_text(json.dumps(lines))
    return open_mixture(folder / "mixture.json")


ALL = ({"path": "data_info.json", "task": "text2image", "images": "images", "captions": "captions"}, {"path": "{00000..00001}.tar", "task": "text2image", "weight": 3},
       {"path": "classes", "task": "text2image"}, {"path": "llava.jsonl", "task": "image2text", "images": "images"}, {"path": "text.json", "task": "text"},
       {"path": "shapes", "task": "image2text", "count": 50})


def test_every_format(folder):
    pairs, shards, classes, llava, text, world = mixture(folder, *ALL)
    assert [len(s.samples) for s in (pairs, shards, classes, llava, text, world)] == [6, 10, 2, 6, 6, 50]
    for source in (pairs, shards):
        sample = source.samples[4]
        assert sample.caption(None) == "caption 4" and sample.image().getpixel((5, 5)) == color(4) and sample.image().size == (96, 120)
    assert shards.samples[7].caption(None) == "caption 7"
    assert {classes.samples[i].caption(None) for i in range(2)} == {"tree frog", "owl"}
    assert llava.samples[2].turns(None) == [("What is it?", "a color"), ("Sure?", "yes")] and llava.samples[2].image().getpixel((0, 0)) == color(2)
    assert text.samples[1].turns(None) == [("Is it 1?", "yes, 1")] and text.samples[1].image is None
    assert world.samples[3].image().size == (64, 64) and world.samples[3].turns(random.Random(0))


def test_json_words_in_a_shard(tmp_path):
    said = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "this"}]
    words = lambda i: {"json": json.dumps({"conversations": said} if i else {"caption": "long"}).encode()}  # noqa: E731
    source = open_source(str(shard(tmp_path / "a.tar", 2, words=words)))
    assert source[0].caption(None) == "long" and source[1].turns(None) == [("Which?", "this")]


@pytest.mark.parametrize("line, message", [
    ({"path": "nowhere", "task": "text"}, "source 1: .*nowhere: no such file or folder"),
    ({"path": "classes", "task": "draw"}, "task 'draw' must be one of"),
    ({"path": "classes", "task": "text2image", "weight": 0}, "weight 0 above 0"),
    ({"path": "classes"}, "path, task and a number as weight are needed"),
    ({"path": "classes", "task": "text2image", "colour": 1}, "unexpected keyword argument 'colour'"),
    ({"path": "{00000..00003}.tar", "task": "text2image"}, r"00002.tar: no such file \(2 of 4 shards are missing\)"),
    ({"path": "images/0.png", "task": "text2image"}, "neither a folder nor"),
    ({"path": "captions", "task": "text2image"}, "no samples in it"),
    ({"path": "shapes", "task": "text2image", "latents": "nothing"}, "no latent cache"),
    ({"path": "shapes", "task": "text2image", "count": 0}, "no samples in it"),
    ({"path": "shapes", "task": "text2image", "count": "x"}, "count is 'x'; a whole number"),
    ({"path": "shapes_photos", "task": "text2image"}, "source 1: .*/shapes_photos: no such file or folder"),
])
def test_a_wrong_mixture_says_what_is_wrong(folder, line, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        mixture(folder, line)


def test_image_rules():
    wide = Image.new("RGB", (100, 50))
    wide.paste((255, 0, 0), (0, 0, 50, 50))
    assert {training_squares(wide, "text2image", 1, random.Random(i))[0].size for i in range(5)} == {(50, 50)}
    assert len({training_squares(wide, "text2image", 1, random.Random(i))[0].getcolors()[0] for i in range(9)}) > 3           # random places
    assert sorted(training_squares(wide, "text2image", 0, None)[0].getcolors()) == [(1250, (0, 0, 0)), (1250, (255, 0, 0))]           # the middle
    padded = training_squares(wide, "image2text", 1, None)[0]
    assert padded.size == (100, 100) and padded.getpixel((0, 0)) == (127, 127, 127) and padded.getpixel((0, 50)) == (255, 0, 0)
    for size, task, fine in (((8, 20), "text2image", False), ((9, 20), "text2image", True), ((80, 90), "image2text", False), ((81, 90), "image2text", True),
                             ((100, 1001), "text2image", False), ((100, 1000), "image2text", True)):
        assert (reject_reason(Image.new("RGB", size), task, 256) == "") == fine, (size, task)


def test_images_are_never_cut_but_long_answers_are(small):
    ids, labels = data.conversation(small, [("What is it?", "a very long answer " * 50)], image_tokens=20, max_length=40)
    assert ids.count(IMAGE_TOKEN_ID) == 20 and len(ids) == len(labels) == 60
    whole, _ = data.conversation(small, [("What is it?", "short")], image_tokens=20, max_length=40)
    assert whole[-1] == small.tokenizer.token_to_id("<|im_end|>")


def test_a_batch_without_labels_costs_nothing(small):
    batch = {"task": "text", "turns": [[("A question much longer than there is room for?", "yes")]]}
    loss = small.image2text_loss(None, **to_model(small, batch, max_length=4))
    assert loss.item() == 0


def test_sources_take_turns_in_their_ratio(folder):
    lines = mixture(folder, *ALL)
    batches = Batches(lines, {"text": 1, "image2text": 3, "text2image": 8}, 1, 64)
    counts = Counter(batches.place(j)[0] for j in range(12 * 50))
    tasks = Counter()
    for s, n in counts.items():
        tasks[lines[s].task] += n / 50
    assert tasks == {"text": 1, "image2text": 3, "text2image": 8}
    assert counts[1] == 3 * counts[0] == 3 * counts[2]                                 # by weight within a task
    seen = [batches.place(j) for j in range(100)]
    assert all([k for s, k in seen if s == source] == list(range(sum(s == source for s, _ in seen))) for source in range(6))
    assert data.turns_of_sources([1, 3, 8]) == data.turns_of_sources([10, 30, 80]) and len(data.turns_of_sources([0.7, 0.3])) == 10
    with pytest.raises(ValueError, match="no source for reca and sources for image2text, text, which it does not train"):
        Batches(lines, {"text2image": 1, "reca": 1}, 1, 64)


def test_every_sample_once_an_epoch_and_the_same_again(folder):
    lines = mixture(folder, {"path": "text.json", "task": "text"})
    batches = Batches(lines, {"text": 1}, 2, 64)
    epochs = [[batches[j]["turns"] for j in range(3 * e, 3 * e + 3)] for e in range(2)]
    assert all(len({str(turns) for rows in epoch for turns in rows}) == 6 for epoch in epochs) and epochs[0] != epochs[1]
    assert Batches(lines, {"text": 1}, 2, 64)[4]["turns"] == batches[4]["turns"] != Batches(lines, {"text": 1}, 2, 64, seed=1)[4]["turns"]


def test_a_tenth_of_the_captions_is_dropped():
    batches = Batches([Source("shapes", "text2image", 1, open_source("shapes", count=600))], {"text2image": 1}, 600, 64)
    dropped = sum(turns == [(data.UNCONDITIONAL, None)] for turns in batches[0]["turns"])
    assert 0.06 < dropped / 600 < 0.14


def test_what_the_losses_get(small):
    for task in ("text2image", "image2text", "reca", "text"):
        source = Source("shapes", task, 1, open_source("shapes-text" if task == "text" else "shapes", count=20))
        made = to_model(small, Batches([source], {task: 1}, 3, 64)[0] | {"task": task})
        image = (made["input_ids"] == IMAGE_TOKEN_ID).sum(dim=1).tolist()
        assert image == [64 + 4 if task in ("image2text", "reca") else 0] * 3
        assert ("labels" in made) == (task in ("image2text", "text")) and ("pixels" in made) == (task != "text")
        if "labels" in made:
            kept = made["labels"] != IGNORE_INDEX
            assert torch.equal(made["labels"][kept], made["input_ids"][kept]) and kept.any(dim=1).all()
            assert "assistant" not in small.tokenizer.decode(made["labels"][kept].tolist())


# ---- faults ----------------------------------------------------------------------------------------------------------

def test_one_percent_of_corrupt_images_is_skipped_and_counted(tmp_path):
    source = Source("a.tar", "text2image", 1, open_source(str(shard(tmp_path / "a.tar", 300, corrupt=(7, 150, 222)))))
    batches, ledger, said = Batches([source], {"text2image": 1}, 50, 16), Ledger([source]), []
    for j in range(12):                                                                 # two epochs: each is named once
        batch = batches[j]
        assert batch["pixels"].shape == (50, 3, 16, 16)
        ledger.add(batch, said.append)
    assert len(said) == 3 and all("UnidentifiedImageError" in line for line in said) and ledger.bad == [3]
    assert {line.split(":")[1] for line in said} == {"000007", "000150", "000222"}


def test_too_many_bad_samples_stop_the_run(tmp_path):
    source = Source("a.tar", "text2image", 1, open_source(str(shard(tmp_path / "a.tar", 200, corrupt=range(0, 200, 10)))))
    batches, ledger = Batches([source], {"text2image": 1}, 25, 16), Ledger([source])
    with pytest.raises(ValueError, match="a.tar: .* samples are bad, more than 5%"):
        for j in range(8):
            ledger.add(batches[j], lambda line: None)


def test_a_shard_that_ends_inside_a_file(tmp_path):
    path = shard(tmp_path / "a.tar", 20)
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        cut = [m for m in tar if m.name == "000012.png"][0].offset_data + 100
    path.write_bytes(content[:cut])
    source = open_source(str(path))
    good = []
    for i in range(len(source)):
        try:
            source[i].image()
            good.append(i)
        except SkipSample as error:
            assert "000012" in str(error) or "ends too early" in str(error)
    assert good == list(range(12))


def test_the_index_of_a_shard_is_kept_and_follows_it(tmp_path, monkeypatch):
    path = str(shard(tmp_path / "a.tar", 4))
    assert len(open_source(path)) == 4 and (tmp_path / "a.tar.index").exists()
    sources.shard_index.cache_clear()
    monkeypatch.setattr(sources, "scan", lambda path: pytest.fail("read through again"))
    assert [open_source(path)[i].caption(None) for i in range(4)] == [f"caption {i}" for i in range(4)]
    monkeypatch.undo()
    sources.shard_index.cache_clear()
    shard(tmp_path / "a.tar", 6, start=2)
    assert [open_source(path)[i].caption(None) for i in range(6)] == [f"caption {i}" for i in range(2, 8)]


def test_broken_lines_and_missing_files_are_named(folder):
    (folder / "images" / "1.png").unlink()
    (folder / "captions" / "2.json").write_text("{")
    (folder / "captions" / "3.json").write_text('{"text": "x"}')
    lines = (folder / "llava.jsonl").read_text().splitlines()
    (folder / "llava.jsonl").write_text("\n".join([lines[0], lines[2][:30], '{"image": "0.png"}', json.dumps({"conversations": [{"from": "gpt", "value": "hm"}]})]))
    pairs, llava = mixture(folder, ALL[0], ALL[3])
    for i, reason in ((1, "FileNotFoundError"), (2, "not JSON"), (3, 'no "caption"')):
        with pytest.raises(SkipSample, match=reason):
            pairs.samples[i].image()
    for i, reason in ((1, "llava.jsonl:2: not JSON"), (2, "no conversations"), (3, "must take turns")):
        with pytest.raises(SkipSample, match=reason):
            llava.samples[i]


def test_a_source_without_one_usable_sample(folder):
    lines = mixture(folder, {"path": "classes", "task": "text2image"})
    for file in (folder / "classes").glob("*/*.png"):
        file.write_bytes(b"x")
    with pytest.raises(ValueError, match="no usable sample among 2"):
        Batches(lines, {"text2image": 1}, 1, 64)[0]


# ---- latents and commands --------------------------------------------------------------------------------------------

def test_cached_latents_are_those_of_the_pixels(small, tmp_path):
    source = Source("a.tar", "text2image", 1, open_source(str(shard(tmp_path / "a.tar", 30, corrupt=(3,)))))
    for rank in (0, 1):
        cache_latents(small.encode, source, tmp_path / "cache", 64, crops=2, rank=rank, ranks=2)
    cache = LatentCache(tmp_path / "cache")
    cache.check(small.encode, 64)
    with pytest.raises(SkipSample):
        cache.get(3)
    latents = cache.get(5)
    assert latents.shape == (2, 8, 8, 4) and latents.dtype == torch.bfloat16
    flat = small.encode(torch.tensor(color(5)).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1)[0]          # a picture of one color: every crop is the same
    assert torch.allclose(latents[1].float(), flat, atol=0.02)
    row = Batches([Source("a.tar", "text2image", 1, source.samples, cache)], {"text2image": 1}, 4, 64)[0]
    assert row["latents"].shape == (4, 8, 8, 4) and "pixels" not in row
    with pytest.raises(ValueError, match="another VAE"):
        cache.check(lambda pixels: small.encode(pixels) + 1, 64)
    with pytest.raises(ValueError, match="pictures of 64 pixels, and 30 of 128 are wanted"):
        cache.check(small.encode, 128)


def test_inspect_and_cache_from_the_command_line(folder):
    (folder / "mixture.json").write_text(json.dumps(ALL))
    (folder / "images" / "2.png").write_bytes(b"x")
    shell = lambda *args: subprocess.run([sys.executable, "data.py", *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "2"})  # noqa: E731
    done = shell("inspect", str(folder / "mixture.json"), "--size", "64", "--out", str(folder / "sheet.png"))
    assert done.returncode == 0, done.stderr
    assert "text2image, weight 1, 6 samples; of 6 looked at 1 bad" in done.stdout and "2.png: UnidentifiedImageError" in done.stdout and "50% ≤" in done.stdout
    assert Image.open(folder / "sheet.png").width > 500
    done = shell("cache", str(folder / "mixture.json"), "--size", "64", "--out", str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    lines = open_mixture(folder / "cache" / "mixture.json")
    assert [s.latents is None for s in lines] == [False, False, False, False, True, False]
    assert Batches(lines, {"text": 1, "image2text": 3, "text2image": 8}, 2, 64)[0]["latents"].shape[:3] == (2, 8, 8)
    done = shell("cache", "nowhere.json", "--out", "x")
    assert done.returncode == 2 and done.stderr.splitlines() == ["data.py: nowhere.json: no such file"]
