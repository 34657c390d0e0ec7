"""What the shapes world measures of a model: right pictures, right answers, the VAE, head losses."""
import random

import torch
from tqdm import tqdm

from harmonkit.evals.benchmark import Item
from harmonkit.images import image_to_pixels
from harmonkit.pipeline import generation_prompts
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import correct, find, prompts
from mar import random_mask

# ---- pictures --------------------------------------------------------------------------------------------

def items_of(split, count) -> list:
    """count Items of each category that a split has."""
    chosen = enumerate(prompts(count, split == "held-out"))
    return [Item(f"{split}/{i:05d}", caption, {"split": split, "category": category, "scene": scene, "i": i})
            for i, (category, scene, caption) in chosen]


def draw(model, prompts, batch, seed=0, desc="drawing", **sampling) -> list:
    """A PIL image for each caption or label, `batch` at a time; image i has seed + i. sampling: fields of
    Sampling.
    """
    images = []
    for start in tqdm(range(0, len(prompts), batch), desc=desc, disable=None, leave=False):
        images += model.generate_image(prompts[start:start + batch], seed=seed + start, **sampling)
    return images


def generation_scores(model, split, count, seed, batch, **sampling) -> dict:
    """{category: share correct} over count prompts each, for a model in memory. split: one of SPLITS."""
    items = items_of(split, count)
    captions = [item.prompt for item in items]
    images = draw(model, captions, batch, seed, f"{split}, {sampling['num_iter']} steps", **sampling)
    return shares(items, verdicts(items, images))


def verdicts(items, images) -> list:
    """Whether each image shows what its item's caption tells."""
    return [correct(image, item.fields["scene"], item.fields["category"])
            for item, image in zip(items, images, strict=True)]


def shares(items, verdicts) -> dict:
    """{category: share of right pictures}"""
    by_category = {}
    for item, verdict in zip(items, verdicts, strict=True):
        by_category.setdefault(item.fields["category"], []).append(verdict)
    return {category: sum(of_one) / len(of_one) for category, of_one in by_category.items()}


def mean(scores) -> float:
    return sum(scores.values()) / len(scores)


# ---- other scores ----------------------------------------------------------------------------------------

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
