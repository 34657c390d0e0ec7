"""WebDataset: samples in tar files. Files of one stem are a sample: an image, and its words or its class.

    000000.jpg 000000.txt                       # .txt or .caption
    000000.jpg 000000.json                      # {"caption": …}, {"prompt": …}, {"conversations": …}, …
    000000.jpg 000000.txt 000000.json           # img2dataset
    000000.jpg 000000.cls                       # a number; classes.json beside the shards has the names

Which samples a shard has is kept beside it in <shard>.index; only the first start scans a shard.
"""
import bisect
import contextlib
import itertools
import os
import sys
from functools import partial

from tqdm import tqdm

from harmonkit.data.classes import SYNSET
from harmonkit.data.formats import Format
from harmonkit.data.labels import label_names, read_label
from harmonkit.data.paths import expand, list_folder, training_split
from harmonkit.data.records import (
    IMAGE_SUFFIXES,
    ImageAt,
    SkipSample,
    fields_of_files,
    image_of,
    printable,
    read_image,
    sample_of,
    skip_errors,
)
from harmonkit.data.shard_index import WORD_SUFFIXES, Part, ShardIndex
from harmonkit.data.words import decode

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MEMORY = 2 ** 26                    # bytes of indexes that a source keeps; the others stay on the disk


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
        self.indexes = []
        kept = 0                                                # bytes
        for shard in paths:
            index = ShardIndex(shard)
            kept += len(index.content)
            if kept > MEMORY:
                index.release()
            self.indexes.append(index)
        self.ends = list(itertools.accumulate(map(len, self.indexes)))
        damaged = [index for index in self.indexes if index.loss]
        if damaged:
            name, reason = damaged[0].loss
            place = printable(f"{damaged[0].path}:{name}")
            print(f"note: {path}: {len(damaged)} of {len(self.indexes)} shards are damaged; each damage is "
                  f"a bad sample, such as {place}: {reason}", file=sys.stderr)
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
        """A sample's name, and its files as {suffix: Part}. Raises SkipSample for what is lost."""
        shard = bisect.bisect(self.ends, i)
        index = self.indexes[shard]
        row = i - self.ends[shard] + len(index)
        with skip_errors(f"{index.path}:sample {row + 1}"):
            stem, files = index[row]
        name = printable(f"{index.path}:{stem}")
        if isinstance(files, str):
            raise SkipSample(name, files)
        return name, {suffix: Part(index, f"{stem}{suffix}", place) for suffix, place in files.items()}

    def parts(self):
        """The crc of an index is that of the names, places and headers of all files in the shard."""
        shards = [(os.path.basename(index.path), index.size, index.crc) for index in self.indexes]
        return [self.class_names, *shards]

    def has_words(self, i) -> bool:
        """Whether a sample has other words than the name of its class."""
        with contextlib.suppress(SkipSample), skip_errors(f"{self.path}:{i + 1}"):
            name, files = self.files(i)
            sample = self.sample(name, {suffix: files[suffix] for suffix in files if suffix != ".cls"})
            return sample.caption is not None or sample.turns is not None
        return False

    def some_labels(self) -> list:
        """The labels of at most 256 samples, spread over the source."""
        labels = []
        for i in range(0, len(self), -(-len(self) // 256)):
            with contextlib.suppress(SkipSample, ValueError, OSError):
                _, files = self.files(i)
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
            image = ImageAt(partial(read_image, name, files[suffix]), files[suffix].origin)
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


def read_bytes(file) -> bytes:
    return file().read()
