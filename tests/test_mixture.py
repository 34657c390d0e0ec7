"""Mixtures: what a wrong file is told, the order of a run, and the arguments of every loss."""
import json
import pickle
import random
from collections import Counter

import pytest
import torch
from data_files import LINES, RATIO, color, open_lines, png, write_shard, write_sources

from harmonkit.chat_template import GENERATE, IGNORE_INDEX, IMAGE_TOKEN_ID, UNCONDITIONAL
from harmonkit.data import mixture
from harmonkit.data.mixture import (
    Fit,
    MixtureDataset,
    SampleCounts,
    Source,
    loss_arguments,
    open_mixture,
    prepare,
)
from harmonkit.data.records import Sample, SkipSample
from harmonkit.data.sources import open_source


def world(task, count, latents=None):
    samples = open_source("shapes-text" if task == "text" else "shapes", count=count)
    return Source("shapes", task, 1, samples, latents)


class FlatLatents:
    """A cache of two crops of each image; all latents of a crop are one number."""

    def get(self, index, sample):
        return torch.stack([torch.full((2, 2, 4), 10.0 * index + crop) for crop in range(2)]).bfloat16()


# ---- files ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, message", [
    ({"path": "nowhere", "task": "text"}, "source 1: .*nowhere: no such file or folder"),
    ({"path": "shapes_photos", "task": "text2image"}, "source 1: .*/shapes_photos: no such file or folder"),
    ({"path": "classes", "task": "draw"}, "task 'draw' must be one of"),
    ({"path": "classes", "task": "text2image", "weight": 0}, "weight 0 a number above 0"),
    ({"path": "classes", "task": "text", "weight": "x"}, "weight 'x' a number above 0"),
    ({"path": "classes", "task": "text", "weight": float("nan")}, "weight nan a number above 0"),
    ({"path": "classes", "task": "text", "weight": float("inf")}, "weight inf a number above 0"),
    ({"path": "classes"}, "source 1: path and task are needed; here: path"),
    ({"task": "text"}, "source 1: path and task are needed; here: task"),
    ({"path": ["a.tar", "b.tar"], "task": "text2image"}, "path is .'a.tar', 'b.tar'.; a text is expected"),
    ({"path": "classes", "task": "text2image", "images": 3}, "images is 3; a text is expected"),
    ({"path": "classes", "task": "text2image", "colour": 1},
     "unknown key 'colour'; known: path, task, weight, latents, text, images, captions"),
    ({"path": "classes", "task": "text2image", "count": 1}, "classes: unknown option 'count'; a .* has capt"),
    ({"path": "classes", "task": "text2image", "text": 1}, "text is 1; the name of a field is expected"),
    ({"path": "{00000..00003}.tar", "task": "text2image"}, r"00002.tar: no such .*\(missing: 2 of 4\)"),
    ({"path": "images/0.png", "task": "text2image"}, "neither a folder nor"),
    ({"path": "captions", "task": "text2image"}, "no samples in it"),
    ({"path": "captions/0.json", "task": "text2image"}, "a list of samples is expected"),
    ({"path": "shapes", "task": "text2image", "latents": "nothing"}, "no latent cache"),
    ({"path": "shapes-text", "task": "text", "latents": "x"}, "the task text trains on no latents; leave"),
    ({"path": "shapes", "task": "text2image", "count": 0}, "no samples in it"),
    ({"path": "shapes", "task": "text2image", "count": "x"}, "count is 'x'; a whole number"),
])
def test_a_wrong_line_is_named(tmp_path, line, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"mixture.json: .*{message}"):
        open_lines(write_sources(tmp_path), line)


@pytest.mark.parametrize("content, message", [
    ("{", "not JSON"), ("[]", "a list of sources is expected"), ("[3]", "a list of sources is expected"),
    ('{"path": "shapes"}', "a list of sources is expected"),
])
def test_a_file_that_is_no_mixture(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json: {message}"):
        open_mixture(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="b.json: no such file"):
        open_mixture(tmp_path / "b.json")


def test_a_folder_is_no_mixture(tmp_path):
    with pytest.raises(ValueError, match="a folder; a JSON file that names it is expected"):
        open_mixture(tmp_path)


def test_a_mixture_in_toml(tmp_path):
    pytest.importorskip("tomllib")
    write_sources(tmp_path)
    (tmp_path / "a.toml").write_text('[[source]]\npath = "text.json"\ntask = "text"\nweight = 2.5\n')
    source, = open_mixture(tmp_path / "a.toml")
    assert (source.task, source.weight, len(source.samples)) == ("text", 2.5, 6)
    for content, message in {"path = ": "not TOML", "[path]": "a list of sources is expected"}.items():
        (tmp_path / "a.toml").write_text(content)
        with pytest.raises(ValueError, match=f"a.toml: {message}"):
            open_mixture(tmp_path / "a.toml")


# ---- samples and batches -------------------------------------------------------------------------------

def test_a_sample_that_lacks_a_part_is_skipped():
    empty = Sample("a", None)
    for task, reason in {"reca": "no image", "text": "no conversation or caption"}.items():
        with pytest.raises(SkipSample, match=f"a: {reason}"):
            prepare(empty, task, 64, random.Random(0))
    cached = torch.zeros(1, 8, 8, 4)
    with pytest.raises(SkipSample, match="a: no caption"):
        prepare(empty, "text2image", 64, random.Random(0), cached)


def test_an_image_with_a_caption_alone_is_described():
    row = prepare(Sample("a", None, caption=lambda rng: "an owl"), "text", 64, random.Random(0))
    assert row == {"turns": [(mixture.DESCRIBE, "an owl")]}


def test_a_tenth_of_captions_and_labels_is_dropped():
    source = world("text2image", 600, FlatLatents())
    turns = MixtureDataset([source], {"text2image": 1}, 600, 64)[0]["turns"]
    prompts = [prompt for [(prompt, answer)] in turns if answer is None]
    assert len(prompts) == 600
    captions = [prompt for prompt in prompts if prompt != UNCONDITIONAL]
    assert 0.86 < len(captions) / 600 < 0.94
    assert all(prompt.startswith(GENERATE.format(caption="")) for prompt in captions)
    labels = MixtureDataset([world("mar", 600, FlatLatents())], {"mar": 1}, 600, 64)[0]["labels"]
    assert 0.06 < (labels == -1).float().mean() < 0.14


def test_cached_latents_take_the_place_of_the_image():
    batch = MixtureDataset([world("reca", 3, FlatLatents())], {"reca": 1}, 12, 64)[0]
    assert batch["latents"].shape == (12, 2, 2, 4) and batch["latents"].dtype == torch.float32
    assert "pixels" not in batch
    assert set(batch["latents"][:, 0, 0, 0].tolist()) == {0, 1, 10, 11, 20, 21}     # both crops of each image


@pytest.mark.parametrize("task", ["text2image", "image2text", "reca", "text", "mar", "reconstruct"])
@pytest.mark.parametrize("cached", [False, True])
def test_the_arguments_of_every_loss(small, task, cached):
    batch = MixtureDataset([world(task, 20)], {task: 1}, 3, 64)[0]
    if cached and task != "text":
        batch["latents"] = small.encode(batch.pop("pixels"))                            # (3, 8, 8, 4)
    inputs = loss_arguments(small, batch)
    assert ("pixels" in inputs) == (task != "text" and not cached)
    assert ("latents" in inputs) == (task != "text" and cached)
    assert ("input_ids" in inputs) == (task not in ("mar", "reconstruct"))
    assert ("labels" in inputs) == (task in ("image2text", "text", "mar"))
    if task == "mar":
        assert inputs["labels"].shape == (3,)
    elif "input_ids" in inputs:
        num_image_tokens = 64 + 4 if task in ("image2text", "reca") else 0          # 8 × 8 and the buffers
        assert (inputs["input_ids"] == IMAGE_TOKEN_ID).sum(dim=1).tolist() == [num_image_tokens] * 3
        assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    if task in ("image2text", "text"):
        labelled = inputs["labels"] != IGNORE_INDEX
        assert torch.equal(inputs["labels"][labelled], inputs["input_ids"][labelled])
        assert labelled.any(dim=1).all() and inputs["attention_mask"][labelled].all()
        assert "assistant" not in small.tokenizer.decode(inputs["labels"][labelled].tolist())


def test_a_batch_without_labels_costs_nothing(small):
    batch = {"task": "text", "turns": [[("A question much longer than there is room for?", "yes")]]}
    inputs = loss_arguments(small, batch, max_length=4)
    assert inputs["input_ids"].shape == (1, 4)
    assert small.image2text_loss(None, **inputs).item() == 0


# ---- the order of a run --------------------------------------------------------------------------------

def test_sources_alternate_in_their_ratio(tmp_path):
    sources = open_lines(write_sources(tmp_path), *LINES)
    dataset = MixtureDataset(sources, RATIO, 1, 64)
    places = [dataset.place(number) for number in range(12 * 50)]
    counts = Counter(s for s, _ in places)
    tasks = Counter(sources[s].task for s, _ in places)
    assert tasks == {task: 50 * part for task, part in RATIO.items()}
    assert counts[1] == 3 * counts[0] == 3 * counts[2]                              # by weight within a task
    for source in range(6):
        assert [before for s, before in places if s == source] == list(range(counts[source]))
    with pytest.raises(ValueError, match="trains text2image, reca; .* text2image, image2text, text; .* same"):
        MixtureDataset(sources, {"text2image": 1, "reca": 1}, 1, 64)


def test_every_sample_comes_once_an_epoch_and_again_with_the_same_seed(tmp_path):
    sources = open_lines(write_sources(tmp_path), {"path": "text.json", "task": "text"})
    dataset = MixtureDataset(sources, {"text": 1}, 2, 64)
    first, second = [], []
    for number in range(3):                                                         # 3 × 2 of 6 samples
        first += map(str, dataset[number]["turns"])
        second += map(str, dataset[3 + number]["turns"])
    assert sorted(first) == sorted(second) and len(set(first)) == 6
    assert first != second
    same, other = (MixtureDataset(sources, {"text": 1}, 2, 64, seed)[4]["turns"] for seed in (0, 1))
    assert same == dataset[4]["turns"] != other


def test_samples_of_many_sources_are_permuted_once_an_epoch(monkeypatch):
    """And a source keeps the order of its current epoch only."""
    calls = []

    def permutation(count, *seed):
        calls.append(seed)
        return list(range(count))

    monkeypatch.setattr(mixture, "permutation", permutation)
    sources = [world("text", 4) for _ in range(100)]
    dataset = MixtureDataset(sources, {"text": 1}, 1, 64)
    for number in range(800):                                                       # two epochs of each
        dataset[number]
    assert sorted(calls) == [(0, s, epoch) for s in range(100) for epoch in range(2)]
    assert len(dataset.epochs) == 100


# ---- texts that are too long ---------------------------------------------------------------------------

def fit_of(small, max_length):
    return Fit.of(small, 64, max_length)


@pytest.mark.parametrize("task", ["text2image", "image2text", "text", "reca", "mar", "reconstruct"])
@pytest.mark.parametrize("max_length", [1024, 32])
def test_a_fit_gives_the_arguments_that_there_are_without(small, task, max_length):
    sources = [world(task, 20)]
    plain = MixtureDataset(sources, {task: 1}, 4, 64)
    fit = pickle.loads(pickle.dumps(fit_of(small, max_length)))
    fitted = MixtureDataset(sources, {task: 1}, 4, 64, fit=fit)
    for number in range(3):
        batch = fitted[number]
        assert batch["skipped"] == []
        expected = loss_arguments(small, plain[number], max_length)
        inputs = loss_arguments(small, batch, max_length)
        assert inputs.keys() == expected.keys()
        assert all(torch.equal(inputs[key], expected[key]) for key in inputs)
        longer = loss_arguments(small, plain[number])
        if "input_ids" in inputs:
            rows = zip(longer["attention_mask"].sum(1), inputs["attention_mask"].sum(1), strict=True)
            assert batch["cut"] == sum(int(full > cut) for full, cut in rows)


def chats(tmp_path, *lengths):
    """A source of conversations whose questions have so many words."""
    rows = []
    for length in lengths:
        rows.append({"messages": [{"role": "user", "content": "what " * length},
                                  {"role": "assistant", "content": "a red circle"}]})
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    return open_lines(tmp_path, {"path": "chats.json", "task": "text"})[0]


def test_samples_without_room_for_an_answer_are_replaced_and_counted(small, tmp_path):
    source = chats(tmp_path, *[1] * 30, 200)
    dataset = MixtureDataset([source], {"text": 1}, 31, 64, fit=fit_of(small, 40))
    counts, said = SampleCounts([source]), []
    for number in range(2):                                                         # two epochs
        batch = dataset[number]
        assert all(any(label != IGNORE_INDEX for label in labels) for _, labels in batch["ids"])
        counts.add(batch, said.append)
    assert said == [f"skipped {tmp_path}/chats.json:31: its question fills all 40 text tokens, so no answer "
                    "is left to learn; a larger --max-length has room for it"]
    assert counts.totals() == {"unusable": 1, "cut": 0}


def test_cut_answers_are_counted(small, tmp_path):
    source = chats(tmp_path, 1, 1, 8)
    uncut = MixtureDataset([source], {"text": 1}, 3, 64, fit=fit_of(small, 99))[0]["ids"]
    full = max(len(ids) for ids, _ in uncut)
    for max_length, cut in ((full, 0), (full - 1, 2)):                              # of two epochs
        dataset = MixtureDataset([source], {"text": 1}, 3, 64, fit=fit_of(small, max_length))
        counts = SampleCounts([source])
        for number in range(2):
            counts.add(dataset[number])
        assert counts.totals() == {"unusable": 0, "cut": cut}


def test_questions_that_are_all_too_long_stop_a_run(small, tmp_path):
    source = chats(tmp_path, *[200] * 8, *[1] * 92)
    dataset = MixtureDataset([source], {"text": 1}, 25, 64, fit=fit_of(small, 40))
    counts = SampleCounts([source])
    with pytest.raises(ValueError, match="chats.json: [678] of the first 100 samples are bad, more than 5%"):
        for number in range(4):
            counts.add(dataset[number], lambda line: None)
    with pytest.raises(ValueError, match="no usable sample among 100, the last: .*; a larger --max-length"):
        MixtureDataset([source], {"text": 1}, 25, 64, fit=fit_of(small, 5))[0]


@pytest.mark.parametrize("max_length", [1, 2, 3, 5])
def test_image_tokens_are_never_cut(small, max_length):
    batch = MixtureDataset([world("reca", 3)], {"reca": 1}, 2, 64, fit=fit_of(small, max_length))[0]
    input_ids = loss_arguments(small, batch)["input_ids"]
    assert (input_ids == IMAGE_TOKEN_ID).sum(dim=1).tolist() == [68, 68]


# ---- samples that cannot be used -----------------------------------------------------------------------

def test_bad_samples_of_one_name_count_each(tmp_path):
    source = world("text2image", 200)
    counts = SampleCounts([source])
    batch = {"source": 0, "turns": [[]] * 100}
    with pytest.raises(ValueError, match="shapes: 6 of the first 106 samples are bad"):
        skipped = [(i, SkipSample("a.tar", "broken")) for i in range(6)]
        counts.add(batch | {"skipped": skipped}, lambda line: None)


def test_an_error_in_a_data_reader_has_no_traceback(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(3), corrupt=range(3)))
    source = Source("a.tar", "text2image", 1, samples)
    dataset = MixtureDataset([source], {"text2image": 1}, 1, 64)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(2), num_workers=1)
    with pytest.raises(ValueError, match="^a.tar: no usable sample among 3, the last: .*it is text$"):
        SampleCounts([source]).add(next(iter(loader)))


def test_corrupt_images_are_skipped_counted_and_reported_once(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(300), corrupt=(7, 150, 222)))
    source = Source("a.tar", "text2image", 1, samples)
    dataset, counts, said = MixtureDataset([source], {"text2image": 1}, 50, 16), SampleCounts([source]), []
    for number in range(12):                                                        # two epochs
        batch = dataset[number]
        assert batch["pixels"].shape == (50, 3, 16, 16)
        counts.add(batch, said.append)
    assert (counts.used, counts.skipped, counts.bad) == ([600], [3], [3])
    assert len(said) == 3 and all("not an image" in line for line in said)
    assert {line.split(":")[1] for line in said} == {"000007", "000150", "000222"}


def test_the_next_sample_replaces_a_corrupt_one(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(8), corrupt=(3,)))
    dataset = MixtureDataset([Source("a.tar", "reca", 1, samples)], {"reca": 1}, 8, 8)
    drawn = [tuple(((image[:, 0, 0] + 1) * 127.5).round().int().tolist()) for image in dataset[0]["pixels"]]
    assert set(drawn) == {color(i) for i in range(8) if i != 3}
    assert [(index, error.name.split(":")[1]) for index, error in dataset[0]["skipped"]] == [(3, "000003")]


def test_images_outside_the_rules_are_not_bad(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(4)))
    source = Source("a.tar", "image2text", 1, samples)
    counts = SampleCounts([source])
    batch = {"source": 0, "turns": [[]] * 4}
    counts.add(batch | {"skipped": [(i, SkipSample(str(i), "too small", bad=False)) for i in range(4)]})
    assert (counts.skipped, counts.bad) == ([4], [0])
    counts.add(batch | {"skipped": [(5, SkipSample("x", "broken"))]})               # one is always allowed
    with pytest.raises(ValueError, match="a.tar: 2 of the first 4 samples are bad, more than 5%"):
        counts.add(batch | {"skipped": [(6, SkipSample("y", "broken"))]})


def test_too_many_bad_samples_stop_the_run(tmp_path):
    samples = open_source(write_shard(tmp_path / "a.tar", range(200), corrupt=range(0, 200, 10)))
    source = Source("a.tar", "text2image", 1, samples)
    dataset, counts = MixtureDataset([source], {"text2image": 1}, 25, 16), SampleCounts([source])
    with pytest.raises(ValueError, match="a.tar: .* of the first 1.. samples are bad, more than 5%"):
        for number in range(8):
            counts.add(dataset[number], lambda line: None)


def test_a_source_without_one_usable_sample(tmp_path):
    source, = open_lines(write_sources(tmp_path), {"path": "classes", "task": "text2image"})
    for file in (tmp_path / "classes").glob("*/*.png"):
        file.write_bytes(png(0)[:20])
    with pytest.raises(ValueError, match="no usable sample among 2, the last: .*/a.png: not an image"):
        MixtureDataset([source], {"text2image": 1}, 1, 64)[0]


def test_a_mixture_file_is_read_with_absolute_paths(tmp_path, monkeypatch):
    write_sources(tmp_path)
    (tmp_path / "mixture.json").write_text(json.dumps([LINES[0], LINES[5]]))
    monkeypatch.chdir(tmp_path / "images")
    pairs, shapes = open_mixture("../mixture.json")
    assert pairs.samples[2].caption(None) == "caption 2"
    assert (shapes.path, len(shapes.samples)) == ("shapes", 20)


def test_paths_in_the_home_folder_and_a_byte_order_mark(tmp_path, monkeypatch):
    write_sources(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    line = {"path": "~/data_info.json", "images": "~/images", "captions": "~/captions", "task": "text2image"}
    (tmp_path / "a" / "a.json").write_text("\ufeff" + json.dumps([line]), encoding="utf-8")
    toml = "".join(f"{key} = {json.dumps(value)}\n" for key, value in line.items())
    (tmp_path / "a" / "a.toml").write_text("\ufeff[[source]]\n" + toml, encoding="utf-8")
    for name in ("a.json", "a.toml"):
        source, = open_mixture(tmp_path / "a" / name)
        assert source.path == str(tmp_path / "data_info.json")
        assert source.samples[2].image().getpixel((5, 5)) == color(2)
        assert source.samples[2].caption(None) == "caption 2"
