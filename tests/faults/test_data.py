"""Data as they come: damage is found and counted, what is cut is told, and no mixture blocks a run."""
import io
import json
import os
import shutil
import tarfile
import time

import pytest
import torch
from data_files import png, write_shard

from faults.helpers import (
    call,
    cut,
    draw,
    fine,
    full_disk,
    inspect,
    log,
    not_silent,
    refused,
    run,
    told,
    write_mixture,
    write_pictures,
    write_rows,
)
from harmonkit.data.sources import open_source


def places(path):
    """Where each member of a tar file begins: {name: (header, data, size)}."""
    with tarfile.open(path) as tar:
        return {member.name: (member.offset, member.offset_data, member.size) for member in tar}


def overwrite(path, start, content):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(content)


def shard_mixture(tmp_path, count=20, **options):
    shard = tmp_path / "00.tar"
    write_shard(shard, range(count), **options)
    return shard, write_mixture(tmp_path / "mixture.json", (shard, "text2image"))


def captions_in_a_fork(mixture):
    """{caption: color of the image's middle} of a mixture's first source, read in a process of its own."""
    def plant():
        from harmonkit.data.mixture import open_mixture
        samples = open_mixture(mixture)[0].samples
        rows = {}
        for i in range(len(samples)):
            rows[samples[i].caption(None)] = samples[i].image().convert("RGB").getpixel((5, 5))
        print(json.dumps(rows))
        raise SystemExit(0)
    done = call("train.py", plant=plant)
    assert done.status == 0, done
    return {caption: tuple(pixel) for caption, pixel in json.loads(done.out).items()}


def expected(numbers):
    return {f"caption {i}": png_color(i) for i in numbers}


def png_color(i):
    from PIL import Image
    return Image.open(io.BytesIO(png(i))).getpixel((5, 5))


# ---- damaged shards ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["zeros", "garbage", "a bit", "zeros over a whole sample",
                                    "two zero blocks"])
def test_damage_in_the_middle_of_a_shard_is_told(damage, models, tmp_path):
    """tarfile takes a damaged header for the end of the shard: half of the samples were lost."""
    shard, mixture = shard_mixture(tmp_path)
    header, _, _ = places(shard)["000010.png"]
    if damage == "a bit":
        overwrite(shard, header + 3, b"X")
    else:
        size = {"zeros over a whole sample": 4096, "two zero blocks": 1024}.get(damage, 512)
        overwrite(shard, header, os.urandom(size) if damage == "garbage" else bytes(size))
    done, rows = inspect(mixture)
    fine(done)
    assert rows[0]["bad"] >= 1 and "00.tar" not in rows[0]["reasons"], rows
    assert any("shard" in reason or "tar" in reason for reason in rows[0]["reasons"]), rows
    done, rows = inspect(mixture)                                           # from the index
    assert rows[0]["bad"] >= 1, "told by the first start alone"


def test_a_joined_shard_is_told_or_read(tmp_path):
    """`cat a.tar b.tar`: tarfile ends at the first end mark."""
    write_shard(tmp_path / "a.tar", range(10))
    write_shard(tmp_path / "b.tar", range(10, 20))
    (tmp_path / "00.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    done, rows = inspect(write_mixture(tmp_path / "mixture.json", (tmp_path / "00.tar", "text2image")))
    fine(done)
    assert rows[0]["samples"] == 20 or rows[0]["bad"] >= 1, rows


@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_a_cut_shard_is_told(share, tmp_path):
    shard, mixture = shard_mixture(tmp_path)
    cut(shard, share)
    done, rows = inspect(mixture)
    fine(done)
    assert rows[0]["bad"] in (1, 2) and rows[0]["usable"] == rows[0]["samples"] - rows[0]["bad"]


def test_a_shard_cut_between_two_files_is_told(tmp_path):
    """It lacks the end mark that every writer puts there."""
    shard, mixture = shard_mixture(tmp_path)
    os.truncate(shard, places(shard)["000010.png"][0])
    done, rows = inspect(mixture)
    fine(done)
    assert rows[0]["bad"] == 1 or "00.tar" in done.err, rows


def test_a_damaged_picture_in_a_shard_is_one_bad_sample(tmp_path):
    shard, mixture = shard_mixture(tmp_path)
    _, start, size = places(shard)["000010.png"]
    overwrite(shard, start, bytes(size))
    done, rows = inspect(mixture)
    assert (rows[0]["samples"], rows[0]["usable"], rows[0]["bad"]) == (20, 19, 1), done


def test_training_on_a_damaged_shard_tells(models, tmp_path):
    shard, mixture = shard_mixture(tmp_path, 40)
    overwrite(shard, places(shard)["000020.png"][0], bytes(512))
    done = draw(models.one, tmp_path / "runs", mixture, "--batch", 8, "--micro-batch", 8, "--save-every",
                100, steps=6)
    not_silent(done, "00.tar")


# ---- indices -----------------------------------------------------------------------------------------------

def same_state(path, write):
    """Write a file anew with the size and the time it had."""
    state = os.stat(path)
    write(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(path).st_size == state.st_size, "the test wants the same size"


@pytest.mark.parametrize("how", ["written over", "moved there", "other pictures"])
def test_an_index_does_not_survive_another_shard(how, tmp_path):
    """Same size, same time, other order of the samples."""
    shard, mixture = shard_mixture(tmp_path, 6)
    assert captions_in_a_fork(mixture) == expected(range(6))
    assert (tmp_path / "00.tar.index").exists()

    def write(path):
        if how == "moved there":
            write_shard(tmp_path / "new.tar", [5, 4, 3, 2, 1, 0])
            os.replace(tmp_path / "new.tar", path)
        elif how == "written over":
            write_shard(path, [5, 4, 3, 2, 1, 0])
        else:
            write_shard(path, [0, 1, 2, 3, 5, 4])
    same_state(shard, write)
    assert captions_in_a_fork(mixture) == expected(range(6))


def test_an_index_of_another_shard_is_not_taken(tmp_path):
    """Files of different lengths under the same total: the places of one are no places of the other."""
    shard, mixture = shard_mixture(tmp_path, 4)
    captions_in_a_fork(mixture)

    def write(path):
        write_shard(path, [3, 1, 0, 2])
    same_state(shard, write)
    assert captions_in_a_fork(mixture) == expected(range(4))


INDEX_DAMAGES = {
    "empty": lambda text: "", "cut in a line": lambda text: text[:len(text) // 2 + 3],
    "cut at a line": lambda text: "".join(text.splitlines(True)[:4]),
    "the head alone": lambda text: text.splitlines(True)[0],
    "without its last line end": lambda text: text[:-1],
    "a line less": lambda text: "".join(text.splitlines(True)[:-1]),
    "a line more": lambda text: text + text.splitlines(True)[-1], "zeros": lambda text: "\0" * len(text),
    "a hole": lambda text: text[:200] + "\0" * 40 + text[240:], "garbage": lambda text: "garbage\n" * 9,
    "a list": lambda text: "[]\n", "null": lambda text: "null\n" + text,
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_a_damaged_index_is_made_anew(damage, tmp_path):
    shard, mixture = shard_mixture(tmp_path, 6)
    captions_in_a_fork(mixture)
    index = tmp_path / "00.tar.index"
    index.write_text(INDEX_DAMAGES[damage](index.read_text()))
    assert captions_in_a_fork(mixture) == expected(range(6))
    done, rows = inspect(mixture)
    fine(done)
    assert (rows[0]["samples"], rows[0]["usable"]) == (6, 6)


def test_an_index_that_is_a_folder_does_no_harm(tmp_path):
    (tmp_path / "00.tar.index").mkdir()
    _, mixture = shard_mixture(tmp_path, 6)
    assert captions_in_a_fork(mixture) == expected(range(6))


def test_an_index_that_cannot_be_written_does_no_harm(tmp_path):
    _, mixture = shard_mixture(tmp_path, 30)
    done, rows = inspect(mixture, plant=full_disk(100))
    fine(done)
    assert rows[0]["usable"] == 30
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


def test_a_cut_index_is_trained_on(models, tmp_path):
    shard, mixture = shard_mixture(tmp_path, 6)
    fine(draw(models.one, tmp_path / "runs", mixture, steps=1))
    (tmp_path / "00.tar.index").write_text("")
    fine(draw(models.one, tmp_path / "runs", mixture, steps=2))


def test_many_shards_take_no_longer(tmp_path):
    """A sample of 100 shards takes about as long as one of 10."""
    write_shard(tmp_path / "000.tar", range(200), words=lambda i: {"png": b"no image", "txt": b"caption"})
    for k in range(1, 100):
        shutil.copy(tmp_path / "000.tar", tmp_path / f"{k:03d}.tar")

    def seconds(pattern, count):
        samples = open_source(str(tmp_path / pattern))
        assert len(samples) == 200 * count
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        times = []
        for i in order[:400]:
            began = time.perf_counter()
            samples[i]
            times.append(time.perf_counter() - began)
        return sum(sorted(times[200:])[:190]) / 190                          # the first opened the shards
    few, many = seconds("00{0..9}.tar", 10), seconds("*.tar", 100)
    assert many < 4 * few + 3e-4, f"{1e3 * few:.2f} ms with 10 shards, {1e3 * many:.2f} ms with 100"


# ---- what is cut -------------------------------------------------------------------------------------------

LONG = "Is it red or blue or green or yellow or purple or black? " * 8


def write_chats(file, questions, answer="yes"):
    rows = [{"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            for question in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chats(models, tmp_path, questions, *flags, answer="yes", **options):
    mixture = write_mixture(tmp_path / "mixture.json",
                            (write_chats(tmp_path / "chats.jsonl", questions, answer), "text"))
    return mixture, run(models.one, tmp_path / "runs", "--mixture", mixture, "--max-length", 40,
                        "--save-every", 100, *flags, **options)


def test_questions_that_leave_no_answer_end_a_run(models, tmp_path):
    _, done = chats(models, tmp_path, [LONG] * 20, steps=20)
    refused(done, "chats", "max.length|answer|5%|usable")


def test_a_quarter_of_such_questions_ends_a_run(models, tmp_path):
    _, done = chats(models, tmp_path, ["Is it red?", "Is it blue?", "No?", LONG] * 5, steps=20)
    refused(done, "chats", "5%|max.length")


def test_a_few_such_questions_are_replaced_and_counted(models, tmp_path):
    _, done = chats(models, tmp_path, ["Is it red?"] * 39 + [LONG], "--batch", 4, "--micro-batch", 4,
                    steps=20)
    fine(done, "max.length", "answer", r"chats.jsonl:40")
    line = log(tmp_path / "runs" / "tiny-llm")[-1]
    assert line["unusable"] == 1 and line["cut"] == 0 and line["loss"]["text"] > 0


def test_cut_answers_are_counted(models, tmp_path):
    _, done = chats(models, tmp_path, ["Is it red?"] * 20, answer="yes " * 100)
    fine(done)
    line = log(tmp_path / "runs" / "tiny-llm")[-1]
    assert line["cut"] == 6, line
    assert line["loss"]["text"] > 0


def test_cut_captions_are_counted(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6, caption="a very long caption {} " * 20)
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(draw(models.one, tmp_path / "runs", mixture, "--max-length", 30, "--seed", 1))
    assert log(tmp_path / "runs" / "tiny-joint")[-1]["cut"] >= 4            # one in ten is left out
    done, rows = inspect(mixture, "--max-length", 30)
    fine(done)
    assert rows[0].get("cut") >= 4, rows


@pytest.mark.parametrize("task", ["image2text", "text2image"])
def test_nothing_cut_is_counted_as_nothing(task, models, tmp_path):
    mixture = write_mixture(tmp_path / "mixture.json", (write_pictures(tmp_path / "data", 6), task))
    fine(run(models.one, tmp_path / "runs", "--mixture", mixture, "--ratio", f"{task}=1",
             recipe="tiny-joint"))
    line = log(tmp_path / "runs" / "tiny-joint")[-1]
    assert (line["cut"], line["unusable"]) == (0, 0)


def test_inspect_counts_what_a_run_would_cut(models, tmp_path):
    mixture, _ = chats(models, tmp_path, ["Is it red?"] * 3 + [LONG], steps=1)
    done, rows = inspect(mixture, "--max-length", 40)
    fine(done)
    assert (rows[0]["usable"], rows[0]["bad"]) == (3, 1), rows
    assert any("max-length" in reason for reason in rows[0]["reasons"]), rows
    done, rows = inspect(mixture)
    assert (rows[0]["usable"], rows[0]["bad"]) == (4, 0), rows


def test_inspect_prints_what_a_run_would_cut(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6, caption="a very long caption {} " * 20)
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    done = fine(call("harmonkit.data", "inspect", mixture, "--size", 64, "--out", tmp_path / "sheet.png",
                     "--max-length", 30))
    assert "6" in done.out and "cut" in done.out, done


def test_a_long_question_about_a_picture_is_counted_on_latents_too(models, tmp_path):
    from faults.helpers import cache
    write_pictures(tmp_path / "data", 20)
    rows = [{"image": f"images/{i}.png", "conversations": [
        {"from": "human", "value": LONG if i == 7 else "What is it?"}, {"from": "gpt", "value": "a color"}]}
        for i in range(20)]
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = write_mixture(tmp_path / "mixture.json", (tmp_path / "data" / "pairs.jsonl", "image2text"))
    fine(cache(models.one, mixture, tmp_path / "latents"))
    for name, data in (("pixels", mixture), ("cached", tmp_path / "latents" / "mixture.json")):
        done = run(models.one, tmp_path / name, "--mixture", data, "--ratio", "image2text=1", "--max-length",
                   60,
                   "--save-every", 100, recipe="tiny-joint", steps=15)
        fine(done, "max.length")
        assert log(tmp_path / name / "tiny-joint")[-1]["unusable"] == 1


def test_a_conversation_whose_first_answer_fits_is_used(models, tmp_path):
    rows = [{"conversations": [
        {"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes"},
        {"from": "human", "value": LONG}, {"from": "gpt", "value": "no"}]}] * 6
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = write_mixture(tmp_path / "mixture.json", (tmp_path / "chats.jsonl", "text"))
    fine(run(models.one, tmp_path / "runs", "--mixture", mixture, "--max-length", 60))
    line = log(tmp_path / "runs" / "tiny-llm")[-1]
    assert line["loss"]["text"] > 0 and line["unusable"] == 0 and line["cut"] == 6


# ---- bad entries -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.txt", "pairs.json",
                                  "folder"])
def test_bad_entries_that_share_a_name_count_each(name, models, tmp_path):
    """A quarter of 40 entries name the same missing picture."""
    numbers = ["gone" if i % 4 == 0 else i for i in range(40)]
    write_pictures(tmp_path, 40)
    rows = [{"file_name" if name == "folder" else "image": f"images/{i}.png", "caption": f"caption {k}"}
            for k, i in enumerate(numbers)]
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        shutil.move(tmp_path / "images", path / "images")
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith(".txt"):
        path.write_text("".join(f"{row['image']}\t{row['caption']}\n" for row in rows))
    elif name == "pairs.json":
        (tmp_path / "0.json").write_text('{"caption": "a color"}')
        path.write_text(json.dumps([{"image": row["image"], "annotation": "0.json"} for row in rows]))
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows))
    elif name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        between = "," if name.endswith(".csv") else "\t"
        table = [["image", "caption"], *(row.values() for row in rows)]
        path.write_text("".join(between.join(row) + "\n" for row in table))
    mixture = write_mixture(tmp_path / "mixture.json", (path, "text2image"))
    done = draw(models.one, tmp_path / "runs", mixture, "--batch", 8, "--micro-batch", 8, "--save-every", 100,
                steps=10)
    refused(done, "5%")


def test_bad_entries_of_two_sources_count_in_each(models, tmp_path):
    """The same rows for two tasks; the names of the bad ones are the same in both."""
    rows = write_pictures(tmp_path / "data", 20)
    for i in (3, 7):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"no image")
    few = write_rows(tmp_path / "data", range(8), "few.jsonl")
    many = write_pictures(tmp_path / "data", 100, "many.jsonl")
    for i in (3, 7):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (many, "text2image"), (few, "image2text"))
    assert rows.exists()
    done = run(models.one, tmp_path / "runs", "--mixture", mixture, "--ratio", "text2image=8,image2text=1",
               "--batch", 20, "--micro-batch", 20, "--save-every", 100, recipe="tiny-joint", steps=12)
    refused(done, "few.jsonl", "5%")


def test_bad_entries_of_one_name_in_a_shard_count_each(models, tmp_path):
    """Stems that occur twice, in two shards."""
    for k in range(4):
        write_shard(tmp_path / f"{k}.tar", range(10), corrupt=(0, 1, 2))
    mixture = write_mixture(tmp_path / "mixture.json", (tmp_path / "*.tar", "text2image"))
    done = draw(models.one, tmp_path / "runs", mixture, "--batch", 8, "--micro-batch", 8, "--save-every", 100,
                steps=10)
    refused(done, "5%")


def test_a_bad_entry_met_in_each_epoch_counts_once(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 30)
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    done = draw(models.one, tmp_path / "runs", mixture, "--batch", 10, "--micro-batch", 10, "--save-every",
                100,
                steps=12)
    assert fine(done).err.count("skipped ") == 1
    assert log(tmp_path / "runs" / "tiny-joint")[-1]["unusable"] == 1


# ---- mixtures ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights", [
    (1, 1e-9), (1e9, 1), (1, 1e-300), (1e308, 1e308), (3.14159265, 2.718281828), (1, 1e-5), (123457, 99991)])
def test_uneven_weights_take_neither_memory_nor_time(weights, models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6)
    lines = [{"path": str(rows), "task": "text2image", "weight": weight} for weight in weights]
    mixture = write_mixture(tmp_path / "mixture.json", *lines)

    def plant():
        import resource
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 ** 31,) * 2)
    began = time.time()
    not_silent(draw(models.one, tmp_path / "runs", mixture, plant=plant, limit=40))
    assert time.time() - began < 20


@pytest.mark.parametrize("ratio", ["text2image=1e9,image2text=1", "text2image=1,image2text=1e-9"])
def test_uneven_ratios_take_neither_memory_nor_time(ratio, models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6)
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"), (rows, "image2text"))
    done = run(models.one, tmp_path / "runs", "--mixture", mixture, "--ratio", ratio, recipe="tiny-joint",
               limit=40)
    not_silent(done)


@pytest.mark.parametrize("weight", [0, -1, "1", True, None, float("nan"), float("inf")])
def test_no_weight_is_one_line(weight, models, tmp_path):
    rows = write_pictures(tmp_path / "data", 2)
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps([{"path": str(rows), "task": "text2image", "weight": weight}]))
    refused(draw(models.one, tmp_path / "runs", mixture), "weight")


def test_the_mixture_is_opened_before_the_model(tmp_path):
    """A wrong path in it need not wait for gigabytes of weights."""
    done = draw(tmp_path / "no-model", tmp_path / "runs", tmp_path / "no-mixture.json")
    refused(done, "no-mixture.json")
    mixture = write_mixture(tmp_path / "mixture.json", (tmp_path / "no-data.jsonl", "text2image"))
    refused(draw(tmp_path / "no-model", tmp_path / "runs", mixture), "no-data.jsonl")


def test_tasks_are_compared_before_the_model_is_loaded(tmp_path):
    mixture = write_mixture(tmp_path / "mixture.json", (write_pictures(tmp_path / "data", 2), "image2text"))
    refused(draw(tmp_path / "no-model", tmp_path / "runs", mixture), "image2text", "text2image")


def test_latents_are_compared_before_the_model_is_loaded(tmp_path, models):
    from faults.helpers import cache
    rows = write_pictures(tmp_path / "data", 4)
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(cache(models.one, mixture, tmp_path / "latents"))
    write_rows(tmp_path / "data", [1, 0, 2, 3])
    refused(draw(tmp_path / "no-model", tmp_path / "runs", tmp_path / "latents" / "mixture.json"), "png")


def test_a_source_with_nothing_usable_is_one_line(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 3)
    for i in range(3):
        (tmp_path / "data" / "images" / f"{i}.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    for workers in (0, 1):
        done = draw(models.one, tmp_path / "runs", mixture, "--workers", workers)
        refused(done, "pairs.jsonl", "usable|5%")


def test_one_broken_picture_is_told_with_readers_too(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 30)
    (tmp_path / "data" / "images" / "3.png").write_bytes(b"no image")
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    done = draw(models.one, tmp_path / "runs", mixture, "--workers", 2, "--save-every", 100, steps=30)
    told(fine(done), "3.png")
