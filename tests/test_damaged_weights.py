"""Files of weights that are damaged on the disk: what the checksums of torch.save find."""
import random
import zipfile

import pytest
import torch
from test_weight_files import TENSORS, same, zip_again

from harmonkit.weight_files import check_crc, read


@pytest.fixture
def pth(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    return tmp_path / "x.pth"


def test_a_whole_file_passes(pth, tmp_path):
    check_crc(pth)
    zip_again(pth, tmp_path / "deflated.pth", zipfile.ZIP_DEFLATED)
    check_crc(tmp_path / "deflated.pth")
    with pytest.raises(FileNotFoundError):
        check_crc(tmp_path / "none.pth")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_hole_of_zeros_is_found_and_its_entry_named(pth, tmp_path, method):
    """torch.load reads it, mapped or not."""
    again = zip_again(pth, tmp_path / "again.pth", method)
    content = bytearray(again.read_bytes())
    entry = max(zipfile.ZipFile(again).infolist(), key=lambda entry: entry.compress_size)
    middle = entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2
    content[middle:middle + 64] = bytes(64)
    again.write_bytes(content)
    for check in (check_crc, read):
        with pytest.raises(ValueError, match=f"again.pth: its entry '{entry.filename}' is damaged .*; write"):
            check(again)


def test_files_that_torch_saved_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(TENSORS, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(read(tmp_path / "x.pth"))


def test_no_damage_gives_other_numbers(pth, tmp_path):
    """A flipped bit, zeros or a cut anywhere: refused, or, if it does no harm, the same tensors."""
    whole, damaged = pth.read_bytes(), tmp_path / "damaged.pth"
    rng = random.Random(0)
    refused = 0
    for number in range(600):
        content, place = bytearray(whole), rng.randrange(len(whole))
        if number % 3 == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif number % 3 == 1:
            end = min(len(whole), place + rng.choice((1, 8, 64, 512)))
            content[place:end] = bytes(end - place)
        else:
            content = content[:place]
        damaged.write_bytes(content)
        try:
            assert same(read(damaged)), (number, place)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{damaged}: ") and "\n" not in str(error)
    assert refused > 400
