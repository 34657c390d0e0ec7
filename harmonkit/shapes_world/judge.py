"""The judge of the shapes world: does a picture show its caption? By color, connected components and outline.

The categories are GenEval's. The ceiling is the score of a perfect model: the tokens of one generation step
are drawn independently of each other, so with few steps even a perfect model mixes pictures.
"""
import random
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from harmonkit.shapes_world import world
from harmonkit.shapes_world.world import COLORS, SHAPES, SIZE, Scene, Thing, relation, render
from mar import mask_schedule

CATEGORIES = ("one object", "two objects", "counting", "colors", "position", "attribution")
KIND = dict(zip(CATEGORIES, ("single", "pair", "count", "single", "pair", "pair"), strict=True))
STYLE = dict(zip(CATEGORIES, ("plain", "plain", "color", "color", "color position", "color"), strict=True))
MIN_CHROMA = 70             # of 255; paler pixels are background
MIN_AREA = 20               # pixels of 64×64; smaller components are noise
MIN_IOU = 0.72              # overlap with the ideal outline
RGB = {color: world.shade(color, random.Random(0)) for color in COLORS}         # one shade for each color


def prompts(count, held_out) -> list:
    """[(category, scene, caption), …], count of each category. held_out: captions name one of HELD_OUT."""
    chosen = []
    for category, style in STYLE.items():
        if held_out and "color" not in style:
            continue
        for i in range(count):
            rng = random.Random(f"{category}/{i}/{held_out}")
            scene = world.scene(f"evaluate/{category}", i, held_out=held_out, kind=KIND[category])
            chosen.append((category, scene, world.caption(scene, rng, style=style)))
    return chosen


# ---- the judge ---------------------------------------------------------------------------------------------

def correct(image, scene, category) -> bool:
    """Whether an image shows the things that the category's captions of the scene tell, and no others."""
    def told(thing):
        return (thing.color, thing.shape) if "color" in STYLE[category] else thing.shape
    found = find(image)
    if sorted(map(told, found)) != sorted(map(told, scene.things)):
        return False
    if category != "position":
        return True
    a, b = scene.things
    found_as = {told(thing): thing for thing in found}
    return relation(found_as[told(a)], found_as[told(b)]) == relation(a, b)


def find(image) -> list:
    """The Things in an image: x, y and size are the bounding box's; the shape is "?" if none fits."""
    rgb = np.asarray(image.convert("RGB")).astype(np.float64)
    r, g, b = np.moveaxis(rgb, 2, 0)
    high = rgb.max(2)
    chroma = np.maximum(high - rgb.min(2), 1e-9)
    hues = [(g - b) / chroma % 6, (b - r) / chroma + 2, (r - g) / chroma + 4]
    hue = 60 * np.select([high == r, high == g, high == b], hues)
    nearest = np.argmin([np.abs((hue - named + 180) % 360 - 180) for named in world.HUES.values()], axis=0)
    found = []
    for i, color in enumerate(COLORS):
        for mask in components((nearest == i) & (chroma > MIN_CHROMA)):
            if mask.sum() < MIN_AREA * image.width * image.height / SIZE ** 2:
                continue
            ys, xs = np.nonzero(mask)
            left, top, right, bottom = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
            shape = shape_of(mask[top:bottom, left:right])
            size = max(right - left, bottom - top)
            found.append(Thing(color, shape, (left + right - 1) / 2, (top + bottom - 1) / 2, size))
    return found


def components(mask) -> list:
    """The 4-connected components of a bool array, as bool arrays of the same shape."""
    labels = Image.fromarray(mask.astype(np.int32))             # 0 outside, 1 not labelled yet, then 2, 3, …
    count = 1
    for y, x in np.argwhere(mask).tolist():
        if labels.getpixel((x, y)) == 1:
            count += 1
            ImageDraw.floodfill(labels, (x, y), count)
    return [np.asarray(labels) == i for i in range(2, count + 1)]


def template(shape) -> Image.Image:
    """The shape, stretched to 256×256 pixels."""
    points = np.array(world.outline(shape, 0, 0, 1))
    points = (points - points.min(0)) / np.ptp(points, axis=0) * 255
    image = Image.new("L", (256, 256))
    ImageDraw.Draw(image).polygon([tuple(point) for point in points], fill=255)
    return image


TEMPLATES = {shape: template(shape) for shape in SHAPES}


def shape_of(mask) -> str:
    """The shape that, stretched to the mask, overlaps it best; "?" below MIN_IOU or for an oblong mask."""
    h, w = mask.shape
    if not 0.6 < w / h < 1.67:
        return "?"
    iou = {}
    for shape, image in TEMPLATES.items():
        ideal = np.asarray(image.resize((w, h), Image.BOX)) > 127
        iou[shape] = (ideal & mask).sum() / (ideal | mask).sum()
    best = max(iou, key=iou.get)
    return best if iou[best] >= MIN_IOU else "?"


def judge_the_judge(count=500) -> tuple:
    """Share of rendered scenes accepted, share of spoiled ones rejected, how many of each."""
    accepted, rejected = [], []
    todo = prompts(count // 5, False) + prompts(count // 5, True)
    for category, scene, _ in tqdm(todo, desc="judge", disable=None, leave=False):
        accepted.append(correct(render(scene), scene, category))
        for wrong in spoiled(scene, category):
            rejected.append(not correct(render(wrong), scene, category))
    return np.mean(accepted), np.mean(rejected), len(accepted), len(rejected)


def spoiled(scene, category):
    """Yield the scene with a wrong shape, a thing less, and if told, a wrong color and places swapped."""
    first, *rest = scene.things
    shape = next(s for s in SHAPES if s not in [thing.shape for thing in scene.things])
    yield replace(scene, things=(replace(first, shape=shape), *rest))
    yield replace(scene, things=tuple(rest))
    if "color" in STYLE[category]:
        color = next(c for c in COLORS if c not in [thing.color for thing in scene.things])
        yield replace(scene, things=(replace(first, color=color, rgb=RGB[color]), *rest))
    if category == "position":
        a, b = scene.things
        yield replace(scene, things=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


# ---- the ceiling -------------------------------------------------------------------------------------------

def ceiling(num_iter, count=20, candidates=200) -> dict:
    """{category: share correct} of a perfect model: count prompts each, `candidates` pictures a prompt."""
    verdicts = {}
    todo = tqdm(prompts(count, False), desc=f"perfect, {num_iter} steps", disable=None, leave=False)
    for i, (category, scene, _) in enumerate(todo):
        scenes = allowed(scene, category, candidates, random.Random(i))
        pictures = {s: np.asarray(render(s, 2)) for s in set(scenes)}         # equal scenes are rendered once
        pixels = np.stack([pictures[s] for s in scenes])
        pixels = perfect_picture(pixels, num_iter, np.random.default_rng(i))
        verdicts.setdefault(category, []).append(correct(Image.fromarray(pixels), scene, category))
    return {category: sum(v) / len(v) for category, v in verdicts.items()}


def allowed(scene, category, count, rng) -> list:
    """count scenes that the category's captions of `scene` allow; one shade a color, one background."""
    scenes = []
    while len(scenes) < count:
        spots = world.place(scene.kind, len(scene.things), rng)
        colors = [thing.color for thing in scene.things]
        if "color" not in STYLE[category]:
            colors = rng.sample(COLORS, len(colors))
        things = zip(scene.things, colors, spots, strict=True)
        things = tuple(Thing(color, thing.shape, *spot, RGB[color]) for thing, color, spot in things)
        if category != "position" or relation(*things) == relation(*scene.things):
            scenes.append(Scene(scene.kind, things, ((220, 220, 220), (220, 220, 220))))
    return scenes


def perfect_picture(pixels, num_iter, rng, stride=8):
    """Masked generation from n equally likely pictures: pixels (n, SIZE, SIZE, 3) -> (SIZE, SIZE, 3).

    Each token has its exact distribution given all visible tokens, independent of the others of its step.
    """
    n, side = len(pixels), SIZE // stride
    N = side * side
    patches = pixels.reshape(n, side, stride, side, stride, 3).swapaxes(2, 3).reshape(n, N, -1)
    tokens = np.array([[hash(patch.tobytes()) for patch in picture] for picture in patches])    # (n, N)
    order = rng.permutation(N)
    agreement = np.zeros(n, dtype=int)                          # of each picture with the visible tokens
    source = np.zeros(N, dtype=int)                             # the picture that each token is taken from
    masked = mask_schedule(N, num_iter)
    for before, after in zip(masked[:-1], masked[1:], strict=True):
        new = order[N - before:N - after]
        source[new] = rng.choice(np.flatnonzero(agreement == agreement.max()), len(new))
        agreement += (tokens[:, new] == tokens[source[new], new]).sum(1)
    source = source.reshape(side, side).repeat(stride, 0).repeat(stride, 1)     # (SIZE, SIZE)
    rows, columns = np.indices(source.shape)
    return pixels[source, rows, columns]
