"""Records: reasons that can be counted, junk, images from bytes, and the words in files of one stem."""
import io
import json
import random
from collections import Counter

import pytest
from data_files import color, png

from harmonkit.data.records import (
    Sample,
    SkipSample,
    fields_of_files,
    image_of,
    is_junk,
    lacking,
    read_image,
    sample_of,
    skip_errors,
    usable_image,
)
from harmonkit.data.words import clean, decode, words_of


def reason(error):
    with pytest.raises(SkipSample) as skipped, skip_errors("a.json:7"):
        raise error
    return skipped.value.reason


@pytest.mark.parametrize("name, expected", [
    ("a/._0.jpg", True), ("__MACOSX/a/0.jpg", True), ("a/__MACOSX/0.jpg", True), (".DS_Store", True),
    ("a/Thumbs.db", True), ("a/thumbs.db", True), ("desktop.ini", True), (".cache/0.jpg", True),
    ("a\\._0.jpg", True), ("@eaDir/0.jpg", True),
    ("./0.jpg", False), ("../a/0.jpg", False), ("a.b/0.jpg", False), ("0._jpg", False), ("_0.jpg", False),
])
def test_junk(name, expected):
    assert is_junk(name) == expected


def test_reasons_are_the_same_for_all_samples_with_a_fault(tmp_path):
    reasons = Counter()
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"not an image")
        for name in (f"{i}.png", f"missing-{i}.png"):
            with pytest.raises(SkipSample) as error:
                read_image(f"a.json:{i}", tmp_path / name)
            reasons[error.value.reason] += 1
            assert str(error.value).startswith(f"a.json:{i}: {tmp_path}/{name}: ")
        with pytest.raises(SkipSample) as error, skip_errors(f"a.json:{i}"):
            json.loads(" " * i + "{")
        reasons[error.value.reason] += 1
    assert set(reasons.values()) == {4} and len(reasons) == 3
    assert reasons["no such file"] == 4
    assert reasons["not JSON (Expecting property name enclosed in double quotes)"] == 4


def test_reasons_of_errors():
    assert reason(KeyError("caption")) == "no 'caption' in it"
    assert reason(ValueError("a text")) == "a text"
    assert reason(TypeError("a text")) == "TypeError: a text"
    assert reason(PermissionError(13, "Permission denied", "/a/b")) == "permission denied"
    assert reason(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad")) == "its text is not valid Unicode, in UTF-8"


def test_a_skipped_sample_can_be_printed():
    error = SkipSample("caf\udce9.png", "a \ud83d")
    assert str(error).encode() == rb"caf\udce9.png: a \ud83d"


def test_an_image_of_a_record_in_bytes():
    for value in (png(3), {"bytes": png(3), "path": "x.png"}, [png(3)], [{"bytes": png(3), "path": None}]):
        assert image_of("a", {"image": value})().getpixel((0, 0)) == color(3)
    with pytest.raises(SkipSample, match="^a: not an image|^a: .*image") as error:
        image_of("a", {"image": b"not an image"})()
    assert error.value.name == "a"
    assert image_of("a", {"caption": "x"}) is None


def test_an_image_read_from_a_function_keeps_the_samples_name():
    def open_file():
        file = io.BytesIO(b"not an image")
        file.name = "a.tar"
        return file

    with pytest.raises(SkipSample) as error:
        read_image("a.tar:0007", open_file)
    assert error.value.name == "a.tar:0007" and "a.tar" not in error.value.reason


@pytest.mark.parametrize("files, expected", [
    ({".txt": b"x"}, {".txt": "x"}),
    ({".json": b'{"a": 1}', ".txt": b"x", ".caption": b"y"}, {"a": 1, ".caption": "y", ".txt": "x"}),
    ({".json": b'"c"'}, {"caption": "c"}), ({".json": b'["c", "d"]'}, {"caption": ["c", "d"]}),
    ({".json": b'[{"caption": "c"}]'}, {"caption": "c"}), ({".json": b"[1]", ".txt": b"x"}, {".txt": "x"}),
    ({".json": b'[{"from": "human", "value": "a"}]'}, {"conversations": [{"from": "human", "value": "a"}]}),
    ({}, {}),
])
def test_a_record_in_files(files, expected):
    readers = {suffix: (lambda content=content: content) for suffix, content in files.items()}
    assert fields_of_files(readers) == expected


def test_files_without_a_record():
    with pytest.raises(ValueError, match="its .json holds no object, caption or conversation"):
        fields_of_files({".json": lambda: b"3"})


def test_the_order_of_files_and_fields():
    fields = {"caption": None, ".txt": "t"}
    assert words_of(fields).captions == ("t",)
    assert words_of({".txt": "t", ".caption": "c"}).captions == ("c",)
    assert words_of({".txt": "t", "prompt": "p"}).captions == ("p",)
    assert words_of({".txt": "t", "prompt": "p"}, text="txt").captions == ("t",)
    assert words_of({".txt": "t", "prompt": ""}, text=["prompt", ".txt"]).captions == ("t",)


def test_text_of_any_encoding():
    assert decode(b"\xef\xbb\xbfa\xc3\xa9") == decode("aé".encode("utf-16")) == "aé"
    assert decode(b"") == ""
    for data in (b"caf\xe9", b"\xed\xa0\xbd"):
        with pytest.raises(ValueError, match="its text is not valid Unicode"):
            clean(decode(data))


def test_a_sample_says_what_it_lacks():
    sample = sample_of("a", {"image": "0.png", "title": "x"}, image=lambda: None)
    assert lacking("caption", sample) == "no caption, and the task needs one; its fields are image, title"
    assert lacking("image", Sample("a", None)) == "no image, and the task needs one"
    with pytest.raises(SkipSample, match="a: no image, and the task needs one"):
        usable_image(Sample("a", None), "reca", 64)


def test_drawing_a_caption_uses_the_generator_only_if_there_are_several():
    rng = random.Random(0)
    state = rng.getstate()
    assert sample_of("a", {"caption": ["x", ""]}, image=lambda: None).caption(rng) == "x"
    assert rng.getstate() == state
    sample_of("a", {"caption": ["x", "y"]}, image=lambda: None).caption(rng)
    assert rng.getstate() != state
