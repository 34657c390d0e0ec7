"""Every data format gives the same kind of samples, and broken files are skipped by name."""
import json
import pickle
import random

import pytest
from data_files import CONVERSATION, LINES, color, open_lines, write_sources
from PIL import Image

from harmonkit.data.records import Sample, SkipSample, usable_image
from harmonkit.data.sources import open_source

TURNS = [("What is it?", "a color"), ("Sure?", "yes")]


def test_every_format(tmp_path):
    opened = open_lines(write_sources(tmp_path), *LINES)
    pairs, shards, classes, llava, text, world = [source.samples for source in opened]
    assert [len(source) for source in (pairs, shards, classes, llava, text, world)] == [6, 10, 2, 6, 6, 20]
    for source in (pairs, shards):
        assert source[4].caption(None) == "caption 4"
        assert source[4].image().size == (96, 120)
        assert source[4].image().getpixel((5, 5)) == color(4)
    assert [shards[i].caption(None) for i in range(10)] == [f"caption {i}" for i in range(10)]
    assert [(classes[i].caption(None), classes[i].label) for i in range(2)] == [("owl", 0), ("tree frog", 1)]
    assert llava[2].turns(None) == TURNS
    assert llava[2].image().getpixel((0, 0)) == color(2)
    assert text[1].turns(None) == [("Is it 1?", "yes, 1")]
    assert text[1].image is None
    assert world[3].image().size == (64, 64)
    assert world[3].turns(random.Random(0)) and world[3].caption(random.Random(0)) and world[3].label >= 0


def test_sources_cross_processes(tmp_path):
    for source in open_lines(write_sources(tmp_path), *LINES):
        again = pickle.loads(pickle.dumps(source.samples))
        assert len(again) == len(source.samples) and again.kind == source.samples.kind
        caption, turns = again[1].caption, again[1].turns
        assert (caption or turns)(random.Random(0)) == (source.samples[1].caption or turns)(random.Random(0))


def test_conversations_in_a_list_and_on_lines_are_alike(tmp_path):
    entries = [{"id": 'an "annotation"', "conversations": CONVERSATION}] * 3
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, entries)))
    for name in ("list.json", "lines.jsonl"):
        source = open_source(str(tmp_path / name))
        assert [source[i].turns(None) for i in range(len(source))] == [TURNS] * 3


def test_broken_files_are_skipped_by_name(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "captions" / "2.json").write_text("{")
    (tmp_path / "captions" / "3.json").write_text("3")
    (tmp_path / "captions" / "4.json").write_text('{"caption": {"a": 1}}')
    (tmp_path / "images" / "5.png").write_bytes(b"not an image")
    pairs, = open_lines(tmp_path, LINES[0])
    reasons = {1: "1.png: no such", 2: "2.json: not JSON", 3: "no object", 4: "not dict", 5: "not an image"}
    for i, reason in reasons.items():
        with pytest.raises(SkipSample, match=f"data_info.json:{i + 1}: .*{reason}") as error:
            pairs.samples[i].image()
        assert error.value.bad
    assert pairs.samples[0].image().getpixel((0, 0)) == color(0)


@pytest.mark.parametrize("line, reason", [
    ('{"image": "0.png", "convers', "not JSON"),
    ('{"images": ["0.png", "1.png"], "caption": "x"}', "several images in one sample"),
    ('{"image": 7, "caption": "x"}', "its image is of type int; a path is expected"),
    ('{"conversations": [{"from": "human"}]}', "no answered question"),
    ('{"conversations": [{"from": "gpt", "value": "hm"}]}', "do not alternate"),
    ('{"conversations": [{"from": "human", "value": "hm"}]}', "no answered question"),
    ('{"messages": [{"role": "user", "content": "<image>"}, {"role": "bot", "content": "m"}]}', "a turn"),
    ('{"conversations": []}', "neither an image nor a conversation"),
    ('{"conversations": 3}', "its conversations are not a list of turns"),
    ('[1]', "an object with fields is expected, not list"),
])
def test_broken_lines_are_skipped_by_number(tmp_path, line, reason):
    good = json.dumps({"conversations": CONVERSATION})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n{good}")
    source = open_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(SkipSample, match=f"a.jsonl:2: .*{reason}"):
        source[1].image()
    assert source[0].turns(None) == source[2].turns(None) == TURNS


def test_images_outside_the_rules_are_skipped_but_not_bad():
    sample = Sample("a", lambda: Image.new("RGB", (60, 90)))
    assert usable_image(sample, "text2image", 256).size == (60, 90)
    with pytest.raises(SkipSample, match="a: 60×90 pixels, sides must be above 80") as error:
        usable_image(sample, "image2text", 256)
    assert not error.value.bad


@pytest.mark.parametrize("path", ["shapes", "shapes-text", "text.json"])
def test_unknown_options_are_refused(tmp_path, path):
    path = path if path.startswith("shapes") else str(write_sources(tmp_path) / path)
    with pytest.raises(ValueError, match=f"{path}: unknown option 'colour'; a .* has "):
        open_source(path, colour=1)


def test_a_skipped_sample_crosses_processes():
    error = pickle.loads(pickle.dumps(SkipSample("a.tar:7", "too small", bad=False)))
    assert (error.name, error.reason, error.bad) == ("a.tar:7", "too small", False)
    assert str(error) == "a.tar:7: too small"
