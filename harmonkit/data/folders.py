"""Folders of images. Their words lie in a table, in files beside the images, or in names of class folders.

    0.jpg, 0.txt, 1.jpg, 1.json, …              # .txt, .caption or .json of the same stem, nested or flat
    metadata.jsonl, 0.jpg, 1.jpg, …             # {"file_name": "0.jpg", "text": …}, also in subfolders
    owl/0.jpg, tree_frog/0.jpg, …               # class folders
    0.jpg, 1.jpg, …                             # images without words, for reca
"""
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path

from harmonkit.data.classes import class_of, find_classes
from harmonkit.data.formats import Format, Joined, folder_of
from harmonkit.data.parquet import Parquet
from harmonkit.data.paths import list_folder
from harmonkit.data.records import (
    IMAGE_SUFFIXES,
    ImageAt,
    fields_of_files,
    origin_of_file,
    read_image,
    sample_of,
)
from harmonkit.data.rows import JSONLines, Table

METADATA = {"metadata.jsonl": JSONLines, "metadata.csv": Table, "metadata.parquet": Parquet}
WORD_SUFFIXES = (".caption", ".txt", ".json")


def split_suffix(file):
    """The path without its suffix, and the suffix in lower case."""
    stem, suffix = os.path.splitext(file)
    return stem, suffix.lower()


class MetadataFolder(Joined):
    """A folder of images with a file of METADATA in it or in each subfolder, Hugging Face's imagefolder."""
    kind = "folder of images with metadata"

    @classmethod
    def lies_at(cls, path):
        return os.path.isdir(path) and bool(metadata_files(path))

    def __init__(self, path, text=None):
        opened = []
        self.files = metadata_files(path)
        for file in self.files:
            folder, name = os.path.split(os.path.join(path, file))
            opened.append(METADATA[name](os.path.join(folder, name), images=folder, text=text))
        super().__init__(path, opened)
        self.kind = type(self).kind
        images = [file for file in list_folder(path) if split_suffix(file)[1] in IMAGE_SUFFIXES]
        if len(images) > len(self):
            print(f"note: {path}: {len(images)} images, but {len(self)} rows of metadata; an image without a "
                  "row is not used", file=sys.stderr)

    def parts(self):
        return [*map(os.path.dirname, self.files), *super().parts()]


def suffixes_in(path) -> str:
    """What lies in a folder, for messages: ".arrow (3), .json (2)"."""
    counts = Counter(split_suffix(file)[1] or file for file in list_folder(path))
    return ", ".join(f"{suffix} ({count})" for suffix, count in counts.most_common(5)) or "nothing"


def metadata_files(path) -> list:
    """The metadata files in a folder: of each subfolder the first form of METADATA."""
    found = {}
    for file in list_folder(path):
        folder, _, name = file.rpartition("/")
        if name in METADATA:
            found.setdefault(folder, {})[name] = file
    return [next(files[name] for name in METADATA if name in files) for files in found.values()]


class ImageFolder(Format):
    """A folder of images. The words of an image are those beside it; otherwise its class is its caption.

    captions: another folder, in which the words have the places that they would have beside the images.
    text: the field of .json files with the words, or "txt" or "caption" for these suffixes.
    """

    @classmethod
    def lies_at(cls, path):
        return os.path.isdir(path)

    def __init__(self, path, captions=None, text=None):
        self.path = path
        self.text = text
        self.entries = [file for file in list_folder(path) if split_suffix(file)[1] in IMAGE_SUFFIXES]
        self.word_folder = str(folder_of(path, captions)) if captions else path
        self.words = words_beside(self.entries, list_folder(self.word_folder))
        self.entries = self.entries if self.words else in_classes(path, self.entries)
        self.classes = find_classes(path, set(map(class_of, self.entries)) - {None})
        # Where most images have words, one without them is a fault, not a picture of its folder's name.
        self.has_classes = self.classes.origin or 2 * len(self.words) <= len(self.entries)
        self.kind = "folder of images"
        if self.words:
            self.kind = "folder of images with captions"
        elif self.classes.labels:
            self.kind = f"class folders, named by {self.classes.origin or 'the folders'}"

    def name(self, i):
        return os.path.join(self.path, self.entries[i])

    def parts(self):
        yield self.classes.names if self.has_classes else {}
        for file in self.entries:                               # one by one: there may be millions
            yield file, self.words.get(file)

    def sample(self, name, file):
        fields = {}
        if file in self.words:
            readers = {}
            for suffix, beside in self.words[file].items():
                readers[suffix] = partial(read_words, Path(self.word_folder, beside))
            fields = fields_of_files(readers)
        folder = class_of(file)
        label = self.classes.labels.get(folder, -1) if self.has_classes else -1
        path = os.path.join(self.path, file)
        image = ImageAt(partial(read_image, name, path), partial(origin_of_file, file, path))
        sample = sample_of(name, fields, image, text=self.text if fields else None, label=label)
        if self.has_classes and folder in self.classes.names and not (sample.caption or sample.turns):
            return sample_of(name, {"caption": self.classes.names[folder]}, image, label=label)
        return sample


def read_words(path) -> bytes:
    """A file beside an image. Raises ValueError that names its suffix, where messages name the image."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"its {path.suffix} file cannot be read ({error.strerror.lower()})") from None


def in_classes(path, images) -> list:
    """The images in class folders, unless most images are in none."""
    inside = [image for image in images if class_of(image) is not None]
    if 2 * len(inside) <= len(images):
        return images
    if len(inside) < len(images):
        print(f"note: {path}: {len(images) - len(inside)} of {len(images)} images lie in no class folder and "
              "are not used", file=sys.stderr)
    return inside


def words_beside(images, files) -> dict:
    """{image: {suffix: file}} of the images with words: files of the same stem, or of the whole name."""
    by_stem = {}
    for file in files:
        stem, suffix = split_suffix(file)
        if suffix in WORD_SUFFIXES:
            by_stem.setdefault(stem, {})[suffix] = file
    words = {}
    for image in images:
        found = by_stem.get(split_suffix(image)[0]) or by_stem.get(image)
        if found:
            words[image] = found
    return words
