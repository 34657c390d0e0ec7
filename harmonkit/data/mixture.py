"""Mixtures of sources: the file that lists them, the model's view of a sample, the micro-batches of a run.

A mixture is a JSON list (or TOML, [[source]]) of {"path": …, "task": …, "weight": …}, with the options of the
source's format (sources.py) and "latents", a folder of cached latents. Paths are relative to the file; ~ is
the home folder.
Tasks are "text2image", "image2text", "text" and "reca", reconstruction alignment.

Letters: B batch, L text length, S image side in pixels, h×w token grid, C latent channels.
"""
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from harmonkit.chat_template import (
    DESCRIBE,
    GENERATE,
    IGNORE_INDEX,
    UNCONDITIONAL,
    end_of_text,
    pad,
    training_ids,
)
from harmonkit.config import read_json
from harmonkit.data.latents import LatentCache
from harmonkit.data.order import Order, permutation, source_shares
from harmonkit.data.records import SkipSample, lacking, usable_image
from harmonkit.data.sources import BUILT_IN, FORMATS, PATH_OPTIONS, open_source, options_of
from harmonkit.images import image_to_pixels, training_squares
from harmonkit.pipeline import token_grid

TASKS = ("text2image", "image2text", "text", "reca", "mar", "reconstruct")  # the last two: harmon-tiny's
ANSWERS = ("image2text", "text")                                            # the tasks that learn answers
ASKS_IMAGES = ("image2text", "reca")                                        # those with images in the prompt
WITHOUT_LATENTS = ("text", "reconstruct")                                   # these train on none
CAPTION_DROP = 0.1                  # fraction of captions and labels left out, for classifier-free guidance
MAX_BAD = 0.05                      # fraction of a source; more bad samples stop the run


# ---- mixtures ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A line of a mixture, opened."""
    path: str
    task: str
    weight: float
    samples: object                 # of open_source
    latents: object = None          # a LatentCache


def read_mixture(file) -> list:
    """The lines of a mixture file, dictionaries, with absolute paths. Raises ValueError or OSError."""
    if os.path.isdir(file):
        raise ValueError(f'{file}: a folder; a JSON file that names it is expected, [{{"path", "task"}}]')
    lines = read_toml(file) if Path(file).suffix == ".toml" else read_json(file)
    if not isinstance(lines, list) or not lines or not all(isinstance(line, dict) for line in lines):
        raise ValueError(f'{file}: a list of sources is expected, {{"path", "task", "weight"}} each')
    folder = Path(file).absolute().parent
    for line in lines:
        for key in ("path", "latents", *PATH_OPTIONS):
            value = line.get(key)
            if isinstance(value, str) and value and value not in BUILT_IN:          # "shapes" is no path
                line[key] = str(folder / os.path.expanduser(value))
    return lines


def read_toml(file):
    try:
        import tomllib

        return tomllib.loads(Path(file).read_text(encoding="utf-8-sig")).get("source")
    except (ImportError, ValueError) as error:
        raise ValueError(f"{file}: not TOML, or Python is older than 3.11 ({error})") from None


def open_mixture(file, tasks=TASKS, with_latents=True) -> list:
    """The Sources of a mixture file. Raises ValueError or FileNotFoundError that name the line."""
    sources = []
    for number, line in enumerate(read_mixture(file), start=1):
        where = f"{file}: source {number}"
        if not with_latents:
            line.pop("latents", None)
        try:
            sources.append(open_line(tasks, line))
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{where}: {error}") from None
    return sources


def open_line(tasks, line) -> Source:
    """The Source of a mixture's line. Raises ValueError, also for latents of other images; FileNotFoundError.
    """
    options = dict(line)
    path, task = options.pop("path", None), options.pop("task", None)
    weight, latents = options.pop("weight", 1), options.pop("latents", None)
    of_formats = [option for format in (*FORMATS, *BUILT_IN.values()) for option in options_of(format)]
    known = dict.fromkeys(["path", "task", "weight", "latents", *of_formats])
    for key in line:
        if key not in known:
            raise ValueError(f"unknown key {key!r}; known: {', '.join(known)}")
    for key in ("path", *PATH_OPTIONS, "latents"):
        if key in line and not (isinstance(line[key], str) and line[key]):
            raise ValueError(f"{key} is {line[key]!r}; a text is expected")
    if path is None or task is None:
        raise ValueError(f"path and task are needed; here: {', '.join(line) or 'nothing'}")
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if task not in tasks or not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"task {task!r} must be one of {', '.join(tasks)}, and weight {weight!r} a number "
                         "above 0")
    if latents and task in WITHOUT_LATENTS:
        raise ValueError(f"latents is {latents!r}, but the task {task} trains on no latents; leave it out")
    samples = open_source(path, **options)
    cache = None
    if latents:
        cache = LatentCache(latents)
        cache.compare(samples, task)
    return Source(path, task, weight, samples, cache)


# ---- samples -> batches -> losses ----------------------------------------------------------------------

def prepare(sample, task, size, rng, cached=None) -> dict:
    """The model's view of a sample, with the keys that the task needs. size: S. Raises SkipSample.

    "pixels" (1, 3, S, S), or "latents" (1, h, w, C) if `cached` (crops, h, w, C) is given;
    "turns", [(question, answer or None), …], or "labels" (1,), -1 = none.
    """
    row = {}
    if task != "text" and cached is not None:
        row["latents"] = cached[rng.randrange(len(cached))][None].float()
    elif task != "text":
        square = training_squares(usable_image(sample, task, size), task, 1, rng)[0]
        row["pixels"] = image_to_pixels(square, (size, size))

    if task == "mar":
        row["labels"] = torch.tensor([-1 if rng.random() < CAPTION_DROP else sample.label])
    elif task == "reca":
        row["turns"] = [(DESCRIBE, None)]
    elif task == "text2image":
        if sample.caption is None:
            raise SkipSample(sample.name, lacking("caption", sample))
        is_dropped = rng.random() < CAPTION_DROP
        prompt = UNCONDITIONAL if is_dropped else GENERATE.format(caption=sample.caption(rng))
        row["turns"] = [(prompt, None)]
    elif task in ANSWERS:
        if sample.turns is None and sample.caption is None:
            raise SkipSample(sample.name, lacking("conversation or caption", sample))
        row["turns"] = sample.turns(rng) if sample.turns else [(DESCRIBE, sample.caption(rng))]
    return row


@dataclass(frozen=True)
class Fit:
    """The text that a run has room for, in tokens."""
    tokenizer: object
    num_image_tokens: int           # of an image that is asked about
    max_length: int                 # text tokens at most; a longer text is cut at its end

    @classmethod
    def of(cls, model, size, max_length):
        """That of a model which trains on images of this size in pixels."""
        return cls(model.tokenizer, num_image_tokens(model, token_grid(model, size)), max_length)

    def tokens(self, name, task, turns) -> tuple:
        """(ids, labels) of a sample, cut, and whether they are cut. Raises SkipSample if no label remains."""
        lengths = {"num_image_tokens": self.num_image_tokens if task in ASKS_IMAGES else 0}
        ids, labels = training_ids(self.tokenizer, turns, **lengths)
        end = end_of_text(ids, lengths["num_image_tokens"] + self.max_length)
        has_label = labels[:end].count(IGNORE_INDEX) < len(labels[:end])
        if task in ANSWERS and not has_label:
            raise SkipSample(name, f"its question fills all {self.max_length} text tokens, so no answer is "
                                   "left to learn; a larger --max-length has room for it")
        return ids[:end], labels[:end], end < len(ids)


def num_image_tokens(model, grid) -> int:
    """How many tokens of an image with this grid (h, w) the language model sees."""
    h, w = grid
    return h * w + model.config.mar.buffer_size


def loss_arguments(model, batch, max_length=None) -> dict:
    """Convert a batch of MixtureDataset into keyword arguments of its loss, on the model's device.

    max_length: text tokens at most, for a dataset without a Fit. Labels are (B, L) like input_ids and
    attention_mask, or (B,) for "mar".
    """
    inputs = {key: batch[key] for key in ("pixels", "latents", "labels") if key in batch}
    if "turns" in batch:
        rows = batch["ids"] if "ids" in batch else tokenize_turns(model, batch, max_length)
        ids, labels = zip(*rows, strict=True)
        inputs["input_ids"], inputs["attention_mask"] = pad(model.tokenizer, ids)
        if batch["task"] in ANSWERS:
            labels = [torch.tensor(row) for row in labels]
            inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return {key: value.to(model.device) for key, value in inputs.items()}


def tokenize_turns(model, batch, max_length) -> list:
    """[(ids, labels), …] of a batch's turns."""
    lengths = {"max_length": max_length}
    if batch["task"] in ASKS_IMAGES:
        is_cached = "latents" in batch
        grid = batch["latents"].shape[1:3] if is_cached else token_grid(model, batch["pixels"].shape[-1])
        lengths["num_image_tokens"] = num_image_tokens(model, grid)
    return [training_ids(model.tokenizer, turns, **lengths) for turns in batch["turns"]]


# ---- the micro-batches of a run ------------------------------------------------------------------------

class MixtureDataset(torch.utils.data.Dataset):
    """The micro-batches of a run by number. Each is of one source; sources alternate in the recipe's ratio.

    A micro-batch is a function of (seed, number), so a run resumes anywhere, on any number of processes.
    A sample that cannot be used is replaced by the next one. ratio: {task: part}. size: S. fit: a Fit, with
    which texts are tokenized here, and samples without room for a label cannot be used.
    """

    def __init__(self, sources, ratio, micro_batch, size, seed=0, fit=None):
        self.sources = sources
        self.micro_batch = micro_batch
        self.size = size
        self.seed = seed
        self.fit = fit
        self.order = Order(source_shares(sources, ratio))
        self.epochs = {}                                        # {s: (epoch, its order of the samples)}

    def __len__(self):
        return sys.maxsize

    def place(self, number):
        """The index of a micro-batch's source, and how many micro-batches of that source come before."""
        return self.order.place(number)

    def __getitem__(self, number):
        """{"task", "source": its index, "skipped": [(index, SkipSample), …]} and B rows of `prepare`.

        With a Fit also "ids", (ids, labels) of each row, and "cut", the number of cut texts. In a process of
        its own, where torch would put a traceback into the message, an error comes as {"error"}.
        """
        try:
            return self.batch(number)
        except (ValueError, OSError) as error:
            if torch.utils.data.get_worker_info() is None:
                raise
            return {"error": error}

    def batch(self, number):
        s, before = self.place(number)
        first, task = before * self.micro_batch, self.sources[s].task
        batch = {"task": task, "source": s, "skipped": []}
        drawing = [self.usable(s, first + i, batch["skipped"]) for i in range(self.micro_batch)]
        drawn = [next(samples) for samples in drawing]
        if self.fit and "turns" in drawn[0][2]:
            # All texts after all images: a tokenizer is faster while its tables stay in the CPU's cache.
            batch["cut"] = 0
            for i, samples in enumerate(drawing):
                drawn[i] = self.tokenize(drawn[i], samples, batch)
        rows = [row for _, _, row in drawn]
        for key in rows[0]:
            values = [row[key] for row in rows]
            batch[key] = torch.cat(values) if torch.is_tensor(values[0]) else values
        return batch

    def usable(self, s, position, skipped):
        """Yield (index, name, row) of the usable samples of source s, from a position counted through all
        epochs. Raises ValueError after the last.
        """
        source = self.sources[s]
        count = len(source.samples)
        rng = random.Random(f"{self.seed}/{s}/{position}")
        for candidate in range(position, position + min(count, 1000)):
            index = self.index(s, candidate)
            try:
                sample = source.samples[index]
                cached = source.latents.get(index, sample) if source.latents else None
                row = prepare(sample, source.task, self.size, rng, cached)
            except SkipSample as error:
                skipped.append((index, error))
                continue
            yield index, sample.name, row
        raise ValueError(f"{source.path}: no usable sample among {min(count, 1000)}, the last: "
                         f"{skipped[-1][1]}")

    def tokenize(self, drawn, samples, batch):
        """What `usable` yields, with "ids"; the next of `samples` where a text has no room for a label."""
        while True:
            index, name, row = drawn
            try:
                ids, labels, is_cut = self.fit.tokens(name, batch["task"], row["turns"])
            except SkipSample as error:
                batch["skipped"].append((index, error))
                drawn = next(samples)
                continue
            row["ids"] = (ids, labels)
            batch["cut"] += is_cut
            return drawn

    def index(self, s, position) -> int:
        """The sample at a position of source s. Each epoch has an order of its own."""
        count = len(self.sources[s].samples)
        epoch, i = divmod(position, count)
        if s not in self.epochs or self.epochs[s][0] != epoch:
            self.epochs[s] = epoch, permutation(count, self.seed, s, epoch)
        return int(self.epochs[s][1][i])


class SampleCounts:
    """Counts samples by source, reports each skipped one once, and stops a run with too many bad ones."""

    def __init__(self, sources):
        self.sources = sources
        self.used = [0] * len(sources)
        self.skipped = [0] * len(sources)
        self.bad = [0] * len(sources)               # of the skipped ones
        self.cut = [0] * len(sources)               # of the used ones, in all epochs
        self.seen = set()                           # (source, index) of the skipped ones

    def add(self, batch, say=print):
        """Count a batch of MixtureDataset. Raises its error, or ValueError if more than MAX_BAD of its source
        is bad.
        """
        if "error" in batch:
            raise batch["error"]
        s = batch["source"]
        self.used[s] += next(len(batch[key]) for key in ("pixels", "latents", "turns") if key in batch)
        self.cut[s] += batch.get("cut", 0)
        for index, error in batch["skipped"]:
            if (s, index) not in self.seen:
                self.seen.add((s, index))
                self.skipped[s] += 1
                self.bad[s] += error.bad
                say(f"skipped {error}")
        # Judge after 100 samples or an epoch. One bad sample is always allowed.
        source = self.sources[s]
        checked = min(self.used[s] + self.skipped[s], len(source.samples))
        if checked >= min(100, len(source.samples)) and self.bad[s] > max(1, MAX_BAD * checked):
            raise ValueError(f"{source.path}: {self.bad[s]} of the first {checked} samples are bad, more "
                             f"than {MAX_BAD:.0%}; `python -m harmonkit.data inspect` lists them")

    def totals(self) -> dict:
        """{"unusable": samples that were skipped, "cut": samples whose text was cut}."""
        return {"unusable": sum(self.skipped), "cut": sum(self.cut)}
