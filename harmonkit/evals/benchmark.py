"""What all benchmarks share: items, questions and results, the flags of their commands, and the model.

A benchmark is a module. `pictures.py` runs those that draw, `answers.py` those that answer; both say what a
module must have.
"""
from dataclasses import dataclass, field
from pathlib import Path

from harmon import Harmon
from harmonkit.devices import DTYPES, choose_device, choose_dtype, rank_and_world_size
from harmonkit.drawing import about_model
from harmonkit.evals.origins import weight_files
from harmonkit.fast import MODES, accelerate
from harmonkit.pipeline import CONTEXT_LENGTH
from harmonkit.repeatable import make_repeatable
from harmonkit.terminal import file_path


@dataclass(frozen=True)
class Item:
    """One prompt of a drawing benchmark."""
    name: str                   # a file's stem: "partiprompts97", "00000"
    prompt: str
    fields: dict = field(default_factory=dict)          # what the prompt file says about it


@dataclass(frozen=True)
class Question:
    """One question of an answering benchmark."""
    key: str                    # unique, and the same in every run
    text: str                   # what the model is asked: the template is applied
    image: object = None        # a path, the bytes of a file, or None; opened late, by images.open_image
    fields: dict = field(default_factory=dict)          # label, options, subtask, … that the rules need


@dataclass(frozen=True)
class Result:
    """Scores by reading protocol, the headline first in each; how many of what; what must stand beside."""
    scores: dict                # {protocol: {name: number}}
    counts: dict = field(default_factory=dict)          # {"questions": 3000, "failed": 2, …}
    notes: tuple = ()           # sentences

    @property
    def headline(self) -> tuple:
        """(protocol, name, number) of the score that stands for the benchmark."""
        protocol, scores = next(iter(self.scores.items()))
        name, number = next(iter(scores.items()))
        return protocol, name, number


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run, and what it computes with."""
    model: object
    about: dict                 # model, weights (a fingerprint), dtype, mode, version, torch
    files: dict                 # {name: sha256} of the weights, the configuration and the tokenizer


# ---- flags -----------------------------------------------------------------------------------------------

def add_common_arguments(parser):
    """Flags of every benchmark that runs a model."""
    add = parser.add_argument
    add("--model", default="harmon-tiny", help="harmon-tiny, a folder, an official .pth, or a hub id")
    add("--vae", type=file_path, help="the VAE's file, if the model's holds none (kl16.ckpt)")
    add("--tokenizer", type=file_path, help="a tokenizer.json or its folder, if the model has none beside it")
    add("--size", metavar="HxW", help="pixels, as 512 or 512x768; default: the native size")
    add("--device", help="cuda, cpu, mps, …; default: cuda if there is one")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 for small models on a CPU")
    add("--mode", choices=MODES, default="auto", help="packed (x86), compiled, eager; auto: the fastest")
    add("--out", type=file_path, help="folder of the results; default: results/MODEL/BENCHMARK")
    add("--batch-size", type=int, default=8, help="pictures or questions at once; default: 8")
    add("--limit", type=int, metavar="N", help="only the first N; the score is marked as a part's")
    add("--overwrite", action="store_true", help="make anew what is in --out already")


def add_drawing_arguments(parser):
    """Flags of the benchmarks that draw: the seed, and fields of Sampling."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="default: 0")
    add("--num-iter", "--steps", type=int, help="steps K; default: 64, at most a quarter of the tokens")
    add("--cfg", type=float, help="classifier-free guidance, 1 = off; default: 3")
    add("--cfg-schedule", help="constant (default), or linear: from 1 to --cfg")
    add("--temperature", type=float, default=1.0, help="factor on the diffusion noise; default: 1")
    add("--solver", default="ancestral", help="of the head: ancestral (default), ddim or dpm++")
    add("--num-sampling-steps", type=int, help="diffusion steps S a token; default: the model's, 100")


def add_answering_arguments(parser):
    """Flags of the benchmarks that answer."""
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="of an answer; default: 1024")


def check_common(args):
    """Raise ValueError for numbers outside their ranges."""
    for name in ("batch_size", "limit", "max_new_tokens"):
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if getattr(args, "max_new_tokens", 1) >= CONTEXT_LENGTH:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; with the question there is room for "
                         f"{CONTEXT_LENGTH}")


def data_files(module, args) -> list:
    """The files of a benchmark's data: those that its module names, else that of --data, if it has one."""
    if hasattr(module, "files"):
        return module.files(args)
    return [data for data in [getattr(args, "data", None)] if data is not None]


def default_folder(args, name) -> Path:
    """Where results go without --out: results/MODEL/BENCHMARK."""
    return Path("results") / Path(args.model).name.removesuffix(".pth") / name


# ---- the model -------------------------------------------------------------------------------------------

def load(args) -> Loaded:
    """The model of the flags, whose pictures are the same bytes in any batch on a CPU. It is kept in
    args.loaded, and taken from there if it is there. Raises ValueError or OSError.
    """
    if getattr(args, "loaded", None) is None:
        device = choose_device(args.device)
        dtype = DTYPES[args.dtype] if args.dtype != "auto" else choose_dtype(args.model, device)
        # Only process 0 writes the digests, and those of large files take long.
        is_first = rank_and_world_size()[0] == 0
        files = weight_files(args.model, args.vae, args.tokenizer) if is_first else {}
        model = Harmon.from_pretrained(
            args.model, vae=args.vae, tokenizer=args.tokenizer, device=device, dtype=dtype)
        about = about_model(model, args.model, args.mode)   # before accelerate packs the weights
        args.loaded = Loaded(make_repeatable(accelerate(model, args.mode)), about, files)
    return args.loaded


# ---- show ------------------------------------------------------------------------------------------------

def show(name, result):
    """Print a Result as Markdown: a table for each protocol, the counts, the notes."""
    print(f"\n## {name}")
    for protocol, scores in result.scores.items():
        cells = " | ".join(map(number, scores.values()))
        print(f"\n{protocol}:\n\n| {' | '.join(scores)} |\n|{'---|' * len(scores)}\n| {cells} |")
    if result.counts:
        print(f"\n{', '.join(f'{what}: {count}' for what, count in result.counts.items())}")
    for note in result.notes:
        print(f"\nNote: {note}")


def number(value) -> str:
    """A score for people: four places below 2, else two. Counts stay whole."""
    if isinstance(value, int) or not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 2 else f"{value:.2f}"
