"""A folder of cached latents, read: which images it is of, and whether these are still the source's.

A cache is a folder of about.json and safetensors shards of SHARD samples (n), of which some images (m) were
usable. caching.py writes it.

    latents     (m, crops, h, w, C) bfloat16
    crc         (m, crops)      the CRC-32 of each crop's bytes, begun with the sample's number
    row         (n,)            of each sample in latents; -1 if it was unusable
    sides       (n, 2)          width and height of the image; 0 if it could not be read
    origin      (n, 2)          size and mtime_ns of the image's bytes: records.ImageAt
    bad         (n,)            whether an unusable sample was broken
    names, reasons              texts: of the origin, and why a sample was unusable. `pack_texts`
    about                       the part of about.json that the latents depend on, as a text

Letters: h×w token grid, C latent channels.
"""
import json
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from harmonkit.config import read_json
from harmonkit.data.records import SkipSample
from harmonkit.images import LARGEST_SQUARE, reject_reason

FORMAT = 2
SHARD = 1000                        # samples
LOOKED_AT = 256                     # samples of a source that are compared when it is opened
COMMAND = "`python -m harmonkit.data cache`"
AGAIN = f"run {COMMAND} again, which makes these latents anew, or give another folder"
SHARED = ("size", "squares", "task", "probe")                   # of about.json: the latents depend on them
NOTHING = ("", -1, 0)               # the origin of a sample without an image

Picture = namedtuple("Picture", "size width height")            # what reject_reason looks at


class LatentCache:
    """A complete folder of `cache_latents`.

    Raises FileNotFoundError if files are missing, and ValueError if one is damaged or no image was usable.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.about = read_about(folder)
        files = [shard_file(folder, k) for k in range(-(-self.about["count"] // SHARD))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]}: no such file, {len(missing)} shards are missing; "
                                    f"run {COMMAND} again, it adds them")
        self.shards = {}
        for k in range(len(files)):
            self.shard(k)
        if not any(len(shard.latents) for shard in self.shards.values()):
            raise ValueError(f"{folder}: not one of {self.about['count']} images was usable when the latents "
                             f"were computed, the first: {self.shards[0].reason(0)}")

    def __getstate__(self):                                     # a data reader opens the shards itself
        return self.__dict__ | {"shards": {}}

    def shard(self, k):
        if k not in self.shards:
            shard = Shard(shard_file(self.folder, k))
            count = min(SHARD, self.about["count"] - k * SHARD)
            if not is_alike(shard.about, self.about) or len(shard) != count:
                raise ValueError(f"{shard.file}: of another caching than about.json; run {COMMAND} again")
            self.shards[k] = shard
        return self.shards[k]

    def get(self, index, sample):
        """The latents (crops, h, w, C) of a sample. Raises SkipSample if it was not usable for the cache, and
        ValueError if its image is another one than that of the latents, or the latents are damaged.
        """
        shard, i = self.shard(index // SHARD), index % SHARD
        changed = difference(shard.origin(i), origin_of(sample))
        if changed:
            raise ValueError(f"{self.folder}: sample {index + 1}: {changed}; {AGAIN}")
        row = shard.row[i]
        if row < 0:
            raise SkipSample(sample.name, shard.reason(i), bad=bool(shard.bad[i]))
        if shard.is_damaged(i, index):
            raise ValueError(f"{shard.file}: the latents of sample {index + 1} are damaged; delete the file, "
                             f"and {COMMAND} makes it again, or train.py that of the shapes world")
        return shard.latents[row]

    def compare(self, samples, task):
        """Raises ValueError unless the latents are of a source's samples, as far as some of them show, and
        serve the task.
        """
        if len(samples) != self.about["count"]:
            more = len(samples) - self.about["count"]
            change = f"{more} were added" if more > 0 else f"{-more} were removed"
            raise ValueError(f"{self.folder}: latents of {self.about['count']} samples of "
                             f"{self.about['source']}, but {samples.path} has {len(samples)}: {change}; "
                             f"{AGAIN}")
        if self.about["task"] != task:
            reason = why_another_task(self.shards.values(), self.about["task"], task, self.about["size"])
            if reason:
                raise ValueError(f"{self.folder}: latents for the task {self.about['task']}, but {task} is "
                                 f"wanted; {reason}; give another folder, {COMMAND} makes one for each task")
        # Where the source's list has changed, perhaps only its words, look at more of it.
        is_same = samples.fingerprint() == self.about["fingerprint"]
        looked_at = LOOKED_AT if is_same else 40 * LOOKED_AT
        for index in range(0, len(samples), -(-len(samples) // looked_at)):
            changed = difference(self.shard(index // SHARD).origin(index % SHARD), origin_at(samples, index))
            if changed:
                raise ValueError(f"{self.folder}: latents of {self.about['source']}, but they do not fit "
                                 f"{samples.path}: sample {index + 1}: {changed}; {AGAIN}")

    def check(self, encode, size):
        """Raises ValueError unless `encode` made the latents, from images of this size."""
        check_vae(self.folder, self.about, probe(encode), size)


class Shard:
    """The file of SHARD samples, mapped. Raises ValueError if it is damaged."""

    def __init__(self, file):
        self.file = file
        try:
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self.latents = tensors.pop("latents")
            self.bits = bits_of(self.latents)
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            self.crc, self.row, self.sides = arrays["crc"], arrays["row"], arrays["sides"]
            self.stats, self.bad = arrays["origin"], arrays["bad"]
            self.names = arrays["names"], arrays["names_ends"]
            self.reasons = arrays["reasons"], arrays["reasons_ends"]
            self.about = json.loads(arrays["about"].tobytes())
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else error
            raise ValueError(f"{file}: a damaged shard of latents ({reason}); run {COMMAND} again") from None

    def __len__(self):
        return len(self.row)

    def origin(self, i) -> tuple:
        size, mtime = self.stats[i].tolist()
        return text_at(i, *self.names), size, mtime

    def reason(self, i) -> str:
        """Why sample i of the shard was unusable."""
        return text_at(i, *self.reasons)

    def is_damaged(self, i, index) -> bool:
        """Whether the latents of sample i of the shard differ from their checksums. index: its number."""
        row = self.row[i]
        return row >= len(self.bits) or checksums(self.bits[row], index) != self.crc[row].tolist()


def shard_file(folder, k):
    return Path(folder) / f"{k:05d}.safetensors"


def read_about(folder) -> dict:
    """about.json. Raises FileNotFoundError, or ValueError for a file that another version wrote."""
    file = Path(folder) / "about.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no about.json, so no latent cache; {COMMAND} makes one")
    about = read_json(file)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ValueError(f"{folder}: latents of an earlier format, which does not record the images that "
                         f"they are of; delete the folder, and {COMMAND} makes it again, or train.py that of "
                         "the shapes world")
    types = {"count": int, "source": str, "fingerprint": str, "size": int, "squares": str, "task": str,
             "probe": list}
    wrong = [key for key, type in types.items() if not isinstance(about.get(key), type)]
    if wrong or about["count"] < 1:
        raise ValueError(f"{file}: damaged, {', '.join(wrong) or 'count'} cannot be right; delete the folder "
                         f"and run {COMMAND} again")
    return about


def shared(about) -> dict:
    return {key: about[key] for key in SHARED}


def is_alike(about, other) -> bool:
    """Whether latents were made alike: both as in about.json. Processors differ a little in the probe."""
    same = [key for key in SHARED if key != "probe"]
    return all(about[key] == other[key] for key in same) and are_close(about["probe"], other["probe"])


def are_close(probe, other) -> bool:
    return len(probe) == len(other) and np.allclose(probe, other, atol=0.1)


# ---- texts and checksums -------------------------------------------------------------------------------

def pack_texts(name, texts) -> dict:
    """Two tensors of texts: their bytes one after the other, and where each ends."""
    parts = [text.encode(errors="backslashreplace") for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    blob = np.frombuffer(b"".join(parts), np.uint8).copy()
    return {name: torch.from_numpy(blob), f"{name}_ends": torch.from_numpy(ends)}


def text_at(i, blob, ends) -> str:
    return blob[ends[i - 1] if i else 0:ends[i]].tobytes().decode(errors="replace")


def bits_of(latents):
    """bfloat16 latents as a numpy array of whole numbers, which shares their memory."""
    return latents.view(torch.int16).numpy()


def checksums(crops, index) -> list:
    """The CRC-32 of each crop's bits, begun with the sample's number, so that it is no other sample's."""
    return [zlib.crc32(crop, index & 0xffffffff) for crop in crops]


# ---- comparisons ---------------------------------------------------------------------------------------

def origin_of(sample) -> tuple:
    """(name, size, mtime_ns) of a sample's image: records.ImageAt."""
    return NOTHING if sample.origin is None else sample.origin()


def origin_at(samples, index):
    """The origin of a source's sample, None if the sample cannot be used."""
    try:
        return origin_of(samples[index])
    except SkipSample:
        return None


def difference(before, now) -> str:
    """How an image differs from the one that its latents were computed from; "" if it does not.

    Two origins. now: None for a sample that cannot be used. A file that is gone is fine.
    """
    if now is None or now == before:
        return ""
    if now[0] != before[0]:
        return f"its image is {now[0] or 'none'}, but the latents are of {before[0] or 'none'}"
    if now[1] == -1:
        return ""
    if now[1] != before[1]:
        was = f"{before[1]} bytes" if before[1] >= 0 else "no file"
        return f"{now[0]} has {now[1]} bytes, but was {was} when its latents were computed"
    return (f"{now[0]} was changed at {date(now[2])}, but was of {date(before[2])} when its latents were "
            "computed")


def date(mtime_ns) -> str:
    seconds, rest = divmod(mtime_ns, 10 ** 9)
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) + f".{rest:09d}"


def squares_of(task, crops) -> str:
    """How `training_squares` makes squares of an image."""
    if task == "image2text":
        return "padded"
    return f"{crops} random" if crops else "middle"


def why_another_task(shards, before, now, size) -> str:
    """Why latents for a task do not serve another one; "" if they would be the same.

    They are the same where both tasks use the same images, and pad or crop them alike, as square ones.
    """
    sides = [np.zeros((0, 2), np.int64), *(shard.sides for shard in shards)]
    widths, heights = np.concatenate(sides).astype(np.int64).T
    is_padded = "image2text" in (before, now)
    for both in np.unique(widths << 32 | heights).tolist():
        width, height = both >> 32, both & 0xffffffff
        if not width:                                           # of an image that could not be read
            continue
        picture = Picture((width, height), width, height)
        rejected = [bool(reject_reason(picture, task, size)) for task in (before, now)]
        image = f"an image of {width}×{height} pixels"
        if rejected[0] != rejected[1]:
            return f"{image} is left out for {before if rejected[0] else now} only"
        is_square = width == height <= LARGEST_SQUARE
        if is_padded and not is_square and not rejected[0]:
            return f"{image} is padded to a square for image2text and cropped for other tasks"
    return ""


def check_vae(folder, about, probed, size):
    """Raises ValueError unless the latents come from images of this size, and from a VAE that probes so."""
    if about["size"] != size:
        raise ValueError(f"{folder}: latents of images of {about['size']} pixels, but {size} are wanted; "
                         "give another folder")
    if not are_close(about["probe"], probed):
        raise ValueError(f"{folder}: these latents come from another VAE; delete the folder or give another")


def probe(encode):
    """Some latents of a fixed image; they differ between VAEs."""
    ramp = torch.linspace(-1, 1, 64).expand(64, 64)
    with torch.no_grad():
        latents = encode(torch.stack([ramp, ramp.T, -ramp])[None])
    return latents.float().flatten()[::7].tolist()
