"""Mini-GenEval on the shapes world: does the picture show the prompt, does the answer tell the picture?

    python -m harmonkit.evals shapes                        # 520 prompts at 16 steps, questions, VAE
    python -m harmonkit.evals shapes --steps 4 8 16 32 64     # the paper's Table S2 in small
    python -m harmonkit.evals shapes --judge                  # is the judge right about rendered scenes?
    python -m harmonkit.evals shapes --ceiling --steps 8 16   # the scores of a perfect model
    python -m harmonkit.evals shapes --layouts                # do places that a prompt leaves open vary?
    python -m harmonkit.evals shapes --losses                 # head loss by masking ratio

"seen" prompts name combinations of color and shape that occur in training, "held-out" prompts one that does
not. The first two categories name no colors, so they have no held-out half. With --out the pictures are kept,
and a run that was killed goes on. Also with torchrun.
"""
import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from diffusion_head import SOLVERS
from harmon import Harmon
from harmonkit.devices import DTYPES, rank_and_world_size
from harmonkit.evals import pictures
from harmonkit.evals.benchmark import Result
from harmonkit.evals.world_scores import (
    items_of,
    layouts,
    masked_losses,
    mean,
    question_scores,
    reconstruction_psnr,
    shares,
    verdicts,
)
from harmonkit.fast import MODES
from harmonkit.images import open_image
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import CATEGORIES, ceiling, judge_the_judge
from mar import Sampling

PSNR_SCENES = 500
TABLE = f"| K, split | {' | '.join(CATEGORIES)} | overall | time |\n|---|{'---|' * (len(CATEGORIES) + 2)}"


# ---- a drawing benchmark, see pictures.py ----------------------------------------------------------------

PER_PROMPT = 1
SEED_STRIDE = 1
SPLITS = ("seen", "held-out")


def read(args) -> list:
    return [*items_of("seen", args.prompts), *items_of("held-out", args.prompts * 2 // 3)]


def seed_number(number, item) -> int:
    """The seeds of each split begin with the first one."""
    return item.fields["i"]


def picture(number, item, sample) -> str:
    return f"{item.name}.png"


def score(out, items, args) -> Result:
    """The shares of right pictures by split. args.others: scores of the same model that stand beside them."""
    scores = {}
    for split in SPLITS:
        part = [item for item in items if item.fields["split"] == split]
        categories = shares(part, verdicts(part, images_of(out, part)))
        scores[split] = {"overall": mean(categories)} | categories
    return Result(scores | args.others, {"pictures": len(items)})


def images_of(out, items) -> list:
    return [open_image(out / picture(number, item, 0)) for number, item in enumerate(items)]


# ---- the command -------------------------------------------------------------------------------------------

def add_arguments(parser):
    parser.add_argument("--model", default="harmon-tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[16], help="numbers K of generation steps")
    parser.add_argument("--prompts", type=int, default=60, help="seen ones a category; held-out: two thirds")
    parser.add_argument("--questions", type=int, default=120, help="scenes that are asked about")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--solver", choices=SOLVERS, default="ancestral", help="of the diffusion head")
    parser.add_argument("--num-sampling-steps", type=int, help="of the diffusion head (default: the model's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture of a split")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto")
    parser.add_argument("--mode", choices=MODES, default="auto", help="fast paths, as of sample.py")
    parser.add_argument("--out", type=Path, help="a folder for pictures, scores.json and contact sheets")
    parser.add_argument("--overwrite", action="store_true", help="draw anew what is in --out already")
    parser.add_argument("--judge", action="store_true", help="test the judge instead")
    parser.add_argument("--ceiling", action="store_true", help="print the scores of a perfect model instead")
    parser.add_argument("--losses", action="store_true", help="print head losses by masking ratio instead")
    parser.add_argument("--layouts", action="store_true", help="print how many pairs are stacked instead")


def run(args):
    """Print the tables that the arguments ask for. Raises ValueError for values outside their ranges."""
    for name, least in (("prompts", 2), ("questions", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least {least}")
    settings = {name: getattr(args, name) for name in ("cfg", "temperature", "solver", "num_sampling_steps")}
    Sampling(min(args.steps), **settings)                                   # raises ValueError
    if args.judge:
        accepted, rejected, right, wrong = judge_the_judge()
        print(f"rendered truth accepted: {accepted:.4f} of {right}; "
              f"wrong pictures rejected: {rejected:.4f} of {wrong}")
    elif args.ceiling:
        print(TABLE)
        for num_iter in args.steps:
            print(table_row(f"{num_iter}, perfect", ceiling(num_iter, args.prompts)))
    elif args.losses:
        print("| masked | with caption | without |\n|---|---|---|")
        model = Harmon.from_pretrained(args.model)
        for ratio, with_caption, without in masked_losses(model, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1), 100):
            print(f"| {ratio:.1f} | {with_caption:.4f} | {without:.4f} |")
    elif args.layouts:
        model = Harmon.from_pretrained(args.model)
        pairs, stacked = layouts(model, args.prompts, args.batch, num_iter=args.steps[0], **settings)
        found = f"{pairs} pairs found, {stacked} of them one above the other"
        print(f"{args.prompts} prompts that leave places open: {found}")
    elif args.out is not None:
        print_scores(args, args.out)
    elif rank_and_world_size()[1] > 1:
        raise ValueError("several processes share the pictures; give a folder for them, --out FOLDER")
    else:
        with TemporaryDirectory() as folder:
            print_scores(args, Path(folder))


def print_scores(args, folder):
    """All scores; in the folder pictures, contact sheets and scores.json, for several --steps in a folder of
    each.
    """
    is_first = rank_and_world_size()[0] == 0
    if is_first:
        print(TABLE)
    jobs = []
    for num_iter in args.steps:
        out = folder if len(args.steps) == 1 else folder / f"steps-{num_iter}"
        jobs.append(pictures.begin("shapes", sys.modules[__name__], runner_arguments(args, num_iter), out))
        args.loaded = jobs[-1].loaded
        for split in SPLITS:
            numbers = [n for n, item in enumerate(jobs[-1].items) if item.fields["split"] == split]
            began = time.time()
            pictures.draw(jobs[-1], [jobs[-1].sheets[n] for n in numbers])
            seconds = time.time() - began
            if is_first:
                print_split(jobs[-1], [jobs[-1].items[n] for n in numbers], seconds, folder)
    if not is_first:
        return
    model = args.loaded.model
    answered, asked = question_scores(model, args.questions)
    print(f"\nquestions ({asked}): {', '.join(f'{name} {share:.3f}' for name, share in answered.items())}")
    psnr = reconstruction_psnr(model, PSNR_SCENES)
    print(f"VAE reconstruction ({PSNR_SCENES} scenes): {psnr:.2f} dB")
    for job in jobs:
        job.args.others = {"questions": answered, "VAE": {"PSNR": psnr}}
        pictures.finish(job)


def scorer(args):
    return {"questions": args.questions}


def runner_arguments(args, num_iter):
    """The arguments as pictures.py expects them, for one number of steps."""
    fixed = {"size": None, "vae": None, "tokenizer": None, "limit": None, "cfg_schedule": None, "others": {}}
    return argparse.Namespace(**vars(args) | fixed | {"num_iter": num_iter, "batch_size": args.batch})


def print_split(job, items, seconds, folder):
    """A row of TABLE; in the folder a contact sheet of the first 16 pictures of each category."""
    images = images_of(job.out, items)
    right = verdicts(items, images)
    shown = [(image, item.prompt, verdict) for image, item, verdict in zip(images, items, right, strict=True)
             if item.fields["i"] % job.args.prompts < 16]
    name = items[0].fields["split"]
    world.contact_sheet(shown).save(folder / f"{name}-{job.args.num_iter}.png")
    print(table_row(f"{job.args.num_iter}, {name}", shares(items, right), f"{seconds:.0f} s"), flush=True)


def table_row(name, scores, seconds="") -> str:
    cells = [f"{scores[category]:.3f}" if category in scores else "–" for category in CATEGORIES]
    return f"| {name} | {' | '.join(cells)} | {mean(scores):.3f} | {seconds} |"
