"""Shards that are damaged: what lies behind the damage is used, and what is lost is told and counted."""
import io
import os
import re
import shutil
import subprocess
import tarfile

import pytest
from data_files import color, png, write_shard, write_tar

from harmonkit.data import shard_index, tars
from harmonkit.data.records import SkipSample, lacking
from harmonkit.data.sources import open_source

EARLY = "(the shard ends too early)"


def read_all(path, **options):
    """The numbers of the usable samples of a shard by `write_shard`, and {name: reason} of the others."""
    source = open_source(path, **options)
    good, bad = [], {}
    for i in range(len(source)):
        try:
            sample = source[i]
            pixel = sample.image().getpixel((0, 0))
            if sample.caption is None:
                raise SkipSample(sample.name, lacking("caption", sample))
            number = int(sample.caption(None).split()[1])
            assert pixel == color(number)
            good.append(number)
        except SkipSample as error:
            assert error.bad
            bad[error.name.removeprefix(f"{path}:")] = error.reason
    return good, bad


def member(path, name):
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def overwrite(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("content", [b"\0" * 512, b"\xff" * 512, b"junk" * 128])
@pytest.mark.parametrize("lost", [0, 5, 9])
def test_a_damaged_header_costs_one_sample(tmp_path, content, lost):
    path = write_shard(tmp_path / "a.tar", range(10))
    place = member(path, f"{lost:06d}.png").offset
    overwrite(path, place, content)
    good, bad = read_all(path)
    assert good == [i for i in range(10) if i != lost]
    size = member(write_shard(tmp_path / "b.tar", range(10)), f"{lost:06d}.txt").offset - place
    reason = bad.pop(f"({size} bytes from byte {place})")
    assert reason == "the shard is damaged there; its samples are lost"
    assert list(bad) == [f"{lost:06d}"] and "neither an image" in bad[f"{lost:06d}"]     # its words are there


@pytest.mark.parametrize("content", [b"\0", b"\xa7"])
def test_a_hole_over_several_samples_is_told_once(tmp_path, content):
    path = write_shard(tmp_path / "a.tar", range(40))
    start = member(path, "000010.png").offset_data + 30
    end = member(path, "000030.png").offset_data + 30
    overwrite(path, start, content * (end - start))
    good, bad = read_all(path)
    assert good == [*range(10), *range(31, 40)]
    first, last = member(write_shard(tmp_path / "b.tar", range(40)), "000030.txt"), bad.pop("000010")
    assert "image" in last                                              # its picture has the hole
    assert bad.pop("000030").startswith("neither an image")
    name, = bad
    count, place = int(name[1:].split()[0]), int(name.split()[-1][:-1])
    assert start < place < place + count == first.offset


def test_two_holes_are_two_losses(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(12))
    for number in (3, 7):
        place = member(write_shard(tmp_path / "b.tar", range(12)), f"{number:06d}.png").offset
        overwrite(path, place, b"\1" * 512)
    good, bad = read_all(path)
    assert good == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert sum("bytes from byte" in name for name in bad) == 2 and len(bad) == 4


def test_opening_tells_of_damage(tmp_path, capsys):
    """A short run may not reach the samples that stand for it."""
    paths = [write_shard(tmp_path / f"{k}.tar", range(20 * k, 20 * k + 20)) for k in range(3)]
    open_source(tmp_path)
    assert capsys.readouterr().err == ""
    place = member(paths[1], "000025.png").offset
    overwrite(paths[1], place, b"\1" * 512)
    for _ in range(2):                                          # the second time from the index
        open_source(tmp_path)
        told = capsys.readouterr().err
        assert told.startswith(f"note: {tmp_path}: 1 of 3 shards are damaged; each ")
        assert told.count("\n") == 1
        assert re.search(rf"{paths[1]}:\(\d+ bytes from byte {place}\): the shard is damaged there;", told)


def test_a_cut_out_piece_shifts_the_rest(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(12))
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[:5000] + content[5600 + 77:])
    good, bad = read_all(path)
    assert good == [0, 1, *range(3, 12)] and any("bytes from byte" in name for name in bad)


def test_shards_one_behind_the_other_in_a_file(tmp_path):
    """As `cat a.tar b.tar` makes them. tarfile alone ends at the end of the first."""
    parts = [write_shard(tmp_path / f"{k}.tar.part", range(4 * k, 4 * k + 4)) for k in range(2)]
    (tmp_path / "a.tar").write_bytes(b"".join(open(part, "rb").read() for part in parts))
    good, bad = read_all(f"{tmp_path}/a.tar")
    assert good == list(range(8)) and len(bad) == 1


@pytest.mark.parametrize("padding", [0, 512, 10240, 2 ** 19])
def test_zeros_at_the_end_are_no_damage(tmp_path, padding):
    path = write_shard(tmp_path / "a.tar", range(4))
    with open(path, "ab") as file:
        file.write(b"\0" * padding)
    assert read_all(path) == ([0, 1, 2, 3], {})
    assert len(open_source(write_tar(tmp_path / "b.tar", {"0.png": png(0)}))) == 1


def test_a_hole_up_to_the_end_is_damage(tmp_path):
    """A download into a file of its full size that stopped."""
    path = write_shard(tmp_path / "a.tar", range(40))
    start = member(path, "000020.png").offset_data + 50
    overwrite(path, start, b"\0" * (os.path.getsize(path) - start))
    good, bad = read_all(path)
    assert good == list(range(20)) and set(bad) > {"000020"}
    assert [name for name in bad if "bytes from byte" in name]


def test_a_truncated_shard_keeps_its_complete_samples(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(20))
    os.truncate(path, member(path, "000012.png").offset_data + 100)
    good, bad = read_all(path)
    assert good == list(range(12))
    assert list(bad) == ["000012", EARLY] and bad[EARLY] == "what followed is lost"


def test_a_shard_cut_between_two_files_has_no_end(tmp_path):
    path = write_shard(tmp_path / "a.tar", range(20))
    os.truncate(path, member(path, "000012.png").offset)
    assert read_all(path) == (list(range(12)), {EARLY: "what followed is lost"})
    os.truncate(path, member(path, "000010.png").offset + 100)          # inside a header
    assert read_all(path) == (list(range(10)), {EARLY: "what followed is lost"})


def test_a_shard_that_ends_inside_an_image(tmp_path):
    """The image is the last file, so the shard loses nothing else."""
    path = write_shard(tmp_path / "a.tar", [0], words=lambda i: {})
    (_, files), = shard_index.scan(path)
    offset, size, crc = files[".png"]
    assert tars.read_part(path, offset, size, crc).read() == png(0)
    with pytest.raises(ValueError, match="the shard ends inside the sample"):
        tars.read_part(path, offset, 10 ** 6, crc)


def test_names_that_come_again_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", png(0)), ("0.txt", b"caption 0"), ("0.txt", b"caption 0")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    good, bad = read_all(f"{tmp_path}/a.tar")
    assert good == [0]
    assert bad == {"(1 names again)": "several files of one name in a shard; the last is used"}


def test_links_lead_to_files_of_the_shard_or_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        info = tarfile.TarInfo("a/0.png")
        info.size = len(png(0))
        tar.addfile(info, io.BytesIO(png(0)))
        hard = {"2.png": "a/0.png", "4.png": "x.png"}
        for name, target in {"b/1.png": "../a/0.png", "3.png": "/a/0.png", **hard}.items():
            link = tarfile.TarInfo(name)
            link.type = tarfile.LNKTYPE if name in hard else tarfile.SYMTYPE
            link.linkname = target
            tar.addfile(link)
    source = open_source(tmp_path / "a.tar")
    assert [source[i].image().getpixel((0, 0)) for i in range(3)] == [color(0)] * 3
    with pytest.raises(SkipSample, match=r"\(2 links, such as 3.png\): links to files that are not"):
        source[3]
    assert len(source) == 4


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_before_long_names(tmp_path, form):
    """The header of a long name is damaged, so its file has a short name; all others stay."""
    path = f"{tmp_path}/a.tar"
    names = ["x" * 150 + f"/{i:06d}" for i in range(6)]
    with tarfile.open(path, "w", format=form) as tar:
        for i, name in enumerate(names):
            for suffix, content in (("png", png(i)), ("txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    overwrite(path, member(path, f"{names[3]}.png").offset, b"\1" * 512)
    good, bad = read_all(path)
    assert good == [0, 1, 2, 4, 5] and len(bad) == 3


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_files(tmp_path, form):
    """`tar --sparse` leaves out the zeros in a file."""
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "0.txt").write_bytes(b"caption 0")
    os.truncate(tmp_path / "0.png", 2 ** 20)
    with open(tmp_path / "0.png", "ab") as file:
        file.write(b"the end")
    (tmp_path / "1.png").write_bytes(png(1))
    (tmp_path / "1.txt").write_bytes(b"caption 1")
    command = ["tar", "--sparse", f"--format={form}", "-cf", "a.tar", "0.png", "0.txt", "1.png", "1.txt"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True)
    if made.returncode:
        pytest.skip("not GNU tar")
    assert os.path.getsize(tmp_path / "a.tar") < 2 ** 17
    source = open_source(f"{tmp_path}/a.tar")
    content = source.files(0)[1][".png"]().read()
    assert (len(content), content[:len(png(0))], content[-7:]) == (2 ** 20 + 7, png(0), b"the end")
    assert [source[i].caption(None) for i in range(2)] == ["caption 0", "caption 1"]
    assert source[1].image().getpixel((0, 0)) == color(1)


def test_a_file_without_any_header_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(os.urandom(3 * 2 ** 20))
    with pytest.raises(ValueError, match="a.tar: not an uncompressed tar file: invalid header"):
        open_source(tmp_path / "a.tar")


def test_a_header_may_lie_anywhere(tmp_path):
    header = tarfile.TarInfo("0.png").tobuf()
    for place in (0, 1, 512, tars.CHUNK - 300, tars.CHUNK - 512, tars.CHUNK - 511, 2 * tars.CHUNK + 7):
        file = io.BytesIO((b"ustar" * 100).ljust(place, b"x")[:place] + header)
        assert tars.next_header(file, 0) == place
        assert tars.next_header(file, place + 1) is None
