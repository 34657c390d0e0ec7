"""Tar files: where their files lie, also behind a damaged place, and the bytes of one file.

A member is a header of 512 bytes and its data. tarfile stops at the first header that is damaged, as it does
at the zeros of the end. Here the search goes on, and what lies between is told as lost.
"""
import contextlib
import io
import os
import posixpath
import tarfile
import zlib

from harmonkit.data.records import is_junk

BLOCK = tarfile.BLOCKSIZE           # 512 bytes
PADDING = tarfile.RECORDSIZE + 2 * BLOCK            # bytes of zeros that end a tar, at most
LARGE_PADDING = 2 ** 20 + 2 * BLOCK                 # the same with larger records (tar -b)
CHUNK = 2 ** 20                     # bytes read at once in search of a header
BEGINNINGS = {                      # of files that are no tar file: what is wrong with them
    b"\x1f\x8b": "compressed with gzip", b"BZh": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd", b"PK\x03\x04": "a zip file",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the shard itself",
}
DAMAGED = (tarfile.TarError, ValueError, LookupError, ArithmeticError)      # what tarfile raises at damage


# ---- one file ------------------------------------------------------------------------------------------

def read_part(path, offset, size, crc, is_sparse=False):
    """A file in a tar as a binary file in memory, from its place in `find_files`. Raises ValueError.

    The header in front is compared, so that another file in its place is never taken for it.
    """
    with open(path, "rb") as file:
        file.seek(offset - BLOCK)
        if zlib.crc32(file.read(BLOCK)) != crc:
            raise ChangedError("the shard holds another file there than when it was scanned; start again")
        if is_sparse:
            file.seek(offset - BLOCK)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                content = tar.extractfile(tar.next()).read()
        else:
            content = file.read(size)
    if len(content) != size:
        raise ValueError("the shard ends inside the sample")
    part = io.BytesIO(content)
    part.name = path                                            # open_image names it in messages
    return part


class ChangedError(ValueError):
    """A tar file that is not what was scanned."""


def is_there(path, places) -> bool:
    """Whether a tar file has the headers of these places."""
    with open(path, "rb") as file:
        for offset, _, crc, *_ in places:
            file.seek(offset - BLOCK)
            if zlib.crc32(file.read(BLOCK)) != crc:
                return False
    return True


# ---- all files -----------------------------------------------------------------------------------------

def find_files(path) -> tuple:
    """The files of a tar as {name: place}, and its losses as [(name, reason), …]. Raises ValueError.

    place: (offset, size, crc of the header in front); (offset behind the first header, size, crc, True) of a
    sparse file, whose data have gaps.
    """
    places, links = {}, {}
    gaps = []                                                   # [first byte, byte behind the last]
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        refuse_other_files(path, file)
        position = 0
        repeated = 0
        while position is not None:
            end, again = read_members(file, position, places, links)
            repeated += again
            if end < size and is_zero(file, end) and is_padding(file, size - end, places):
                break
            position = next_header(file, end + 1)
            gap_end = size if position is None else position
            if gaps and gaps[-1][1] == end:
                gaps[-1][1] = gap_end
            else:
                gaps.append([end, gap_end])
        has_end = is_zero(file, max(0, size - BLOCK))
    if gaps and not places:
        raise ValueError(f"{path}: {why_no_tar('invalid header' if size else 'empty file')}")
    dangling = [name for name, target in links.items() if target not in places]
    places.update({name: places[target] for name, target in links.items() if target in places})
    losses = [loss(start, end, has_end or end < size) for start, end in gaps]
    if repeated:
        losses.append((f"({repeated} names again)", "several files of one name in a shard; the last is used"))
    if dangling:
        name = f"({len(dangling)} links, such as {dangling[0]})"
        losses.append((name, "links to files that are not in the shard"))
    return places, losses


def read_members(file, position, places, links) -> tuple:
    """Add the members from a position on, until there is no header.

    Returns the position where that is, and how many names were there already.
    """
    file.seek(position)
    repeated = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            with contextlib.suppress(*DAMAGED):
                while (member := tar.next()) is not None:
                    repeated += add(file, member, places, links)
            return tar.offset, repeated
    except DAMAGED:
        return position, 0


def add(file, member, places, links) -> bool:
    """Add a member if it is a file or a link. Returns whether its name was there already."""
    name = posixpath.normpath(member.name.lstrip("/"))
    if is_junk(name):
        return False
    if member.issym():                                          # relative to its folder
        links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
    if member.islnk():                                          # the same content under another name
        links[name] = posixpath.normpath(member.linkname.lstrip("/"))
    if not member.isfile():
        return False
    is_again = name in places
    offset = member.offset + BLOCK if member.issparse() else member.offset_data
    file.seek(offset - BLOCK)
    place = (offset, member.size, zlib.crc32(file.read(BLOCK)))
    places[name] = (*place, True) if member.issparse() else place
    return is_again


def is_zero(file, position) -> bool:
    """Whether a file has only zeros from a position on, as at the end of a tar."""
    file.seek(position)
    return not any(chunk.strip(b"\0") for chunk in iter(lambda: file.read(CHUNK), b""))


def is_padding(file, count, places) -> bool:
    """Whether so many zeros behind the last file are a tar's end, not a hole that begins inside the file."""
    if count <= PADDING or not places:
        return True
    offset, size, *_ = max(places.values())                     # of the last file
    file.seek(offset + max(0, size - 64))
    return count <= LARGE_PADDING and bool(file.read(min(size, 64)).strip(b"\0"))


def next_header(file, position):
    """The position of the next header from a position on, None if there is none."""
    file.seek(position)
    window = b""                                                # it begins at `position`
    while chunk := file.read(CHUNK):
        window += chunk
        place = window.find(b"ustar")
        while place >= 0:
            start = place - 257                                 # of the header with this mark
            if start >= 0 and is_header(window[start:start + BLOCK]):
                return position + start
            place = window.find(b"ustar", place + 1)
        cut = max(0, len(window) - BLOCK)
        position += cut
        window = window[cut:]
    return None


def is_header(block) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except DAMAGED:
        return False
    return True


def loss(start, end, has_end) -> tuple:
    """The name and the reason of what is lost between two positions of a tar."""
    if has_end:
        return f"({end - start} bytes from byte {start})", "the shard is damaged there; its samples are lost"
    return "(the shard ends too early)", "what followed is lost"


def refuse_other_files(path, file):
    """Raises ValueError for a file that begins as no tar file does."""
    head = file.read(64)
    found = next((meaning for beginning, meaning in BEGINNINGS.items() if head.startswith(beginning)), None)
    if found:
        raise ValueError(f"{path}: {why_no_tar(found)}")


def why_no_tar(reason) -> str:
    if "compressed" in reason or "zip" in reason:
        reason += "; unpack it first, because samples are read in any order"
    return f"not an uncompressed tar file: {reason}"
