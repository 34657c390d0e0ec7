"""Data that vanish or change during a run, and files that were cut: bad samples with a reason, or refused."""
import builtins
import errno
import os
import shutil
from importlib.util import find_spec

import pytest
from data_files import captions, png, write_rows

from harmonkit.data.records import SkipSample
from harmonkit.data.sources import open_source

CHANGED = "the file has changed since it was opened; start again"
ROWS = [(f"{i}.png", f"caption {i}") for i in range(6)]
needs_pyarrow = pytest.mark.skipif(not find_spec("pyarrow"), reason="needs pyarrow")


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def table(name, rows) -> str:
    comma = "\t" if name.endswith("tsv") else ","
    return f"image{comma}caption\n" + "".join(f"{image}{comma}{caption}\n" for image, caption in rows)


def write(folder, name, rows):
    if name.endswith(".jsonl"):
        return write_rows(folder, name, [{"image": image, "caption": caption} for image, caption in rows])
    return write_rows(folder, name, table(name, rows))


def reason(read) -> str:
    """Why a sample is bad."""
    with pytest.raises(SkipSample) as error:
        read()
    assert error.value.bad
    return error.value.reason


# ---- tables --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_table_written_anew_during_a_run_is_refused(folder, name):
    path = write(folder, name, ROWS)
    source = open_source(path)
    write(folder, name, ROWS[1:] + ROWS[:1])                    # of the same size, in another order
    assert [reason(lambda i=i: source[i]) for i in range(6)] == [CHANGED] * 6
    write(folder, name, ROWS[:2])
    assert [source[i].caption(None) for i in range(2)] == ["caption 0", "caption 1"]
    assert [reason(lambda i=i: source[i]) for i in range(2, 6)] == [CHANGED] * 4
    os.unlink(path)
    assert reason(lambda: source[0]) == "no such file or directory"
    assert captions(open_source(write(folder, name, ROWS[1:] + ROWS[:1])))[0] == "caption 1"


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
def test_a_table_touched_or_longer_goes_on(folder, name):
    path = write(folder, name, ROWS[:4])
    source = open_source(path)
    write(folder, name, ROWS)
    os.utime(path, (1, 1))
    assert captions(source) == [f"caption {i}" for i in range(4)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_rows_of_several_lines_are_compared_as_a_whole(folder, name):
    rows = [(f"{i}.png", f'"caption\n\n{i}"') for i in range(6)]
    source = open_source(write(folder, name, rows))
    assert captions(source) == [f"caption\n\n{i}" for i in range(6)]
    rows[3] = ("3.png", '"caption\n\nx"')
    write(folder, name, rows)
    assert reason(lambda: source[3]) == CHANGED
    assert source[4].caption(None) == "caption\n\n4"


@pytest.mark.parametrize("name, end, expected", [
    ("a.jsonl", 9, "not JSON"),
    ("a.csv", 14, "1 cells, but 2 columns"),
    ("a.tsv", 14, "1 cells, but 2 columns"),
])
def test_a_row_that_was_cut_is_bad(folder, name, end, expected):
    path = write(folder, name, ROWS)
    os.truncate(path, os.path.getsize(path) - end)
    source = open_source(path)
    assert len(source) == 6
    assert [source[i].caption(None) for i in range(5)] == [f"caption {i}" for i in range(5)]
    assert expected in reason(lambda: source[5])


def test_a_cell_in_quotes_that_was_cut_is_bad(folder):
    path = write(folder, "a.csv", [(image, f'"{caption}"') for image, caption in ROWS])
    os.truncate(path, os.path.getsize(path) - 4)
    assert "broken row" in reason(lambda: open_source(path)[5])


def test_a_list_that_was_cut_is_refused(folder):
    path = write_rows(folder, "a.json", [{"image": image, "caption": caption} for image, caption in ROWS])
    os.truncate(path, os.path.getsize(path) - 9)
    with pytest.raises(ValueError, match="a.json: not JSON"):
        open_source(path)


# ---- folders -------------------------------------------------------------------------------------------

def test_files_of_a_folder_that_vanish(folder):
    for image, caption in ROWS:
        (folder / image).with_suffix(".txt").write_text(caption)
    source = open_source(folder)
    sample = source[1]
    os.unlink(folder / "1.png")
    os.unlink(folder / "2.txt")
    assert reason(sample.image) == "no such file"
    assert sample.origin() == ("1.png", -1, 0)
    assert reason(lambda: source[2]) == "its .txt file cannot be read (no such file or directory)"
    (folder / "3.png").write_bytes(png(3)[:60])
    assert "cut off" in reason(source[3].image)


def test_a_disk_error_is_a_bad_sample(folder, monkeypatch):
    source = open_source(write(folder, "a.jsonl", ROWS))
    plain = builtins.open

    def failing(path, *args, **options):
        if str(path).endswith("a.jsonl"):
            raise OSError(errno.EIO, "Input/output error", path)
        return plain(path, *args, **options)

    monkeypatch.setattr(builtins, "open", failing)
    assert reason(lambda: source[0]) == "input/output error"


def test_a_row_of_metadata_without_its_image_is_bad_and_an_image_without_a_row_is_told(folder, capsys):
    write_rows(folder, "metadata.jsonl", [{"file_name": f"{i}.png", "text": "x"} for i in range(1, 6)])
    source = open_source(folder)
    assert "note: " in capsys.readouterr().err.replace("6 images, but 5 rows of metadata", "note: ")
    os.unlink(folder / "4.png")
    assert reason(source[3].image) == "no such file"
    open_source(folder)
    assert capsys.readouterr().err == ""


# ---- parquet and arrow ---------------------------------------------------------------------------------

def write_parquet(folder, name, numbers):
    import pyarrow
    import pyarrow.parquet

    columns = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
               "caption": [f"caption {i}" for i in numbers]}
    written = pyarrow.table(columns)
    if name.endswith(".arrow"):
        with pyarrow.ipc.new_stream(str(folder / "new"), written.schema) as file:
            file.write_table(written, max_chunksize=2)
    else:
        pyarrow.parquet.write_table(written, folder / "new", row_group_size=2)
    os.replace(folder / "new", folder / name)                   # a mapped file must not be changed in place
    return str(folder / name)


@needs_pyarrow
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_of_row_groups_replaced_during_a_run_is_refused(tmp_path, name):
    path = write_parquet(tmp_path, name, range(6))
    source = open_source(path)
    assert captions(source) == [f"caption {i}" for i in range(6)]
    os.utime(path, (1, 1))                                      # touched: it is the same
    assert captions(source) == [f"caption {i}" for i in range(6)]
    write_parquet(tmp_path, name, range(10, 16))
    assert [reason(lambda i=i: source[i]) for i in range(6)] == [CHANGED] * 6
    os.unlink(path)
    assert reason(lambda: source[0]) == "no such file or directory"


@needs_pyarrow
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_file_of_row_groups_that_was_cut_is_refused(tmp_path, name):
    path = write_parquet(tmp_path, name, range(6))
    with open(path, "rb") as file:
        content = file.read()
    for count in {len(content) // 2, len(content) - 8, len(content) - 4, *range(8, len(content), 64)}:
        write_rows(tmp_path, "new", content[:count])
        shutil.move(tmp_path / "new", tmp_path / f"{count}{name}")
        with pytest.raises(ValueError, match=f"{count}{name}: not a readable ."):
            open_source(f"{tmp_path}/{count}{name}")
