"""Reconstruction in the shapes world: what does a model keep of a picture that it looks at and draws anew?

    python -m harmonkit.evals reconstruction --out out/reconstruction      # 60 held-out scenes at 16 steps

A row is the share of pictures in which the judge finds the same as in the original: the colors, how many
things, the shapes, their places (half a lattice step is allowed), and all of it thing by thing; the last
three columns give the share of "all" by kind of scene: one thing, two, several alike. The rows:

    looking         drawn like the picture, with the request of reconstruction alignment
    from words      drawn from the full description of the scene, without the picture
    VAE alone       encoded and decoded, which nothing that is drawn can exceed
"""
import json
import time
from pathlib import Path

import torch
from tqdm import tqdm

from harmon import Harmon
from harmonkit.evals.world_scores import draw, rendered
from harmonkit.images import pixels_to_images
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import find
from mar import Sampling

ASPECTS = ("color", "number", "shape", "place", "all")
KINDS = ("single", "pair", "count")
TABLE = f"| | {' | '.join(ASPECTS + KINDS)} | time |\n|---|{'---|' * (len(ASPECTS + KINDS) + 1)}"


def equal_aspects(image, original) -> dict:
    """{aspect: whether the judge finds it equal in two pictures}, in the order of ASPECTS.

    color and shape: the same ones occur. place: each thing of either picture has one at its place in the
    other. all: it also has its color and its shape.
    """
    found, wanted = find(image), find(original)

    def near(a, b):
        return max(abs(a.x - b.x), abs(a.y - b.y)) <= world.LATTICE / 2

    def alike(a, b):
        return near(a, b) and (a.color, a.shape) == (b.color, b.shape)

    def paired(are_equal):
        # The original's things are farther apart than `near` reaches, so none can take another's partner.
        return len(found) == len(wanted) and all(any(are_equal(a, b) for a in found) for b in wanted)
    return {"color": {thing.color for thing in found} == {thing.color for thing in wanted},
            "number": len(found) == len(wanted),
            "shape": {thing.shape for thing in found} == {thing.shape for thing in wanted},
            "place": paired(near), "all": paired(alike)}


def look(model, pictures, batch, seed=0, **sampling) -> list:
    """Each picture drawn anew, `batch` at a time; picture i has seed + i. sampling: fields of Sampling."""
    drawn = []
    for start in tqdm(range(0, len(pictures), batch), desc="looking", disable=None, leave=False):
        drawn += model.generate_image(like=pictures[start:start + batch], seed=seed + start, **sampling)
    return drawn


@torch.no_grad()
def through_the_vae(model, scenes) -> list:
    pixels = torch.cat([rendered(scene) for scene in scenes])
    return pixels_to_images(model.decode(model.encode(pixels)))


def shares(verdicts, scenes) -> dict:
    """The share of each aspect, and that of "all" for each kind of scene that occurs."""
    columns = {aspect: [verdict[aspect] for verdict in verdicts] for aspect in ASPECTS}
    for kind in KINDS:
        of_kind = [v["all"] for v, scene in zip(verdicts, scenes, strict=True) if scene.kind == kind]
        columns |= {kind: of_kind} if of_kind else {}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def contact_sheet(originals, drawn, verdicts):
    """Each original with what is drawn like it at its right, which has a red frame where all is not equal."""
    pictures = []
    for original, image, verdict in zip(originals, drawn, verdicts, strict=True):
        lost = [aspect for aspect in ASPECTS[:-1] if not verdict[aspect]]
        said = f"differs in {', '.join(lost) or 'its pairs'}"
        pictures.append((original, "original", True))
        pictures.append((image, "equal" if verdict["all"] else said, verdict["all"]))
    return world.contact_sheet(pictures)


# ---- the command -------------------------------------------------------------------------------------------

def add_arguments(parser):
    parser.add_argument("--model", default="harmon-tiny")
    parser.add_argument("--scenes", type=int, default=60, help="scenes with a held-out combination")
    parser.add_argument("--steps", type=int, default=16, help="generation steps K")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a folder for reconstruction.json, and a sheet for each row")


def run(args):
    """Print the settings and the table. Raises ValueError for values outside their ranges."""
    for name in ("scenes", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    sampling = {"num_iter": args.steps, "cfg": args.cfg, "temperature": args.temperature}
    Sampling(**sampling)                                                    # raises ValueError
    model = Harmon.from_pretrained(args.model)
    scenes = [world.scene("evaluate/reconstruction", i, held_out=True) for i in range(args.scenes)]
    originals = [world.render(scene) for scene in scenes]
    captions = [world.describe(scene) for scene in scenes]
    rows = {
        "looking": lambda: look(model, originals, args.batch, args.seed, **sampling),
        "from words": lambda: draw(model, captions, args.batch, args.seed, "from words", **sampling),
        "VAE alone": lambda: through_the_vae(model, scenes),
    }
    results = {"settings": {name: str(value) for name, value in vars(args).items()}}
    print(f"{args.scenes} held-out scenes, {args.steps} steps, CFG {args.cfg:g}, temperature "
          f"{args.temperature:g}, seed {args.seed}\n\n{TABLE}")
    for name, make in rows.items():
        began = time.time()
        drawn = make()
        seconds = time.time() - began
        verdicts = [equal_aspects(image, original) for image, original in zip(drawn, originals, strict=True)]
        scores = results[name] = shares(verdicts, scenes)
        cells = [f"{scores[column]:.3f}" if column in scores else "–" for column in ASPECTS + KINDS]
        print(f"| {name} | {' | '.join(cells)} | {seconds:.0f} s |", flush=True)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            contact_sheet(originals, drawn, verdicts).save(args.out / f"{name.replace(' ', '-').lower()}.png")
    if args.out:
        (args.out / "reconstruction.json").write_text(json.dumps(results, indent=2) + "\n")
