"""Training data as it lies on disk: one class a format, each a list of samples that are read when they are asked for.

    open_source("photos/data_info.json", images="photos/images", captions="photos/captions")    # the original's lists
    open_source("llava.jsonl", images="coco")                                                    # LLaVA conversations, with or without images
    open_source("shards/{00000..00099}.tar")                                                     # WebDataset
    open_source("imagenet/train")                                                                # a folder a class
    open_source("shapes", seed="train-0", count=40000)                                           # the world of shapes.py

`source[i]` is a Sample, or raises SkipSample when that one cannot be used. Opening raises ValueError or FileNotFoundError.
"""
import bisect
import contextlib
import glob
import io
import itertools
import json
import os
import random
import re
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Callable

from PIL import Image

from harmonkit.shapes_world import world as shapes
from harmonkit import checkpoints
from harmonkit.images import reject_reason

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class SkipSample(Exception):
    """A sample that cannot be used. bad: it is broken, and not merely outside the rules."""

    def __init__(self, name, reason, bad=True):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.bad = name, reason, bad

    def __reduce__(self):  # it crosses process borders
        return SkipSample, (self.name, self.reason, self.bad)


@dataclass(frozen=True)
class Sample:
    name: str                                  # for messages
    image: Callable[[], Image.Image] | None    # reads it; None: there is none
    caption: Callable[[random.Random], str] | None = None
    turns: Callable[[random.Random], list] | None = None   # [(question, answer), …]
    label: int = -1                            # of its class; -1: none


def picture(name, read):
    """The RGB image that `read()` opens, fully decoded; SkipSample if it cannot be."""
    try:
        with read() as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many types on corrupt files
        raise SkipSample(name, f"{type(error).__name__}: {error}") from None


def usable_image(sample, task, size):
    """The sample's image, if the task can use it."""
    image = sample.image()
    reason = reject_reason(image, task, size)
    if reason:
        raise SkipSample(sample.name, reason, bad=False)
    return image


def parse(name, text):
    try:
        return json.loads(text)
    except ValueError as error:
        raise SkipSample(name, f"not JSON ({error})") from None


def text_of(name, path):
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SkipSample(name, f"{type(error).__name__}: {error}") from None


def caption_of(name, content):
    """The caption of a parsed JSON file."""
    caption = content.get("caption") if isinstance(content, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise SkipSample(name, 'no "caption" in it')
    return caption.strip()


def turns_of(name, conversations):
    """LLaVA's [{from: human, value}, {from: gpt, value}, …] -> [(question, answer), …]; `<image>` marks are dropped, the image always opens the first turn."""
    try:
        said = [(turn["from"], turn["value"].replace("<image>", "").strip()) for turn in conversations]
    except (TypeError, KeyError, AttributeError):
        raise SkipSample(name, 'its "conversations" are not a list of {from, value}') from None
    speakers = [speaker for speaker, _ in said]
    if not said or len(said) % 2 or speakers != ["human", "gpt"] * (len(said) // 2) or not all(text for _, text in said):
        raise SkipSample(name, f"human and gpt must take turns and say something; here: {', '.join(speakers) or 'nobody'}")
    return [(question[1], answer[1]) for question, answer in zip(said[::2], said[1::2])]


def constant(value):
    return None if value is None else lambda rng: value


# ---- formats ---------------------------------------------------------------------------------------------------------

class Pairs:
    """The original's format: a list of {image, annotation}, with a folder of images and one of JSON captions ({"caption": …})."""

    def __init__(self, path, entries, images=None, captions=None):
        self.entries = entries
        self.images, self.captions = Path(images or Path(path).parent), Path(captions or Path(path).parent)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        try:
            image, annotation = self.images / self.entries[i]["image"], self.captions / self.entries[i]["annotation"]
        except (TypeError, KeyError):
            raise SkipSample(f"entry {i}", "not {image, annotation}") from None
        caption = caption_of(annotation, parse(annotation, text_of(annotation, annotation)))
        return Sample(str(image), lambda: picture(image, lambda: Image.open(image)), constant(caption))


class Conversations:
    """LLaVA's format: {image?, conversations}, from a JSON list or the lines of a JSONL file."""

    def __init__(self, path, entries, images=None):
        self.path, self.entries, self.images = path, entries, Path(images or Path(path).parent)

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        name = f"{self.path}:{i + 1}"
        entry = parse(name, self.entries[i]) if isinstance(self.entries[i], str) else self.entries[i]
        if not isinstance(entry, dict) or "conversations" not in entry:
            raise SkipSample(name, "no conversations in it")
        turns = turns_of(name, entry["conversations"])
        if not entry.get("image"):
            return Sample(name, None, turns=constant(turns))
        image = self.images / entry["image"]
        return Sample(str(image), lambda: picture(image, lambda: Image.open(image)), turns=constant(turns))


class ClassFolders:
    """A folder of images for each class; the folder's name is the caption, _ read as a blank."""

    def __init__(self, path):
        self.files = sorted(p for p in Path(path).glob("*/**/*") if p.suffix.lower() in PICTURES)
        self.root, self.classes = Path(path), sorted({p.relative_to(path).parts[0] for p in self.files})

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        file = self.files[i]
        name = file.relative_to(self.root).parts[0]
        return Sample(str(file), lambda: picture(file, lambda: Image.open(file)), constant(name.replace("_", " ")), label=self.classes.index(name))


class Shards:
    """WebDataset: uncompressed tar files in which files of one stem make a sample: an image, and a .txt or .json with the words.

    Where a shard's members lie is kept beside it, in <shard>.index, so that only the first start reads through all of them.
    """

    def __init__(self, paths):
        self.paths = list(paths)
        self.ends = list(itertools.accumulate(shard_index(path, count_only=True) for path in self.paths))

    def __len__(self):
        return self.ends[-1]

    def __getitem__(self, i):
        shard = bisect.bisect(self.ends, i)
        path = self.paths[shard]
        stem, members = shard_index(path)[i - (self.ends[shard - 1] if shard else 0)]
        name = f"{path}:{stem.lstrip('/')}"
        image = next((s for s in PICTURES if s in members), None)
        if image is None and ".json" not in members:
            raise SkipSample(name, "no image and no .json in it")
        read = lambda suffix: self.read(path, name, *members[suffix])  # noqa: E731
        caption = turns = None
        if ".json" in members:
            content = parse(name, read(".json"))
            turns = turns_of(name, content["conversations"]) if isinstance(content, dict) and "conversations" in content else None
            caption = None if turns else caption_of(name, content)
        elif ".txt" in members:
            caption = read(".txt").decode(errors="replace").strip()
        else:
            raise SkipSample(name, "neither .txt nor .json beside the image")
        return Sample(name, image and (lambda: picture(name, lambda: Image.open(io.BytesIO(read(image))))), constant(caption), constant(turns))

    @staticmethod
    def read(path, name, offset, size):
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size) if size >= 0 else b""
        if len(content) != size:
            raise SkipSample(name, "the shard ends inside it")
        return content


class Shapes:
    """`count` scenes of the shapes world, of seed `seed`."""

    def __init__(self, seed="train-0", count=40_000):
        if not isinstance(count, int):
            raise ValueError(f"count is {count!r}; a whole number is expected")
        self.seed, self.count = seed, count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        scene = shapes.training_scene(self.seed, i)
        return Sample(f"shapes {self.seed}/{i}", lambda: shapes.render(scene), lambda rng: shapes.caption(scene, rng), lambda rng: shapes.looking_turns(scene, rng),
                      shapes.label(scene))


class ShapesText(Shapes):
    """The same world in words alone."""

    def __getitem__(self, i):
        return Sample(f"shapes {self.seed}/{i}", None, turns=lambda rng: shapes.reading_turns(shapes.training_scene(self.seed, i), rng))


BUILT_IN = {"shapes": Shapes, "shapes-text": ShapesText}


def scan(path):
    """[(stem, {suffix: (offset, size)}), …] of a tar file. What one that ends too early still holds is kept, and one sample more, a bad one, says so."""
    stems, end = {}, Path(path).stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    stem, _, suffix = file.partition(".")
                    whole = member.offset_data + member.size <= end
                    stems.setdefault(f"{folder}/{stem}", {})["." + suffix.lower()] = (member.offset_data, member.size if whole else -1)
    except tarfile.ReadError as error:
        if not stems:
            raise ValueError(f"{path}: not an uncompressed tar file ({error}); samples are read in any order, so unpack compressed shards first") from None
        stems["(the shard ends too early)"] = {}
    return list(stems.items())


@lru_cache(maxsize=64)
def shard_index(path, count_only=False):
    """The scan of a shard, or only its length, from <shard>.index if that is of the shard as it is now; the index is written if it can be."""
    file, stat = Path(f"{path}.index"), os.stat(path)
    state = [stat.st_size, stat.st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError):
        with open(file) as lines:
            head = json.loads(next(lines))
            if head["shard"] == state:
                return head["count"] if count_only else [json.loads(line) for line in lines]
    samples = scan(path)
    with contextlib.suppress(OSError), checkpoints.atomic_write(file) as temporary:
        Path(temporary).write_text("".join(json.dumps(row) + "\n" for row in [{"shard": state, "count": len(samples)}, *samples]))
    return len(samples) if count_only else samples


# ---- which one -------------------------------------------------------------------------------------------------------

def braces(pattern):
    """"a{008..010}.tar" -> a008.tar, a009.tar, a010.tar; "*" and "?" as the shell has them."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return sorted(glob.glob(pattern)) if set("*?[") & set(pattern) else [pattern]
    first, last = match.groups()
    return [p for n in range(int(first), int(last) + 1) for p in braces(pattern[:match.start()] + f"{n:0{len(first)}d}" + pattern[match.end():])]


def open_source(path, **options):
    """The source at a path; the format is told from what lies there. options: those of the format's class (images, captions, seed, count)."""
    try:
        if path in BUILT_IN:
            source = BUILT_IN[path](**options)
        elif Path(path).is_dir():
            source = ClassFolders(path, **options)
        elif str(path).endswith(".tar"):
            shards = braces(str(path))
            missing = [p for p in shards if not Path(p).is_file()]
            if missing or not shards:
                raise FileNotFoundError(f"{missing[0] if missing else path}: no such file" + (f" ({len(missing)} of {len(shards)} shards are missing)" if missing[1:] else ""))
            source = Shards(shards, **options)
        elif not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif str(path).endswith(".jsonl"):
            source = Conversations(path, [line for line in Path(path).read_text().splitlines() if line.strip()], **options)
        elif str(path).endswith(".json"):
            entries = json.loads(Path(path).read_text())
            if not isinstance(entries, list) or not entries:
                raise ValueError(f"{path}: a list of samples is expected")
            source = (Pairs if "annotation" in entries[0] else Conversations)(path, entries, **options)
        else:
            raise ValueError(f"{path}: neither a folder nor .json, .jsonl or .tar")
    except TypeError as error:
        raise ValueError(f"{path}: {str(error).split('.__init__() ')[-1]}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not len(source):
        raise ValueError(f"{path}: no samples in it")
    return source
