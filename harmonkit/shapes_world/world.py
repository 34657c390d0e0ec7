"""The shapes world: an endless supply of small scenes with captions and questions, made from an integer.

It mirrors the six categories of GenEval (2310.11513) in 64×64 pixels: one object, two objects, counting, colors, position and
color attribution. Things vary in shade, size and place, but there are few layouts: one thing is large, two share the picture along one axis,
three and four keep to its quarters. For tokens that are sampled in one step do not know of each other, and may draw halves of two layouts: where things
of 22 to 38 pixels lie anywhere, a perfect model would draw 78% of the pictures right in 16 steps; here it draws 93% (`python evaluate.py --ceiling`).
Boxes lie on a lattice of 8 pixels, the stride of harmon-tiny's VAE, so that a token shows one of few patterns.
Everything is a pure function of (seed, index), so a data set needs no files. The combinations of color and shape in HELD_OUT never occur
in training (`training_scene`), neither in pictures nor in words; they measure composition. Three tenths of the training scenes have hues between the
six colors, "green blue" being a blue that leans to green: one who has met six hues learns them as six patterns, apart for each shape; one who has met
them all, as a color.

    python shapes.py        # draws a contact sheet of scenes with their captions to out/shapes.png
"""
import colorsys
import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64                                                                                          # pixels
HUES = {"red": 0, "yellow": 52, "green": 125, "cyan": 182, "blue": 228, "purple": 285}             # degrees
COLORS = tuple(HUES)
SHAPES = ("circle", "square", "triangle", "star", "cross")
HELD_OUT = frozenset({("red", "triangle"), ("yellow", "star"), ("green", "circle"), ("cyan", "cross"), ("blue", "square"), ("purple", "star")})
SEEN = tuple((c, s) for c in COLORS for s in SHAPES if (c, s) not in HELD_OUT)
NUMBERS = ("no", "one", "two", "three", "four")
INVERSE = {"left": "right", "right": "left", "above": "below", "below": "above"}
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SIDES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
DIAMETERS = {"single": (44, 52), "pair": (24, 28), "count": (22, 26)}                          # pixels, by kind of scene
LATTICE = 8                                                                                        # pixels: where the box of one thing may begin
BETWEEN = 0.3                                                                                      # share of training scenes in hues between the six
PURE = 5                                                                                           # degrees: what is nearer to a color has no second one in its name


@dataclass(frozen=True)
class Thing:
    color: str
    shape: str
    x: float                # center and diameter, pixels
    y: float
    size: float
    rgb: tuple = (0, 0, 0)  # the shade it is drawn in


@dataclass(frozen=True)
class Scene:
    """kind: "single" (one thing), "pair" (two that differ in color and in shape) or "count" (two to four alike)."""
    kind: str
    things: tuple
    background: tuple       # top and bottom rgb


# ---- scenes ----------------------------------------------------------------------------------------------------------

def outline(shape, x, y, size):
    """Polygon of a shape that fills a size × size box around (x, y), as a list of points."""
    r = size / 2
    if shape == "square":
        return [(x - .9 * r, y - .9 * r), (x + .9 * r, y - .9 * r), (x + .9 * r, y + .9 * r), (x - .9 * r, y + .9 * r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + .85 * r), (x - r, y + .85 * r)]
    if shape == "star":
        spikes = [(1.08 * r if i % 2 == 0 else .45 * r, math.pi * i / 5) for i in range(10)]
        return [(x + a * math.sin(t), y + .05 * r - a * math.cos(t)) for a, t in spikes]
    if shape == "cross":
        a = .36 * r
        return [(x + u, y + v) for u, v in ((-a, -r), (a, -r), (a, -a), (r, -a), (r, a), (a, a), (a, r), (-a, r), (-a, a), (-r, a), (-r, -a), (-a, -a))]
    return [(x + r * math.cos(t), y + r * math.sin(t)) for t in np.linspace(0, 2 * math.pi, 48, endpoint=False)]


def shade(color, rng, between=False):
    """An rgb within 4 degrees of the color's hue; between=True: of any hue that is nearer to this color's than to another's."""
    before, after = (min((s * (HUES[c] - HUES[color])) % 360 for c in COLORS if c != color) / 2 - 1 for s in (-1, 1))
    hue = (HUES[color] + (rng.uniform(-before, after) if between else rng.uniform(-4, 4))) / 360 % 1
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, rng.uniform(.85, 1), rng.uniform(.75, 1)))


def place(kind, n, rng):
    """n centers and diameters. One thing: a box on the lattice, 2 pixels larger on each side. Two: side by side or one above the other. More: in quarters."""
    if n == 1:
        box = (size := rng.choice(DIAMETERS[kind])) + 4
        return [tuple(rng.randrange(0, SIZE - box + 1, LATTICE) + box / 2 for _ in "xy") + (size,)]
    quarter, half = SIZE / 4, SIZE / 2
    if n == 2:
        spots = rng.choice((((quarter, half), (3 * quarter, half)), ((half, quarter), (half, 3 * quarter))))
    else:
        spots = [(x, y) for y in (quarter, 3 * quarter) for x in (quarter, 3 * quarter)]
    return [spot + (rng.choice(DIAMETERS[kind]),) for spot in rng.sample(spots, n)]


def scene(seed, index, *, held_out=False, kind=None, between=False):
    """Scene number `index` of the set `seed` (any string or int). held_out=True puts a held-out combination into it."""
    rng = random.Random(f"{seed}/{index}/{held_out}")
    kind = kind or rng.choices(("single", "pair", "count"), (35, 40, 25))[0]
    first = rng.choice(sorted(HELD_OUT) if held_out else SEEN)
    if kind == "pair":
        combinations = SEEN + (tuple(sorted(HELD_OUT)) if held_out else ())
        kinds = [first, rng.choice([c for c in combinations if c[0] != first[0] and c[1] != first[1]])]
        rng.shuffle(kinds)
    else:
        kinds = [first] * (1 if kind == "single" else rng.choice((2, 3, 4)))
    color_of = {c: shade(c, rng, between) for c, _ in kinds}
    things = tuple(Thing(c, s, *spot, color_of[c]) for (c, s), spot in zip(kinds, place(kind, len(kinds), rng)))
    grey, tint = rng.uniform(195, 245), [rng.uniform(-6, 6) for _ in range(3)]
    slope = rng.uniform(-15, 15)
    background = tuple(tuple(round(min(255, max(0, grey + t + d))) for t in tint) for d in (-slope, slope))
    return Scene(kind, things, background)


def training_scene(seed, index):
    """Scene number `index` of a training set: seen combinations, and BETWEEN of them in any hue, as long as the nearest color makes a seen one."""
    return scene(seed, index, between=random.Random(f"{seed}/{index}/named").random() < BETWEEN)


def render(scene, supersample=4):
    """The scene as a PIL image, SIZE × SIZE, RGB, antialiased."""
    k = supersample
    ramp = np.linspace(0, 1, SIZE * k)[:, None, None]
    top, bottom = np.array(scene.background, dtype=np.float64)
    pixels = np.broadcast_to(top + (bottom - top) * ramp, (SIZE * k, SIZE * k, 3)).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for t in scene.things:
        draw.polygon([(k * x, k * y) for x, y in outline(t.shape, t.x, t.y, t.size)], fill=t.rgb)
    return image.reduce(k)


# ---- words -----------------------------------------------------------------------------------------------------------

def plural(shape):
    return "crosses" if shape == "cross" else shape + "s"


def relation(a, b):
    """Where a is, seen from b: "left", "right", "above" or "below", by the axis on which they are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def color(thing):
    """The words for its hue: "blue", or from PURE degrees away "green blue", a blue that leans to green."""
    hue = 360 * colorsys.rgb_to_hsv(*thing.rgb)[0]
    away = {c: (hue - h + 180) % 360 - 180 for c, h in HUES.items()}
    if abs(own := away.pop(thing.color)) < PURE:
        return thing.color
    return min((c for c in away if away[c] * own < 0), key=lambda c: abs(away[c])) + " " + thing.color


def pure(scene):
    return all(color(t) == t.color for t in scene.things)


def name(thing, colored=True):
    return f"{color(thing)} {thing.shape}" if colored else thing.shape


def reading_order(scene):
    a, b = scene.things
    return (a, b) if relation(a, b) in ("left", "above") else (b, a)


def describe(scene):
    """The one full description of a scene, which also is the answer to "Describe the image."."""
    if scene.kind == "pair":
        a, b = reading_order(scene)
        return f"a {name(a)} {PHRASES[relation(a, b)]} a {name(b)}"
    return group(scene)


def group(scene, colored=True):
    """What a scene of one thing or several alike shows."""
    n, first = len(scene.things), scene.things[0]
    return f"a {name(first, colored)}" if n == 1 else f"{NUMBERS[n]} {color(first) + ' ' if colored else ''}{plural(first.shape)}"


LABELS = len(COLORS) * len(SHAPES) * 5


def label(scene):
    """A class in [0, LABELS), for pretraining by class: the combination and number of things; of a pair the first in reading order."""
    n, thing = (5, reading_order(scene)[0]) if scene.kind == "pair" else (len(scene.things), scene.things[0])
    return ((n - 1) * len(COLORS) + COLORS.index(thing.color)) * len(SHAPES) + SHAPES.index(thing.shape)


def caption(scene, rng, *, style=None):
    """A caption that is true of the scene. style: None for any, or "plain" (no color) / "color" / "position" / "color position".

    Without a style, hues between the colors are always told: who asks for none gets one of the six.
    """
    colored = style is None and not pure(scene)
    style = style or rng.choice(("plain", "color", "color", "color", "position", "color position", "color position"))
    colored = colored or "color" in style
    if scene.kind == "pair":
        a, b = rng.sample(scene.things, 2)
        r = relation(a, b)
        if "position" in style:
            form = rng.choice(("{a} {of} {b}", "{a} {of} {b}", "{a} {at} and {b} {other}"))
        else:
            form = "{a} and {b}"
        text = form.format(a=f"a {name(a, colored)}", b=f"a {name(b, colored)}", of=PHRASES[r], at=SIDES[r], other=SIDES[INVERSE[r]])
    else:
        text = group(scene, colored)
        if scene.kind == "single":
            text = rng.choice(("a", "a", "one")) + text.removeprefix("a")
    return rng.choice(("{}", "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", f"there {'are' if scene.kind == 'count' else 'is'} {{}}")).format(text)


def questions(scene, rng):
    """All (type, question, answer) of a scene. Types: shape, count, where; and color, exists and describe where all colors are pure.

    Where they are not, these leave too much to taste, and one who has learned to answer "green blue" takes what it never saw for something in between.
    """
    qa = [("describe", "Describe the image.", describe(scene))]
    n, first = len(scene.things), scene.things[0]
    many = "s" if scene.kind == "count" else ""
    for t in scene.things if scene.kind == "pair" else scene.things[:1]:
        other = scene.things[scene.things[0] is t] if scene.kind == "pair" else None
        place = f" {SIDES[relation(t, other)]}" if other else ""
        is_the = "are the" if many else "is the"                     # by name, or by place: who answers by name alone learns which colors a shape has
        qa.append(("color", f"What color {is_the} {rng.choice((plural(t.shape) if many else t.shape, f'object{many}{place}'))}?", color(t)))
        qa.append(("shape", f"What shape {is_the} {rng.choice((f'{color(t)} object{many}', f'object{many}{place}'))}?", t.shape))
    if scene.kind == "pair":
        for a, b in (scene.things, scene.things[::-1]):
            qa.append(("where", f"Where is the {a.shape}?", f"{PHRASES[relation(a, b)]} the {b.shape}"))
        qa.append(("count", "How many objects are there?", "two"))
    else:
        qa.append(("count", f"How many {rng.choice((plural(first.shape), 'objects'))} are there?", NUMBERS[n]))
    real = {(t.color, t.shape) for t in scene.things}
    yes = rng.choice(sorted(real))
    no = rng.choice([c for c in SEEN if c not in real and (c[0] == yes[0] or c[1] == yes[1])])
    for (c, s), answer in ((yes, "yes"), (no, "no")):
        qa.append(("exists", f"Is there a {c} {s}?", answer))
    return qa if pure(scene) else [q for q in qa if q[0] in ("shape", "count", "where")]


FACTS = (
    ("How many sides does a triangle have?", "three"),
    ("How many sides does a square have?", "four"),
    ("How many points does a star have?", "five"),
    ("Which shape is round?", "circle"),
    ("Which shape has three sides?", "triangle"),
    ("Which shape has four equal sides?", "square"),
    ("Which shape has five points?", "star"),
    ("What comes after one?", "two"),
    ("What comes after two?", "three"),
    ("What comes after three?", "four"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of right?", "left"),
    ("What is the opposite of above?", "below"),
    ("What is the opposite of below?", "above"),
    ("Which color do blue and yellow make?", "green"),
    ("Which color do red and blue make?", "purple"),
    ("Which color is the sky?", "blue"),
    ("Which color is grass?", "green"),
    ("Which color is a lemon?", "yellow"),
    ("Which color is a tomato?", "red"),
    ("Which shapes can you draw?", "circles, squares, triangles, stars and crosses"),
    ("Which colors do you know?", "red, yellow, green, cyan, blue and purple"),
    ("What are you?", "I am a tiny model of a world of shapes."),
    ("Hello!", "Hello! Ask me about shapes."),
)


def reading_turns(scene, rng):
    """Text alone: facts, or questions about a scene that a sentence stands in for. [(question, answer), …]"""
    if rng.random() < 0.1:
        return [rng.choice(FACTS)]
    asked = questions(scene, rng)
    turns = [(q, a) for kind, q, a in rng.sample(asked, min(len(asked), 3)) if kind != "describe"]
    told = describe(scene) if scene.kind != "pair" or rng.random() < 0.5 else caption(scene, rng, style="color position")
    return [(f"{told}\n{turns[0][0]}", turns[0][1])] + turns[1:]


def looking_turns(scene, rng):
    """Three to five questions about a picture; a fact now and then, so that not every answer is sought in the picture."""
    asked = questions(scene, rng)
    turns = [(q, a) for _, q, a in rng.sample(asked, min(len(asked), rng.choice((3, 4, 5))))]
    return turns + ([rng.choice(FACTS)] if rng.random() < 0.05 else [])


if __name__ == "__main__":
    from pathlib import Path

    sheet = Image.new("RGB", (8 * 200, 4 * 240), "white")
    for i in range(32):
        s = training_scene("sheet", i)
        sheet.paste(render(s).resize((192, 192), Image.NEAREST), (i % 8 * 200, i // 8 * 240))
        ImageDraw.Draw(sheet).text((i % 8 * 200, i // 8 * 240 + 200), caption(s, random.Random(i)).replace(" a ", "\na ", 1), fill="black")
    Path("out").mkdir(exist_ok=True)
    sheet.save("out/shapes.png")
    print("out/shapes.png")
