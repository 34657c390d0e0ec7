"""Origins of images and fingerprints of sources change when the data do, and stay when these are moved."""
import base64
import json
import os
import shutil
import zlib
from importlib.util import find_spec

import every_form
import pytest
from data_files import png, write_rows, write_shard
from every_form import write_every_form

from harmonkit.data import shapes
from harmonkit.data.records import ImageAt, image_of, sample_of
from harmonkit.data.sources import open_source

COUNT = 6
HAS_PARQUET = find_spec("pyarrow") is not None
IN_TABLES = {"jsonl", "csv", "list.json", "lines.jsonl", "a.csv", "a.tsv", "llava.json", "chats.jsonl",
             "texts.jsonl"}


def write(folder, count=COUNT, time=1):
    """Every form in a folder, all files of the same time. Returns the lines of the mixture."""
    lines = [line for line, _, _ in write_every_form(folder, count, HAS_PARQUET)]
    touch(folder, time)
    return lines


def touch(folder, time):
    for around, _, files in os.walk(folder):
        for file in files:
            os.utime(os.path.join(around, file), (time, time))


def open_all(folder, lines) -> dict:
    """{path: (fingerprint, origins)} of the sources."""
    found = {}
    for line in lines:
        paths = {key: str(folder / line[key]) for key in ("path", "images", "captions") if key in line}
        source = open_source(**{key: value for key, value in {**line, **paths}.items() if key != "task"})
        samples = [source[i] for i in range(len(source))]
        found[line["path"]] = source.fingerprint(), [sample.origin and sample.origin() for sample in samples]
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "data"
    lines = write(folder)
    return folder, lines, open_all(folder, lines)


def differing(one, other, part) -> set:
    """The paths of the sources whose fingerprints (0) or origins (1) differ."""
    assert one.keys() == other.keys()
    return {path for path in one if one[path][part] != other[path][part]}


def test_every_sample_has_an_origin_of_its_own(first):
    _, _, found = first
    for path, (fingerprint, origins) in found.items():
        assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
        if path == "texts.jsonl":
            assert origins == [None] * COUNT
            continue
        assert len(set(origins)) == COUNT, path
        for name, size, time in origins:
            assert size > 0 and time == 10 ** 9 and not os.path.isabs(name), path
    assert found["flat"][1][1] == ("001.png", len(png(1)), 10 ** 9)
    assert found["nested"][1][0] == ("0/000.PNG", len(png(0)), 10 ** 9)
    assert found["list.json"][1][1] == ("001.png", len(png(1)), 10 ** 9)
    assert found["chats.jsonl"][1][1] == ("pictures/001.png", len(png(1)), 10 ** 9)
    assert found["shards"][1][0] == ("00000.tar:000000.png", len(png(0)), 10 ** 9)
    if HAS_PARQUET:
        assert found["conversations.parquet"][1][2][0] == "conversations.parquet:3"
    # Several ways to the same data.
    assert found["shards"] == found["shards/*.tar"] == found["shards/{00000..00001}.tar"]
    assert len({fingerprint for fingerprint, _ in found.values()}) == len(found) - 2


def test_moved_data_stay_the_same(first, tmp_path):
    folder, lines, found = first
    shutil.copytree(folder, tmp_path / "else" / "where")
    assert open_all(tmp_path / "else" / "where", lines) == found


def test_touched_data_have_other_origins_and_the_same_fingerprints(first, tmp_path):
    folder, lines, found = first
    shutil.copytree(folder, tmp_path / "data")
    touch(tmp_path / "data", 2)
    again = open_all(tmp_path / "data", lines)
    assert differing(found, again, 0) == set()
    assert differing(found, again, 1) == set(found) - {"texts.jsonl"}
    for path in found:
        names = [[origin and origin[:2] for origin in origins] for _, origins in (found[path], again[path])]
        assert names[0] == names[1]


def test_the_same_data_written_again_are_the_same(first, tmp_path):
    _, lines, found = first
    write(tmp_path)
    assert open_all(tmp_path, lines) == found


@pytest.mark.parametrize("count", [COUNT - 1, COUNT + 1])
def test_appended_and_removed_samples_change_every_fingerprint(first, tmp_path, count):
    _, lines, found = first
    write(tmp_path, count)
    again = open_all(tmp_path, lines)
    assert differing(found, again, 0) == set(found)
    few = min(count, COUNT)
    for path in ("flat", "list.json", "lines.jsonl", "a.csv", "txt.tar", "jsonl", "pairs.json"):
        assert found[path][1][:few] == again[path][1][:few]


def test_a_replaced_image_has_another_origin(first, tmp_path, monkeypatch):
    _, lines, found = first
    monkeypatch.setattr(every_form, "png", lambda i: png(i) + b" " * (i == 2))
    write(tmp_path)
    again = open_all(tmp_path, lines)
    for path, (_, origins) in found.items():
        if path == "texts.jsonl":
            continue
        changed = [i for i in range(COUNT) if origins[i] != again[path][1][i]]
        if path == "saved":                                     # has room for the byte; the time will tell
            continue
        is_of_file = path == "caption" or path.endswith(".parquet")
        assert changed == list(range(COUNT)) if is_of_file else len(changed) == 1, path


def test_edited_words_in_tables_change_the_fingerprint_but_no_origin(first, tmp_path):
    folder, lines, found = first
    shutil.copytree(folder, tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.*"):
        if path.suffix in (".json", ".jsonl", ".csv", ".tsv", ".txt", ".caption"):
            path.write_bytes(path.read_bytes().replace(b"caption 3", b"captioN 3"))
    touch(tmp_path / "data", 1)
    again = open_all(tmp_path / "data", lines)
    assert differing(found, again, 0) == IN_TABLES
    assert differing(found, again, 1) == set()


@pytest.mark.parametrize("path", ["list.json", "lines.jsonl", "a.csv", "a.tsv", "pairs.json",
                                  "jsonl/metadata.jsonl"])
def test_reordered_rows_have_reordered_origins(first, tmp_path, path):
    folder, lines, found = first
    shutil.copytree(folder, tmp_path / "data")
    file = tmp_path / "data" / path
    if path.endswith(".json"):
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8-sig"))[::-1]))
    else:
        rows = file.read_text(encoding="utf-8-sig").strip("\n").split("\n")
        head = rows[:1] if path.endswith("sv") else []
        file.write_text("\n".join(head + rows[len(head):][::-1]))
    touch(tmp_path / "data", 1)
    again = open_all(tmp_path / "data", lines)
    name = path.split("/")[0]
    assert differing(found, again, 0) == differing(found, again, 1) == {name}
    assert again[name][1] == found[name][1][::-1]


def test_renamed_files_change_names_and_fingerprints(first, tmp_path):
    folder, lines, found = first
    shutil.copytree(folder, tmp_path / "data")
    os.rename(tmp_path / "data" / "flat" / "003.png", tmp_path / "data" / "flat" / "003x.png")
    os.rename(tmp_path / "data" / "flat" / "003.txt", tmp_path / "data" / "flat" / "003x.txt")
    os.rename(tmp_path / "data" / "plain" / "003.png", tmp_path / "data" / "plain" / "003x.png")
    again = open_all(tmp_path / "data", lines)
    assert differing(found, again, 0) == differing(found, again, 1) == {"flat", "plain"}
    assert again["flat"][1][3][0] == again["plain"][1][3][0] == "003x.png"


def test_samples_in_another_order_or_of_other_names_in_a_shard(tmp_path):
    found = set()
    for numbers in ([0, 1, 2], [2, 1, 0], [0, 1, 3], [0, 1, 2]):
        path = write_shard(tmp_path / "a.tar", numbers, words=lambda i: {"png": b"image", "txt": b"words"})
        os.utime(path, (1, len(found) + 1))
        found.add(open_source(path).fingerprint())
    assert len(found) == 3


def test_lists_of_images_and_several_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
        write_rows(tmp_path, f"list{i}.txt", f"{i}.png\tcaption {i}\n")
    one = open_source(f"{tmp_path}/list{{0..2}}.txt")
    other = open_source(f"{tmp_path}/list{{0,2,1}}.txt")
    assert [one[i].origin()[0] for i in range(3)] == ["0.png", "1.png", "2.png"]
    assert one.fingerprint() != other.fingerprint()
    write_rows(tmp_path, "list1.txt", "1.png\tcaption one\n")
    assert open_source(f"{tmp_path}/list{{0..2}}.txt").fingerprint() != one.fingerprint()
    assert open_source(f"{tmp_path}/list0.txt").fingerprint() == one.sources[0].fingerprint()


def test_the_shapes_world():
    one = open_source("shapes", seed="train-0", count=20)
    assert one.fingerprint() == open_source("shapes", seed="train-0", count=20).fingerprint()
    others = [open_source("shapes", seed="train-1", count=20),
              open_source("shapes", seed="train-0", count=21),
              open_source("shapes-text", seed="train-0", count=20)]
    assert len({source.fingerprint() for source in (one, *others)}) == 4
    assert one[3].origin() == others[1][3].origin() == ("train-0:4", 0, 0)
    assert others[0][3].origin() != one[3].origin()
    assert others[2][3].origin is None
    assert isinstance(one, shapes.Shapes)


@pytest.mark.parametrize("value", [
    png(3), {"bytes": png(3), "path": "x.png"}, [png(3)], base64.b64encode(png(3) + b" " * 200).decode(),
    "data:image/png;base64," + base64.b64encode(png(3)).decode(),
])
def test_bytes_in_a_record_are_their_own_origin(value):
    name, size, time = image_of("a", {"image": value}).origin()
    content = png(3) + (b" " * 200 if size > len(png(3)) else b"")
    assert (name, size, time) == (f"crc32 {zlib.crc32(content):08x}", len(content), 0)


@pytest.mark.parametrize("value, name", [
    ("0.png", "0.png"), ("gone.png", "gone.png"), ("https://a.b/c.png", "https://a.b/c.png"), (7, "7"),
    ("caf\udce9.png", r"caf\udce9.png"), ("a\0b.png", "a\0b.png"),
    ("data:image/png;base64,abc", "data:image/png;base64,abc"),
])
def test_an_image_that_is_gone_or_none_has_a_size_of_minus_one(tmp_path, value, name):
    assert image_of("a", {"image": value}, tmp_path).origin() == (name, -1, 0)


def test_an_absolute_path_under_the_source_is_relative_to_it(tmp_path):
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / folder / "images" / "0.png").write_bytes(png(0))
        row = {"image": f"{tmp_path}/{folder}/images/0.png", "caption": "x"}
        path = write_rows(tmp_path / folder, "a.json", [row])
        names.append(open_source(path)[0].origin()[0])
    assert names == ["images/0.png"] * 2


def test_a_format_of_ones_own_has_origins_by_image_of(tmp_path):
    (tmp_path / "0.png").write_bytes(png(0))
    image = image_of("a", {"image": "0.png"}, tmp_path)
    assert isinstance(image, ImageAt)
    assert sample_of("a", {"caption": "x"}, image).origin()[0] == "0.png"
    assert sample_of("a", {"caption": "x"}, lambda: None).origin is None


@pytest.mark.skipif(not HAS_PARQUET, reason="needs pyarrow")
def test_images_that_a_parquet_names_by_path_have_the_origins_of_their_files(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    images = [{"bytes": None, "path": f"{i}.png"} for i in range(4)]
    table = pyarrow.table({"image": pyarrow.array(images, image), "caption": ["x"] * 4})
    lists = pyarrow.array([[image] for image in images], pyarrow.list_(image))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pyarrow.ipc.new_stream(str(tmp_path / "b.arrow"), table.schema) as file:
        file.write_table(table)
    pyarrow.parquet.write_table(table.set_column(0, "image", lists), tmp_path / "c.parquet")
    for file in ("a.parquet", "b.arrow", "c.parquet"):
        source = open_source(tmp_path / file)
        for i in range(4):
            assert source[i].origin()[:2] == (f"{i}.png", len(png(i))), file
        assert source[3].image().size == (96, 120)
