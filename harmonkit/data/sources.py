"""Training data on disk: one class a format. A source is a list of samples, each read when it is asked for.

    open_source("photos/data_info.json", images="photos/images", captions="photos/captions")  # Harmon's pairs
    open_source("llava.jsonl", images="coco")                # rows: conversations, or images with captions
    open_source("shards/{00000..00099}.tar")                 # WebDataset
    open_source("photos")                                    # images, with words beside them or in metadata
    open_source("imagenet/train")                            # a folder of images for each class
    open_source("shapes", seed="train-0", count=40000)       # the shapes world

`source[i]` is a Sample or raises SkipSample; `source.fingerprint()` changes with the list of samples. A new
format is a class derived from Format in FORMATS.
"""
import inspect
import os

from harmonkit.data.folders import ImageFolder, MetadataFolder, suffixes_in
from harmonkit.data.formats import Format, Joined
from harmonkit.data.parquet import Parquet
from harmonkit.data.paths import expand, list_folder
from harmonkit.data.rows import JSONLines, JSONList, Pairs, PathList, Table
from harmonkit.data.shapes import Shapes, ShapesText
from harmonkit.data.shards import Shards

PATH_OPTIONS = ("images", "captions")                           # options of formats that are paths
FORMATS = (Shards, MetadataFolder, Parquet, ImageFolder, Pairs, JSONList, JSONLines, Table, PathList)
PACKED = (".gz", ".tgz", ".zip", ".zst", ".bz2", ".xz", ".7z", ".rar")
BUILT_IN = {"shapes": Shapes, "shapes-text": ShapesText}        # names in place of a path


def open_source(path, **options) -> Format:
    """The source at a path, a pattern of paths or a built-in name. options: those of its class, such as text.

    Raises ValueError or FileNotFoundError that name the path.
    """
    path = str(path)
    list_folder.cache_clear()                                   # it may have changed since the last opening
    format = BUILT_IN.get(path) or format_at(path)
    check_options(path, format, options)
    if path in BUILT_IN:
        source = format(**options)
    elif format.takes_patterns:
        source = format(path, **options)
    else:
        opened = [format(file, **options) for file in expand(path)]
        source = opened[0] if len(opened) == 1 else Joined(path, opened)
    if not len(source):
        held = f"; it holds {suffixes_in(path)}" if os.path.isdir(path) else ""
        raise ValueError(f"{path}: no samples in it{held}")
    return source


def format_at(path):
    """The first of FORMATS that lies at a path. Raises FileNotFoundError, or ValueError if there is none."""
    files = expand(path)
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        count = f"{len(missing)} of {len(files)}"
        raise FileNotFoundError(f"{missing[0]}: no such file or folder (missing: {count})")
    for format in FORMATS:
        if any(map(format.lies_at, files)):                     # `shards/*` also finds their .json and .index
            return format
    if files[0].lower().endswith(PACKED):
        raise ValueError(f"{path}: a packed file; unpack it first, because samples are read in any order")
    known = ", ".join(suffix for format in FORMATS for suffix in format.suffixes)
    raise ValueError(f"{path}: neither a folder nor a file of a known format ({known})")


def options_of(format) -> list:
    """The names of a format's options."""
    return [name for name in inspect.signature(format).parameters if name != "path"]


def check_options(path, format, options):
    """Raises ValueError for an option that a format does not have."""
    known = options_of(format)
    for option in options:
        if option not in known:
            raise ValueError(f"{path}: unknown option {option!r}; a {format.kind or 'source'} has "
                             f"{', '.join(known) or 'none'}")
    text = options.get("text")
    names = text if isinstance(text, list) and text else [text]
    if text is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: text is {text!r}; the name of a field is expected, or a list of names")
