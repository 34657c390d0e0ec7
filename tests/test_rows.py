"""Rows of JSON, JSON lines, CSV, TSV and lists: images with words, and conversations."""
import base64
import json
import random

import pytest
from data_files import (
    MESSAGES,
    TURNS,
    captions,
    captions_and_labels,
    color,
    first_row,
    pixel,
    png,
    write_rows,
)
from PIL import Image

from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    (tmp_path / "images" / "sub" / "7.png").write_bytes(png(7))
    return tmp_path


# ---- forms of files ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content", [
    ("a.json", [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(3)]),
    ("a.jsonl", [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(3)]),
    ("a.ndjson", "".join(f'{{"image": "{i}.png", "caption": "caption {i}"}}\n' for i in range(3))),
    ("A.JSONL", "".join(f'{{"image": "{i}.png", "caption": "caption {i}"}}\r\n\r\n' for i in range(3))),
    ("lines.json", "".join(f'{{"image": "{i}.png", "caption": "caption {i}"}}\n' for i in range(3))),
    ("a.json", {"data": [{"image": f"{i}.png", "caption": f"caption {i}"} for i in range(3)]}),
    ("a.json", {"info": {}, "rows": [{"image": f"{i}.png", "text": f"caption {i}"} for i in range(3)]}),
    ("a.json", {"test": [{}], "train": [{"image": f"{i}.png", "text": f"caption {i}"} for i in range(3)]}),
    ("a.json", {f"{i}.png": f"caption {i}" for i in range(3)}),
    ("a.json", {f"{i}.png": {"caption": f"caption {i}", "tags": "x"} for i in range(3)}),
    ("a.csv", "image,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(3))),
    ("a.csv", "id;File_Name;Text\r\n" + "".join(f'{i};{i}.png;"caption {i}"\r\n' for i in range(3))),
    ("a.tsv", "caption\tfilepath\n" + "".join(f"caption {i}\t{i}.png\n" for i in range(3))),
    ("a.csv", "filepath\tcaption\n" + "".join(f"{i}.png\tcaption {i}\n" for i in range(3))),
    ("a.csv", "".join(f"{i}.png,caption {i}\n" for i in range(3))),
    ("a.tsv", "".join(f"caption {i}\t{i}.png\n" for i in range(3))),
    ("a.csv", "filepath\ttitle\n" + "".join(f"{i}.png\tcaption {i}\n" for i in range(3))),
    ("a.csv", "image_name| note| caption\n" + "".join(f"{i}.png| 7|  caption {i}\n" for i in range(3))),
    ("a.json", {f"{i:05d}": {"image": f"{i}.png", "caption": f"caption {i}"} for i in range(3)}),
    ("captions.txt", "image,caption\n" + "".join(f"{i}.png,caption {i}\n" for i in range(3))),
    ("list.txt", "".join(f"{i}.png\tcaption {i}\n" for i in range(3))),
])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_images_with_captions(folder, name, content, mark):
    path = write_rows(folder, name, content)
    (folder / name).write_bytes(mark + (folder / name).read_bytes())
    source = open_source(path, images=str(folder / "images"))
    assert captions(source) == ["caption 0", "caption 1", "caption 2"]
    assert [pixel(source[i]) for i in range(3)] == [color(0), color(1), color(2)]
    kinds = {"tsv": "TSV", "csv": "TSV" if "\t" in content else "CSV", "json": "JSON list"}
    if name in ("a.tsv", "a.csv", "a.json"):
        assert source.kind == kinds[name[2:]]


def test_cocos_captions(folder):
    content = {
        "images": [{"id": 9, "file_name": "1.png", "coco_url": "http://x"}, {"id": 4, "file_name": "0.png"}],
        "annotations": [{"image_id": 4, "caption": "nought\n"}, {"image_id": 9, "caption": "A"},
                        {"image_id": 9, "caption": "B"}],
    }
    source = open_source(write_rows(folder, "captions_val2014.json", content), images=str(folder / "images"))
    assert source.kind == "COCO captions"
    assert len(source) == 2 and source[1].caption(None) == "nought"
    assert [pixel(source[i]) for i in range(2)] == [color(1), color(0)]
    assert {source[0].caption(random.Random(seed)) for seed in range(20)} == {"A", "B"}
    content["images"] += [3, {"id": None}]
    source = open_source(write_rows(folder, "broken.json", content), images=str(folder / "images"))
    for i in (2, 3):
        with pytest.raises(SkipSample, match=f"broken.json:{i + 1}: "):
            source[i]
    content["annotations"] = [3, {"image_id": 4, "bbox": [0, 0, 1, 1]}]
    with pytest.raises(ValueError, match="instances.json: COCO annotations without captions"):
        open_source(write_rows(folder, "instances.json", content))


def test_karpathys_splits(folder):
    row = {"filepath": "sub", "filename": "7.png", "sentences": [{"raw": "seven"}], "split": "val"}
    path = write_rows(folder, "dataset_coco.json", {"images": [row]})
    source = open_source(path, images=str(folder / "images"))
    assert (source[0].caption(None), pixel(source[0])) == ("seven", color(7))
    rows = [{**row, "sentences": [3]}, row]
    source = open_source(write_rows(folder, "broken.json", rows), images=str(folder / "images"))
    with pytest.raises(SkipSample, match="broken.json:1: TypeError"):
        source[0]
    assert source[1].caption(None) == "seven"


def test_a_list_of_images_without_words(folder):
    source = open_source(write_rows(folder, "list.txt", "images/2.png\n\nimages/sub/7.png\n"))
    assert [pixel(source[i]) for i in range(2)] == [color(2), color(7)]
    assert source[0].caption is None and source[0].turns is None


def test_files_of_a_pattern_are_one_source(folder):
    for i in range(3):
        write_rows(folder, f"part-{i:02d}.jsonl", [{"image": f"images/{i}.png", "caption": f"caption {i}"}])
    for pattern in ("part-*.jsonl", "part-{00..02}.jsonl"):
        source = open_source(str(folder / pattern))
        assert captions(source) == ["caption 0", "caption 1", "caption 2"]
        with pytest.raises(IndexError):
            source[3]


@pytest.mark.parametrize("text", ["one\u2028two", "one\x85two", "one\x0btwo", "one\rtwo", "a \"b\", c"])
def test_only_newlines_end_lines(folder, text):
    rows = [{"image": "images/0.png", "caption": text}, {"image": "images/1.png", "caption": "next"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    assert captions(open_source(write_rows(folder, "a.jsonl", lines))) == [text, "next"]
    cell = text.replace('"', '""')
    table = f'image,caption\nimages/0.png,"{cell}"\nimages/1.png,next\n'
    assert captions(open_source(write_rows(folder, "a.csv", table))) == [text, "next"]


def test_a_quoted_cell_holds_line_breaks(folder):
    table = 'image,caption\nimages/0.png,"one\ntwo"\n\nimages/1.png,"next\r\nline"\nimages/2.png,end'
    source = open_source(write_rows(folder, "a.csv", table))
    assert captions(source) == ["one\ntwo", "next\r\nline", "end"]
    assert [pixel(source[i]) for i in range(3)] == [color(0), color(1), color(2)]


@pytest.mark.parametrize("broken", ['images/2.png,"one', 'images/2.png,"one" more', '"images/2.png,one'])
@pytest.mark.parametrize("after", ["images/1.png,two\n", 'images/1.png,"two"\n', 'images/1.png,"two"'])
def test_a_quote_that_does_not_end_costs_one_row(folder, broken, after):
    table = f"image,caption\nimages/0.png,zero\n{broken}\n{after}"
    source = open_source(write_rows(folder, "a.csv", table))
    assert len(source) == 3
    assert [source[i].caption(None) for i in (0, 2)] == ["zero", "two"]
    with pytest.raises(SkipSample, match=r"a.csv:2: a broken row \("):
        source[1]


def test_empty_rows_of_a_spreadsheet(folder):
    table = "image,caption\r\nimages/0.png,zero\r\n,\r\n , \r\n\r\n"
    source = open_source(write_rows(folder, "a.csv", table))
    assert captions(source) == ["zero"]


def test_quotes_in_a_table_with_tabs(folder):
    """Whether it was written with quoting or without."""
    rows = ['images/0.png\t"One day', 'images/1.png\tso "x" it', 'images/2.png\t"a ""b"" c"',
            'images/0.png\t"two\nlines"', 'images/1.png\t"end" he said']
    source = open_source(write_rows(folder, "a.tsv", "image\tcaption\n" + "\n".join(rows)))
    expected = ['"One day', 'so "x" it', 'a "b" c', "two\nlines", '"end" he said']
    assert captions(source) == expected
    assert [pixel(source[i]) for i in range(5)] == [color(i) for i in (0, 1, 2, 0, 1)]
    rows = ['"two\n\nlines"\timages/0.png', '"One day\timages/1.png', '"a\ttab"\timages/2.png']
    source = open_source(write_rows(folder, "b.tsv", "caption\timage\n" + "\r\n".join(rows)))
    assert captions(source) == ["two\n\nlines", '"One day', "a\ttab"]
    assert [pixel(source[i]) for i in range(3)] == [color(i) for i in range(3)]


def test_one_broken_line_is_one_bad_sample(folder):
    good = b'{"image": "images/0.png", "caption": "good"}'
    lines = [good, b'{"image": "images/0.png", "cap', b'{"image": "images/0.png", "caption": "caf\xe9"}',
             b'{"image": "images/0.png", "caption": "\\ud83d"}', b"null", good]
    source = open_source(write_rows(folder, "a.jsonl", b"\n".join(lines)))
    assert source[0].caption(None) == source[5].caption(None) == "good"
    reasons = []
    for i in range(1, 5):
        with pytest.raises(SkipSample) as error:
            source[i]
        reasons.append(error.value.reason)
        assert error.value.name.endswith(f"a.jsonl:{i + 1}") and error.value.bad
    not_unicode = "its text is not valid Unicode, in UTF-8"
    assert reasons == ["not JSON (Unterminated string starting at)", not_unicode, not_unicode,
                       "an object with fields is expected, not NoneType"]


def test_bytes_that_are_not_utf8_cost_their_sample_alone(folder):
    rows = b'[{"image": "images/0.png", "caption": "caf\xe9"}, {"image": "images/1.png", "caption": "good"}]'
    table = b"image,caption\nimages/0.png,caf\xe9\nimages/1.png,good\n"
    for name, content in {"a.json": rows, "a.csv": table}.items():
        source = open_source(write_rows(folder, name, content))
        with pytest.raises(SkipSample, match=f"{name}:1: its text is not valid Unicode"):
            source[0]
        assert source[1].caption(None) == "good"


def test_broken_rows_of_a_table(folder):
    rows = "image,caption\nimages/0.png\n0.png,a,b\nimages/1.png,one,,\n"
    source = open_source(write_rows(folder, "a.csv", rows))
    for i, cells in enumerate((1, 3)):
        with pytest.raises(SkipSample, match=f"a.csv:{i + 1}: {cells} cells, but 2 columns"):
            source[i]
    assert (source[2].caption(None), pixel(source[2])) == ("one", color(1))


@pytest.mark.parametrize("name, content, message", [
    ("a.json", "{", "not JSON"), ("a.json", '{"caption": "x"}', "a list of samples is expected"),
    ("a.json", "3", "a list of samples is expected"), ("a.json", "[]", "no samples in it"),
    ("a.jsonl", "\n\n", "no samples in it"), ("a.csv", "image,caption\n", "no samples in it"),
    ("a.csv", "", "no samples in it"),
    ("a.csv", "a,b\n1,2\n", "the first line is expected to name the columns"),
    ("a.tsv", "url\tcaption\nhttp://x/0.jpg\tan owl\n", r"its images are on the web \(column 'url'\)"),
    ("a.csv", "TEXT,URL\nowl,http://x/0.jpg\n", r"its images are on the web \(column 'url'\)"),
    ("a.jsonl", "\ufeff{}".encode("utf-16-le"), "text in UTF-16; convert it first"),
    ("a.tsv", "a man in a\thttp://x/0\nowl\thttp://x/1", "its images are on the web"),
    ("a.json.gz", b"\x1f\x8b", "a packed file; unpack it first"),
    ("a.csv", 'image,"caption\n0.png,x\n', "its first line is a broken row"),
    ("a.json", "[" * 100000, "not JSON .JSON with too many brackets"),
    ("a.docx", b"x", "neither a folder nor a file of a known format"),
])
def test_files_that_are_refused(folder, name, content, message):
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        open_source(write_rows(folder, name, content))


def test_utf16_json_is_read(folder):
    content = '[{"image": "images/0.png", "caption": "größer"}]'
    assert captions(open_source(write_rows(folder, "a.json", content.encode("utf-16")))) == ["größer"]


def test_lines_are_read_by_index(folder, monkeypatch):
    """Of a long file only the wanted line is read."""
    line = json.dumps({"image": "images/0.png", "caption": "x" * 1000}) + "\n"
    path = write_rows(folder, "a.jsonl", line * 1000)
    source = open_source(path)
    assert len(source) == 1000
    assert source.entries[700] == line.encode()
    assert source.entries.starts.itemsize == 8


# ---- images --------------------------------------------------------------------------------------------

def test_ways_to_name_an_image(folder):
    encoded = base64.b64encode(png(5)).decode()
    references = {
        "images/0.png": 0, str(folder / "images" / "1.png"): 1, "0.png": 0, "sub/7.png": 7, "sub\\7.png": 7,
        f"file://{folder}/images/2.png": 2, f"data:image/png;base64,{encoded}": 5, encoded: 5,
    }
    for reference, number in references.items():
        for value in (reference, [reference], {"bytes": None, "path": reference}, {"path": reference}):
            sample = first_row(folder, {"image": value, "caption": "x"}, images=str(folder / "images"))
            assert pixel(sample) == color(number), value
    for field in ("images", "file_name", "img", "image_path", "filepath", "path"):
        assert pixel(first_row(folder, {field: "images/1.png", "caption": "x"})) == color(1)


def test_a_path_in_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "images"))
    assert pixel(first_row(folder, {"image": "~/1.png", "caption": "x"})) == color(1)


def test_paths_are_relative_to_the_file_without_images(folder, monkeypatch):
    monkeypatch.chdir("/")
    assert pixel(first_row(folder, {"image": "images/1.png", "caption": "x"})) == color(1)
    assert pixel(first_row(folder, {"image": "./images/../images/1.png", "caption": "x"})) == color(1)


@pytest.mark.parametrize("image, reason", [
    (["images/0.png", "images/1.png"], "several images in one sample"),
    ("https://x/0.png", "its image is on the web; download it first"),
    (3, "its image is of type int; a path is expected"),
    ("data:image/png;base64,iVBORw0KG", "its image is not valid base64"),
    ("images/9.png", "no such file"),
    ("images", "a folder"),
])
def test_images_that_cannot_be_used(folder, image, reason):
    with pytest.raises(SkipSample, match=f"a.json:1: .*{reason}") as error:
        first_row(folder, {"image": image, "caption": "x"}).image()
    assert "9.png" not in error.value.reason and str(folder) not in error.value.reason


def test_a_folder_of_images_that_is_missing(folder):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        first_row(folder, {"image": "0.png", "caption": "x"}, images=str(folder / "nowhere"))


@pytest.mark.parametrize("image", [None, "", [], [None], {"bytes": None, "path": None}, float("nan")])
def test_a_row_without_an_image(folder, image):
    assert first_row(folder, {"image": image, "messages": MESSAGES}).image is None
    assert pixel(first_row(folder, {"image": image, "file_name": "images/1.png", "caption": "x"})) == color(1)
    with pytest.raises(SkipSample, match="neither an image nor a conversation in it; its fields are image"):
        first_row(folder, {"image": image, "text": "x"})


def test_an_image_that_is_only_a_link(folder):
    sample = first_row(folder, {"url": "https://x/0.png", "caption": "x"})
    with pytest.raises(SkipSample, match="its image is on the web"):
        sample.image()
    chat = {"url": "https://x", "messages": MESSAGES}
    assert first_row(folder, chat).turns(None) == TURNS                     # needs no image for text


@pytest.mark.parametrize("part", [
    {"type": "image", "image": "images/1.png"}, {"type": "image_url", "image_url": {"url": "images/1.png"}},
    {"type": "image_url", "image_url": "images/1.png"}, {"type": "image", "path": "images/1.png"},
    {"image": "images/1.png"}, {"type": "image", "url": "images/1.png"},
])
def test_an_image_in_a_part_of_a_message(folder, part):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": "a color"}]
    sample = first_row(folder, {"messages": messages})
    assert (pixel(sample), sample.turns(None)) == (color(1), [("What is it?", "a color")])
    messages[0]["content"].append({"type": "image", "image": "images/2.png"})
    with pytest.raises(SkipSample, match="several images in one sample"):
        first_row(folder, {"messages": messages})


# ---- chats and classes ---------------------------------------------------------------------------------

def test_messages_in_a_cell(folder):
    cell = json.dumps(MESSAGES).replace('"', '""')
    source = open_source(write_rows(folder, "a.csv", f'image,messages\nimages/0.png,"{cell}"\n'))
    assert source[0].turns(None) == TURNS
    table = "image,question,answer\nimages/0.png,What is it?,a color\n"
    source = open_source(write_rows(folder, "b.csv", table))
    assert source[0].turns(None) == TURNS[:1]


def test_an_image_opened_from_a_row_is_rgb(folder):
    Image.new("RGBA", (96, 96), (255, 0, 0, 0)).save(folder / "clear.png")
    assert pixel(first_row(folder, {"image": "clear.png", "caption": "x"})) == (255, 255, 255)


def test_rows_with_a_class_have_its_label_and_name(folder):
    rows = [{"image": "images/0.png", "label": 1}, {"image": "images/0.png", "label": "n01443537"},
            {"image": "images/0.png", "label": 1, "caption": "words"},
            {"image": "images/0.png", "label": "tree_frog"}, {"image": "images/0.png", "label": None},
            {"image": "images/0.png", "label": [1, 2]}]
    source = open_source(write_rows(folder, "a.json", rows))
    found = captions_and_labels(source)
    assert found == [(None, 1), ("goldfish", 1), ("words", 1), ("tree frog", -1), (None, -1), (None, -1)]
    write_rows(folder, "classes.json", ["owl", "tree frog"])
    table = "filename,label\nimages/0.png,1\nimages/1.png,owl\nimages/2.png,\n"
    source = open_source(write_rows(folder, "a.csv", table))
    found = captions_and_labels(source)
    assert found == [("tree frog", 1), ("owl", 0), (None, -1)]
