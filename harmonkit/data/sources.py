"""Training data on disk: one class a format. A source is a list of samples, each read when it is asked for.

    open_source("photos/data_info.json", images="photos/images", captions="photos/captions")  # Harmon's pairs
    open_source("llava.jsonl", images="coco")                # LLaVA's conversations, with or without images
    open_source("shards/{00000..00099}.tar")                 # WebDataset
    open_source("imagenet/train")                            # a folder of images for each class
    open_source("shapes", seed="train-0", count=40000)       # the shapes world

`source[i]` is a Sample or raises SkipSample. A new format is a class derived from Format in FORMATS.
"""
import bisect
import contextlib
import glob
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from harmonkit.checkpoints import write_text
from harmonkit.config import read_json
from harmonkit.images import open_image, reject_reason
from harmonkit.shapes_world import world

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PATH_OPTIONS = ("images", "captions")                           # options of formats that are paths


class SkipSample(Exception):
    """A sample that cannot be used. bad: the sample is broken; otherwise it is only outside the rules."""

    def __init__(self, name, reason, bad=True):
        super().__init__(name, reason, bad)                     # pickle restores it from these
        self.name, self.reason, self.bad = name, reason, bad

    def __str__(self):
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """The parts of a sample are functions, so that only the needed ones are read; None = no such part."""
    name: str                                                   # for messages
    image: Callable | None                                      # () -> PIL image; raises SkipSample
    caption: Callable | None = None                             # (rng) -> text
    turns: Callable | None = None                               # (rng) -> [(question, answer), …]
    label: int = -1                                             # class of the image, -1 = none


@contextlib.contextmanager
def skip_errors(name):
    """Errors in this block become SkipSample; of any type, because Pillow raises many for corrupt files."""
    try:
        yield
    except SkipSample:
        raise
    except KeyError as error:
        raise SkipSample(name, f"no {error} in it") from None
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise SkipSample(name, f"{kind}{error}") from None


def read_image(name, file):
    """The RGB image in a file: a path, or a function that opens a binary file. Raises SkipSample."""
    with skip_errors(name):
        return open_image(file() if callable(file) else file)


def usable_image(sample, task, size):
    """The sample's image. Raises SkipSample if there is none, or the paper's rules leave it out."""
    if sample.image is None:
        raise SkipSample(sample.name, "no image, and the task needs one")
    image = sample.image()
    reason = reject_reason(image, task, size)
    if reason:
        raise SkipSample(sample.name, reason, bad=False)
    return image


def caption_of(content) -> str:
    """The caption in {"caption": …}."""
    caption = content["caption"].strip()
    if not caption:
        raise ValueError("its caption is empty")
    return caption


def turns_of(conversations) -> list:
    """LLaVA's [{from: human, value}, {from: gpt, value}, …] -> [(question, answer), …].

    `<image>` marks are dropped: the image always opens the first turn.
    """
    speakers = [turn["from"] for turn in conversations]
    texts = [turn["value"].replace("<image>", "").strip() for turn in conversations]
    if not texts or not all(texts) or speakers != ["human", "gpt"] * (len(texts) // 2):
        raise ValueError(f"human and gpt must alternate, each with a text; here: {speakers}")
    return list(zip(texts[::2], texts[1::2], strict=True))


# ---- formats -------------------------------------------------------------------------------------------

class Format:
    """A source. `__init__` sets path and entries; `sample` makes a Sample of an entry or raises any error."""
    suffixes = ()

    @classmethod
    def lies_at(cls, path):
        """Whether an existing file or folder is of this format."""
        return path.endswith(cls.suffixes)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        name = f"{self.path}:{i + 1}"
        entry = self.entries[i]
        with skip_errors(name):
            return self.sample(name, entry)


class ClassFolders(Format):
    """A folder of images for each class; its name is the caption, with blanks for underscores."""

    @classmethod
    def lies_at(cls, path):
        return os.path.isdir(path)

    def __init__(self, path):
        self.path = path
        files = Path(path).glob("*/**/*")
        self.entries = sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES)
        self.classes = sorted({file.relative_to(path).parts[0] for file in self.entries})

    def sample(self, name, file):
        folder = file.relative_to(self.path).parts[0]
        return Sample(name, partial(read_image, name, file), caption=lambda rng: folder.replace("_", " "),
                      label=self.classes.index(folder))


class Pairs(Format):
    """Harmon's own format: a JSON list of {image, annotation}, and a {"caption": …} file for each image."""

    @classmethod
    def lies_at(cls, path):
        if not path.endswith(".json"):
            return False
        with open(path) as file:                                # may be long; its first entry is enough
            first_entry, _, _ = file.read(2 ** 16).partition("}")
        return '"annotation"' in first_entry

    def __init__(self, path, images=None, captions=None):
        self.path = path
        self.entries = read_entries(path)
        self.images = Path(images or Path(path).parent)
        self.captions = Path(captions or Path(path).parent)

    def sample(self, name, entry):
        image = self.images / entry["image"]
        caption = caption_of(read_json(self.captions / entry["annotation"]))
        return Sample(name, partial(read_image, name, image), caption=lambda rng: caption)


class Conversations(Format):
    """LLaVA's format: {image?, conversations}, in a JSON list or on the lines of a JSONL file."""
    suffixes = (".json", ".jsonl")

    def __init__(self, path, images=None):
        self.path = path
        self.entries = read_entries(path)
        self.images = Path(images or Path(path).parent)

    def sample(self, name, entry):
        if isinstance(entry, str):
            entry = json.loads(entry)
        turns = turns_of(entry["conversations"])
        image = partial(read_image, name, self.images / entry["image"]) if entry.get("image") else None
        return Sample(name, image, turns=lambda rng: turns)


def read_entries(path) -> list:
    """The entries of a JSON list, or the lines of a JSONL file, still as text. Raises ValueError."""
    if path.endswith(".jsonl"):
        return [line for line in Path(path).read_text().split("\n") if line.strip()]
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: a list of samples is expected")
    return entries


class Shards(Format):
    """WebDataset: uncompressed tar files. Files of one stem are a sample: an image, and a .txt or .json.

    The positions of a shard's files are kept beside it in <shard>.index; only the first start scans a shard.
    """
    suffixes = (".tar",)

    def __init__(self, path):
        self.paths = expand(path)
        self.ends = list(itertools.accumulate(shard_index(p, count_only=True) for p in self.paths))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        shard = bisect.bisect(self.ends, i)
        path = self.paths[shard]
        stem, positions = shard_index(path)[i - self.ends[shard]]               # counted from the end
        name = f"{path}:{stem.lstrip('/')}"
        files = {suffix: partial(read_part, path, *positions[suffix]) for suffix in positions}
        with skip_errors(name):
            return self.sample(name, files)

    def sample(self, name, files):
        suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in files), None)
        image = partial(read_image, name, files[suffix]) if suffix else None
        if ".json" in files:
            content = json.load(files[".json"]())
            if "conversations" in content:
                turns = turns_of(content["conversations"])
                return Sample(name, image, turns=lambda rng: turns)
            caption = caption_of(content)
        elif image and ".txt" in files:
            caption = files[".txt"]().read().decode(errors="replace").strip()
        else:
            raise ValueError(f"an image with a .txt or .json is expected; here: {list(files)}")
        return Sample(name, image, caption=lambda rng: caption)


def read_part(path, offset, size):
    """A part of a file as a binary file in memory."""
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise ValueError(f"{path} ends inside the sample")
    part = io.BytesIO(content)
    part.name = path                                            # open_image names it in messages
    return part


@lru_cache(maxsize=64)
def shard_index(path, count_only=False):
    """The `scan` of a shard or its length, from <shard>.index unless the shard has changed since."""
    file = Path(f"{path}.index")
    state = [os.stat(path).st_size, os.stat(path).st_mtime_ns]
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
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, file = member.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                positions = samples.setdefault(f"{folder}/{stem}", {})
                positions[f".{suffix.lower()}"] = (member.offset_data, member.size)
    except tarfile.ReadError as error:
        if not samples:
            raise ValueError(f"{path}: not an uncompressed tar file ({error}); unpack compressed shards "
                             "first, because samples are read in any order") from None
        samples["(the shard ends too early)"] = {}
    return list(samples.items())


class Shapes(Format):
    """`count` training scenes of the shapes world."""

    def __init__(self, seed="train-0", count=40_000):
        if not isinstance(count, int):
            raise ValueError(f"count is {count!r}; a whole number is expected")
        self.path = f"shapes {seed}"
        self.entries = range(count)
        self.seed = seed

    def sample(self, name, i):
        scene = world.training_scene(self.seed, i)
        return Sample(name, partial(world.render, scene), partial(world.caption, scene),
                      partial(world.looking_turns, scene), world.label(scene))


class ShapesText(Shapes):
    """The same scenes in words alone."""

    def sample(self, name, i):
        scene = world.training_scene(self.seed, i)
        return Sample(name, None, turns=partial(world.reading_turns, scene))


# ---- open ----------------------------------------------------------------------------------------------

FORMATS = (ClassFolders, Shards, Pairs, Conversations)          # the first that lies at a path opens it
BUILT_IN = {"shapes": Shapes, "shapes-text": ShapesText}        # names in place of a path


def open_source(path, **options) -> Format:
    """The source at a path or of a built-in name. options: those of its class, such as images or count.

    Raises ValueError or FileNotFoundError that name the path.
    """
    path = str(path)
    try:
        source = BUILT_IN[path](**options) if path in BUILT_IN else format_at(path)(path, **options)
    except TypeError as error:                                  # for an option that the class does not have
        raise ValueError(f"{path}: {str(error).split('.__init__() ')[-1]}") from None
    if not len(source):
        raise ValueError(f"{path}: no samples in it")
    return source


def format_at(path):
    files = expand(path)
    missing = [file for file in files if not os.path.exists(file)]
    if missing:
        count = f"{len(missing)} of {len(files)}"
        raise FileNotFoundError(f"{missing[0]}: no such file or folder (missing: {count})")
    for format in FORMATS:
        if format.lies_at(path):
            return format
    raise ValueError(f"{path}: neither a folder nor .json, .jsonl or .tar")


def expand(pattern) -> list:
    """The paths of a pattern: "a{8..9}.tar" -> a8.tar, a9.tar; "*", "?" and "[…]" as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return sorted(glob.glob(pattern)) or [pattern]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [path for number in numbers for path in expand(pattern.replace(match[0], number, 1))]
