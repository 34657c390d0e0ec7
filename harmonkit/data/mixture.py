"""From sources to batches: mixtures, what the model sees of a sample, the order of a run, cached latents.

    python data.py inspect mixture.json                         # what is in each source, what is broken, 16 samples as the model sees them
    python data.py cache mixture.json --vae kl16.ckpt --size 256 --out latents     # VAE latents once and for all; also under torchrun

A mixture is a JSON list (or TOML, [[source]]) of sources: {"path": …, "task": …, "weight": …} and what the format takes beside it (sources.py);
paths are relative to the mixture's file. task: "text2image", "image2text", "text", or "reca", reconstruction alignment.

Letters: B batch, L text length, S image side in pixels, h×w token grid, C latent channels.
"""
import argparse
import json
import os
import random
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from harmonkit.shapes_world import world as shapes
from harmonkit import checkpoints
from harmon import ASSISTANT, END, GENERATE, IGNORE_INDEX, PAD, UNCONDITIONAL, USER, Harmon
from harmonkit.images import image_to_pixels, pixels_to_images, training_squares
from harmonkit.data.latents import LatentCache, cache_latents, vae_encoder
from pretrained import HarmonConfig, choose_device, load_tokenizer, locate
from harmonkit.data.sources import BUILT_IN, SkipSample, open_source, usable_image

TASKS = ("text2image", "image2text", "text", "reca", "mar", "reconstruct")   # the last two: of the tiny recipes
CAPTION_DROP = 0.1                        # of text-to-image samples, for classifier-free guidance
DESCRIBE = "Describe the image."          # the question where an image comes with a caption only
MAX_BAD = 0.05                            # of a source; more stops the run


# ---- mixtures --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """A line of a mixture, opened. samples: see sources.py; latents: a LatentCache or None."""
    path: str
    task: str
    weight: float
    samples: object
    latents: object = None


def read_mixture(file):
    """The lines of a mixture file, dictionaries."""
    file = Path(file)
    try:
        if file.suffix == ".toml":
            import tomllib  # Python 3.11

            lines = tomllib.loads(file.read_text())["source"]
        else:
            lines = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except ImportError:
        raise ValueError(f"{file}: reading TOML needs Python 3.11; write the mixture as JSON") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a mixture ({type(error).__name__}: {error})") from None
    if not isinstance(lines, list) or not lines or not all(isinstance(line, dict) for line in lines):
        raise ValueError(f"{file}: a list of sources is expected, {{\"path\", \"task\", \"weight\"}} each")
    return lines


def open_mixture(file, tasks=TASKS):
    """The sources of a mixture file. Raises ValueError or FileNotFoundError, naming the line."""
    return [open_line(dict(line), Path(file).parent, f"{file}: source {i + 1}", tasks) for i, line in enumerate(read_mixture(file))]


def open_line(line, folder, where, tasks=TASKS):
    try:
        path, task, weight, latents = str(line.pop("path")), line.pop("task"), float(line.pop("weight", 1)), line.pop("latents", None)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: path, task and a number as weight are needed ({type(error).__name__}: {error})") from None
    if task not in tasks or weight <= 0:
        raise ValueError(f"{where}: task {task!r} must be one of {', '.join(tasks)}, weight {weight:g} above 0")
    inside = lambda p: p if p in BUILT_IN else str(folder / p)  # noqa: E731
    options = {k: inside(str(v)) if k in ("images", "captions") else v for k, v in line.items()}
    try:
        return Source(path, task, weight, open_source(inside(path), **options), LatentCache(folder / latents) if latents else None)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{where}: {error}") from None


# ---- what the model sees of a sample ---------------------------------------------------------------------------------

def prepare(sample, task, size, rng, cached=None):
    """Sample -> {"pixels" (1, 3, S, S) or "latents" (1, h, w, C), "turns" [(question, answer or None), …] or "labels" (1,)}. Raises SkipSample."""
    row = {}
    if task != "text":
        if cached is not None:
            row["latents"] = cached[rng.randrange(len(cached))][None].float()
        elif sample.image is None:
            raise SkipSample(sample.name, "no image, and the task needs one")
        else:
            row["pixels"] = image_to_pixels(training_squares(usable_image(sample, task, size), task, 1, rng)[0], (size, size))
    if task == "mar":
        row["labels"] = torch.tensor([-1 if rng.random() < CAPTION_DROP else sample.label])
    elif task == "reca":
        row["turns"] = [(DESCRIBE, None)]
    elif task == "text2image":
        if sample.caption is None:
            raise SkipSample(sample.name, "no caption, and the task needs one")
        row["turns"] = [(UNCONDITIONAL if rng.random() < CAPTION_DROP else GENERATE.format(caption=sample.caption(rng)), None)]
    elif task in ("image2text", "text"):
        if sample.turns is None and sample.caption is None:
            raise SkipSample(sample.name, "neither conversation nor caption")
        row["turns"] = sample.turns(rng) if sample.turns else [(DESCRIBE, sample.caption(rng))]
    return row


def conversation(model, turns, image_tokens=0, max_length=None):
    """[(question, answer), …] -> ids and labels, lists of one length. The image opens the first turn; answers and their end are labelled.

    max_length: of the text; what is longer is cut at its end. The image is never cut.
    """
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        if i == 0:
            prompt = model.prompt_ids(question, image_tokens=image_tokens)
        else:
            prompt = model.tokenize(f"\n{USER}{question}{END}\n{ASSISTANT}")
        said = [] if answer is None else model.tokenize(answer + END)
        ids += prompt + said
        labels += [IGNORE_INDEX] * len(prompt) + said
    end = None if max_length is None else image_tokens + max_length
    return ids[:end], labels[:end]


def to_model(model, batch, max_length=None):
    """What `Batches` gives -> the arguments of the task's loss, on the model's device."""
    made = {k: batch[k].to(model.device) for k in ("pixels", "latents", "labels") if k in batch}
    if "turns" in batch:
        tokens = 0
        if batch["task"] in ("image2text", "reca"):
            h, w = batch["latents"].shape[1:3] if "latents" in batch else model.token_grid(batch["pixels"].shape[-1])
            tokens = h * w + model.config.mar.buffer_size
        rows = [conversation(model, turns, tokens, max_length) for turns in batch["turns"]]
        made["input_ids"], made["attention_mask"] = (x.to(model.device) for x in model.pad([ids for ids, _ in rows]))
        if batch["task"] in ("image2text", "text"):
            L = made["input_ids"].shape[1]
            made["labels"] = torch.tensor([labels + [IGNORE_INDEX] * (L - len(labels)) for _, labels in rows], device=model.device)
    return made


# ---- the order of a run ----------------------------------------------------------------------------------------------

def turns_of_sources(shares):
    """Positive numbers -> the shortest cycle of indices in which each comes as often as its share says, evenly spread."""
    smallest = min(shares)
    for d in range(1, 101):
        counts = [round(s / smallest * d) for s in shares]
        if all(abs(n - s / smallest * d) < 1e-3 * n for n, s in zip(counts, shares)):
            break
    order, credit = [], [0] * len(shares)
    for _ in range(sum(counts)):
        credit = [have + n for have, n in zip(credit, counts)]
        order.append(max(range(len(shares)), key=credit.__getitem__))
        credit[order[-1]] -= sum(counts)
    return order


def shares_of(sources, ratio):
    """Each source's share of the micro-batches: its task's part of the ratio, by weight among the task's sources."""
    missing = [task for task in ratio if not any(s.task == task for s in sources)]
    extra = sorted({s.task for s in sources} - set(ratio))
    if missing or extra:
        raise ValueError(f"the recipe trains {', '.join(ratio)}; the mixture has " + " and ".join(
            [f"no source for {', '.join(missing)}"] * bool(missing) + [f"sources for {', '.join(extra)}, which it does not train"] * bool(extra)))
    return [ratio[s.task] * s.weight / sum(o.weight for o in sources if o.task == s.task) for s in sources]


@dataclass
class Batches(torch.utils.data.Dataset):
    """Micro-batch j of a run for every j, a pure function of (seed, j): a run resumes at any j, and on any number of processes the order is the same.

    Each micro-batch is of one source; the sources take turns in the ratio of the recipe. An unusable sample is replaced by the next one.
    """
    sources: list
    ratio: dict                    # task -> part
    micro_batch: int
    size: int                      # S
    seed: int = 0
    cycle: list = field(init=False)

    def __post_init__(self):
        self.cycle = turns_of_sources(shares_of(self.sources, self.ratio))

    def __len__(self):
        return sys.maxsize

    def place(self, j):
        """-> (source, how many micro-batches of it came before)"""
        rounds, i = divmod(j, len(self.cycle))
        s = self.cycle[i]
        return s, rounds * self.cycle.count(s) + self.cycle[:i].count(s)

    def __getitem__(self, j):
        s, k = self.place(j)
        skipped = []
        rows = [self.row(s, position, skipped) for position in range(k * self.micro_batch, (k + 1) * self.micro_batch)]
        batch = {"task": self.sources[s].task, "source": s, "skipped": skipped}
        for key in rows[0]:
            values = [row[key] for row in rows]
            batch[key] = torch.cat(values) if torch.is_tensor(values[0]) else values
        return batch

    def row(self, s, position, skipped):
        source, rng = self.sources[s], random.Random(f"{self.seed}/{s}/{position}")
        for offset in range(min(len(source.samples), 1000)):
            epoch, i = divmod(position + offset, len(source.samples))
            index = int(permutation(len(source.samples), self.seed, s, epoch)[i])
            try:
                cached = None if source.latents is None else source.latents.get(index)
                return prepare(source.samples[index], source.task, self.size, rng, cached)
            except SkipSample as error:
                skipped.append(error)
        raise ValueError(f"{source.path}: no usable sample among {offset + 1}; the last: {skipped[-1]}")


@lru_cache(maxsize=64)
def permutation(n, *seed):
    return np.random.default_rng(seed).permutation(n).astype(np.int32)


class Ledger:
    """Counts samples used and skipped by source, names each once, and stops the run where too many are bad."""

    def __init__(self, sources):
        self.sources, self.used, self.skipped, self.bad, self.names = sources, [0] * len(sources), [0] * len(sources), [0] * len(sources), set()

    def add(self, batch, say=print):
        s = batch["source"]
        self.used[s] += len(batch[next(k for k in ("pixels", "latents", "turns") if k in batch)])
        for error in batch["skipped"]:
            if error.name not in self.names:
                self.names.add(error.name)
                self.skipped[s] += 1
                self.bad[s] += error.bad
                say(f"skipped {error}")
        checked = min(self.used[s] + self.skipped[s], len(self.sources[s].samples))
        if self.bad[s] > max(1, MAX_BAD * checked) and checked >= min(100, len(self.sources[s].samples)):
            raise ValueError(f"{self.sources[s].path}: {self.bad[s]} of the first {checked} samples are bad, more than {MAX_BAD:.0%}; "
                             "`python data.py inspect` lists them")


# ---- the tokenizer of the shapes world -------------------------------------------------------------------------------

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Qwen2.5 splits text


def train_tokenizer(vocab_size, seed="tokenizer"):
    """A byte-level BPE tokenizer in the form of Qwen2.5's, trained on the world's text."""
    def corpus():
        rng = random.Random(seed)
        for i in range(4000):
            scene = shapes.scene(seed, i)
            yield USER + GENERATE.format(caption=shapes.caption(scene, rng)) + f"{END}\n{ASSISTANT}"
            yield from (f"{q}\n{a}" for _, q, a in shapes.questions(scene, rng))
            yield from (f"{q}\n{a}" for q, a in shapes.FACTS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, "<|im_start|>", END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


# ---- commands --------------------------------------------------------------------------------------------------------

def inspect(sources, model, size, out, check=2000):
    """Print what each source holds, looking at up to `check` samples of each, and draw 16 micro-batches of one as the model sees them."""
    for s, source in enumerate(sources):
        lengths, bad, other = [], [], []
        order = permutation(len(source.samples), 0, s, 0)[:check]
        for index in tqdm(order, desc=source.path, disable=None, leave=False):
            try:
                cached = None if source.latents is None else source.latents.get(int(index))
                row = prepare(source.samples[int(index)], source.task, size, random.Random(int(index)), cached)
                lengths.append(len(conversation(model, row["turns"])[0]))
            except SkipSample as error:
                (bad if error.bad else other).append(error)
        print(f"{source.path}: {source.task}, weight {source.weight:g}, {len(source.samples)} samples; of {len(order)} looked at {len(bad)} bad, {len(other)} outside the rules")
        if lengths:
            print("    text tokens: " + ", ".join(f"{p}% ≤ {np.percentile(lengths, p):.0f}" for p in (5, 50, 95, 99, 100)))
        for error in (bad + other)[:10]:
            print(f"    {error}")
    ratio = {task: sum(s.weight for s in sources if s.task == task) for task in {s.task: 0 for s in sources}}
    sheet(Batches(sources, ratio, 1, size), model, out)
    print(out)


def sheet(batches, model, out, count=16, side=224):
    """Draw samples as the model sees them: the picture, the decoded text, and what the loss falls on in red."""
    page = Image.new("RGB", (4 * (side + 16), -(-count // 4) * (side + 150)), "white")
    draw = ImageDraw.Draw(page)
    for i in range(count):
        batch = batches[i]
        left, top = i % 4 * (side + 16) + 8, i // 4 * (side + 150) + 8
        if "pixels" in batch:
            page.paste(pixels_to_images(batch["pixels"])[0].resize((side, side), Image.BICUBIC), (left, top))
        else:
            draw.rectangle((left, top, left + side, top + side), outline="grey")
            draw.text((left + 8, top + 8), "cached latents" if "latents" in batch else "no image", fill="grey")
        drawn = batch["task"] in ("text2image", "reca")
        draw.text((left, top + side + 2), batch["task"] + (": the loss is on hidden tokens of the picture" if drawn else ""), fill="red" if drawn else "grey")
        x, y = left, top + side + 16
        ids, labels = conversation(model, batch["turns"][0], image_tokens=0)
        for token, label in zip(ids, labels):
            piece = model.tokenizer.decode([token], skip_special_tokens=False)
            for part in piece.replace("\n", "\n\0").split("\0"):
                width = draw.textlength(part.strip("\n"))
                if x + width > left + side:
                    x, y = left, y + 12
                draw.text((x, y), part.strip("\n"), fill="black" if label == IGNORE_INDEX else "red")
                x, y = (left, y + 12) if part.endswith("\n") else (x + width, y)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    page.save(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("inspect", "cache"))
    parser.add_argument("mixture")
    parser.add_argument("--model", default="harmon-tiny", help="whose tokenizer and VAE to use (default: harmon-tiny)")
    parser.add_argument("--tokenizer", help="tokenizer.json or its folder")
    parser.add_argument("--vae", help="cache: kl16.ckpt, or another VAE of its form, instead of a model's")
    parser.add_argument("--size", type=int, default=256, help="side of the square pictures, pixels (default: 256)")
    parser.add_argument("--center", action="store_true", help="cache: one middle crop instead of two random ones")
    parser.add_argument("--device", help="default: cuda when there is one; under torchrun each process has its own")
    parser.add_argument("--out", help="inspect: the picture (default: out/inspect.png); cache: a folder")
    args = parser.parse_args()
    try:
        if args.command == "inspect":
            with torch.device("meta"):
                model = Harmon(checkpoints.find_config(args.model))
            model.tokenizer = load_tokenizer(args.tokenizer or find_model(args.model))
            print(f"as {args.model} sees them, at {args.size} pixels" + (f", in the words of {args.tokenizer}" if args.tokenizer else ""))
            return inspect(open_mixture(args.mixture), model, args.size, args.out or "out/inspect.png")
        if not args.out:
            raise ValueError("cache needs --out, a folder")
        device = choose_device(args.device)
        encode = vae_encoder(args.vae, device) if args.vae else Harmon.from_pretrained(args.model, device=device, dtype=torch.float32).encode
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        lines = []
        for i, (source, line) in enumerate(zip(open_mixture(args.mixture), read_mixture(args.mixture))):
            line = line | {k: os.path.abspath(Path(args.mixture).parent / line[k]) for k in ("path", "images", "captions") if k in line and line[k] not in BUILT_IN}
            if source.task != "text":
                cache_latents(encode, source, Path(args.out) / str(i), args.size, crops=0 if args.center else 2, rank=rank, ranks=ranks)
                line["latents"] = str(i)
            lines.append(line)
        if rank == 0:
            with checkpoints.atomic_write(Path(args.out) / "mixture.json") as temporary:
                Path(temporary).write_text(json.dumps(lines, indent=2) + "\n")
            print(Path(args.out) / "mixture.json")
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
