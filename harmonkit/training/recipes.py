"""The recipes of train.py: which parts of the model train on which tasks, how fast and for how long.

A recipe is an entry of RECIPES. Each field is also a flag of train.py.
"""
import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import PurePath

from harmonkit.config import HARMON_SIZES, HarmonConfig
from harmonkit.pipeline import CONTEXT_LENGTH
from harmonkit.training.optim import PARTS


@dataclass(frozen=True)
class TinyRecipe:
    """Settings of harmon-tiny and its shapes world. With the defaults a recipe follows the paper."""
    scenes: int = 40_000          # of the shapes world, the data where there is no mixture
    kl: float = 1e-2              # weight of the KL divergence in the VAE's loss
    free_nats: float = 1.3        # KL below this is free per channel; else two channels hold everything
    local: float = 0.05           # weight of `losses.locality` in the VAE's loss
    all_hidden: float = 0.0       # fraction of drawing micro-batches with all tokens hidden
    cosine_mask: bool = False     # masking ratios cos(π/2 · u), the sampler's, instead of [0.7, 1]
    muon: bool = False            # Muon instead of AdamW for the matrices of the transformer blocks


@dataclass(frozen=True)
class Recipe:
    ratio: dict                   # task -> its part of the samples
    lr: dict                      # part of the model -> peak learning rate; other parts are frozen
    steps: int
    batch: int                    # samples a step: processes × micro-batch × accumulation
    micro_batch: int = 8          # samples in a forward pass, all of one source
    size: int = 256               # side of the images, pixels
    after: str = ""               # the recipe whose EMA weights it starts from
    from_scratch: str = ""        # sizes of the random model it starts from; "": trained weights
    warmup: float = 0.01          # fraction of the steps; a cosine to 0 follows
    weight_decay: float = 0.02    # 0 on 1-D parameters and on the diffusion head
    clip: float = 1.0             # largest norm of the gradient; inf: no clipping
    ema: float = 0.9999           # decay of the averaged weights, which are exported
    max_length: int = 1024        # text tokens of a sample
    bf16: bool = True             # bfloat16 autocast over float32 weights
    checkpointing: bool = True    # recompute activations in the backward pass: less memory, more time
    compile: bool = False         # torch.compile the blocks
    seed: int = 0
    save_every: int = 1000        # steps
    sample_every: int = 1000      # steps; 0: never
    grad_scale: float = 0.1       # of the gradient into z_enc where an image is only looked at
    tiny: TinyRecipe = TinyRecipe()


# ---- the table ---------------------------------------------------------------------------------------------

# Table 1 of the paper, 2503.21979.
STAGE_1 = {"mar-decoder": 1e-4, "mar-encoder": 1e-5}
STAGE_3 = {"mar-decoder": 2e-5, "mar-encoder": 2e-6, "llm": 2e-6}
PAPER = Recipe(ratio={}, lr=STAGE_3, steps=50_000, batch=4096)
PAPER_512 = replace(PAPER, size=512, micro_batch=4)

ALL_TINY = {"mar-decoder": 7e-4, "mar-encoder": 7e-4, "llm": 7e-4}
TINY = Recipe(ratio={}, lr=ALL_TINY, steps=0, batch=48, micro_batch=24, size=64, from_scratch="harmon-tiny",
              warmup=0.05, ema=0.998, checkpointing=False, save_every=200, sample_every=0,
              tiny=TinyRecipe(cosine_mask=True, muon=True))
TINY_PART = replace(TINY, batch=32, micro_batch=32)

RECIPES = {
    "stage1": replace(PAPER, ratio={"image2text": 1, "text2image": 2}, lr=STAGE_1),
    "stage2": replace(PAPER, ratio={"text": 1, "image2text": 3, "text2image": 8}, lr=STAGE_1 | {"llm": 1e-5},
                      after="stage1"),
    "stage3": replace(PAPER_512, ratio={"text": 1, "image2text": 3, "text2image": 16}, batch=1024,
                      after="stage2"),
    "finetune": replace(PAPER_512, ratio={"text2image": 1}, batch=128, steps=2000, ema=0.999),
    "reca": replace(PAPER_512, ratio={"reca": 1, "image2text": 1}, batch=512, steps=3000, ema=0.999,
                    lr={"mar-decoder": 1e-5, "mar-encoder": 1e-6, "llm": 1e-6}),

    "tiny-llm": replace(TINY_PART, ratio={"text": 1}, lr={"llm": 1e-3}, steps=800),
    "tiny-vae": replace(TINY, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=3300, batch=16,
                        micro_batch=16, compile=True, after="tiny-llm"),
    "tiny-mar": replace(TINY_PART, ratio={"mar": 1}, lr={"mar-decoder": 1e-3, "mar-encoder": 1e-3},
                        steps=1500, after="tiny-vae"),
    "tiny-align": replace(TINY, ratio={"text2image": 2, "image2text": 1}, steps=200, micro_batch=16,
                          lr={"mar-decoder": 7e-4, "mar-encoder": 7e-4}, after="tiny-mar"),
    "tiny-joint": replace(TINY, ratio={"text2image": 10, "image2text": 2, "text": 4}, steps=25_000,
                          warmup=0.02, grad_scale=0.3, tiny=replace(TINY.tiny, all_hidden=0.25),
                          after="tiny-align"),
    "tiny-reca": replace(TINY, ratio={"reca": 2, "image2text": 1}, lr=dict.fromkeys(ALL_TINY, 2e-4),
                         steps=800, warmup=0.02, grad_scale=0.3, tiny=replace(TINY.tiny, all_hidden=0.2),
                         after="tiny-joint"),
}
CHAINS = {"tiny": ("tiny-llm", "tiny-vae", "tiny-mar", "tiny-align", "tiny-joint", "tiny-reca")}
TRAINED_BY = {                    # task -> the parts of the model that its loss depends on
    "text": {"llm"}, "image2text": {"llm", "mar-encoder"},
    "text2image": {"llm", "mar-encoder", "mar-decoder"}, "reca": {"llm", "mar-encoder", "mar-decoder"},
    "mar": {"mar-encoder", "mar-decoder"}, "reconstruct": {"vae"},
}
FIELDS = [field for field in fields(Recipe) if field.name != "tiny"] + list(fields(TinyRecipe))


# ---- ranges ------------------------------------------------------------------------------------------------

MOST = 10 ** 9


def whole(low, high=MOST):
    def is_inside(value):
        return type(value) is int and low <= value <= high
    return is_inside, f"a whole number from {low} to {high}"


def number(words, is_inside):
    def is_number(value):
        return type(value) in (int, float) and is_inside(value)             # nan is in no range
    return is_number, f"a number {words}"


ABOVE_0 = number("above 0, up to 1e9", lambda x: 0 < x <= MOST)
FROM_0 = number("from 0 to 1e9", lambda x: 0 <= x <= MOST)
FRACTION = number("from 0 to 1", lambda x: 0 <= x <= 1)
BELOW_1 = number("from 0 to below 1", lambda x: 0 <= x < 1)
ABOVE_0_OR_INF = number("above 0; inf is no clipping", lambda x: x > 0)
TRUE_OR_FALSE = (lambda value: type(value) is bool), "true or false"


def named(known):
    """{name: number}, the names among `known`."""
    def is_inside(value):
        is_named = isinstance(value, dict) and bool(value) and set(value) <= set(known)
        return is_named and all(map(ABOVE_0[0], value.values()))
    return is_inside, f"NAME=X,… with names of {', '.join(known)} and numbers above 0, up to 1e9"


def is_run(name) -> bool:
    """Whether `name` can be that of a run: a path below --runs, or ""."""
    path = PurePath(name) if isinstance(name, str) else PurePath("/")
    return "\0" not in str(path) and not path.is_absolute() and ".." not in path.parts


RANGES = {                        # field -> (whether a value is inside, the range in words)
    "ratio": named(TRAINED_BY), "lr": named(PARTS),
    "steps": whole(1), "batch": whole(1), "micro_batch": whole(1), "size": whole(1, 8192),
    "after": (is_run, "the name of a run, a folder in --runs"),
    "from_scratch": (("", *HARMON_SIZES).__contains__, f"one of {', '.join(HARMON_SIZES)}"),
    "warmup": FRACTION, "weight_decay": FROM_0, "clip": ABOVE_0_OR_INF, "ema": BELOW_1,
    "max_length": whole(1, CONTEXT_LENGTH), "bf16": TRUE_OR_FALSE, "checkpointing": TRUE_OR_FALSE,
    "compile": TRUE_OR_FALSE, "seed": whole(0, 2 ** 62), "save_every": whole(1),
    "sample_every": whole(0), "grad_scale": FROM_0,
    "scenes": whole(1), "kl": FROM_0, "free_nats": FROM_0, "local": FROM_0, "all_hidden": FRACTION,
    "cosine_mask": TRUE_OR_FALSE, "muon": TRUE_OR_FALSE,
}


def check(recipe):
    """Raise ValueError that names the flag of the first field outside its range."""
    for name, value in settings(recipe).items():
        is_inside, words = RANGES[name]
        if not is_inside(value):
            raise ValueError(f"{flag_of(name)} is {as_text(value) or 'empty'}; expected {words}")


def check_size(recipe, config):
    """Raise ValueError unless a model of this HarmonConfig has a grid for images of the recipe's size."""
    if recipe.size % config.vae.stride:
        raise ValueError(f"--size is {recipe.size}; expected a multiple of {config.vae.stride}, the VAE's "
                         "stride")


def flag_of(field) -> str:
    return f"--{field.replace('_', '-')}"


def as_text(value) -> str:
    """A flag's value as it is written."""
    if isinstance(value, dict):
        return ",".join(f"{name}={number!r}" for name, number in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- reading and changing recipes --------------------------------------------------------------------------

def settings(recipe) -> dict:
    """The values of all FIELDS in one dictionary."""
    values = asdict(recipe)
    return values | values.pop("tiny")


def change(recipe, **values) -> Recipe:
    """`dataclasses.replace`, which reaches the fields of TinyRecipe too."""
    tiny = {field.name: values.pop(field.name) for field in fields(TinyRecipe) if field.name in values}
    return replace(recipe, tiny=replace(recipe.tiny, **tiny), **values)


def accumulation(recipe, world_size: int) -> int:
    """Micro-batches of one process in a step. Raises ValueError where the batch cannot be divided so."""
    share = recipe.micro_batch * world_size
    if recipe.batch % share:
        raise ValueError(
            f"a batch of {recipe.batch} is no multiple of {world_size} processes × a micro-batch of "
            f"{recipe.micro_batch}; --batch {max(1, round(recipe.batch / share)) * share} is")
    return recipe.batch // share


def add_flags(parser):
    """A flag for each of FIELDS."""
    parse = {bool: true_or_false, dict: named_numbers}
    metavar = {bool: "true|false", dict: "NAME=X,…"}
    for field in FIELDS:
        parser.add_argument(flag_of(field.name), help="override the recipe's value",
                            type=parse.get(field.type, field.type),
                            metavar=metavar.get(field.type, field.type.__name__))


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def named_numbers(text):
    """"a=1,b=2" -> {"a": 1.0, "b": 2.0}"""
    numbers = {}
    for pair in text.split(","):
        name, equals, number = pair.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not name or not equals or value is None:
            raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=NUMBER")
        if name in numbers:
            raise argparse.ArgumentTypeError(f"{name} is given twice, as {numbers[name]:g} and {value:g}")
        numbers[name] = value
    return numbers


def override(name, recipe, args) -> Recipe:
    """The recipe called `name` with the values of the flags. Raises ValueError for impossible ones."""
    flags = {field.name: getattr(args, field.name) for field in FIELDS}
    recipe = change(recipe, **{key: value for key, value in flags.items() if value is not None})
    if args.only:
        if args.only not in recipe.lr:
            raise ValueError(f"--only {args.only}: {name} trains {', '.join(recipe.lr)}")
        recipe = replace(recipe, lr={args.only: recipe.lr[args.only]})
    check(recipe)
    if recipe.from_scratch and not args.init and not args.config:
        check_size(recipe, HarmonConfig.from_name(recipe.from_scratch))
    # A task that uses frozen parts only has no gradient.
    ratio = {task: part for task, part in recipe.ratio.items() if TRAINED_BY[task] & set(recipe.lr)}
    if not ratio:
        raise ValueError(f"--ratio: no task of it trains {', '.join(recipe.lr)}")
    return replace(recipe, ratio=ratio)
