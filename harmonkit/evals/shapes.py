"""A mini-GenEval for the shapes world: does the picture show what the prompt says, does the answer say what the picture shows?

    python evaluate.py                                   # harmon-tiny, 520 prompts at 16 steps, questions, reconstruction
    python evaluate.py --steps 4 8 16 32 64              # the paper's Table S2 in small
    python evaluate.py --judge                           # is the judge itself right? on rendered truth and on wrong pictures
    python evaluate.py --ceiling --steps 8 16 32         # what a perfect model would reach: tokens of one step do not know of each other
    python evaluate.py --layouts                         # do places that a prompt leaves open vary?
    python evaluate.py --losses                          # head loss by the share of tokens that is masked, with and without the caption

The judge is exact pixel analysis (color, connected components, outline); no model is involved. "seen" prompts name combinations of color and
shape that training showed, "held-out" prompts one that it never did (GenEval's first two categories name no colors, so they have no held-out half).
"""
import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from harmonkit.shapes_world import world as shapes
from diffusion_head import SOLVERS
from harmon import GENERATE, UNCONDITIONAL, Harmon, mask_schedule
from harmonkit.images import image_to_pixels

CATEGORIES = ("one object", "two objects", "counting", "colors", "position", "attribution")
KIND = dict(zip(CATEGORIES, ("single", "pair", "count", "single", "pair", "pair")))
STYLE = dict(zip(CATEGORIES, ("plain", "plain", "color", "color", "color position", "color")))
MIN_CHROMA, MIN_AREA, MIN_IOU = 70, 20, 0.72   # of 255; pixels at 64×64; overlap with the ideal outline


# ---- the judge -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Found:
    color: str
    shape: str      # "?" when it looks like none
    x: float        # center of the bounding box, pixels
    y: float


def components(mask):
    """4-connected components of a bool array, each a tuple of row and column indices."""
    left, found = {tuple(p) for p in np.argwhere(mask)}, []
    while left:
        stack = [left.pop()]
        pixels = []
        while stack:
            y, x = stack.pop()
            pixels.append((y, x))
            for p in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if p in left:
                    left.remove(p)
                    stack.append(p)
        found.append(tuple(np.array(pixels).T))
    return found


def template(shape):
    image = Image.new("L", (256, 256))
    points = np.array(shapes.outline(shape, 0, 0, 1))
    low, high = points.min(0), points.max(0)
    ImageDraw.Draw(image).polygon([tuple(p) for p in (points - low) / (high - low) * 255], fill=255)
    return image


TEMPLATES = {shape: template(shape) for shape in shapes.SHAPES}


def outline_of(mask):
    """The shape whose outline, stretched to the mask's box, overlaps it best; "?" below MIN_IOU or for a box far from square."""
    h, w = mask.shape
    if not 0.6 < w / h < 1.67:
        return "?"
    iou = {}
    for shape, image in TEMPLATES.items():
        ideal = np.asarray(image.resize((w, h), Image.BOX)) > 127
        iou[shape] = (ideal & mask).sum() / (ideal | mask).sum()
    best = max(iou, key=iou.get)
    return best if iou[best] >= MIN_IOU else "?"


def find(image):
    """All things in a PIL image of the shapes world."""
    rgb = np.asarray(image.convert("RGB")).astype(np.float64)
    high, low = rgb.max(2), rgb.min(2)
    chroma = np.maximum(high - low, 1e-9)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(high == r, (g - b) / chroma % 6, np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)) * 60
    distance = np.stack([np.abs((hue - h + 180) % 360 - 180) for h in shapes.HUES.values()])
    nearest = distance.argmin(0)
    found = []
    for i, color in enumerate(shapes.COLORS):
        for ys, xs in components((nearest == i) & (chroma > MIN_CHROMA)):
            if len(ys) < MIN_AREA * image.width * image.height / shapes.SIZE ** 2:
                continue
            mask = np.zeros((ys.max() - ys.min() + 1, xs.max() - xs.min() + 1), dtype=bool)
            mask[ys - ys.min(), xs - xs.min()] = True
            found.append(Found(color, outline_of(mask), (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2))
    return found


def correct(image, scene, category):
    """Whether the picture shows what the category's caption says of the scene: those things, no others, and where it says so."""
    found = find(image)
    colored = "color" in STYLE[category]
    name = lambda t: (t.color, t.shape) if colored else t.shape  # noqa: E731
    if sorted(map(name, found)) != sorted(map(name, scene.things)):
        return False
    if category != "position":
        return True
    a, b = scene.things
    (first,), (second,) = ([f for f in found if name(f) == name(t)] for t in (a, b))
    return shapes.relation(first, second) == shapes.relation(a, b)


def prompts(count, held_out):
    """count prompts of each category: (category, scene that makes it true, caption)."""
    chosen = []
    for category in CATEGORIES:
        if held_out and "color" not in STYLE[category]:
            continue
        for i in range(count):
            rng = random.Random(f"{category}/{i}/{held_out}")
            scene = shapes.scene(f"evaluate/{category}", i, held_out=held_out, kind=KIND[category])
            chosen.append((category, scene, shapes.caption(scene, rng, style=STYLE[category])))
    return chosen


def judge_the_judge(count=500):
    """Share of right verdicts on rendered truth, and share of rejections of pictures that are wrong in one respect."""
    right = wrong = wrong_total = 0
    todo = [p for held_out in (False, True) for p in prompts(count // 5, held_out)]
    for category, scene, _ in tqdm(todo, desc="judge", disable=None, leave=False):
        right += correct(shapes.render(scene), scene, category)
        for other in spoiled(scene, category):
            wrong_total += 1
            wrong += not correct(shapes.render(other), scene, category)
    return right / len(todo), wrong / wrong_total, len(todo), wrong_total


def spoiled(scene, category):
    """The scene with one thing missing, another shape, and, where the caption tells, another color or the places swapped."""
    first, rest = scene.things[0], scene.things[1:]
    change = lambda **k: shapes.Scene(scene.kind, (shapes.Thing(**{**first.__dict__, **k}),) + rest, scene.background)  # noqa: E731
    used = {t.shape for t in scene.things}
    yield change(shape=next(s for s in shapes.SHAPES if s not in used))
    yield shapes.Scene(scene.kind, rest, scene.background)
    if "color" in STYLE[category]:
        color = next(c for c in shapes.COLORS if c not in {t.color for t in scene.things})
        yield change(color=color, rgb=shapes.shade(color, random.Random(0)))
    if category == "position":
        a, b = scene.things
        yield shapes.Scene(scene.kind, (shapes.Thing(a.color, a.shape, b.x, b.y, a.size, a.rgb), shapes.Thing(b.color, b.shape, a.x, a.y, b.size, b.rgb)), scene.background)


# ---- the ceiling -----------------------------------------------------------------------------------------------------

def allowed(scene, category, count, rng):
    """`count` scenes of the world that the category's caption of `scene` allows; with one shade a color and one background."""
    drawn = []
    while len(drawn) < count:
        spots = shapes.place(scene.kind, len(scene.things), rng)
        names = [(t.color, t.shape) for t in scene.things]
        if "color" not in STYLE[category]:
            colors = rng.sample(shapes.COLORS, len(names))
            names = [(c, s) for c, (_, s) in zip(colors, names)]
        things = tuple(shapes.Thing(c, s, *spot, shapes.shade(c, random.Random(0))) for (c, s), spot in zip(names, spots))
        if category != "position" or shapes.relation(*things) == shapes.relation(*scene.things):
            drawn.append(shapes.Scene(scene.kind, things, ((220,) * 3,) * 2))
    return drawn


def perfect_picture(patches, num_iter, rng):
    """Masked generation by one who knows the world: patches (n, N, …) of n equally likely pictures -> one picture's (N, …).

    Each token is drawn from its exact distribution given all that is visible, but independently of the others of its step, as MAR does.
    """
    n, N = patches.shape[:2]
    same = np.array([[hash(patch.tobytes()) for patch in picture] for picture in patches])         # (n, N)
    order, agree, chosen = rng.permutation(N), np.zeros(n, dtype=int), np.zeros(N, dtype=int)
    masked = mask_schedule(N, num_iter)
    for m, m_next in zip(masked, masked[1:]):
        new = order[N - m:N - m_next]
        chosen[new] = rng.choice(np.flatnonzero(agree == agree.max()), len(new))                   # pictures that fit what is visible, or nearly
        agree += (same[:, new] == same[chosen[new], new]).sum(1)
    return patches[chosen, np.arange(N)]


def ceiling(num_iter, count=20, candidates=200, stride=8):
    """{category: share correct} of a perfect model with num_iter steps, as tokens of one step are drawn independently."""
    verdicts, side = {}, shapes.SIZE // stride
    for i, (category, scene, _) in enumerate(tqdm(prompts(count, False), desc=f"perfect, {num_iter} steps", disable=None, leave=False)):
        drawn = allowed(scene, category, candidates, random.Random(i))
        pictures = {s: np.asarray(shapes.render(s, 2)) for s in set(drawn)}
        pixels = np.stack([pictures[s] for s in drawn]).reshape(-1, side, stride, side, stride, 3).swapaxes(2, 3)
        made = perfect_picture(pixels.reshape(len(drawn), side * side, stride, stride, 3), num_iter, np.random.default_rng(i))
        image = made.reshape(side, side, stride, stride, 3).swapaxes(1, 2).reshape(shapes.SIZE, shapes.SIZE, 3)
        verdicts.setdefault(category, []).append(correct(Image.fromarray(image), scene, category))
    return {c: sum(v) / len(v) for c, v in verdicts.items()}


# ---- the model -------------------------------------------------------------------------------------------------------

def generation_scores(model, split, count, seed, batch, sheet=None, **sampling):
    """{category: share correct} over count prompts each, and the seconds it took. sampling: see Harmon.sample. sheet: a PNG of the first pictures, wrong ones framed."""
    todo = prompts(count, split == "held-out")
    began, verdicts, pictures = time.time(), {}, []
    for start in tqdm(range(0, len(todo), batch), desc=f"{split}, {sampling['num_iter']} steps", disable=None, leave=False):
        part = todo[start:start + batch]
        images = model.generate_image([caption for _, _, caption in part], seed=[seed + start + i for i in range(len(part))], **sampling)
        for image, (category, scene, caption) in zip(images, part):
            verdicts.setdefault(category, []).append(correct(image, scene, category))
            pictures.append((image, caption, verdicts[category][-1]))
    if sheet:
        contact_sheet(pictures, count).save(sheet)
    return {c: sum(v) / len(v) for c, v in verdicts.items()}, time.time() - began


def layouts(model, count, batch, **sampling):
    """Whether places that a caption leaves open vary: (pictures of "attribution" in which two things are found, those of them with one thing above the other). In the world itself it is half of them."""
    captions = [caption for category, _, caption in prompts(count, False) if category == "attribution"]
    images = [image for i in range(0, count, batch) for image in model.generate_image(captions[i:i + batch], seed=list(range(i, min(i + batch, count))), **sampling)]
    pairs = [things for things in map(find, images) if len(things) == 2]
    return len(pairs), sum(abs(a.y - b.y) > abs(a.x - b.x) for a, b in pairs)


def contact_sheet(pictures, per_category, columns=8, scale=2):
    """Two rows of pictures a category, the caption beneath, a red frame around wrong ones."""
    shown = [p for i, p in enumerate(pictures) if i % per_category < 2 * columns]
    side = shapes.SIZE * scale
    sheet = Image.new("RGB", (columns * (side + 12), -(-len(shown) // columns) * (side + 40)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption, ok) in enumerate(shown):
        x, y = i % columns * (side + 12) + 6, i // columns * (side + 40) + 6
        if not ok:
            draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), fill="red")
        sheet.paste(image.resize((side, side), Image.NEAREST), (x, y))
        words = caption.split()
        half = len(words) // 2 if len(caption) > 22 else len(words)
        draw.text((x, y + side + 5), " ".join(words[:half]) + "\n" + " ".join(words[half:]), fill="black")
    return sheet


def question_scores(model, count):
    """{type: share answered exactly} over `count` scenes, every second one with a held-out combination; and by half; and how many questions."""
    verdicts, halves = {}, {"seen": [], "held-out": []}
    for i in tqdm(range(count), desc="questions", disable=None, leave=False):
        held_out = i % 2 == 1
        scene = shapes.scene("evaluate/questions", i, held_out=held_out)
        image, asked = shapes.render(scene), set()
        for kind, question, answer in shapes.questions(scene, random.Random(i)):
            if kind in asked:
                continue
            asked.add(kind)
            verdict = "".join(model.chat(question, image, max_new_tokens=24)).strip() == answer
            verdicts.setdefault(kind, []).append(verdict)
            halves["held-out" if held_out else "seen"].append(verdict)
    return {k: sum(v) / len(v) for k, v in (verdicts | halves).items() if v}, sum(map(len, verdicts.values()))


def rendered(scene):
    return image_to_pixels(shapes.render(scene), (shapes.SIZE, shapes.SIZE))


@torch.no_grad()
def reconstruction_psnr(model, count):
    """Mean PSNR in dB of decode(encode(x)) over `count` fresh scenes, peak 2 for pixels in [-1, 1]."""
    pixels = torch.cat([rendered(shapes.scene("evaluate/psnr", i)) for i in range(count)]).to(model.device)
    errors = [(model.decode(model.encode(part)).float().clamp(-1, 1) - part).square().mean(dim=(1, 2, 3)) for part in pixels.split(50)]
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def masked_losses(model, ratios, count):
    """[(ratio, loss with captions, loss without)] of the diffusion head on `count` fresh scenes; the same masks, t and noise for both."""
    scenes = [shapes.scene("evaluate/losses", i) for i in range(count)]
    latents = model.encode(torch.cat([rendered(s) for s in scenes]))
    B, h, w, _ = latents.shape
    with_caption = model.pad([model.prompt_ids(GENERATE.format(caption=shapes.describe(s))) for s in scenes])
    without = model.pad([model.prompt_ids(UNCONDITIONAL)] * count)
    rows = []
    for ratio in ratios:
        torch.manual_seed(0)
        mask, losses = model.draw_mask(B, h * w, ratio), []
        for ids, real in (with_caption, without):
            torch.manual_seed(1)
            losses.append(model.text2image_loss(None, ids.to(model.device), real.to(model.device), latents=latents, mask=mask).item())
        rows.append((ratio, *losses))
    return rows


def row(name, scores, seconds=None):
    cells = [f"{scores[c]:.3f}" if c in scores else "–" for c in CATEGORIES]
    return f"| {name} | {' | '.join(cells)} | {sum(scores.values()) / len(scores):.3f} | {'' if seconds is None else f'{seconds:.0f} s'} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="harmon-tiny")
    parser.add_argument("--steps", type=int, nargs="+", default=[16], help="numbers of generation steps K")
    parser.add_argument("--prompts", type=int, default=60, help="prompts a category; two thirds as many for each held-out category")
    parser.add_argument("--questions", type=int, default=120, help="scenes that are asked about")
    parser.add_argument("--cfg", type=float, default=3.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--solver", choices=SOLVERS, default="ancestral", help="of the diffusion head")
    parser.add_argument("--diffusion-steps", type=int, help="of the diffusion head (default: the model's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, help="write a contact sheet of each split and scores.json there")
    parser.add_argument("--judge", action="store_true", help="validate the judge instead")
    parser.add_argument("--ceiling", action="store_true", help="print what a perfect model would reach instead")
    parser.add_argument("--losses", action="store_true", help="print head losses by masking ratio instead")
    parser.add_argument("--layouts", action="store_true", help="print how pairs are laid out where the prompt does not say, instead")
    args = parser.parse_args()
    least = {"prompts": 2, "questions": 1, "batch": 1, "cfg": 0, "temperature": 0}                  # two thirds as many prompts are held-out ones
    wrong = [f"--{name} must be at least {n}" for name, n in least.items() if getattr(args, name) < n] + ["--steps must be at least 1"] * (min(args.steps) < 1)
    if wrong:
        parser.error("; ".join(wrong))
    if args.judge:
        right, rejected, n, m = judge_the_judge()
        print(f"rendered truth accepted: {right:.4f} of {n}; wrong pictures rejected: {rejected:.4f} of {m}")
        return
    if args.ceiling:
        print(f"| K, split | {' | '.join(CATEGORIES)} | overall | time |\n|---|{'---|' * (len(CATEGORIES) + 2)}")
        for steps in args.steps:
            print(row(f"{steps}, perfect", ceiling(steps, args.prompts)))
        return
    try:
        model = Harmon.from_pretrained(args.model)
        if args.losses:
            print("| masked | with caption | without |\n|---|---|---|")
            for values in masked_losses(model, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1), 100):
                print("| %.1f | %.4f | %.4f |" % values)
            return
        if args.layouts:
            pairs, vertical = layouts(model, args.prompts, args.batch, num_iter=args.steps[0], cfg=args.cfg, temperature=args.temperature,
                                      solver=args.solver, diffusion_steps=args.diffusion_steps)
            print(f"{args.prompts} prompts that leave places open: {pairs} pairs found, {vertical} of them one above the other")
            return
        results = {"settings": {k: str(v) for k, v in vars(args).items()}}
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
        print(f"| K, split | {' | '.join(CATEGORIES)} | overall | time |\n|---|{'---|' * (len(CATEGORIES) + 2)}")
        for steps in args.steps:
            for split, count in (("seen", args.prompts), ("held-out", args.prompts * 2 // 3)):
                sheet = args.out / f"{split}-{steps}.png" if args.out else None
                scores, seconds = generation_scores(model, split, count, args.seed, args.batch, sheet, num_iter=steps, cfg=args.cfg, temperature=args.temperature,
                                                    solver=args.solver, diffusion_steps=args.diffusion_steps)
                results[f"{split} {steps}"] = scores
                print(row(f"{steps}, {split}", scores, seconds), flush=True)
        scores, asked = question_scores(model, args.questions)
        print(f"\nquestions ({asked}): " + ", ".join(f"{k} {v:.3f}" for k, v in scores.items()))
        psnr = reconstruction_psnr(model, 500)
        print(f"VAE reconstruction (500 scenes): {psnr:.2f} dB")
        if args.out:
            (args.out / "scores.json").write_text(json.dumps(results | {"questions": scores, "psnr": psnr}, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
