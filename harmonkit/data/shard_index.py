"""<shard>.index: the samples of a shard, and where their files lie. Only the first start scans a shard.

    {"shard": [VERSION, size, mtime_ns], "count": rows, "crc": of all that follows}
    ["000000", {".jpg": [offset, size, crc], ".txt": …}]            # a sample; places of tars.find_files
    ["(1024 bytes from byte 51200)", "the shard is damaged there; …"]                           # a loss
    "000000000000 0000004b e9d595aa"            # start behind the head, size and CRC-32 of the first row, …
"""
import contextlib
import io
import json
import os
import posixpath
import zlib
from dataclasses import dataclass
from pathlib import Path

from harmonkit.data.records import IMAGE_SUFFIXES, printable
from harmonkit.data.tars import ChangedError, find_files, is_there, read_part

VERSION = 3                         # raise it when `scan` groups files by another rule
WORD_SUFFIXES = (".json", ".caption", ".txt")
ENTRY = '"{:012x} {:08x} {:08x}"\n'
ENTRY_SIZE = len(ENTRY.format(0, 0, 0))
BROKEN = (OSError, ValueError, LookupError, TypeError, OverflowError)           # raised for a broken index


class ShardIndex:
    """The rows of a shard: index[i] is (stem, {suffix: place}), or (name, reason) of what is lost.

    A row is read when it is asked for, from the content of the file or, after `release`, from the file: a
    sample then costs no memory. Either takes the same time with any number of shards.
    """

    def __init__(self, path):
        """Raises ValueError for what is no tar file."""
        self.path = path
        self.file = Path(f"{path}.index")
        self.is_written = True
        state = os.stat(path)
        self.size = state.st_size
        self.state = [VERSION, state.st_size, state.st_mtime_ns]
        try:
            self.take(self.file.read_bytes())
        except BROKEN:
            content = self.encode(scan(path))
            self.take(content)
            try:
                self.file.write_bytes(content)                  # half a file would be made again
            except OSError:                                     # the folder may be read-only
                self.is_written = False

    def release(self):
        """Give up the content, unless it is in no file."""
        if self.is_written:
            self.content = None

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        with contextlib.suppress(*BROKEN), self.open() as file:
            return self.row(file, i)
        # The file was deleted or written anew since it was opened.
        fresh = ShardIndex(self.path)
        if (fresh.count, fresh.crc) != (self.count, self.crc):
            raise ValueError("the shard has changed since it was opened; start again")
        if self.content is None:
            fresh.release()
        self.__dict__.update(vars(fresh))
        with self.open() as file:
            return self.row(file, i)

    def open(self):
        return open(self.file, "rb") if self.content is None else io.BytesIO(self.content)

    def row(self, file, i):
        """A row of an index file. Raises ValueError if it is broken."""
        file.seek(self.table + ENTRY_SIZE * i)
        entry = file.read(ENTRY_SIZE)
        start, size, crc = int(entry[1:13], 16), int(entry[14:22], 16), int(entry[23:31], 16)
        file.seek(self.start + start)
        row = file.read(size)
        if zlib.crc32(row) != crc:
            raise ValueError("a broken index")
        return json.loads(row)

    def take(self, content):
        """Become the index in the content of a file. Raises one of BROKEN, also for that of another shard."""
        head, _, rest = content.partition(b"\n")
        about = json.loads(head)
        self.count, self.crc = about["count"], about["crc"]
        if about["shard"] != self.state or self.crc != zlib.crc32(rest, self.count):
            raise ValueError("broken, or of another shard")
        self.start = len(head) + 1
        self.table = len(content) - ENTRY_SIZE * self.count
        self.loss = None                                        # (name, reason) of the last one
        # Another shard with the same size and time is told by the headers of its files.
        file = io.BytesIO(content)
        for i in sorted({0, self.count // 2, self.count - 1}) if self.count else ():
            stem, files = self.row(file, i)
            if isinstance(files, str):                          # losses are the last rows
                self.loss = stem, files
            elif not is_there(self.path, files.values()):
                raise ValueError("of another shard")
        self.content = content

    def encode(self, rows) -> bytes:
        """The content of the file."""
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        table = []
        start = 0
        for line in lines:
            table.append(ENTRY.format(start, len(line), zlib.crc32(line)).encode())
            start += len(line)
        rest = b"".join([*lines, *table])
        head = {"shard": self.state, "count": len(lines), "crc": zlib.crc32(rest, len(lines))}
        return json.dumps(head).encode() + b"\n" + rest

    def distrust(self):
        """Let the next start scan the shard. Runs that have it open read on: each file is compared."""
        with contextlib.suppress(OSError), open(self.file, "r+b") as file:
            file.write(b"x")                                    # the head is no JSON then


@dataclass(slots=True)
class Part:
    """A file of a sample. Called, it is read, as a binary file in memory."""
    index: ShardIndex
    name: str                                                   # in the shard
    place: tuple                                                # see tars.find_files

    def __call__(self):
        try:
            return read_part(self.index.path, *self.place)
        except ChangedError as error:
            self.index.distrust()
            raise ValueError(str(error)) from None

    def origin(self) -> tuple:
        """See records.ImageAt."""
        name = printable(f"{os.path.basename(self.index.path)}:{self.name}")
        try:
            return name, self.place[1], os.stat(self.index.path).st_mtime_ns
        except OSError:
            return name, -1, 0


# ---- which files are a sample --------------------------------------------------------------------------

def scan(path) -> list:
    """The rows of a shard: its samples, then what is lost. Raises ValueError for what is no tar file."""
    places, losses = find_files(path)
    stems = {}
    for name, place in places.items():
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        stems.setdefault(posixpath.join(folder, stem), {})[f".{suffix.lower()}"] = place
    samples = [sample for stem, files in stems.items() for sample in split_stem(stem, files)]
    return samples + losses


def split_stem(stem, files) -> list:
    """The samples in the files of one stem, which ends at the first dot: [(stem, {suffix: place}), …].

    Usually one sample. An image without such a suffix (IMG.v2.jpg) is its sample's, if it is the only one;
    several ones are a sample each (IMG.v1.jpg IMG.v1.txt IMG.v2.jpg IMG.v2.txt), unless they share words.
    """
    images = [suffix for suffix in IMAGE_SUFFIXES if suffix in files][:1]
    images = images or [suffix for suffix in files if suffix.endswith(IMAGE_SUFFIXES)]
    if len(images) == 1:
        return [(stem, files_of(images[0], files) | files)]
    if any(suffix in files for suffix in (*WORD_SUFFIXES, ".cls")):
        return [(stem, files)]                                  # with several images it will be refused
    samples = [(stem + suffix.rpartition(".")[0], files_of(suffix, files)) for suffix in images]
    return samples or [(stem, files)]


def files_of(image, files) -> dict:
    """The files of an image: .v2.jpg has .v2.txt and .v2.jpg.txt -> {".jpg": place, ".txt": place}."""
    inner, _, suffix = image.rpartition(".")
    own = {f".{suffix}": files[image]}
    for before in (image, inner):
        for other in WORD_SUFFIXES + (".cls",):
            if before + other in files:
                own[other] = files[before + other]
    return own
