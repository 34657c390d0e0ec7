"""Latent caches: latents pair with the captions of their own images, or nothing is trained on them."""
import json
import os
import shutil

import pytest
import torch
from data_files import png, write_shard
from PIL import Image
from safetensors.torch import load_file

from faults.helpers import (
    cache,
    call,
    checkpoints,
    copy,
    cut,
    draw,
    fine,
    flip,
    full_disk,
    hole,
    inspect,
    load,
    not_silent,
    refused,
    same,
    write_mixture,
    write_pictures,
    write_rows,
)
from harmonkit.data import latents
from harmonkit.data.mixture import MixtureDataset, open_mixture


@pytest.fixture(scope="module")
def cached(models, tmp_path_factory):
    """data/, mixture.json with six pictures for text2image, and their latents in latents/."""
    folder = tmp_path_factory.mktemp("cached")
    rows = write_pictures(folder / "data")
    write_mixture(folder / "mixture.json", {"path": "data/pairs.jsonl", "task": "text2image"})
    fine(cache(models.one, folder / "mixture.json", folder / "latents"))
    assert rows.exists()
    return folder


@pytest.fixture
def own(cached, tmp_path):
    """A copy of `cached`, whose files have the same times, with paths of its own."""
    folder = copy(cached, tmp_path / "own")
    lines = json.loads((folder / "latents" / "mixture.json").read_text())
    lines[0]["path"] = str(folder / "data" / "pairs.jsonl")
    (folder / "latents" / "mixture.json").write_text(json.dumps(lines))
    return folder


def mixture_of(folder):
    return folder / "latents" / "mixture.json"


def train_on(folder, models, *flags, **options):
    return draw(models.one, folder / "runs", mixture_of(folder), *flags, **options)


def assert_refused(folder, models, *words):
    """Neither training nor inspect goes on, and the line names the words."""
    refused(train_on(folder, models), *words)
    assert not checkpoints(folder / "runs" / "tiny-joint")
    done, _ = inspect(mixture_of(folder))
    refused(done, *words)


COMMAND = "harmonkit.data cache"


# ---- what goes on ------------------------------------------------------------------------------------------

def test_nothing_changed_goes_on(cached, own, models):
    fine(train_on(own, models))


def test_moved_data_go_on(own, models):
    """Latents, pictures and mixture moved together; only paths changed."""
    fine(train_on(own, models))
    moved = own.parent / "moved"
    own.rename(moved)
    lines = json.loads(mixture_of(moved).read_text())
    lines[0]["path"] = "../data/pairs.jsonl"
    mixture_of(moved).write_text(json.dumps(lines))
    fine(train_on(moved, models, "--runs", moved / "more"))


def test_pictures_that_are_gone_go_on(own, models):
    shutil.rmtree(own / "data" / "images")
    fine(train_on(own, models))


def test_captions_may_be_edited(own, models):
    fine(train_on(own, models))
    write_rows(own / "data", range(6), caption="other words {}")
    fine(train_on(own, models, "--runs", own / "more"))
    assert not same(load(own / "runs" / "tiny-joint")["model"], load(own / "more" / "tiny-joint")["model"])


# ---- changed pictures --------------------------------------------------------------------------------------

def keep_times(path, write):
    state = os.stat(path)
    write(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("change", ["other picture", "other picture of the same time", "touched", "format",
                                    "swapped", "same size"])
def test_a_changed_picture_is_refused(change, own, models):
    path = own / "data" / "images" / "3.png"
    if change == "other picture":
        path.write_bytes(png(77))
    elif change == "other picture of the same time":
        keep_times(path, lambda path: Image.new("RGB", (64, 64)).save(path))
    elif change == "touched":
        os.utime(path, (1e9, 1e9))
    elif change == "format":
        keep_times(path, lambda path: Image.open(path).rotate(90).save(path, "JPEG"))
    elif change == "swapped":
        other = own / "data" / "images" / "4.png"
        path.rename(own / "x")
        other.rename(path)
        (own / "x").rename(other)
    elif change == "same size":
        path.write_bytes(png(77)[:path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    assert_refused(own, models, r"3\.png|pairs", COMMAND)


@pytest.mark.parametrize("change, words", [
    ("append", ("6", "7|1 ")), ("remove", ("6", "5|1 ")), ("reorder", ("png|order",)),
    ("reverse", ("png|order",)), ("insert", ("6", "7|png")), ("replace", ("png",)),
    ("rename", ("png",)), ("swap two at the end", ("png|order",))])
def test_changed_rows_are_refused(change, words, own, models):
    data = own / "data"
    numbers = {"append": range(7), "remove": range(5), "reorder": [1, 0, 2, 3, 4, 5],
               "reverse": [5, 4, 3, 2, 1, 0], "insert": [6, 0, 1, 2, 3, 4, 5], "replace": [0, 1, 6, 3, 4, 5],
               "rename": [0, 1, 9, 3, 4, 5], "swap two at the end": [0, 1, 2, 3, 5, 4]}[change]
    if change in ("append", "insert", "replace"):
        (data / "images" / "6.png").write_bytes(png(6))
    if change == "rename":
        (data / "images" / "2.png").rename(data / "images" / "9.png")
    write_rows(data, numbers)
    assert_refused(own, models, *words)


def test_a_new_picture_in_a_folder_is_refused(models, tmp_path):
    """It sorts before the others and moves all of them on by one."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"{i}.png").write_bytes(png(i))
        (folder / f"{i}.txt").write_text(f"caption {i}")
    write_mixture(tmp_path / "mixture.json", (folder, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents"))
    fine(train_on(tmp_path, models, "--runs", tmp_path / "before"))
    (folder / "0.png").write_bytes(png(0))
    (folder / "0.txt").write_text("caption 0")
    assert_refused(tmp_path, models, "5", "6|0.png")
    (folder / "5.png").unlink()                                             # the count is as before
    (folder / "5.txt").unlink()
    assert_refused(tmp_path, models, "png")


@pytest.mark.parametrize("change", ["reorder", "append", "other pictures"])
def test_changed_shards_are_refused(change, models, tmp_path):
    shard = tmp_path / "data" / "00.tar"
    shard.parent.mkdir()
    write_shard(shard, range(6))
    write_mixture(tmp_path / "mixture.json", (shard, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents"))
    fine(train_on(tmp_path, models, "--runs", tmp_path / "before"))
    if change == "reorder":
        write_shard(shard, [1, 0, 2, 3, 4, 5])
    elif change == "append":
        write_shard(shard, range(7))
    else:
        write_shard(shard, range(6), words=lambda i: {"png": png(i + 50), "txt": f"caption {i}".encode()})
    os.utime(shard, (2e9, 2e9))
    assert_refused(tmp_path, models, "00.tar", COMMAND)


def test_a_parquet_file_of_other_rows_is_refused(models, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def write(numbers):
        pq.write_table(pa.table({"image": [{"bytes": png(i), "path": None} for i in numbers],
                                 "caption": [f"caption {i}" for i in numbers]}), tmp_path / "a.parquet")
    write(range(6))
    write_mixture(tmp_path / "mixture.json", (tmp_path / "a.parquet", "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents"))
    fine(train_on(tmp_path, models, "--runs", tmp_path / "before"))
    write([1, 0, 2, 3, 4, 5])
    os.utime(tmp_path / "a.parquet", (2e9, 2e9))
    assert_refused(tmp_path, models, "parquet", COMMAND)


# ---- other settings ----------------------------------------------------------------------------------------

def with_line(folder, **changes):
    lines = json.loads(mixture_of(folder).read_text())
    lines[0].update(changes)
    mixture_of(folder).write_text(json.dumps(lines))


def test_latents_of_another_task_are_refused(own, models):
    """Drawing crops its pictures to squares, understanding pads them."""
    with_line(own, task="image2text")
    done = draw(models.one, own / "runs", mixture_of(own), "--ratio", "image2text=1")
    refused(done, "image2text", "text2image")
    done, _ = inspect(mixture_of(own))
    refused(done, "image2text", "text2image")


def test_latents_of_another_source_are_refused(own, models):
    """Another list of as many pictures."""
    other = write_pictures(own / "other", 6)
    for i in range(6):
        (own / "other" / "images" / f"{i}.png").write_bytes(png(i + 20))
    with_line(own, path=str(other))
    refused(train_on(own, models), "png|pairs|source")


def test_latents_of_two_sources_swapped_are_refused(models, tmp_path):
    for k in range(2):
        write_pictures(tmp_path / str(k), 6)
        for i in range(6):
            (tmp_path / str(k) / "images" / f"{i}.png").write_bytes(png(6 * k + i))
    lines = [{"path": f"{k}/pairs.jsonl", "task": "text2image"} for k in range(2)]
    write_mixture(tmp_path / "mixture.json", *lines)
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents"))
    fine(train_on(tmp_path, models, "--runs", tmp_path / "before"))
    lines = json.loads(mixture_of(tmp_path).read_text())
    lines[0]["latents"], lines[1]["latents"] = lines[1]["latents"], lines[0]["latents"]
    mixture_of(tmp_path).write_text(json.dumps(lines))
    assert_refused(tmp_path, models, "png|pairs")


def test_latents_of_another_size_are_refused(own, models):
    refused(train_on(own, models, "--size", 128), "64", "128")


def test_latents_of_another_vae_are_refused(own, models):
    refused(draw(models.two, own / "runs", mixture_of(own)), "VAE", "latents")


@pytest.mark.parametrize("flags, options, words", [
    (("--center",), {}, ("crop|square|center",)), ((), {"size": 128}, ("64", "128|size")),
    ((), {"model": "two"}, ("VAE",)), ((), {"task": "image2text"}, ("task|image2text",))])
def test_caching_again_with_other_settings_is_refused(flags, options, words, own, models):
    model = models.two if options.pop("model", None) else models.one
    task = options.pop("task", "text2image")
    write_mixture(own / "mixture.json", {"path": "data/pairs.jsonl", "task": task})
    before = {path.name: path.read_bytes() for path in (own / "latents" / "0").iterdir()}
    refused(cache(model, own / "mixture.json", own / "latents", *flags, **options), *words)
    assert before == {path.name: path.read_bytes() for path in (own / "latents" / "0").iterdir()}


def test_tasks_of_padded_pictures_have_their_own_latents(models, tmp_path):
    """A cache of one middle square is none of padded squares, although both have one row a picture."""
    rows = write_pictures(tmp_path / "data")
    write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", "--center"))
    with_line(tmp_path, task="image2text")
    refused(draw(models.one, tmp_path / "runs", mixture_of(tmp_path), "--ratio", "image2text=1"),
            "image2text")


def test_the_shapes_world_shares_its_latents(models, tmp_path):
    """text2image, image2text, reca and mar: all pictures are square, so all squares are the same."""
    for recipe in ("tiny-mar", "tiny-joint", "tiny-reca"):
        flags = ("--init", models.one, "--runs", tmp_path, "--device", "cpu", "--scenes", 20, "--batch", 2,
                 "--micro-batch", 2, "--steps", 1, "--bf16", "false")
        fine(call("train.py", recipe, *flags))
    assert len(list(tmp_path.glob("latents-*"))) == 1


# ---- caching again -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", ["replaced", "appended", "reordered", "removed"])
def test_caching_again_makes_what_changed(change, own, models, tmp_path):
    if change == "replaced":
        (own / "data" / "images" / "3.png").write_bytes(png(77))
    elif change == "appended":
        write_pictures(own / "data", 7)
    elif change == "reordered":
        write_rows(own / "data", [1, 0, 2, 3, 4, 5])
    else:
        write_rows(own / "data", range(5))
    done = cache(models.one, own / "mixture.json", own / "latents")
    if done.status:                                                         # refused, with what to do
        refused(done, "latents", "delete|another|folder|--out")
        return
    fine(done)
    fine(train_on(own, models, "--runs", tmp_path / "more"))
    fine(cache(models.one, own / "mixture.json", own / "anew"))
    assert_same_latents(own / "latents" / "0", own / "anew" / "0")


def assert_same_latents(a, b):
    files = sorted(path.name for path in a.glob("*.safetensors"))
    assert files == sorted(path.name for path in b.glob("*.safetensors")) and files
    for name in files:
        assert same(load_file(a / name), load_file(b / name))


def small_shards():
    latents.SHARD = 4
    try:
        from harmonkit.data import caching
        caching.SHARD = 4
    except ImportError:
        pass


def test_caching_goes_on_after_a_change_in_between(models, tmp_path):
    """Interrupted after the first of two shards; then a picture of that shard is replaced."""
    write_mixture(tmp_path / "mixture.json", (write_pictures(tmp_path / "data", 8), "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", plant=small_shards))
    (tmp_path / "latents" / "0" / "00001.safetensors").unlink()
    (tmp_path / "data" / "images" / "1.png").write_bytes(png(77))
    done = cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", plant=small_shards)
    if done.status == 0:
        fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "anew", plant=small_shards))
        assert_same_latents(tmp_path / "latents" / "0", tmp_path / "anew" / "0")
    else:
        refused(done, "latents")


def test_shards_without_their_record_are_not_taken(models, own, tmp_path):
    """about.json was deleted; the shards are of another VAE."""
    (own / "latents" / "0" / "about.json").unlink()
    done = cache(models.two, own / "mixture.json", own / "latents")
    if done.status == 0:
        fine(cache(models.two, own / "mixture.json", own / "anew"))
        assert_same_latents(own / "latents" / "0", own / "anew" / "0")
    else:
        refused(done, "about.json|latents")


def test_leftovers_of_a_kill_are_removed(own, models):
    left = own / "latents" / "0" / ".00001.safetensors.abcdefgh.safetensors"
    left.write_bytes(b"half")
    os.utime(left, (1e9, 1e9))
    fine(cache(models.one, own / "mixture.json", own / "latents"))
    assert not left.exists()


# ---- damaged caches ----------------------------------------------------------------------------------------

SHARD_DAMAGES = {
    "hole": lambda path: hole(path, 0.5, 256), "a bit": lambda path: flip(path, 0.6), "cut": cut,
    "empty": lambda path: cut(path, 0), "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
}


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_a_damaged_shard_is_refused(damage, own, models):
    SHARD_DAMAGES[damage](own / "latents" / "0" / "00000.safetensors")
    done = train_on(own, models)
    refused(done, r"latents/0", COMMAND)


@pytest.mark.parametrize("damage", SHARD_DAMAGES)
def test_caching_again_mends_a_damaged_shard(damage, own, models, cached):
    SHARD_DAMAGES[damage](own / "latents" / "0" / "00000.safetensors")
    fine(cache(models.one, own / "mixture.json", own / "latents"))
    assert_same_latents(own / "latents" / "0", cached / "latents" / "0")
    fine(train_on(own, models))


@pytest.mark.parametrize("content", [b"", b'{"size": 64, "cou', b"[]", b"{}", b"\0" * 300])
def test_a_broken_record_is_one_line(content, own, models):
    (own / "latents" / "0" / "about.json").write_bytes(content)
    refused(train_on(own, models), "about.json|latents/0")
    not_silent(cache(models.one, own / "mixture.json", own / "latents"), "about.json|latents/0")


def test_a_cache_of_the_old_format_is_refused(own, models):
    about = json.loads((own / "latents" / "0" / "about.json").read_text())
    old = {key: about[key] for key in ("size", "count", "probe")}
    (own / "latents" / "0" / "about.json").write_text(json.dumps(old))
    refused(train_on(own, models), "about.json|latents/0", COMMAND)


# ---- unusable pictures -------------------------------------------------------------------------------------

def test_a_shard_of_one_broken_picture_is_no_end(models, tmp_path):
    """1,001 pictures: the second shard has only the last, and it is broken."""
    rows = write_pictures(tmp_path / "data", 1)
    numbers = [0] * 1000 + ["broken"]
    (tmp_path / "data" / "images" / "broken.png").write_bytes(b"not an image")
    write_rows(tmp_path / "data", numbers)
    write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", "--center", size=16),
         "broken.png")
    done = draw(models.one, tmp_path / "runs", mixture_of(tmp_path), "--size", 16)
    fine(done)


def test_shards_of_broken_pictures_alone_are_no_end(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 12)
    for i in (4, 5, 6, 7):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"not an image")
    write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", plant=small_shards), "4.png")


def test_no_usable_picture_at_all_is_one_line(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 3)
    for i in range(3):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"not an image")
    write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    refused(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents"), "pairs", "usable")


@pytest.mark.parametrize("broken", ["bytes", "gone", "tiny file"])
def test_too_many_broken_pictures_end_a_run_on_latents_too(broken, models, tmp_path):
    """More than 5% of a source are bad, from pixels and from latents."""
    rows = write_pictures(tmp_path / "data", 20)
    for i in range(0, 20, 4):
        path = tmp_path / "data" / "images" / f"{i}.png"
        path.unlink() if broken == "gone" else path.write_bytes(b"" if broken == "tiny file" else b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    refused(draw(models.one, tmp_path / "pixels", mixture, steps=40), "5%", "pairs")
    fine(cache(models.one, mixture, tmp_path / "latents"))
    refused(draw(models.one, tmp_path / "runs", mixture_of(tmp_path), steps=40), "5%", "pairs")


def test_few_broken_pictures_are_counted_in_the_log(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 20)
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, mixture, tmp_path / "latents"))
    for runs, data in (("pixels", mixture), ("latents-run", mixture_of(tmp_path))):
        done = fine(draw(models.one, tmp_path / runs, data, "--save-every", 100, steps=15), "skipped")
        assert done.err.count("skipped") == 1
        line = json.loads((tmp_path / runs / "tiny-joint" / "log.jsonl").read_text().splitlines()[-1])
        assert line["unusable"] == 1
    done, rows = inspect(mixture_of(tmp_path))
    assert (rows[0]["usable"], rows[0]["bad"]) == (19, 1), done


# ---- the disk and the other --------------------------------------------------------------------------------

def test_a_full_disk_in_caching_is_one_line(models, own, cached):
    shutil.rmtree(own / "latents")
    refused(cache(models.one, own / "mixture.json", own / "latents", plant=full_disk(2_000)),
            "safetensors|latents")
    fine(cache(models.one, own / "mixture.json", own / "latents"))
    assert_same_latents(own / "latents" / "0", cached / "latents" / "0")
    assert not list((own / "latents" / "0").glob(".*")), "half-written files stay"


def test_latents_pair_with_their_own_captions(models, tmp_path):
    """What training gets: the latents of picture i beside caption i, in any order of the samples."""
    rows = write_pictures(tmp_path / "data", 12)
    write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, tmp_path / "mixture.json", tmp_path / "latents", "--center", plant=small_shards))
    shards = [load_file(path) for path in sorted((tmp_path / "latents" / "0").glob("*.safetensors"))]
    expected = [shard["latents"][row, 0].float() for shard in shards for row in shard["row"]]

    def plant():
        small_shards()
        dataset = MixtureDataset(open_mixture(mixture_of(tmp_path)), {"text2image": 1}, 4, 64)
        for number in range(6):
            batch = dataset[number]
            for turns, row in zip(batch["turns"], batch["latents"]):
                words = turns[0][0]
                if "caption" in words:
                    i = int("".join(filter(str.isdigit, words.split("caption")[1])))
                    assert torch.equal(row, expected[i]), words
        print("paired")
        raise SystemExit(0)
    done = call("train.py", plant=plant)
    assert done.status == 0 and "paired" in done.out, done
