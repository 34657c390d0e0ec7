"""Folders of images: words beside them, metadata, class folders, and images without words."""
import json
import os
import random
import re

import pytest
from data_files import CONVERSATION, color, png

from harmonkit.data import folders
from harmonkit.data.mixture import prepare
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source

TURNS = [("What is it?", "a color"), ("Sure?", "yes")]


def fill(folder, files):
    """Write files. A number is an image of that color; lists and dictionaries become JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = png(content)
        elif isinstance(content, (dict, list)):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def open_folder(folder, files, **options):
    return open_source(str(fill(folder, files)), **options)


def captions(source):
    return [sample.caption and sample.caption(None) for sample in map(source.__getitem__, range(len(source)))]


def pixels(source):
    return [source[i].image().getpixel((5, 5)) for i in range(len(source))]


# ---- words beside the images ---------------------------------------------------------------------------

@pytest.mark.parametrize("files, expected", [
    ({"000.png": 0, "000.txt": "zero", "001.png": 1, "001.txt": "one\n"}, ["zero", "one"]),
    ({"b/0.png": 0, "b/0.txt": "zero", "a/0.png": 1, "a/0.txt": "one"}, ["one", "zero"]),
    ({"a.png": 0, "a.caption": "zero", "b.PNG": 1, "b.TXT": "one"}, ["zero", "one"]),
    ({"a.png": 0, "a.json": {"prompt": "zero"}, "b.png": 1, "b.json": {"text": "one"}}, ["zero", "one"]),
    ({"a.png": 0, "a.json": {"caption": None}, "a.txt": "zero"}, ["zero"]),
    ({"a.png": 0, "a.json": {"caption": "zero"}, "a.txt": "txt"}, ["zero"]),
    ({"a.png": 0, "a.json": {"width": 96, "shapes": []}, "a.txt": "zero"}, ["zero"]),
    ({"a.png": 0, "a.json": '"zero"'}, ["zero"]),
    ({"a.png": 0, "a.json": [{"text": "zero"}]}, ["zero"]),
    ({"a.png": 0, "a.json": [{"bbox": [0, 1]}, {"bbox": [1, 2]}], "a.txt": "zero"}, ["zero"]),
    ({"a.b.png": 0, "a.b.txt": "zero", "a.txt": "no"}, ["zero"]),
    ({"a.png": 0, "a.png.txt": "zero"}, ["zero"]),
    ({"a.png": 0, "a.txt": b"\xef\xbb\xbfzero"}, ["zero"]),
    ({"a.png": 0, "a.txt": "zéro".encode("utf-16")}, ["zéro"]),
    ({"a.png": 0, "a.txt": "zero", "._a.png": 1, "._a.txt": "x", ".b.png": 2, "__MACOSX/a.png": 3,
      "Thumbs.db": "x", "__MACOSX/a.txt": "x", ".cache/a.png": 3, "README.txt": "about"}, ["zero"]),
])
def test_words_of_the_same_stem(tmp_path, files, expected):
    source = open_folder(tmp_path, files)
    assert source.kind == "folder of images with captions"
    assert captions(source) == expected


def test_images_and_words_go_together(tmp_path):
    files = {f"{i:03d}.png": i for i in range(12)} | {f"{i:03d}.txt": f"number {i}" for i in range(12)}
    source = open_folder(tmp_path, files)
    assert captions(source) == [f"number {i}" for i in range(12)]
    assert pixels(source) == [color(i) for i in range(12)]


def test_several_captions_and_conversations_in_a_json(tmp_path):
    files = {"a.png": 0, "a.json": {"caption": ["x", "y"]}, "d.png": 3, "d.json": ["x", "y"],
             "b.png": 1, "b.json": {"conversations": CONVERSATION}, "c.png": 2, "c.json": CONVERSATION}
    source = open_folder(tmp_path, files)
    for i in (0, 3):
        assert {source[i].caption(random.Random(seed)) for seed in range(20)} == {"x", "y"}
    assert source[1].turns(None) == source[2].turns(None) == TURNS


def test_a_chosen_field_beside_an_image(tmp_path):
    files = {"a.png": 0, "a.json": {"caption": "c", "title": "t"}, "a.txt": "x"}
    for text, expected in {"title": "t", "txt": "x", ".txt": "x"}.items():
        assert captions(open_folder(tmp_path, files, text=text)) == [expected]
    assert captions(open_folder(tmp_path, files, text=["nothing", "title"])) == ["t"]


def test_words_in_another_folder(tmp_path):
    fill(tmp_path / "images", {"a/0.png": 0, "1.png": 1})
    fill(tmp_path / "words", {"a/0.txt": "zero", "1.json": {"text": "one"}})
    source = open_source(str(tmp_path / "images"), captions=str(tmp_path / "words"))
    assert (captions(source), pixels(source)) == (["one", "zero"], [color(1), color(0)])


def test_a_folder_of_words_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        open_folder(tmp_path, {"0.png": 0}, captions=str(tmp_path / "nowhere"))


def test_an_image_without_words_among_others_is_bad(tmp_path):
    words = {"x/0.txt": "zero", "x/1.txt": "", "x/3.json": "{", "x/4.txt": b"caf\xe9"}
    source = open_folder(tmp_path, {f"x/{i}.png": i for i in range(5)} | words)
    assert source[0].label == -1
    assert source[0].caption(None) == "zero"
    for i in (1, 2):
        with pytest.raises(SkipSample, match=f"x/{i}.png: no caption, and the task needs one") as error:
            prepare(source[i], "text2image", 64, random.Random(0))
        assert error.value.bad
    with pytest.raises(SkipSample, match="x/3.png: not JSON"):
        source[3]
    with pytest.raises(SkipSample, match="x/4.png: its text is not valid Unicode"):
        source[4]


# ---- metadata ------------------------------------------------------------------------------------------

ROWS = [{"file_name": "1.png", "text": "one"}, {"file_name": "sub/0.png", "text": "zero"}]


@pytest.mark.parametrize("name, content", [
    ("metadata.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS)),
    ("metadata.jsonl", "".join(json.dumps(row).replace("text", "prompt") + "\r\n" for row in ROWS)),
    ("metadata.csv", "file_name,text\n1.png,one\nsub/0.png,zero\n"),
    ("metadata.csv", "caption,file_name\n\"one\",1.png\nzero,sub/0.png\n"),
])
@pytest.mark.parametrize("split", ["", "train/"])
def test_a_folder_with_metadata(tmp_path, name, content, split):
    files = {f"{split}1.png": 1, f"{split}sub/0.png": 0, f"{split}{name}": content, f"{split}1.txt": "no"}
    source = open_folder(tmp_path, files)
    assert source.kind == "folder of images with metadata"
    assert (captions(source), pixels(source)) == (["one", "zero"], [color(1), color(0)])


def test_metadata_in_each_split(tmp_path):
    files = {"train/0.png": 0, "train/metadata.jsonl": '{"file_name": "0.png", "text": "zero", "note": "n0"}',
             "test/0.png": 1, "test/metadata.jsonl": '{"file_name": "0.png", "text": "one", "note": "n1"}'}
    source = open_folder(tmp_path, files)
    assert (captions(source), pixels(source)) == (["one", "zero"], [color(1), color(0)])
    assert captions(open_source(str(tmp_path), text="note")) == ["n1", "n0"]


def test_metadata_of_an_image_that_is_missing(tmp_path):
    source = open_folder(tmp_path, {"0.png": 0, "metadata.jsonl": '{"file_name": "9.png", "text": "nine"}'})
    with pytest.raises(SkipSample, match="metadata.jsonl:1: .*9.png: no such file"):
        source[0].image()


def test_metadata_in_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    fill(tmp_path, {"train/1.png": 1, "train/sub/0.png": 0})
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train" / "metadata.parquet")
    source = open_source(str(tmp_path))
    assert (captions(source), pixels(source)) == (["one", "zero"], [color(1), color(0)])


# ---- class folders -------------------------------------------------------------------------------------

def names_and_labels(source):
    return [(source[i].caption and source[i].caption(None), source[i].label) for i in range(len(source))]


IMAGENET = {"n01443537/a.png": 1, "n01440764/b/a.png": 0, "n15075141/a.png": 2}


@pytest.mark.parametrize("prefix", ["", "train/", "ILSVRC/Data/CLS-LOC/train/"])
def test_imagenets_synsets_are_known(tmp_path, prefix):
    source = open_folder(tmp_path, {f"{prefix}{name}": content for name, content in IMAGENET.items()})
    assert source.kind == "class folders, named by ImageNet-1k"
    assert names_and_labels(source) == [("tench", 0), ("goldfish", 1), ("toilet tissue", 999)]
    assert pixels(source) == [color(0), color(1), color(2)]


def test_synsets_in_the_names_of_files(tmp_path):
    source = open_folder(tmp_path, {"n01440764_18.png": 0, "ILSVRC2012_val_00000003_n01443537.png": 1})
    assert names_and_labels(source) == [("goldfish", 1), ("tench", 0)]


@pytest.mark.parametrize("name, content", [
    ("classes.json", {"n01443537": "gold fish", "n01440764": "tinca, Tinca tinca", "n15075141": "paper"}),
    ("imagenet_class_index.json", {"0": ["n01440764", "tinca"], "1": ["n01443537", "gold_fish"],
                                   "999": ["n15075141", "paper"]}),
    ("LOC_synset_mapping.txt", "n01440764 tinca, Tinca tinca\nn01443537 gold fish, x\nn15075141 paper\n"),
    ("classes.json", ["tinca", "gold fish", "paper"]),
    ("classes.json", {"n15075141": ["paper", "tissue"], "n01443537": ["gold fish"], "n01440764": ["tinca"]}),
    ("words.txt", "n00001740\tentity\nn01440764\ttinca, x\nn01443537\tgold fish\nn15075141\tpaper\n"),
])
@pytest.mark.parametrize("place", ["a/b", "a", "."])
def test_names_of_classes_in_a_file(tmp_path, name, content, place):
    fill(tmp_path / "a" / "b", IMAGENET)
    fill(tmp_path, {f"{place}/{name}": content})
    source = open_source(str(tmp_path / "a" / "b"))
    assert source.kind == f"class folders, named by {name}"
    assert names_and_labels(source) == [("tinca", 0), ("gold fish", 1), ("paper", 999)]


def test_labels_of_synsets_beyond_imagenet_1k_are_in_their_own_order(tmp_path):
    names = "n01440764\ttench, x\nn00001740\tentity\nn00004475\torganism, being\n"
    source = open_folder(tmp_path, {"n01440764/0.png": 0, "n00004475/0.png": 1, "words.txt": names})
    assert names_and_labels(source) == [("organism", 0), ("tench", 1)]


@pytest.mark.parametrize("content, expected", [
    ({"owl": "an owl", "tree_frog": "a frog"}, [("an owl", 0), ("a frog", 1)]),
    ({"tree_frog": "a frog, green", "owl": "an owl"}, [("an owl", 1), ("a frog, green", 0)]),
    ({"tree_frog": 0, "owl": 1, "other": 2}, [("owl", 1), ("tree frog", 0)]),
    (["tree_frog", "bear", "owl"], [("owl", 2), ("tree frog", 0)]),
    (["an owl", "a frog"], [("an owl", 0), ("a frog", 1)]),
    ({"0": "an owl", "1": "a frog"}, [("an owl", 0), ("a frog", 1)]),
    ({"an owl": "owl", "a frog": "tree_frog"}, [("an owl", 0), ("a frog", 1)]),
    ({"owl": ["an owl", "strix"], "tree_frog": ["a frog"]}, [("an owl", 0), ("a frog", 1)]),
])
def test_names_of_other_classes(tmp_path, content, expected):
    source = open_folder(tmp_path, {"owl/0.png": 0, "tree_frog/0.png": 1, "classes.json": content})
    assert names_and_labels(source) == expected


def test_names_of_numbered_folders(tmp_path):
    files = {"0/a.png": 0, "10/a.png": 1, "2/a.png": 2}
    assert captions(open_folder(tmp_path, files)) == ["0", "10", "2"]
    source = open_folder(tmp_path, {**files, "classes.json": [f"class {i}" for i in range(11)]})
    assert names_and_labels(source) == [("class 0", 0), ("class 10", 10), ("class 2", 2)]


@pytest.mark.parametrize("content, message", [
    (["a", "b", "c"], "3 class names, but 2 class folders"), ({"bear": "a bear"}, "none of the class"),
    ("{", "not JSON"), ("3", "class names are expected"), ({"owl": {"a": 1}}, "class names are expected"),
    ([1.5, "b"], "class names are expected"), ("[]", "class names are expected"),
])
def test_names_that_do_not_fit(tmp_path, content, message):
    files = {"owl/0.png": 0, "tree_frog/0.png": 1, "classes.json": content}
    with pytest.raises(ValueError, match=f"classes.json: {message}"):
        open_folder(tmp_path, files)


@pytest.mark.parametrize("folder, expected", [
    ("tree_frog", "tree frog"), ("001.Black_footed_Albatross", "Black footed Albatross"), ("7", "7"),
    ("10_sks dog", "sks dog"), ("n99999999", None), ("00042", None), ("n02085620-Chihuahua", "Chihuahua"),
    ("train/owl", "owl"), ("a/abbey", "abbey"), ("owl/small", "owl"), ("images", None), ("3d", "3d"),
])
def test_names_of_folders(tmp_path, folder, expected):
    assert captions(open_folder(tmp_path, {f"{folder}/a.png": 0})) == [expected]


def test_words_beside_an_image_win_over_its_class(tmp_path):
    files = {"owl/0.png": 0, "owl/0.txt": "a snowy owl", "owl/1.png": 1, "bear/0.png": 2}
    source = open_folder(tmp_path / "owls", files)
    assert names_and_labels(source) == [("bear", 0), ("a snowy owl", 1), ("owl", 1)]
    files = {"n01440764/0.png": 0, "n01440764/1.png": 1, "n01440764/1.txt": "a fish"}
    source = open_folder(tmp_path / "imagenet", files)
    assert names_and_labels(source) == [("tench", 0), ("a fish", 0)]
    fill(tmp_path / "imagenet", {"n01440764/2.png": 1, "n01440764/2.txt": "two"})
    source = open_source(str(tmp_path / "imagenet"))
    assert names_and_labels(source) == [("tench", 0), ("a fish", 0), ("two", 0)]


def test_images_beside_class_folders_are_none_of_them(tmp_path):
    source = open_folder(tmp_path / "classes", {"owl/0.png": 0, "bear/0.png": 1, "preview.png": 2})
    assert captions(source) == ["bear", "owl"]
    assert source.kind == "class folders, named by the folders"
    files = {f"{i}.png": i for i in range(5)} | {"owl/0.png": 0, "bear/0.png": 1}
    source = open_folder(tmp_path / "flat", files)
    assert captions(source)[:5] == [None] * 5 and len(source) == 7


def test_names_two_folders_above_may_be_of_other_data(tmp_path):
    fill(tmp_path, {"a/b/owl/0.png": 0, "a/b/bear/0.png": 0, "classes.json": ["x"]})
    assert captions(open_source(str(tmp_path / "a" / "b"))) == ["bear", "owl"]
    with pytest.raises(ValueError, match="1 class names, but 2 class folders"):
        open_folder(tmp_path / "a" / "b", {"../classes.json": ["x"]})


# ---- images without words ------------------------------------------------------------------------------

@pytest.mark.parametrize("files", [{"0.png": 0, "1.JPG": 1}, {"images/0.png": 0, "images/1.jpeg": 1}])
def test_images_without_words(tmp_path, files):
    source = open_folder(tmp_path, files)
    assert source.kind == "folder of images"
    assert pixels(source) == [color(0), color(1)] and names_and_labels(source) == [(None, -1)] * 2
    assert prepare(source[0], "reca", 64, random.Random(0))["pixels"].shape == (1, 3, 64, 64)
    with pytest.raises(SkipSample, match="0.png: no caption, and the task needs one"):
        prepare(source[0], "text2image", 64, random.Random(0))


def test_the_order_is_that_of_the_paths(tmp_path):
    """Caches and runs depend on it: folders and files by name, part by part."""
    names = ["a/b.png", "a-1/b.png", "a.png", "B/a.png", "a/a/z.png", "10.png", "9.png"]
    source = open_folder(tmp_path, {name: 0 for name in names} | {"9.txt": "nine"})
    assert source.entries == ["10.png", "9.png", "B/a.png", "a/a/z.png", "a/b.png", "a-1/b.png", "a.png"]


def test_a_folder_is_listed_once_an_opening(tmp_path, monkeypatch):
    fill(tmp_path, {"owl/0.png": 0, "bear/0.png": 1})
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(folders.os, "scandir", lambda path: listed.append(path) or scandir(path))
    assert len(open_source(str(tmp_path))) == 2
    assert len(listed) == 3
    assert len(open_folder(tmp_path, {"owl/1.png": 2})) == 3


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path, {"0.png": 0, "0.txt": "zero"})
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"not an image")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("one")
    source = open_source(str(tmp_path))
    assert captions(source) == ["zero", "one"]
    with pytest.raises(SkipSample) as error:
        source[1].image()
    assert str(error.value).encode().endswith(b"caf\\udce9.png: " + error.value.reason.encode())


def test_links_between_folders_end(tmp_path):
    fill(tmp_path / "real", {"0.png": 0})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "owl").symlink_to(tmp_path / "real")
    (tmp_path / "photos" / "up").symlink_to(tmp_path / "photos")
    assert captions(open_source(str(tmp_path / "photos"))) == ["owl"]


def test_a_folder_without_images(tmp_path):
    held = {".md (1)": {"sub/readme.md": "x"}, ".txt (2), .md (1)": {"a.txt": "", "b.txt": "", "c.md": ""},
            ".bin (1)": {"data.bin": "x"}, "nothing": {".a.png": 0}}
    for i, (words, files) in enumerate(held.items()):
        with pytest.raises(ValueError, match=f"{i}: no samples in it; it holds {re.escape(words)}"):
            open_folder(tmp_path / str(i), files)


def test_images_outside_the_class_folders_are_told(tmp_path, capsys):
    source = open_folder(tmp_path, {"owl/0.png": 0, "frog/1.png": 1, "frog/2.png": 2, "stray.png": 3})
    assert len(source) == 3
    assert "1 of 4 images lie in no class folder and are not used" in capsys.readouterr().err
    (tmp_path / "stray.png").unlink()
    open_source(tmp_path)
    assert capsys.readouterr().err == ""
