"""Mixtures of sources: the file that lists them, the model's view of a sample, the order of a run.

A mixture is a JSON list (or TOML, [[source]]) of {"path": …, "task": …, "weight": …}, with the options of the
source's format (sources.py) and "latents", a folder of cached latents. Paths are relative to the file; ~ is
the home folder.
Tasks are "text2image", "image2text", "text" and "reca", reconstruction alignment.

Letters: B batch, L text length, S image side in pixels, h×w token grid, C latent channels.
"""
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from harmonkit.chat_template import DESCRIBE, GENERATE, IGNORE_INDEX, UNCONDITIONAL, pad, training_ids
from harmonkit.config import read_json
from harmonkit.data.latents import LatentCache
from harmonkit.data.records import SkipSample, lacking, usable_image
from harmonkit.data.sources import BUILT_IN, FORMATS, PATH_OPTIONS, open_source, options_of
from harmonkit.images import image_to_pixels, training_squares
from harmonkit.pipeline import token_grid

TASKS = ("text2image", "image2text", "text", "reca", "mar", "reconstruct")  # the last two: harmon-tiny's
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


def open_mixture(file, tasks=TASKS) -> list:
    """The Sources of a mixture file. Raises ValueError or FileNotFoundError that name the line."""
    sources = []
    for number, line in enumerate(read_mixture(file), start=1):
        where = f"{file}: source {number}"
        try:
            sources.append(open_line(tasks, line))
        except (ValueError, FileNotFoundError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"{where}: {error}") from None
    return sources


def open_line(tasks, line) -> Source:
    """The Source of a mixture's line. Raises ValueError or FileNotFoundError."""
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
    samples = open_source(path, **options)
    return Source(path, task, weight, samples, LatentCache(latents) if latents else None)


# ---- samples -> batches -> losses ----------------------------------------------------------------------

def prepare(sample, task, size, rng, cached=None) -> dict:
    """The model's view of a sample, with the keys that the task needs. size: S. Raises SkipSample.

    "pixels" (1, 3, S, S), or "latents" (1, h, w, C) if `cached` (crops, h, w, C) is given;
    "turns", a list of one [(question, answer or None), …], or "labels" (1,), -1 = none.
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
    elif task in ("image2text", "text"):
        if sample.turns is None and sample.caption is None:
            raise SkipSample(sample.name, lacking("conversation or caption", sample))
        row["turns"] = sample.turns(rng) if sample.turns else [(DESCRIBE, sample.caption(rng))]
    return row


def loss_arguments(model, batch, max_length=None) -> dict:
    """Convert a batch of MixtureDataset into keyword arguments of its loss, on the model's device.

    max_length: text tokens at most. Labels are (B, L) like input_ids and attention_mask, or (B,) for "mar".
    """
    inputs = {key: batch[key] for key in ("pixels", "latents", "labels") if key in batch}
    if "turns" in batch:
        num_image_tokens = 0
        if batch["task"] in ("image2text", "reca"):
            if "latents" in batch:
                h, w = batch["latents"].shape[1:3]
            else:
                h, w = token_grid(model, batch["pixels"].shape[-1])
            num_image_tokens = h * w + model.config.mar.buffer_size
        lengths = {"num_image_tokens": num_image_tokens, "max_length": max_length}
        rows = [training_ids(model.tokenizer, turns, **lengths) for turns in batch["turns"]]
        ids, labels = zip(*rows, strict=True)
        inputs["input_ids"], inputs["attention_mask"] = pad(model.tokenizer, ids)
        if batch["task"] in ("image2text", "text"):
            labels = [torch.tensor(row) for row in labels]
            inputs["labels"] = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
    return {key: value.to(model.device) for key, value in inputs.items()}


# ---- the order of a run --------------------------------------------------------------------------------

def source_shares(sources, ratio) -> list:
    """Each source's share of the micro-batches: its task's part of the ratio, split by weight.

    ratio: {task: part}. Raises ValueError unless its tasks are those of the sources.
    """
    weights = Counter()
    for source in sources:
        weights[source.task] += source.weight
    if set(weights) != set(ratio):
        raise ValueError(f"the recipe trains {', '.join(ratio)}; the mixture has sources for "
                         f"{', '.join(weights)}; these must be the same tasks")
    return [ratio[source.task] * source.weight / weights[source.task] for source in sources]


def source_cycle(shares) -> list:
    """The shortest cycle of source indices in which each comes as often as its share says, evenly spread."""
    # Find whole numbers in the ratio of the shares.
    for scale in range(1, 101):
        exact = [share / min(shares) * scale for share in shares]
        counts = [round(x) for x in exact]
        if all(abs(count - x) < 1e-3 * count for count, x in zip(counts, exact, strict=True)):
            break
    # Each step adds the counts to the credits. The largest credit is next and loses the sum of the counts.
    cycle = []
    credit = np.zeros(len(counts), dtype=int)
    for _ in range(sum(counts)):
        credit += counts
        cycle.append(int(credit.argmax()))
        credit[cycle[-1]] -= sum(counts)
    return cycle


class MixtureDataset(torch.utils.data.Dataset):
    """The micro-batches of a run by number. Each is of one source; sources alternate in the recipe's ratio.

    A micro-batch is a function of (seed, number), so a run resumes anywhere, on any number of processes.
    A sample that cannot be used is replaced by the next one. ratio: {task: part}. size: S.
    """

    def __init__(self, sources, ratio, micro_batch, size, seed=0):
        self.sources = sources
        self.micro_batch = micro_batch
        self.size = size
        self.seed = seed
        self.cycle = source_cycle(source_shares(sources, ratio))

    def __len__(self):
        return sys.maxsize

    def place(self, number):
        """The index of a micro-batch's source, and how many micro-batches of that source come before."""
        rounds, i = divmod(number, len(self.cycle))
        s = self.cycle[i]
        return s, rounds * self.cycle.count(s) + self.cycle[:i].count(s)

    def __getitem__(self, number):
        """{"task", "source": its index, "skipped": [SkipSample, …]} and B rows of `prepare`."""
        s, before = self.place(number)
        first = before * self.micro_batch
        skipped = []
        rows = [self.row(s, position, skipped) for position in range(first, first + self.micro_batch)]
        batch = {"task": self.sources[s].task, "source": s, "skipped": skipped}
        for key in rows[0]:
            values = [row[key] for row in rows]
            batch[key] = torch.cat(values) if torch.is_tensor(values[0]) else values
        return batch

    def row(self, s, position, skipped):
        """`prepare` of the next usable sample of source s, from a position counted through all epochs."""
        source = self.sources[s]
        count = len(source.samples)
        rng = random.Random(f"{self.seed}/{s}/{position}")
        for candidate in range(position, position + min(count, 1000)):
            epoch, i = divmod(candidate, count)
            index = int(permutation(count, self.seed, s, epoch)[i])
            try:
                cached = source.latents.get(index) if source.latents else None
                return prepare(source.samples[index], source.task, self.size, rng, cached)
            except SkipSample as error:
                skipped.append(error)
        raise ValueError(f"{source.path}: no usable sample among {min(count, 1000)}, the last: {skipped[-1]}")


@lru_cache(maxsize=64)
def permutation(count, *seed):
    return np.random.default_rng(seed).permutation(count).astype(np.int32)


class SampleCounts:
    """Counts samples by source, reports each skipped one once, and stops a run with too many bad ones."""

    def __init__(self, sources):
        self.sources = sources
        self.used = [0] * len(sources)
        self.skipped = [0] * len(sources)
        self.bad = [0] * len(sources)               # of the skipped ones
        self.names = set()

    def add(self, batch, say=print):
        """Count a batch of MixtureDataset. Raises ValueError if more than MAX_BAD of its source is bad."""
        s = batch["source"]
        self.used[s] += next(len(batch[key]) for key in ("pixels", "latents", "turns") if key in batch)
        for error in batch["skipped"]:
            if error.name not in self.names:
                self.names.add(error.name)
                self.skipped[s] += 1
                self.bad[s] += error.bad
                say(f"skipped {error}")
        # Judge after 100 samples or an epoch. One bad sample is always allowed.
        source = self.sources[s]
        checked = min(self.used[s] + self.skipped[s], len(source.samples))
        if checked >= min(100, len(source.samples)) and self.bad[s] > max(1, MAX_BAD * checked):
            raise ValueError(f"{source.path}: {self.bad[s]} of the first {checked} samples are bad, more "
                             f"than {MAX_BAD:.0%}; `python -m harmonkit.data inspect` lists them")
