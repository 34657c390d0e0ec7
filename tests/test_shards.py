"""WebDataset: which files of a tar are a sample, its words and its class, and the shards of a pattern."""
import io
import json
import os
import pickle
import random
import tarfile

import pytest
from data_files import CONVERSATION, color, png, write_shard, write_tar

from harmonkit.data.paths import expand, expand_braces
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source

TURNS = [("What is it?", "a color"), ("Sure?", "yes")]


def captions(source):
    return [source[i].caption(random.Random(0)) for i in range(len(source))]


def as_json(**content):
    return json.dumps(content).encode()


# ---- words ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [
    {"key": "0", "url": "https://a.b/c.jpg", "status": "success", "width": 96},         # img2dataset's forms
    {"caption": None}, {"caption": ""}, {"caption": " \n"}, {},
])
def test_the_txt_counts_where_the_json_has_no_caption(tmp_path, content):
    words = {"txt": b"a red owl\n", "json": as_json(**content)}
    source = open_source(write_shard(tmp_path / "a.tar", range(12), words=lambda i: words))
    assert captions(source) == ["a red owl"] * 12
    assert source[7].image().getpixel((5, 5)) == color(7)


@pytest.mark.parametrize("files, caption", [
    ({"json": as_json(prompt="a prompt")}, "a prompt"),
    ({"json": as_json(prompt="a prompt"), "txt": b"alt text"}, "a prompt"),
    ({"json": as_json(text="a text", prompt="a prompt")}, "a text"),
    ({"json": as_json(caption="a caption", prompt="a prompt"), "txt": b"alt text"}, "a caption"),
    ({"json": b"\xef\xbb\xbf" + as_json(caption="a mark")}, "a mark"),
    ({"json": b'"only a text"'}, "only a text"),
    ({"caption": b"a caption", "txt": b"alt text"}, "a caption"),
    ({"txt": b"\xef\xbb\xbfa mark\r\n"}, "a mark"),
    ({"TXT": b"upper case"}, "upper case"),
    ({"png.txt": b"the whole name"}, "the whole name"),
])
def test_words_of_a_sample(tmp_path, files, caption):
    source = open_source(write_shard(tmp_path / "a.tar", range(2), words=lambda i: files))
    assert captions(source) == [caption] * 2


def test_the_field_of_the_words_can_be_chosen(tmp_path):
    words = {"json": as_json(caption="short", prompt="", long="a long one"), "txt": b"alt text"}
    path = write_shard(tmp_path / "a.tar", range(1), words=lambda i: words)
    for text, caption in (("long", "a long one"), ("txt", "alt text"), (["prompt", "long"], "a long one")):
        assert captions(open_source(path, text=text)) == [caption]
    with pytest.raises(SkipSample, match="a.tar:000000: no 'prompt' in it, or it is empty"):
        open_source(path, text="prompt")[0]


def test_a_list_of_captions_is_drawn_from(tmp_path):
    path = write_shard(tmp_path / "a.tar", [0], words=lambda i: {"json": as_json(caption=["one", "two"])})
    sample = open_source(path)[0]
    assert {sample.caption(random.Random(seed)) for seed in range(20)} == {"one", "two"}


# ---- classes -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content, label, caption", [
    (b"207", 207, "golden retriever"), (b"0\n", 0, "tench"), (b"999", 999, "toilet tissue"),
    (b"n01440764", 0, "tench"), (b"tree_frog", -1, "tree frog"), (b"a lynx of mine", -1, "a lynx of mine"),
])
def test_a_label_has_its_name_in_imagenet(tmp_path, content, label, caption):
    path = write_shard(tmp_path / "a.tar", range(12), words=lambda i: {"cls": content})
    sample = open_source(path)[3]
    assert sample.label == label
    assert sample.caption is None if caption is None else sample.caption(None) == caption


def test_a_json_without_words_leaves_the_label(tmp_path, capsys):
    words = {"json": as_json(label=1, filename="1.JPEG"), "cls": b"1"}                  # timm/imagenet-1k-wds
    source = open_source(write_shard(tmp_path / "a.tar", range(2), words=lambda i: words))
    assert "a.tar: labels are taken for ImageNet-1k's; a classes.json" in capsys.readouterr().err
    assert (source.kind, captions(source)) == ("WebDataset, labels named by ImageNet-1k", ["goldfish"] * 2)


def test_a_label_keeps_the_words_beside_it(tmp_path):
    words = {"cls": b"3", "txt": b"my words"}
    source = open_source(write_shard(tmp_path / "a.tar", [0], words=lambda i: words))
    assert (source[0].label, captions(source), source.kind) == (3, ["my words"], "WebDataset")


@pytest.mark.parametrize("name, content", [
    ("classes.json", '["a cat", "a_dog"]'), ("classes.json", '{"0": "a cat", "1": "a dog"}'),
    ("class_to_idx.json", '{"a_dog": 1, "a_cat": 0}'), ("classnames.txt", "a cat\na dog\n"),
    ("imagenet_class_index.json", '{"0": ["n1", "a_cat"], "1": ["n2", "a_dog"]}'),
])
@pytest.mark.parametrize("folder", [".", ".."])
def test_names_of_labels_lie_beside_the_shards(tmp_path, name, content, folder):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / folder / name).write_text(content)
    path = write_shard(tmp_path / "shards" / "0.tar", range(2), words=lambda i: {"cls": str(i).encode()})
    source = open_source(path)
    assert ([source[i].label for i in range(2)], captions(source)) == ([0, 1], ["a cat", "a dog"])
    assert source.kind == f"WebDataset, labels named by {name}"


def test_small_labels_of_a_large_source_are_not_imagenets(tmp_path):
    files = {}
    for i in range(1000):
        files |= {f"{i}.png": b"", f"{i}.cls": str(i % 10).encode()}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert (source[7].label, source[7].caption) == (7, None)
    assert source.kind == "WebDataset, labels named by nothing"
    files["500.cls"] = b"412"
    write_tar(tmp_path / "b.tar", files)
    assert open_source(tmp_path / "b.tar")[7].label == 7
    labels = {f"{i}.cls": str(i).encode() for i in range(1000)}
    source = open_source(write_tar(tmp_path / "c.tar", {**files, **labels}))
    assert source[7].caption(None) == "cock"


def test_a_synset_in_the_name_is_a_class(tmp_path):
    source = open_source(write_tar(tmp_path / "n01443537.tar", {"n01443537_18.JPEG": png(1)}))
    assert (source[0].label, captions(source)) == (1, ["goldfish"])


# ---- which files are a sample --------------------------------------------------------------------------

def test_junk_is_no_sample(tmp_path):
    files = {"./000.png": png(0), "./000.txt": b"zero", "./._000.png": b"x", "./._000.txt": b"x",
             "__MACOSX/000.png": b"x", "a/.DS_Store": b"x", "a/Thumbs.db": b"x", ".hidden/0.png": b"x",
             "a/b/000.png": png(1), "a/b/000.txt": b"one"}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    assert captions(source) == ["zero", "one"]
    assert [source.files(i)[0].split(":")[1] for i in range(2)] == ["000", "a/b/000"]


@pytest.mark.parametrize("names, expected", [
    (["1.jpg", "1.seg.png", "1.txt"], {"1": "1.txt"}),                      # only one is the image
    (["1.seg.png", "1.jpg", "1.seg.json", "1.txt"], {"1": "1.txt"}),
    (["1.jpg", "1.jpg.txt", "1.png"], {"1": "1.jpg.txt"}),
    (["a.v1/1.jpg", "a.v1/1.txt"], {"a.v1/1": "a.v1/1.txt"}),               # a dot in a folder's name
    (["1.image.jpg", "1.txt"], {"1": "1.txt"}),
    (["1.JPG", "1.Txt"], {"1": "1.Txt"}),
    (["a.v1.jpg", "a.v1.txt", "a.v2.jpg", "a.v2.txt"], {"a.v1": "a.v1.txt", "a.v2": "a.v2.txt"}),
    (["IMG 2.5 x.png", "IMG 2.5 x.txt"], {"IMG 2": "IMG 2.5 x.txt"}),
])
def test_the_files_of_one_stem_are_a_sample(tmp_path, names, expected):
    files = {name: png(1) if name.lower().endswith(("jpg", "png")) else name.encode() for name in names}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    found = {source.files(i)[0].split(":")[1]: source[i].caption(None) for i in range(len(source))}
    assert found == expected
    assert source[0].image().size == (96, 120)


def test_several_images_with_one_caption_are_refused(tmp_path):
    files = {"1.a.png": png(1), "1.b.png": png(2), "1.json": as_json(caption="two")}
    source = open_source(write_tar(tmp_path / "a.tar", files))
    with pytest.raises(SkipSample, match="a.tar:1: several images in one sample; one is expected"):
        source[0]


def test_long_names_and_links(tmp_path):
    long = "a" * 120 + "/" + "ü" * 150
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            for name, content in ((f"{long}.png", png(1)), (f"{long}.txt", b"long"), ("b.txt", b"b")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            link = tarfile.TarInfo("b.png")                     # the second name of a hard link
            link.type, link.linkname = tarfile.LNKTYPE, f"{long}.png"
            tar.addfile(link)
        source = open_source(tmp_path / "a.tar")
        assert sorted(captions(source)) == ["b", "long"]
        assert [source[i].image().getpixel((0, 0)) for i in range(2)] == [color(1)] * 2
        os.utime(tmp_path / "a.tar", (1, 1))


# ---- shards --------------------------------------------------------------------------------------------

def test_patterns_of_shards(tmp_path):
    for i in range(8, 12):
        write_shard(tmp_path / f"a{i:03d}.tar", [i])
    expected = [f"caption {i}" for i in range(8, 12)]
    for pattern in ("a{008..011}.tar", "a*.tar", "a0{08..11}.tar", "a{0..0}{08..11}.tar",
                    "a0{08,{09..10},11}.tar", "a0{0,1}*.tar", "**/a*.tar", ""):
        assert captions(open_source(tmp_path / pattern)) == expected, pattern
    with pytest.raises(FileNotFoundError, match=r"a012.tar: no such file or folder \(missing: 2 of 3\)"):
        open_source(str(tmp_path / "a{011..013}.tar"))
    with pytest.raises(FileNotFoundError, match=r"b\*.tar: no such file"):
        open_source(str(tmp_path / "b*.tar"))


def test_braces():
    assert expand_braces("a{x,y{1..2}}{08..10}") == [
        "ax08", "ax09", "ax10", "ay108", "ay109", "ay110", "ay208", "ay209", "ay210"]
    assert expand_braces("{{0..1},{7..8}}") == ["0", "1", "7", "8"]
    assert expand_braces("{3..1}") == ["3", "2", "1"]
    assert expand_braces("{a,x{b,c}}") == ["a", "xb", "xc"]
    for plain in ("a", "{a}", "{}", "{a,b", "}a{"):
        assert expand_braces(plain) == [plain]


def test_a_folder_may_hold_the_letters_of_patterns(tmp_path):
    folder = tmp_path / "[2024] {a,b} *"
    folder.mkdir()
    write_shard(folder / "0.tar", [0])
    write_shard(folder / "1.tar", [1])
    for pattern in ("{0..1}.tar", "*.tar", "[01].tar"):
        assert expand(str(folder / pattern)) == [str(folder / "0.tar"), str(folder / "1.tar")]


def test_a_folder_of_shards(tmp_path):
    (tmp_path / "a" / "train").mkdir(parents=True)
    write_shard(tmp_path / "a" / "00001.tar", [1])
    write_shard(tmp_path / "a" / "00000.tar", [0])
    write_shard(tmp_path / "a" / "train" / "0.TAR", [2])
    (tmp_path / "a" / "._00000.tar").write_bytes(b"junk")
    (tmp_path / "a" / "00000_stats.json").write_text("{}")                  # img2dataset leaves these
    (tmp_path / "a" / "00000.parquet").write_bytes(b"")
    for _ in range(2):                                                      # also with the indexes there
        source = open_source(tmp_path / "a")
        assert (source.kind, captions(source)) == ("WebDataset", ["caption 0", "caption 1", "caption 2"])
    assert captions(open_source(tmp_path / "a" / "0*")) == ["caption 0", "caption 1"]
    assert captions(pickle.loads(pickle.dumps(source))) == captions(source)
    (tmp_path / "a" / "0.png").write_bytes(png(0))                          # now a folder of images
    assert (open_source(tmp_path / "a").kind, len(open_source(tmp_path / "a"))) == ("folder of images", 1)
    (tmp_path / "a" / "0.png").unlink()
    write_tar(tmp_path / "a" / "00002.tar", {})
    assert len(open_source(tmp_path / "a")) == 3
    with pytest.raises(ValueError, match="00002.tar: no samples in it"):
        open_source(tmp_path / "a" / "00002.tar")


def test_captions_and_conversations_in_a_shard(tmp_path):
    def words(i):
        content = {"conversations": CONVERSATION} if i else {"caption": "long"}
        return {"json": json.dumps(content).encode()}

    source = open_source(write_shard(tmp_path / "a.tar", range(2), words=words))
    assert (source[0].caption(None), source[0].turns) == ("long", None)
    assert (source[1].caption, source[1].turns(None)) == (None, TURNS)


def test_a_sample_without_the_needed_files(tmp_path):
    files = [{"npy": b"7", "png": None}, {"txt": b"words", "png": None}, {}]
    source = open_source(write_shard(tmp_path / "a.tar", range(3), words=files.__getitem__))
    with pytest.raises(SkipSample, match="a.tar:000000: an image with .* is expected; here: .npy"):
        source[0]
    with pytest.raises(SkipSample, match="a.tar:000001: neither an image nor a conversation"):
        source[1]
    assert source[2].caption is None and source[2].image().size == (96, 120)            # enough for reca


def test_a_folder_with_splits(tmp_path):
    write_shard(tmp_path / "imagenet1k-train-0000.tar", [0])
    write_shard(tmp_path / "imagenet1k-train-0001.tar", [1])
    write_shard(tmp_path / "imagenet1k-validation-00.tar", [2])
    assert captions(open_source(tmp_path)) == ["caption 0", "caption 1"]
    assert captions(open_source(tmp_path / "*.tar")) == ["caption 0", "caption 1", "caption 2"]
    (tmp_path / "test").mkdir()
    write_shard(tmp_path / "test" / "0.tar", [3])
    assert captions(open_source(tmp_path / "test")) == ["caption 3"]


@pytest.mark.parametrize("name, content, reason", [
    ("a.tar", None, "compressed with gzip; unpack it first"), ("a.tar.gz", None, "compressed with gzip"),
    ("a.tgz", None, "compressed with gzip"), ("a.tar.zst", b"\x28\xb5\x2f\xfd00", "compressed with zstd"),
    ("a.tar", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ("a.tar", b"PK\x03\x04" * 200, "a zip file; unpack it first"), ("a.tar", b"", "empty file"),
    ("a.tar", b"<html>" * 200, "invalid header"),
])
def test_what_is_no_tar_file_is_refused(tmp_path, name, content, reason):
    if content is None:
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("0.txt"))
    else:
        (tmp_path / name).write_bytes(content)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}: not an uncompressed tar file: {reason}"):
            open_source(path)
