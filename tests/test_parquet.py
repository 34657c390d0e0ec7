"""Parquet in the forms in which Hugging Face distributes datasets."""
import json
import os
import pickle
import random
import sys

import pytest
import torch
from data_files import CONVERSATION, color, png

from harmonkit.data import parquet
from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TURNS = [("What is it?", "a color"), ("Sure?", "yes")]
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "this"}, {"role": "user", "content": "and?"}]


def write(path, rows, rows_in_group=5, caption=None, **metadata):
    """A parquet file of dictionaries, all with this caption. metadata: of its schema, as JSON."""
    table = pa.Table.from_pylist([{**row, "caption": caption} if caption else row for row in rows])
    if metadata:
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_in_group)
    return path


def image(i):
    """An image as Hugging Face's datasets store it."""
    return {"bytes": png(i), "path": f"{i}.png"}


def captions(source):
    return [source[i].caption(random.Random(0)) for i in range(len(source))]


def colors(source):
    return [source[i].image().getpixel((5, 5)) for i in range(len(source))]


@pytest.mark.parametrize("name, value", [
    ("image", image), ("images", lambda i: [image(i)]), ("image", png), ("jpg", png),
    ("image", lambda i: {"bytes": png(i), "path": None}), ("image", lambda i: f"{i}.png"),
    ("image", lambda i: {"bytes": None, "path": f"{i}.png"}), ("image_path", lambda i: f"{i}.png"),
    ("Picture", image), ("images", lambda i: [f"{i}.png"]),
])
def test_the_forms_of_an_image(tmp_path, name, value):
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    rows = [{"id": i, name: value(i), "caption": f"caption {i}"} for i in range(12)]
    source = open_source(write(tmp_path / "a.parquet", rows))
    assert (source.kind, len(source)) == ("parquet", 12)
    assert colors(source) == [color(i) for i in range(12)]
    assert captions(source) == [f"caption {i}" for i in range(12)]


@pytest.mark.parametrize("words, expected", [
    ({"conversations": CONVERSATION}, TURNS),
    ({"conversations": json.dumps(CONVERSATION)}, TURNS),
    ({"messages": MESSAGES}, [("What?", "this")]),
    ({"messages": [{"role": "user", "content": [{"type": "image", "text": None},
                                                {"type": "text", "text": "What?"}]},
                   {"role": "assistant", "content": [{"type": "text", "text": "this"}]}]},
     [("What?", "this")]),
    ({"texts": [{"user": user, "assistant": answer, "source": "AI2D"} for user, answer in TURNS]}, TURNS),
    ({"question": "What?", "answer": "this"}, [("What?", "this")]),
])
def test_the_forms_of_a_conversation(tmp_path, words, expected):
    source = open_source(write(tmp_path / "a.parquet", [{"images": [image(i)], **words} for i in range(12)]))
    assert [source[i].turns(None) for i in range(12)] == [expected] * 12
    assert source[0].dropped_system == (words.get("messages") == MESSAGES)
    assert colors(source) == [color(i) for i in range(12)]


def test_rows_without_an_image(tmp_path):
    rows = [{"image": image(0) if i else None, "messages": MESSAGES} for i in range(2)]
    source = open_source(write(tmp_path / "a.parquet", rows))
    assert source[0].turns(None) == [("What?", "this")]
    with pytest.raises(SkipSample, match="a.parquet:1: no image, and the task needs one"):
        source[0].image()
    assert source[1].image().size == (96, 120)
    text_only = open_source(write(tmp_path / "b.parquet", [{"messages": MESSAGES}]))
    assert (text_only[0].image, text_only[0].turns(None)) == (None, [("What?", "this")])


@pytest.mark.parametrize("row, reason", [
    ({"images": [image(0), image(1)]}, "several images in one sample; one is expected"),
    ({"image": {"bytes": b"no image", "path": None}}, "not an image that can be read"),
    ({"image": "https://a.b/c.png"}, "its image is on the web"),
])
def test_a_bad_image_is_named(tmp_path, row, reason):
    source = open_source(write(tmp_path / "a.parquet", [dict.fromkeys(row), row], caption="x"))
    assert source[1].caption(None) == "x"
    with pytest.raises(SkipSample, match=f"a.parquet:2: {reason}") as error:
        source[1].image()
    assert error.value.bad


def test_captions_in_the_default_order_and_chosen(tmp_path):
    rows = [{"image": image(0), "caption": None, "text": "a text", "prompt": "a prompt", "title": ["x", "y"]},
            {"image": image(1), "caption": "", "text": None, "prompt": "a prompt", "title": []}]
    path = write(tmp_path / "a.parquet", rows)
    assert captions(open_source(path)) == ["a text", "a prompt"]
    assert captions(open_source(path, text="prompt")) == ["a prompt"] * 2
    sample = open_source(path, text=["title", "prompt"])
    assert {sample[0].caption(random.Random(seed)) for seed in range(20)} == {"x", "y"}
    assert sample[1].caption(None) == "a prompt"


def test_labels_have_the_names_of_the_schema(tmp_path):
    features = {"label": {"names": ["tench, Tinca tinca", "tree_frog"], "_type": "ClassLabel"}}
    rows = [{"image": image(i), "label": i} for i in range(2)]
    source = open_source(write(tmp_path / "a.parquet", rows, huggingface={"info": {"features": features}}))
    assert ([source[i].label for i in range(2)], captions(source)) == ([0, 1], ["tench", "tree frog"])
    path = write(tmp_path / "b" / "b.parquet", rows)
    source = open_source(path)
    assert (source[1].label, source[1].caption) == (1, None)
    (tmp_path / "b" / "classes.json").write_text('["a cat", "a dog"]')
    assert captions(open_source(path)) == ["a cat", "a dog"]


# ---- files ---------------------------------------------------------------------------------------------

def test_folders_patterns_and_splits(tmp_path):
    for k in range(3):
        rows = [{"image": image(4 * k + i), "caption": f"caption {4 * k + i}"} for i in range(4)]
        write(tmp_path / "set" / "data" / f"train-{k:05d}-of-00003.parquet", rows, rows_in_group=3)
    held_out = tmp_path / "set" / "data" / "test-00000-of-00001.parquet"
    write(held_out, [{"image": image(0)}], caption="held out")
    (tmp_path / "set" / "README.md").write_text("a dataset card")
    expected = [f"caption {i}" for i in range(12)]
    for path in ("set", "set/data", "set/data/train-*.parquet", "set/**/train-*",
                 "set/data/train-{00000..00002}-of-00003.parquet"):
        source = open_source(tmp_path / path)
        assert captions(source) == expected, path
        assert colors(source) == [color(i) for i in range(12)]
    assert captions(open_source(tmp_path / "set" / "data" / "test*")) == ["held out"]
    with pytest.raises(SkipSample, match="train-00002-of-00003.parquet:4: "):
        open_source(tmp_path / "set", text="none")[11]
    source = pickle.loads(pickle.dumps(source))
    assert captions(source) == expected


@pytest.mark.parametrize("is_file", [False, True])
def test_datasets_saved_to_disk(tmp_path, is_file):
    """save_to_disk writes streams of record batches; the other form is of feather."""
    rows = [{"image": image(i), "caption": f"caption {i}"} for i in range(12)]
    table = pa.Table.from_pylist(rows)
    for split, count in {"train": 12, "test": 5}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text("{}")
        (tmp_path / split / "dataset_info.json").write_text("{}")
        new = pa.ipc.new_file if is_file else pa.ipc.new_stream
        with new(str(tmp_path / split / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table.slice(0, count), max_chunksize=5)
    for path in (tmp_path, tmp_path / "train", tmp_path / "train" / "*.arrow"):
        source = open_source(path)
        assert (source.kind, captions(source)) == ("arrow", [f"caption {i}" for i in range(12)])
        assert colors(source) == [color(i) for i in range(12)]
    content = (tmp_path / "train" / "data-00000-of-00001.arrow").read_bytes()
    for broken in (b"", b"not arrow, but long enough", content[:len(content) // 2]):
        (tmp_path / "broken.arrow").unlink(missing_ok=True)     # a mapped file must not be changed in place
        (tmp_path / "broken.arrow").write_bytes(broken)
        with pytest.raises(ValueError, match=r"^[^\n]*broken.arrow: not a readable .arrow file [^\n]*$"):
            open_source(tmp_path / "broken.arrow")


def test_only_the_needed_columns_and_row_groups_are_read(tmp_path, monkeypatch):
    rows = [{"image": image(i), "caption": f"caption {i}", "embedding": [0.5] * 9} for i in range(12)]
    source = open_source(write(tmp_path / "a.parquet", rows, rows_in_group=4))
    read = []
    plain = parquet.Tables.read
    monkeypatch.setattr(parquet.Tables, "read", lambda *args: read.append(args[2:]) or plain(*args))
    assert captions(source) == [f"caption {i}" for i in range(12)]
    assert read == [(group, ("caption",)) for group in range(3)]
    source[5].image()
    assert read[3:] == [(1, ("image",))]
    assert source[5].image().getpixel((0, 0)) == color(5) and len(read) == 4
    monkeypatch.setattr(parquet, "MEMORY", 0)                   # then one row group stays
    assert colors(source) == [color(i) for i in range(12)]
    assert [group for group, columns in read[4:] if columns == ("image",)] == [0, 1, 2]


def test_loader_processes_read_the_same(tmp_path):
    rows = [{"image": image(i), "caption": f"caption {i}"} for i in range(12)]
    source = open_source(write(tmp_path / "a.parquet", rows))
    captions(source)                                            # this process has read before it is forked
    loader = torch.utils.data.DataLoader(Captions(source), batch_size=None, num_workers=2)
    assert list(loader) == [f"caption {i} {color(i)}" for i in range(12)]


class Captions(torch.utils.data.Dataset):
    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        return f"{self.source[i].caption(None)} {self.source[i].image().getpixel((5, 5))}"


def test_a_file_that_has_changed_is_read_again(tmp_path):
    for caption in ("one", "two"):
        path = write(tmp_path / "a.parquet", [{"image": image(0), "caption": caption}])
        os.utime(path, (1, len(caption + path.name) + (caption == "two")))
        assert captions(open_source(path)) == [caption]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*a.parquet: not a readable .parquet file [^\n]*$"):
        open_source(tmp_path / "a.parquet")


def test_files_of_other_columns_and_rows_of_images_alone(tmp_path):
    write(tmp_path / "a" / "0.parquet", [{"image": image(0), "caption": b"bytes"}])
    write(tmp_path / "a" / "1.parquet", [{"id": 7, "images": [image(1)]}])
    source = open_source(tmp_path / "a")
    assert colors(source) == [color(0), color(1)]
    assert (source[0].caption(None), source[1].caption) == ("bytes", None)


def test_columns_of_images_must_be_clear(tmp_path):
    path = write(tmp_path / "a.parquet", [{"before": image(0), "after": image(1), "caption": "x"}])
    with pytest.raises(ValueError, match=r"a.parquet: several columns of images \(before, after\)"):
        open_source(path)
    path = write(tmp_path / "b.parquet", [{"mask": image(0), "image": image(1), "caption": "x"}])
    assert colors(open_source(path)) == [color(1)]


def test_without_pyarrow_the_message_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [{"image": image(0), "caption": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="a.parquet: this format needs pyarrow: pip install pyarrow"):
        open_source(path)
