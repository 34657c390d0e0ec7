"""<shard>.index: used while it is the shard's own, made again otherwise; many shards are as fast as few."""
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
from data_files import captions, color, png, write_shard, write_tar

from harmonkit.data import shard_index, shards
from harmonkit.data.records import SkipSample
from harmonkit.data.shard_index import ShardIndex
from harmonkit.data.sources import open_source

CHANGED = "the shard holds another file there than when it was scanned; start again"


def head(path) -> dict:
    return json.loads(Path(f"{path}.index").read_bytes().partition(b"\n")[0])


@pytest.fixture
def scans(monkeypatch):
    """The paths of the shards that are scanned."""
    scanned = []
    plain = shard_index.scan
    monkeypatch.setattr(shard_index, "scan", lambda path: scanned.append(path) or plain(path))
    return scanned


def test_the_index_of_a_shard_is_kept_until_the_shard_changes(tmp_path, scans):
    path = write_shard(tmp_path / "a.tar", range(4))
    for _ in range(3):
        assert captions(open_source(path)) == [f"caption {i}" for i in range(4)]
    assert scans == [path]
    write_shard(path, range(2, 8))
    assert captions(open_source(path)) == [f"caption {i}" for i in range(2, 8)]
    assert scans == [path] * 2


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n", b"[]\n", b"not JSON", b"\0" * 700, b"7\n"])
def test_a_broken_index_is_replaced(tmp_path, content):
    path = write_shard(tmp_path / "a.tar", range(3))
    (tmp_path / "a.tar.index").write_bytes(content)
    assert captions(open_source(path)) == ["caption 0", "caption 1", "caption 2"]
    assert head(path)["count"] == 3


def test_an_index_with_any_byte_changed_or_cut_anywhere_is_replaced(tmp_path, scans):
    path = write_shard(tmp_path / "a.tar", range(2))
    open_source(path)
    right = Path(f"{path}.index").read_bytes()
    for place in range(len(right)):
        changed = bytearray(right)
        changed[place] ^= 1 << place % 7
        content = (bytes(changed), right[:place], right + right[-place:])[place * 7 % 3]
        Path(f"{path}.index").write_bytes(content)
        del scans[:]
        assert captions(open_source(path)) == ["caption 0", "caption 1"]
        # A blank in the head may become another one, which means the same.
        assert scans or json.loads(content.partition(b"\n")[0]) == head(path)
        assert scans == [] or Path(f"{path}.index").read_bytes() == right


def test_an_index_of_another_rule_is_replaced(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"._0.png": b"x", "0.png": png(0), "0.txt": b"zero"})
    state = [os.stat(path).st_size, os.stat(path).st_mtime_ns]
    rows = [{"shard": [2, *state], "count": 2}, ["/._0", {".png": [512, 1]}], ["/0", {".png": [1536, 5]}]]
    (tmp_path / "a.tar.index").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert captions(open_source(path)) == ["zero"]
    assert head(path)["shard"] == [shard_index.VERSION, *state]


def same_size_and_time(path, numbers, folder):
    """Replace a shard by one of other samples that nothing but its content tells from it."""
    state = os.stat(path)
    other = write_shard(folder / "other", numbers)
    assert os.path.getsize(other) == state.st_size
    shutil.copyfile(other, path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.unlink(other)


@pytest.mark.parametrize("numbers", [range(10, 16), [0, 1, 2, 3, 4, 6], [5, 1, 2, 3, 4, 0]])
def test_a_shard_of_the_same_size_and_time_is_scanned_again(tmp_path, numbers):
    path = write_shard(tmp_path / "a.tar", range(6))
    open_source(path)
    same_size_and_time(path, numbers, tmp_path)
    source = open_source(path)
    assert captions(source) == [f"caption {i}" for i in numbers]
    assert [source[i].image().getpixel((0, 0)) for i in range(6)] == [color(i) for i in numbers]


def test_a_change_between_the_samples_looked_at_is_refused_until_the_next_start(tmp_path):
    numbers = [*range(20)]
    path = write_shard(tmp_path / "a.tar", numbers)
    open_source(path)
    numbers[5], numbers[6] = 6, 5                               # the first, middle and last are as they were
    same_size_and_time(path, numbers, tmp_path)
    source = open_source(path)
    for i in (5, 6):
        with pytest.raises(SkipSample, match=f"a.tar:00000{i}: {CHANGED}") as error:
            source[i]
        assert error.value.bad
    assert [source[i].caption(None) for i in (0, 4, 7, 19)] == [f"caption {i}" for i in (0, 4, 7, 19)]
    assert captions(open_source(path)) == [f"caption {i}" for i in numbers]


@pytest.mark.parametrize("is_released", [False, True])
def test_a_shard_that_is_replaced_during_a_run_is_never_misread(tmp_path, is_released):
    path = write_shard(tmp_path / "a.tar", range(6))
    source = open_source(path)
    if is_released:
        source.indexes[0].release()
    same_size_and_time(path, range(10, 16), tmp_path)
    for i in range(6):
        with pytest.raises(SkipSample, match=CHANGED):
            source[i]
    assert captions(open_source(path)) == [f"caption {i}" for i in range(10, 16)]      # and writes the index
    for i in range(6):
        with pytest.raises(SkipSample, match="start again"):
            source[i]


def test_a_shard_that_vanishes_is_bad_and_says_so(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(3))
    source = open_source(path)
    sample = source[0]
    os.unlink(path)
    for read in (sample.image, lambda: source[1]):
        with pytest.raises(SkipSample, match="a.tar:00000.: no such file") as error:
            read()
        assert error.value.bad
    source.indexes[0].release()
    os.unlink(f"{path}.index")
    with pytest.raises(SkipSample, match="a.tar:sample 2: no such file"):
        source[1]


# ---- many shards ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("memory", [0, 2 ** 26])
def test_samples_of_many_shards_are_read_without_opening_an_index_again(tmp_path, monkeypatch, memory):
    monkeypatch.setattr(shards, "MEMORY", memory)
    for k in range(130):
        write_shard(tmp_path / f"{k:03d}.tar", [2 * k, 2 * k + 1], words=lambda i: {
            "png": b"", "txt": f"caption {i}".encode()})
    source = open_source(tmp_path)
    kept = sum(len(index.content or b"") for index in source.indexes)
    assert (kept == 0) == (memory == 0) and kept <= memory
    source = pickle.loads(pickle.dumps(source))                 # as a reader process gets it
    for name in ("scan", "find_files"):
        monkeypatch.setattr(shard_index, name, lambda path: pytest.fail("a shard was scanned"))
    monkeypatch.setattr(ShardIndex, "take", lambda *args: pytest.fail("an index was read again"))
    order = list(range(260)) * 2
    random.Random(0).shuffle(order)
    assert [source[i].caption(None) for i in order] == [f"caption {i}" for i in order]


def test_an_index_deleted_during_a_run_is_made_again(tmp_path, scans):
    path = write_shard(tmp_path / "a.tar", range(4))
    source = open_source(path)
    source.indexes[0].release()
    os.unlink(f"{path}.index")
    assert captions(source) == [f"caption {i}" for i in range(4)]
    assert scans == [path] * 2


def test_an_index_damaged_during_a_run_is_made_again(tmp_path, scans):
    path = write_shard(tmp_path / "a.tar", range(4))
    source = open_source(path)
    source.indexes[0].release()
    right = Path(f"{path}.index").read_bytes()
    Path(f"{path}.index").write_bytes(right.replace(b'"000002"', b'"000009"'))
    assert source[2].name == f"{path}:000002"
    assert scans == [path] * 2 and Path(f"{path}.index").read_bytes() == right


def test_an_index_written_anew_during_a_run_is_used_if_it_is_the_same(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(4))
    source = open_source(path)
    source.indexes[0].release()
    os.utime(path, (1, 1))                                      # touched: the same shard
    assert captions(open_source(path)) == captions(source) == [f"caption {i}" for i in range(4)]
    write_shard(path, range(5))
    assert len(open_source(path)) == 5
    with pytest.raises(SkipSample, match="a.tar:sample 3: the shard has changed since it was opened; start"):
        source[2]


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(path, content):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(shards, "MEMORY", 0)
    source = open_source(write_shard(tmp_path / "a.tar", range(2)))
    assert captions(source) == captions(pickle.loads(pickle.dumps(source))) == ["caption 0", "caption 1"]
    assert os.listdir(tmp_path) == ["a.tar"]
