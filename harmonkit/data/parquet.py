"""Parquet and Arrow, as Hugging Face distributes and saves datasets: files, patterns, folders. Needs pyarrow.

    an image    {bytes, path}, a list of one, bytes, or a path
    its words   a caption, a conversation, or the number of a class

A parquet file is stored in row groups, of 100 to some thousand rows. Reading a sample reads the columns that
it needs of one row group; the last row groups read stay in memory. An .arrow file (of save_to_disk) is mapped
instead; its record batches take the place of row groups.
"""
import bisect
import contextlib
import itertools
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from harmonkit.data.classes import plain_name
from harmonkit.data.formats import Format, folder_of
from harmonkit.data.labels import LABEL_FIELDS, label_names, read_label
from harmonkit.data.paths import expand, list_folder, training_split
from harmonkit.data.records import (
    IMAGE_FIELDS,
    IMAGE_SUFFIXES,
    ImageAt,
    image_field,
    image_of,
    origin_of,
    origin_of_file,
    sample_of,
    skip_errors,
)
from harmonkit.data.words import CAPTIONS

MEMORY = 2 ** 28                    # bytes of row groups that a process keeps
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"       # of record batches in an .arrow file


@dataclass(frozen=True)
class Columns:
    """The columns of a parquet file that a sample is made of."""
    words: tuple                    # and labels, and paths of images
    image: str | None               # a column of images; None if they are paths, or there are none
    label: str | None
    names: tuple = ()               # of the labels, as Hugging Face's ClassLabel has them


@dataclass(frozen=True)
class RowGroup:
    file: str
    number: int                     # in the file
    before: int                     # rows of the file
    count: int                      # rows
    columns: Columns
    signature: tuple                # of the file
    of_paths: bool                  # whether its column of images holds paths alone


class Parquet(Format):
    """Rows of one or more parquet files.

    images: the folder of relative image paths, otherwise the file's own. text: the field with the words.
    """
    kind = "parquet"
    suffixes = (".parquet", ".arrow")
    takes_patterns = True

    @classmethod
    def lies_at(cls, path):
        return super().lies_at(path) or os.path.isdir(path) and bool(parquet_files(path))

    def __init__(self, path, images=None, text=None):
        self.path = path
        self.text = text
        self.image_folders = [folder_of(path, images)] if images else []
        files = parquet_files(path) if os.path.isdir(path) else expand(path)
        files = [file for file in files if file.lower().endswith(self.suffixes)]
        self.groups = []
        for file in tqdm(files, desc=f"files of {path}", disable=None, leave=False):
            self.groups += row_groups(file)
        self.kind = os.path.splitext(files[0])[1].lower().lstrip(".")
        self.ends = list(itertools.accumulate(group.count for group in self.groups))
        self.names_beside = {}
        if any(group.columns.label and not group.columns.names for group in self.groups):
            self.names_beside, _ = label_names(path, [], len(self))

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i):
        number = bisect.bisect_right(self.ends, i)
        group = self.groups[number]
        row = i - self.ends[number] + group.count
        name = f"{group.file}:{group.before + row + 1}"
        with skip_errors(name):
            return self.sample(name, group, row)

    def parts(self):
        groups = [(os.path.basename(group.file), group.count, group.columns) for group in self.groups]
        signatures = dict.fromkeys((group.file, group.signature) for group in self.groups)
        return [*groups, [signature for _, signature in signatures], self.names_beside]

    def sample(self, name, group, row):
        columns = group.columns
        folders = [*self.image_folders, Path(group.file).parent]
        fields = {}
        if columns.words:
            fields = read_words(group, columns.words).slice(row, 1).to_pylist()[0]
        label, class_name = -1, None
        if columns.label and fields.get(columns.label) is not None:
            names = dict(enumerate(columns.names)) or self.names_beside
            label, class_name = read_label(fields[columns.label], names)
        if columns.image:
            image = ImageAt(partial(self.read_image, name, group, row, folders),
                            partial(origin_in, group, row, folders))
        else:
            image = image_of(name, fields, *folders)
        sample = sample_of(name, fields, image, text=self.text, label=label)
        if class_name and sample.caption is None and sample.turns is None:
            sample = sample_of(name, {"caption": class_name}, image, label=label)
        return sample

    def read_image(self, name, group, row, folders):
        """The PIL image in a row. Raises SkipSample."""
        with skip_errors(name):
            table = read_images(group, (group.columns.image,))
            value = table.column(0)[row].as_py()
            image = image_of(name, {"image": value}, *folders)
            if image is None:
                raise ValueError("no image, and the task needs one")
            return image()


def parquet_files(folder) -> list:
    """The files in a folder and its subfolders; where there is a train split, its files alone.

    There are none if the folder also holds images: then these are the samples.
    """
    files = list_folder(folder)
    if any(file.lower().endswith(IMAGE_SUFFIXES) for file in files):
        return []
    files = training_split(file for file in files if file.lower().endswith(Parquet.suffixes))
    return [os.path.join(folder, file) for file in files]


# ---- files ---------------------------------------------------------------------------------------------

def row_groups(file) -> list:
    """The RowGroups of a file. Raises ValueError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: this format needs pyarrow: pip install pyarrow") from None
    try:
        if file.lower().endswith(".arrow"):
            schema, batches = record_batches(file, os.stat(file).st_mtime_ns)
            counts = [batch.num_rows for batch in batches]
            parts = batches
        else:
            with pyarrow.parquet.ParquetFile(file) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
            parts = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            counts = [part.num_rows for part in parts]
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:200]
        kind = os.path.splitext(file)[1].lower()
        raise ValueError(f"{file}: not a readable {kind} file ({reason})") from None
    columns = find_columns(file, schema)
    before = [0, *itertools.accumulate(counts)]
    state = signature(file)
    of_paths = [columns.image is not None and are_paths(part, columns.image) for part in parts]
    return [RowGroup(file, number, before[number], count, columns, state, of_paths[number])
            for number, count in enumerate(counts)]


def signature(file) -> tuple:
    """The size of a file, and the CRC-32 of its ends: a parquet's footer says where all of its pages lie."""
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = opened.read(2 ** 16)
        opened.seek(max(0, size - 8))
        end = opened.read(8)
        length = int.from_bytes(end[:4], "little") + 8 if end[4:] == b"PAR1" else 2 ** 16
        opened.seek(max(0, size - length))
        return size, zlib.crc32(start), zlib.crc32(opened.read(length))


def are_paths(part, image) -> bool:
    """Whether a column of {bytes, path} has no bytes. part: metadata of a row group, or a record batch."""
    if hasattr(part, "schema"):
        column = part.column(image)
        return hasattr(column, "field") and column.field("bytes").null_count == part.num_rows
    columns = [part.column(number) for number in range(part.num_columns)]
    columns = [column for column in columns
               if column.path_in_schema.startswith(f"{image}.") and column.path_in_schema.endswith(".bytes")]
    statistics = [column.statistics for column in columns]
    return bool(columns) and all(found and not found.num_values for found in statistics)


def origin_in(group, row, folders) -> tuple:
    """The origin of the image in a row, see records.ImageAt."""
    if group.of_paths:
        with contextlib.suppress(Exception):                    # reading the image will say what is wrong
            value = read_images(group, (group.columns.image,)).column(0)[row].as_py()
            return origin_of(image_field({"image": value}), folders)
    return origin_of_file(f"{os.path.basename(group.file)}:{group.before + row + 1}", group.file)


def find_columns(file, schema) -> Columns:
    """The Columns of a file with this schema. Raises ValueError if several columns may be the image."""
    lower = {field.name.strip().lower(): field.name for field in schema}
    of_images = [field.name for field in schema
                 if holds_images(field.type) and field.name.strip().lower() not in CAPTIONS]
    named = [lower[name] for name in IMAGE_FIELDS if lower.get(name) in of_images]
    if len(of_images) > 1 and not named:
        raise ValueError(f"{file}: several columns of images ({', '.join(of_images)}); one named image is "
                         "expected")
    image = next(iter(named or of_images), None)

    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
    features = features.get("features", {})
    label = next((lower[name] for name in LABEL_FIELDS if name in lower), None)
    names = features.get(label, {}).get("names") if isinstance(features.get(label), dict) else None
    names = tuple(plain_name(str(name).split(",")[0]) for name in names or ())
    words = [field.name for field in schema if field.name not in of_images and holds_text(field.type)]
    words += [field.name for field in schema if field.name == label or is_bytes(field.type)]
    words = [name for name in dict.fromkeys(words) if name not in of_images]
    return Columns(tuple(words), image, label, names)


def holds_images(type) -> bool:
    """Whether a column has images: bytes, {bytes, path}, or a list of these."""
    import pyarrow.types as is_

    if is_.is_list(type) or is_.is_large_list(type) or is_.is_fixed_size_list(type):
        return holds_images(type.value_type)
    if is_.is_struct(type):
        return "bytes" in [field.name for field in type]
    return is_bytes(type)


def is_bytes(type) -> bool:
    """Whether a column has bytes. Some programs write texts so."""
    import pyarrow.types as is_

    return is_.is_binary(type) or is_.is_large_binary(type) or is_.is_binary_view(type)


def holds_text(type) -> bool:
    """Whether a column has texts, or lists or structures with texts."""
    import pyarrow.types as is_

    if is_.is_list(type) or is_.is_large_list(type) or is_.is_fixed_size_list(type):
        return holds_text(type.value_type)
    if is_.is_struct(type):
        return any(holds_text(field.type) for field in type)
    if is_.is_dictionary(type):
        return holds_text(type.value_type)
    return is_.is_string(type) or is_.is_large_string(type) or is_.is_string_view(type)


@lru_cache(maxsize=64)
def record_batches(file, time) -> tuple:
    """The schema and the record batches of an .arrow file, mapped. time: of its last change."""
    import pyarrow

    mapped = pyarrow.memory_map(file)
    if mapped.read(6) == b"ARROW1":
        reader = pyarrow.ipc.open_file(mapped)
        return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
    # A stream that was cut between two batches would be read as a shorter one.
    mapped.seek(max(0, mapped.size() - 8))
    if mapped.read(8) != END_OF_STREAM:
        raise pyarrow.ArrowInvalid("it has no end; it was cut off")
    mapped.seek(0)
    reader = pyarrow.ipc.open_stream(mapped)
    return reader.schema, list(reader)


# ---- row groups ----------------------------------------------------------------------------------------

class Tables:
    """The last row groups read, at most MEMORY bytes of them and at least one."""

    def __init__(self):
        self.tables = OrderedDict()                             # the last one read is the last

    def get(self, group, columns):
        """A pyarrow Table of some columns of a row group. Raises ValueError if the file has changed."""
        key = (group.file, os.stat(group.file).st_mtime_ns, group.number, columns)
        if key not in self.tables:
            if signature(group.file) != group.signature:
                raise ValueError("the file has changed since it was opened; start again")
            self.tables[key] = self.read(group.file, group.number, columns)
        self.tables.move_to_end(key)
        while len(self.tables) > 1 and sum(table.nbytes for table in self.tables.values()) > MEMORY:
            self.tables.popitem(last=False)
        return self.tables[key]

    def read(self, file, number, columns):
        import pyarrow.parquet

        if file.lower().endswith(".arrow"):
            _, batches = record_batches(file, os.stat(file).st_mtime_ns)
            return pyarrow.Table.from_batches([batches[number].select(columns)])
        # In batches, because a row group with more than 2 GB in a column cannot be read in one piece. In one
        # thread, because pyarrow's threads do not outlive the fork of a loader process.
        with pyarrow.parquet.ParquetFile(file) as opened:
            batches = opened.iter_batches(500, [number], list(columns), use_threads=False)
            return pyarrow.Table.from_batches(list(batches))


# Apart, so that a row group of images larger than MEMORY does not give way to the words of the next sample.
read_words = Tables().get
read_images = Tables().get
