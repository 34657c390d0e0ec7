"""Mini-GenEval on the shapes world: does the picture show the prompt, does the answer tell the picture?

    python -m harmonkit.evals shapes                        # 520 prompts at 16 steps, questions, VAE
    python -m harmonkit.evals shapes --steps 4 8 16 32 64     # the paper's Table S2 in small
    python -m harmonkit.evals shapes --judge                  # is the judge right about rendered scenes?
    python -m harmonkit.evals shapes --ceiling --steps 8 16   # the scores of a perfect model
    python -m harmonkit.evals shapes --layouts                # do places that a prompt leaves open vary?
    python -m harmonkit.evals shapes --losses                 # head loss by masking ratio

"seen" prompts name combinations of color and shape that occur in training, "held-out" prompts one that does
not. The first two categories name no colors, so they have no held-out half.
"""
import json
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

from diffusion_head import SOLVERS
from harmon import Harmon
from harmonkit.images import image_to_pixels
from harmonkit.pipeline import generation_prompts
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import CATEGORIES, ceiling, correct, find, judge_the_judge, prompts
from mar import Sampling, random_mask

TABLE = f"| K, split | {' | '.join(CATEGORIES)} | overall | time |\n|---|{'---|' * (len(CATEGORIES) + 2)}"


def draw(model, captions, batch, seed=0, desc="drawing", **sampling) -> list:
    """A PIL image for each caption, `batch` at a time; image i has seed + i. sampling: fields of Sampling."""
    images = []
    for start in tqdm(range(0, len(captions), batch), desc=desc, disable=None, leave=False):
        images += model.generate_image(captions[start:start + batch], seed=seed + start, **sampling)
    return images


def generation_scores(model, split, count, seed, batch, sheet=None, **sampling) -> tuple:
    """({category: share correct} over count prompts each, seconds). split: "seen" or "held-out".

    sheet: a PNG to write, with the first 16 pictures of each category.
    """
    began = time.time()
    categories, scenes, captions = zip(*prompts(count, split == "held-out"), strict=True)
    images = draw(model, captions, batch, seed, f"{split}, {sampling['num_iter']} steps", **sampling)
    verdicts = list(map(correct, images, scenes, categories))
    if sheet:
        pictures = list(zip(images, captions, verdicts, strict=True))
        world.contact_sheet([p for i, p in enumerate(pictures) if i % count < 16]).save(sheet)
    scores = {categories[i]: sum(verdicts[i:i + count]) / count for i in range(0, len(verdicts), count)}
    return scores, time.time() - began


def layouts(model, count, batch, **sampling) -> tuple:
    """For captions that leave places open: pictures that show two things, those with one above the other.

    In the world itself it is half of them.
    """
    captions = [caption for category, _, caption in prompts(count, False) if category == "attribution"]
    found = [find(image) for image in draw(model, captions, batch, **sampling)]
    pairs = [things for things in found if len(things) == 2]
    return len(pairs), sum(abs(a.y - b.y) > abs(a.x - b.x) for a, b in pairs)


def question_scores(model, count) -> tuple:
    """({type: share answered exactly}, number of questions) over count scenes, one question of each type.

    Every second scene has a held-out combination; the shares of both halves are given too.
    """
    verdicts, halves = {}, {}
    for i in tqdm(range(count), desc="questions", disable=None, leave=False):
        split = "held-out" if i % 2 else "seen"
        scene = world.scene("evaluate/questions", i, held_out=split == "held-out")
        image = world.render(scene)
        asked = {}
        for kind, question, answer in world.questions(scene, random.Random(i)):
            asked.setdefault(kind, (question, answer))
        for kind, (question, answer) in asked.items():
            right = "".join(model.chat(question, image, max_new_tokens=24)).strip() == answer
            verdicts.setdefault(kind, []).append(right)
            halves.setdefault(split, []).append(right)
    scores = {name: sum(v) / len(v) for name, v in (verdicts | halves).items()}
    return scores, sum(map(len, verdicts.values()))


def rendered(scene) -> torch.Tensor:
    """The scene as pixels (1, 3, SIZE, SIZE) in [-1, 1]."""
    return image_to_pixels(world.render(scene), (world.SIZE, world.SIZE))


@torch.no_grad()
def reconstruction_psnr(model, count) -> float:
    """Mean PSNR in dB of decode(encode(x)) over count fresh scenes; the peak is 2, pixels are in [-1, 1]."""
    pixels = torch.cat([rendered(world.scene("evaluate/psnr", i)) for i in range(count)])
    errors = []
    for part in pixels.to(model.device).split(50):
        decoded = model.decode(model.encode(part)).float().clamp(-1, 1)
        errors.append((decoded - part).square().mean(dim=(1, 2, 3)))
    return (10 * torch.log10(4 / torch.cat(errors))).mean().item()


@torch.no_grad()
def masked_losses(model, ratios, count) -> list:
    """[(ratio of masked tokens, head loss with captions, without), …] on count fresh scenes.

    The masks, t and noise of both losses are the same.
    """
    scenes = [world.scene("evaluate/losses", i) for i in range(count)]
    latents = model.encode(torch.cat([rendered(scene) for scene in scenes]))
    B, h, w, _ = latents.shape
    texts = generation_prompts(model, [world.describe(scene) for scene in scenes], cfg=0)   # with, without
    ids, attention_mask = (rows.to(model.device) for rows in texts)         # (2B, L)
    rows = []
    for ratio in ratios:
        torch.manual_seed(0)
        mask = random_mask(B, h * w, ratio, model.device)
        losses = []
        for half in (slice(0, B), slice(B, None)):
            torch.manual_seed(1)
            loss = model.text2image_loss(None, ids[half], attention_mask[half], latents=latents, mask=mask)
            losses.append(loss.item())
        rows.append((ratio, *losses))
    return rows


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--out", type=Path, help="a folder for scores.json and a contact sheet of each split")
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
        return
    if args.ceiling:
        print(TABLE)
        for num_iter in args.steps:
            print(table_row(f"{num_iter}, perfect", ceiling(num_iter, args.prompts)))
        return
    model = Harmon.from_pretrained(args.model)
    if args.losses:
        print("| masked | with caption | without |\n|---|---|---|")
        for ratio, with_caption, without in masked_losses(model, (1.0, 0.9, 0.7, 0.5, 0.3, 0.1), 100):
            print(f"| {ratio:.1f} | {with_caption:.4f} | {without:.4f} |")
    elif args.layouts:
        pairs, stacked = layouts(model, args.prompts, args.batch, num_iter=args.steps[0], **settings)
        found = f"{pairs} pairs found, {stacked} of them one above the other"
        print(f"{args.prompts} prompts that leave places open: {found}")
    else:
        print_scores(model, args, settings)


def print_scores(model, args, settings):
    """All scores; with --out also contact sheets and scores.json."""
    results = {"settings": {name: str(value) for name, value in vars(args).items()}}
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    print(TABLE)
    for num_iter in args.steps:
        for split, count in (("seen", args.prompts), ("held-out", args.prompts * 2 // 3)):
            sheet = args.out / f"{split}-{num_iter}.png" if args.out else None
            scores, seconds = generation_scores(
                model, split, count, args.seed, args.batch, sheet, num_iter=num_iter, **settings)
            results[f"{split} {num_iter}"] = scores
            print(table_row(f"{num_iter}, {split}", scores, f"{seconds:.0f} s"), flush=True)
    results["questions"], asked = question_scores(model, args.questions)
    answered = ", ".join(f"{name} {share:.3f}" for name, share in results["questions"].items())
    print(f"\nquestions ({asked}): {answered}")
    results["psnr"] = reconstruction_psnr(model, 500)
    print(f"VAE reconstruction (500 scenes): {results['psnr']:.2f} dB")
    if args.out:
        (args.out / "scores.json").write_text(json.dumps(results, indent=2) + "\n")


def table_row(name, scores, seconds="") -> str:
    cells = [f"{scores[category]:.3f}" if category in scores else "–" for category in CATEGORIES]
    return f"| {name} | {' | '.join(cells)} | {sum(scores.values()) / len(scores):.3f} | {seconds} |"
