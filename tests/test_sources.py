"""Every data format gives the same kind of samples, and broken files are skipped by name."""
import json
import pickle
import random
import tarfile

import pytest
from data_files import CONVERSATION, LINES, color, open_lines, write_shard, write_sources
from PIL import Image

from harmonkit.data import sources
from harmonkit.data.sources import Sample, SkipSample, open_source, usable_image

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


def test_conversations_in_a_list_and_on_lines_are_alike(tmp_path):
    entries = [{"id": 'an "annotation"', "conversations": CONVERSATION}] * 3
    (tmp_path / "list.json").write_text(json.dumps(entries))
    (tmp_path / "lines.jsonl").write_text("\n\n".join(map(json.dumps, entries)))
    for name in ("list.json", "lines.jsonl"):
        source = open_source(str(tmp_path / name))
        assert [source[i].turns(None) for i in range(len(source))] == [TURNS] * 3


def test_captions_and_conversations_in_a_shard(tmp_path):
    def words(i):
        content = {"conversations": CONVERSATION} if i else {"caption": "long"}
        return {"json": json.dumps(content).encode()}

    source = open_source(write_shard(tmp_path / "a.tar", range(2), words=words))
    assert (source[0].caption(None), source[0].turns) == ("long", None)
    assert (source[1].caption, source[1].turns(None)) == (None, TURNS)


def test_patterns_of_shards(tmp_path):
    for i in range(8, 12):
        write_shard(tmp_path / f"a{i:03d}.tar", [i])
    expected = [f"caption {i}" for i in range(8, 12)]
    for pattern in ("a{008..011}.tar", "a*.tar", "a0{08..11}.tar", "a{0..0}{08..11}.tar"):
        source = open_source(str(tmp_path / pattern))
        assert [source[i].caption(None) for i in range(len(source))] == expected, pattern
    with pytest.raises(FileNotFoundError, match=r"a012.tar: no such file or folder \(missing: 2 of 3\)"):
        open_source(str(tmp_path / "a{011..013}.tar"))
    with pytest.raises(FileNotFoundError, match=r"b\*.tar: no such file"):
        open_source(str(tmp_path / "b*.tar"))


def test_a_sample_without_the_needed_files(tmp_path):
    files = [{"cls": b"7"}, {"txt": b"words", "png": None}, {"txt": b"words"}]
    source = open_source(write_shard(tmp_path / "a.tar", range(3), words=files.__getitem__))
    for i in range(2):
        with pytest.raises(SkipSample, match=f"a.tar:00000{i}: an image with a .txt or .json is expected"):
            source[i]
    assert source[2].caption(None) == "words"


def test_broken_files_are_skipped_by_name(tmp_path):
    write_sources(tmp_path)
    (tmp_path / "images" / "1.png").unlink()
    (tmp_path / "captions" / "2.json").write_text("{")
    (tmp_path / "captions" / "3.json").write_text('{"text": "x"}')
    (tmp_path / "captions" / "4.json").write_text('{"caption": " "}')
    (tmp_path / "images" / "5.png").write_bytes(b"not an image")
    pairs, = open_lines(tmp_path, LINES[0])
    reasons = {1: "1.png: no such", 2: "2.json: not JSON", 3: "no 'caption'", 4: "empty", 5: "not an image"}
    for i, reason in reasons.items():
        with pytest.raises(SkipSample, match=f"data_info.json:{i + 1}: .*{reason}") as error:
            pairs.samples[i].image()
        assert error.value.bad
    assert pairs.samples[0].image().getpixel((0, 0)) == color(0)


@pytest.mark.parametrize("line, reason", [
    ('{"image": "0.png", "convers', "JSONDecodeError"),
    ('{"image": "0.png"}', "no 'conversations' in it"),
    ('{"conversations": [{"from": "human"}]}', "no 'value' in it"),
    ('{"conversations": [{"from": "gpt", "value": "hm"}]}', "must alternate"),
    ('{"conversations": [{"from": "human", "value": "hm"}]}', "must alternate"),
    ('{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "m"}]}', "must"),
    ('{"conversations": []}', "must alternate"),
    ('{"conversations": 3}', "TypeError"),
    ('[1]', "TypeError"),
])
def test_broken_lines_are_skipped_by_number(tmp_path, line, reason):
    good = json.dumps({"conversations": CONVERSATION})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n{good}")
    source = open_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(SkipSample, match=f"a.jsonl:2: .*{reason}"):
        source[1]
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
    with pytest.raises(ValueError, match=f"{path}: got an unexpected keyword argument 'colour'"):
        open_source(path, colour=1)


def test_a_skipped_sample_crosses_processes():
    error = pickle.loads(pickle.dumps(SkipSample("a.tar:7", "too small", bad=False)))
    assert (error.name, error.reason, error.bad) == ("a.tar:7", "too small", False)
    assert str(error) == "a.tar:7: too small"


def test_a_truncated_shard_keeps_its_complete_samples(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(20))
    with tarfile.open(path) as tar:
        end = tar.getmember("000012.png").offset_data + 100
    with open(path, "r+b") as file:
        file.truncate(end)
    source = open_source(path)
    good, bad = [], []
    for i in range(len(source)):
        try:
            source[i].image()
            good.append(i)
        except SkipSample as error:
            bad.append(error.name.split(":")[1])
    assert good == list(range(12))
    assert bad == ["000012", "(the shard ends too early)"]


def test_a_shard_that_ends_inside_an_image(tmp_path):
    """The image is the last file, so the shard loses nothing else."""
    path = write_shard(tmp_path / "a.tar", [0], words=lambda i: {})
    sources.shard_index.cache_clear()
    with tarfile.open(path) as tar:
        member = tar.getmember("000000.png")
    with pytest.raises(ValueError, match="a.tar ends inside the sample"):
        sources.read_part(path, member.offset_data, 10 ** 6)
    assert len(sources.read_part(path, member.offset_data, member.size).read()) == member.size


def test_the_index_of_a_shard_is_kept_until_the_shard_changes(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "a.tar", range(4))
    assert len(open_source(path)) == 4
    assert (tmp_path / "a.tar.index").exists()

    sources.shard_index.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "scan", lambda path: pytest.fail("the shard was scanned again"))
        source = open_source(path)
        assert [source[i].caption(None) for i in range(4)] == [f"caption {i}" for i in range(4)]

    sources.shard_index.cache_clear()
    write_shard(path, range(2, 8))
    source = open_source(path)
    assert [source[i].caption(None) for i in range(6)] == [f"caption {i}" for i in range(2, 8)]


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\n", b"not JSON"])
def test_a_broken_index_is_replaced(tmp_path, content):
    path = write_shard(tmp_path / "a.tar", range(3))
    (tmp_path / "a.tar.index").write_bytes(content)
    source = open_source(path)
    assert [source[i].caption(None) for i in range(3)] == ["caption 0", "caption 1", "caption 2"]
    assert json.loads((tmp_path / "a.tar.index").read_text().splitlines()[0])["count"] == 3


def test_a_compressed_shard_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(ValueError, match="a.tar: not an uncompressed tar file"):
        open_source(str(tmp_path / "a.tar"))
