"""WebDataset: samples in tar files. Files of one stem are a sample: an image, and its words or its class.

    000000.jpg 000000.txt                       # .txt or .caption
    000000.jpg 000000.json                      # {"caption": …}, {"prompt": …}, {"conversations": …}, …
    000000.jpg 000000.txt 000000.json           # img2dataset
    000000.jpg 000000.cls                       # a number; classes.json beside the shards has the names

The positions of a shard's files are kept beside it in <shard>.index; only the first start scans a shard.
"""
import bisect
import contextlib
import io
import itertools
import json
import os
import posixpath
import sys
import tarfile
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from harmonkit.checkpoints import write_text
from harmonkit.data.classes import SYNSET
from harmonkit.data.formats import Format
from harmonkit.data.labels import label_names, read_label
from harmonkit.data.paths import expand, list_folder, training_split
from harmonkit.data.records import (
    IMAGE_SUFFIXES,
    SkipSample,
    fields_of_files,
    image_of,
    is_junk,
    read_image,
    sample_of,
    skip_errors,
)
from harmonkit.data.words import decode

VERSION = 2                         # of <shard>.index; raise it when `scan` groups files by another rule
WORD_SUFFIXES = (".json", ".caption", ".txt")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
BEGINNINGS = {                      # of files that are no tar file: what is wrong with them
    b"\x1f\x8b": "compressed with gzip", b"BZh": "compressed with bzip2", b"\xfd7zXZ": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd", b"PK\x03\x04": "a zip file",
    b"version https://git-lfs": "a Git LFS pointer; `git lfs pull` fetches the shard itself",
}


class Shards(Format):
    """One or more tar files: a path, a pattern, or a folder. text: the field with the words (words.py)."""
    kind = "WebDataset"
    suffixes = (".tar",)
    takes_patterns = True

    @classmethod
    def lies_at(cls, path):
        return is_shard(path) or os.path.isdir(path) and bool(shards_in(path))

    def __init__(self, path, text=None):
        self.path = path
        self.text = text
        self.paths = shards_in(path) if os.path.isdir(path) else list(filter(is_shard, expand(path)))
        paths = tqdm(self.paths, desc=f"shards of {path}", disable=None, leave=False)
        self.ends = list(itertools.accumulate(shard_index(shard, count_only=True) for shard in paths))
        self.class_names = {}
        if len(self) and ".cls" in self.files(0)[1]:
            self.class_names, origin = label_names(path, self.some_labels(), len(self))
            if not self.has_words(0):
                self.kind = f"WebDataset, labels named by {origin}"
                if origin == "ImageNet-1k":
                    print(f"note: {path}: labels are taken for ImageNet-1k's; a classes.json beside the "
                          "shards gives other names", file=sys.stderr)

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        name, files = self.files(i)
        with skip_errors(name):
            return self.sample(name, files)

    def files(self, i) -> tuple:
        """A sample's name, and its files as {suffix: () -> binary file}."""
        shard = bisect.bisect(self.ends, i)
        path = self.paths[shard]
        stem, positions = shard_index(path)[i - self.ends[shard]]               # counted from the end
        name = f"{path}:{stem}".encode(errors="backslashreplace").decode()
        return name, {suffix: partial(read_part, path, *positions[suffix]) for suffix in positions}

    def has_words(self, i) -> bool:
        """Whether a sample has other words than the name of its class."""
        name, files = self.files(i)
        with contextlib.suppress(SkipSample), skip_errors(name):
            sample = self.sample(name, {suffix: files[suffix] for suffix in files if suffix != ".cls"})
            return sample.caption is not None or sample.turns is not None
        return False

    def some_labels(self) -> list:
        """The labels of at most 256 samples, spread over the source."""
        labels = []
        for i in range(0, len(self), -(-len(self) // 256)):
            _, files = self.files(i)
            with contextlib.suppress(ValueError, OSError):
                labels.append(int(files[".cls"]().read()) if ".cls" in files else -1)
        return [label for label in labels if label >= 0]

    def sample(self, name, files):
        suffixes = [suffix for suffix in files if suffix.endswith(IMAGE_SUFFIXES)]
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if suffix is None and len(suffixes) > 1:
            raise ValueError(f"several images in one sample; one is expected ({', '.join(suffixes)})")
        words = {suffix: partial(read_bytes, files[suffix]) for suffix in WORD_SUFFIXES if suffix in files}
        if not words and suffix is None:
            raise ValueError(f"an image with .txt, .caption, .json or .cls is expected; "
                             f"here: {', '.join(files) or 'nothing'}")
        fields = fields_of_files(words)
        if suffix is not None:
            image = partial(read_image, name, files[suffix])
        else:
            image = image_of(name, fields, os.path.dirname(self.paths[0]))

        # A class: of a .cls file, or of a name such as n01440764_18.JPEG.
        label, class_name = -1, None
        synsets = SYNSET.findall(os.path.basename(name))
        if ".cls" in files:
            label, class_name = read_label(decode(files[".cls"]().read()), self.class_names)
        elif synsets:
            label, class_name = read_label(synsets[-1], {})
        sample = sample_of(name, fields, image, text=self.text, label=label)
        if class_name and sample.caption is None and sample.turns is None:
            sample = sample_of(name, {"caption": class_name}, image, label=label)
        return sample


def is_shard(path) -> bool:
    return path.lower().endswith((*Shards.suffixes, *COMPRESSED))


def shards_in(folder) -> list:
    """The tar files in a folder and its subfolders; where there is a train split, its files alone.

    There are none if the folder also holds images: then these are the samples.
    """
    files = list_folder(folder)
    if any(file.lower().endswith(IMAGE_SUFFIXES) for file in files):
        return []
    return [os.path.join(folder, file) for file in training_split(filter(is_shard, files))]


# ---- tar files -----------------------------------------------------------------------------------------

def read_part(path, offset, size):
    """A part of a file as a binary file in memory."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise ValueError("the shard ends inside the sample")
    part = io.BytesIO(content)
    part.name = path                                            # open_image names it in messages
    return part


def read_bytes(file) -> bytes:
    return file().read()


@lru_cache(maxsize=64)
def shard_index(path, count_only=False):
    """The `scan` of a shard or its length, from <shard>.index unless the shard has changed since."""
    file = Path(f"{path}.index")
    state = [VERSION, os.stat(path).st_size, os.stat(path).st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(file) as lines:
        head = json.loads(lines.readline())
        if head["shard"] == state:
            return head["count"] if count_only else [json.loads(line) for line in lines]
    samples = scan(path)
    rows = [{"shard": state, "count": len(samples)}, *samples]
    with contextlib.suppress(OSError):                          # the folder may be read-only
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return len(samples) if count_only else samples


def scan(path) -> list:
    """[(stem, {suffix: (offset, size)}), …] of a tar file. Raises ValueError for another file.

    A truncated shard keeps its complete samples and gains one bad sample that reports the truncation.
    """
    places, links = {}, {}
    is_complete = True
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name.lstrip("/"))
                if member.isfile() and not is_junk(name):
                    places[name] = (member.offset_data, member.size)
                elif member.islnk():                            # the same content under another name
                    links[name] = posixpath.normpath(member.linkname.lstrip("/"))
    except tarfile.ReadError as error:
        if not places:
            raise ValueError(f"{path}: {why_no_tar(path, error)}") from None
        is_complete = False
    places.update({name: places[target] for name, target in links.items() if target in places})

    stems = {}
    for name, place in places.items():
        folder, _, file = name.rpartition("/")
        stem, _, suffix = file.partition(".")
        stems.setdefault(posixpath.join(folder, stem), {})[f".{suffix.lower()}"] = place
    samples = [sample for stem, files in stems.items() for sample in split_stem(stem, files)]
    if not is_complete:
        samples.append(("(the shard ends too early)", {}))
    return samples


def why_no_tar(path, error) -> str:
    """Why a file is not a readable tar file, from how it begins, or in tarfile's words."""
    with open(path, "rb") as file:
        head = file.read(64)
    found = next((meaning for beginning, meaning in BEGINNINGS.items() if head.startswith(beginning)), "")
    if "compressed" in found or "zip" in found:
        found += "; unpack it first, because samples are read in any order"
    return f"not an uncompressed tar file: {found or error}"


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
    """The files that belong to an image: .v2.jpg has .v2.txt and .v2.jpg.txt. -> {".jpg": …, ".txt": …}."""
    inner, _, suffix = image.rpartition(".")
    own = {f".{suffix}": files[image]}
    for before in (image, inner):
        for other in WORD_SUFFIXES + (".cls",):
            if before + other in files:
                own[other] = files[before + other]
    return own
