"""Pictures by class of the shapes world, from MAR alone: does the picture show its class?

    python -m harmonkit.evals classes                       # each class once, with and without guidance
    python -m harmonkit.evals classes --cfg 1 2 4 --steps 64 --count 4
    python -m harmonkit.evals classes --out sheets          # also a contact sheet for each guidance

Counted are the classes whose color and shape occur together in training: 120 of 150.
"""
import time
from pathlib import Path

from harmonkit import mar_files
from harmonkit.evals.world_scores import draw
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import find
from mar import Sampling

LABELS = [label for label in range(world.LABELS) if world.combination(label) not in world.HELD_OUT]


def correct(image, label) -> bool:
    """Whether an image shows the things that a label tells, and no others. Of a pair it tells the first."""
    told, group = world.combination(label), label // len(world.SHAPES) // len(world.COLORS)
    things = find(image)
    if group < 4:
        return [(thing.color, thing.shape) for thing in things] == [told] * (group + 1)
    if len(things) != 2 or "?" in (things[0].shape, things[1].shape):
        return False
    first, second = things if world.relation(*things) in ("left", "above") else things[::-1]
    others = first.color != second.color and first.shape != second.shape
    return (first.color, first.shape) == told and others


def score(model, count, batch, seed=0, sheet=None, **sampling) -> float:
    """Share of right pictures, `count` of each of LABELS. sheet: a PNG to write, of each class once."""
    labels = LABELS * count
    images = draw(model, labels, batch, seed, **sampling)
    verdicts = list(map(correct, images, labels))
    if sheet:
        names = world.class_names()
        pictures = [(images[i], names[labels[i]], verdicts[i]) for i in range(len(LABELS))]
        world.contact_sheet(pictures, columns=12).save(sheet)
    return sum(verdicts) / len(verdicts)


def add_arguments(parser):
    parser.add_argument("--model", default="harmon-tiny", help="harmon-tiny, or a MAR folder of 150 classes")
    parser.add_argument("--vae", help="the VAE's file, if the model's holds none")
    parser.add_argument("--steps", type=int, help="generation steps K; default: one a token")
    parser.add_argument("--cfg", type=float, nargs="+", help="guidance; default: 1 and the model's")
    parser.add_argument("--cfg-schedule", default="linear", help="linear (default) or constant")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--num-sampling-steps", type=int, help="of the diffusion head (default: the model's)")
    parser.add_argument("--count", type=int, default=1, help="pictures of each class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a folder for a contact sheet of each guidance")


def run(args):
    """Print the share of right pictures. Raises ValueError for values outside their ranges."""
    for name in ("count", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    model = mar_files.load(args.model, vae=args.vae)
    if model.config.mar.class_num != world.LABELS:
        raise ValueError(f"{args.model}: {model.config.mar.class_num} classes; the shapes world has "
                         f"{world.LABELS}")
    own = mar_files.defaults(model.config)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    print("| guidance | K | right | time |\n|---|---|---|---|")
    for cfg in args.cfg or (1.0, own["cfg"]):
        settings = dict(num_iter=own["num_iter"] if args.steps is None else args.steps, cfg=cfg,
                        cfg_schedule=args.cfg_schedule, temperature=args.temperature,
                        num_sampling_steps=args.num_sampling_steps)
        Sampling(**settings)                                                # raises ValueError
        began = time.time()
        sheet = args.out / f"classes-{cfg:g}.png" if args.out else None
        share = score(model, args.count, args.batch, args.seed, sheet, **settings)
        seconds = time.time() - began
        drawn = len(LABELS) * args.count
        print(f"| {cfg:g} | {settings['num_iter']} | {share:.3f} of {drawn} | {seconds:.0f} s |", flush=True)
