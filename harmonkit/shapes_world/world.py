"""The shapes world: scenes of 64×64 pixels with captions, questions and answers, each made from an integer.

The scenes follow GenEval (2310.11513): one object, two objects, counting, colors, position, attribution.
Shades and sizes vary, but layouts are few: the tokens of one generation step are drawn independently, so with
many layouts even a perfect model mixes two of them (`judge.ceiling`). Boxes lie on a lattice of 8 pixels, the
stride of harmon-tiny's VAE, so that a token shows one of few patterns.

The combinations in HELD_OUT never occur in training, neither in pictures nor in words: they measure
composition. With six training hues the model memorises each color–shape pair; with the whole hue circle it
learns color apart from shape. So some training scenes have hues between the six, like "green blue".
"""
import colorsys
import math
import random
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64                                                                   # pixels, both sides
LATTICE = 8                                                                 # pixels between places of a box
DIAMETERS = {"single": (44, 52), "pair": (24, 28), "count": (22, 26)}       # pixels, by kind of scene
HUES = {"red": 0, "yellow": 52, "green": 125, "cyan": 182, "blue": 228, "purple": 285}      # degrees
COLORS = tuple(HUES)
HELD_OUT = frozenset({("red", "triangle"), ("yellow", "star"), ("green", "circle"),
                      ("cyan", "cross"), ("blue", "square"), ("purple", "star")})
BETWEEN = 0.3               # fraction of training scenes with hues between the named colors
NAMED_WITHIN = 5            # degrees: hues this near to a named color get that name alone

NUMBERS = ("no", "one", "two", "three", "four")
PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
SIDES = {"left": "on the left", "right": "on the right", "above": "at the top", "below": "at the bottom"}
STYLES = ("plain", "color", "color", "color", "position", "color position", "color position")   # of captions

STAR = [(.45 if i % 2 else 1.08, math.pi * i / 5) for i in range(10)]       # radius and angle of its corners
OUTLINES = {                # polygons in a box from -1 to 1
    "circle": [(math.cos(t), math.sin(t)) for t in np.linspace(0, 2 * math.pi, 48, endpoint=False)],
    "square": [(-.9, -.9), (.9, -.9), (.9, .9), (-.9, .9)],
    "triangle": [(0, -1), (1, .85), (-1, .85)],
    "star": [(radius * math.sin(t), .05 - radius * math.cos(t)) for radius, t in STAR],
    "cross": [(-.36, -1), (.36, -1), (.36, -.36), (1, -.36), (1, .36), (.36, .36),
              (.36, 1), (-.36, 1), (-.36, .36), (-1, .36), (-1, -.36), (-.36, -.36)],
}
SHAPES = tuple(OUTLINES)
SEEN = tuple((color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in HELD_OUT)
LABELS = 5 * len(COLORS) * len(SHAPES)                                      # classes of `label`


@dataclass(frozen=True)
class Thing:
    color: str              # the named color nearest to the hue of rgb
    shape: str
    x: float                # center, pixels
    y: float
    size: float             # diameter, pixels
    rgb: tuple = (0, 0, 0)


@dataclass(frozen=True)
class Scene:
    kind: str               # "single", "pair" (two colors, two shapes) or "count" (two to four things alike)
    things: tuple
    background: tuple       # top and bottom rgb


# ---- scenes and pictures -----------------------------------------------------------------------------------

def scene(seed, index, *, held_out=False, kind=None, between=False) -> Scene:
    """Scene `index` of the set `seed`. held_out: with a combination of HELD_OUT. between: in any hue."""
    rng = random.Random(f"{seed}/{index}/{held_out}")
    kind = kind or rng.choices(("single", "pair", "count"), (35, 40, 25))[0]
    unseen = tuple(sorted(HELD_OUT)) if held_out else ()
    first = rng.choice(unseen or SEEN)
    combinations = [first]
    if kind == "pair":
        others = [c for c in SEEN + unseen if c[0] != first[0] and c[1] != first[1]]
        combinations.append(rng.choice(others))
        rng.shuffle(combinations)
    if kind == "count":
        combinations *= rng.choice((2, 3, 4))

    # Things of one color share a shade.
    shades = {color: shade(color, rng, between) for color, _ in combinations}
    spots = place(kind, len(combinations), rng)
    things = tuple(Thing(*c, *spot, shades[c[0]]) for c, spot in zip(combinations, spots, strict=True))

    # The background is a light grey with a tint, lighter or darker toward the bottom.
    grey = rng.uniform(195, 245)
    tints = [rng.uniform(-6, 6) for _ in "rgb"]
    slope = rng.uniform(-15, 15)
    top = tuple(min(255, round(grey + tint - slope)) for tint in tints)
    bottom = tuple(min(255, round(grey + tint + slope)) for tint in tints)
    return Scene(kind, things, (top, bottom))


def training_scene(seed, index) -> Scene:
    """Scene number `index` of a training set: seen combinations, BETWEEN of the scenes in any hue."""
    return scene(seed, index, between=random.Random(f"{seed}/{index}/named").random() < BETWEEN)


def shade(color, rng, between=False) -> tuple:
    """An rgb within 4° of the color's hue; between: of any hue nearer to this color than to others, by 2°."""
    hue = HUES[color]
    low, high = -4, 4
    if between:
        others = [other for other in HUES.values() if other != hue]
        low = 1 - min((hue - other) % 360 for other in others) / 2
        high = min((other - hue) % 360 for other in others) / 2 - 1
    hue = (hue + rng.uniform(low, high)) / 360 % 1
    rgb = colorsys.hsv_to_rgb(hue, rng.uniform(.85, 1), rng.uniform(.75, 1))
    return tuple(round(255 * v) for v in rgb)


def place(kind, n, rng) -> list:
    """[(x, y, diameter), …] of n things: one on the lattice, two in halves, three and four in quarters."""
    if n == 1:
        size = rng.choice(DIAMETERS[kind])
        box = size + 4                                          # a margin of 2 pixels on each side
        x, y = (rng.randrange(0, SIZE - box + 1, LATTICE) + box / 2 for _ in "xy")
        return [(x, y, size)]
    low, middle, high = SIZE / 4, SIZE / 2, 3 * SIZE / 4
    if n == 2:
        centers = rng.choice((((low, middle), (high, middle)), ((middle, low), (middle, high))))
    else:
        centers = [(x, y) for y in (low, high) for x in (low, high)]
    return [(x, y, rng.choice(DIAMETERS[kind])) for x, y in rng.sample(centers, n)]


def outline(shape, x, y, size) -> list:
    """The polygon of a shape that fills a size × size box around (x, y), as a list of points."""
    return [(x + size / 2 * u, y + size / 2 * v) for u, v in OUTLINES[shape]]


def render(scene, supersample=4) -> Image.Image:
    """The scene as an RGB image of SIZE × SIZE pixels, antialiased."""
    k = supersample
    top, bottom = np.array(scene.background, dtype=np.float64)
    ramp = np.linspace(0, 1, SIZE * k)[:, None, None]
    pixels = np.broadcast_to(top + (bottom - top) * ramp, (SIZE * k, SIZE * k, 3))
    image = Image.fromarray(pixels.round().astype(np.uint8))
    for thing in scene.things:
        corners = outline(thing.shape, thing.x, thing.y, thing.size)
        ImageDraw.Draw(image).polygon([(k * x, k * y) for x, y in corners], fill=thing.rgb)
    return image.reduce(k)


def contact_sheet(pictures, columns=8, scale=2) -> Image.Image:
    """Pictures [(image, caption, whether it is right), …] over their captions; wrong ones in a red frame."""
    side = SIZE * scale
    width, height = side + 12, side + 52
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, text, right) in enumerate(pictures):
        x, y = i % columns * width + 6, i // columns * height + 6
        if not right:
            draw.rectangle((x - 4, y - 4, x + side + 3, y + side + 3), fill="red")
        sheet.paste(image.resize((side, side), Image.NEAREST), (x, y))
        draw.text((x, y + side + 5), textwrap.fill(text, 22), fill="black")
    return sheet


# ---- words -------------------------------------------------------------------------------------------------

def color_words(thing) -> str:
    """The words for the thing's hue: "blue", NAMED_WITHIN degrees from it "green blue" or "purple blue"."""
    hue = 360 * colorsys.rgb_to_hsv(*thing.rgb)[0]
    offsets = {color: (hue - named + 180) % 360 - 180 for color, named in HUES.items()}
    own = offsets[thing.color]
    if abs(own) < NAMED_WITHIN:
        return thing.color
    across = [color for color in COLORS if offsets[color] * own < 0]        # on the side to which it leans
    return min(across, key=lambda color: abs(offsets[color])) + " " + thing.color


def has_named_colors(scene) -> bool:
    return all(color_words(thing) == thing.color for thing in scene.things)


def plural(shape) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def phrase(thing, n=1, colored=True) -> str:
    """Like "a blue star", "a star" or "three green blue stars"."""
    words = [color_words(thing)] if colored else []
    words.append(thing.shape if n == 1 else plural(thing.shape))
    return " ".join(["a" if n == 1 else NUMBERS[n], *words])


def relation(a, b) -> str:
    """The place of a seen from b, "left", "right", "above" or "below", by the axis of the larger distance."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def reading_order(scene) -> tuple:
    """The things of a scene, a pair's from left to right or from top to bottom."""
    in_order = scene.kind != "pair" or relation(*scene.things) in ("left", "above")
    return scene.things if in_order else scene.things[::-1]


def describe(scene) -> str:
    """The one full description of a scene, which is also the answer to "Describe the image."."""
    if scene.kind != "pair":
        return phrase(scene.things[0], len(scene.things))
    a, b = reading_order(scene)
    return f"{phrase(a)} {PHRASES[relation(a, b)]} {phrase(b)}"


def label(scene) -> int:
    """A class in [0, LABELS), for pretraining by class: how many things, and the first one's combination."""
    first = reading_order(scene)[0]
    group = 4 if scene.kind == "pair" else len(scene.things) - 1
    return (group * len(COLORS) + COLORS.index(first.color)) * len(SHAPES) + SHAPES.index(first.shape)


def combination(label) -> tuple:
    """(color, shape) of the first thing in scenes of a label."""
    color, shape = divmod(label % (len(COLORS) * len(SHAPES)), len(SHAPES))
    return COLORS[color], SHAPES[shape]


def class_names() -> list:
    """The name of each label. Classes of the combinations in HELD_OUT have names but no training scenes."""
    things = [Thing(color, shape, 0, 0, 1) for color in COLORS for shape in SHAPES]
    words = [(f"{thing.color} {thing.shape}", f"{thing.color} {plural(thing.shape)}") for thing in things]
    alike = [one for one, _ in words] + [f"{n} {many}" for n in NUMBERS[2:] for _, many in words]
    return alike + [f"{one} and another thing" for one, _ in words]


def caption(scene, rng, *, style=None) -> str:
    """A caption that is true of the scene. style: "plain" (no color), "color", "position", "color position".

    None: a random style, and captions without a color word only for the named colors.
    """
    colored = style is None and not has_named_colors(scene)
    style = style or rng.choice(STYLES)
    colored = colored or "color" in style
    if scene.kind == "pair":
        a, b = rng.sample(scene.things, 2)
        first, second = phrase(a, colored=colored), phrase(b, colored=colored)
        text = f"{first} and {second}"
        if "position" in style:
            with_phrase = f"{first} {PHRASES[relation(a, b)]} {second}"
            with_sides = f"{first} {SIDES[relation(a, b)]} and {second} {SIDES[relation(b, a)]}"
            text = rng.choice((with_phrase, with_phrase, with_sides))
    else:
        text = phrase(scene.things[0], len(scene.things), colored)
        if scene.kind == "single":
            text = rng.choice(("a", "a", "one")) + text.removeprefix("a")
    there = "there are " if scene.kind == "count" else "there is "
    return rng.choice(("", "", "", "a picture of ", "an image of ", "a drawing of ", there)) + text


def questions(scene, rng) -> list:
    """All [(type, question, answer), …]: shape, count, where; for named colors also color, exists, describe.

    Half the color and shape questions refer to objects by position; otherwise the model ignores the picture
    and recalls the training colors of the shape. Answers never hold two color words, because a model trained
    on such answers gives them for HELD_OUT too.
    """
    things = scene.things
    pair, alike = scene.kind == "pair", scene.kind == "count"
    are, an_object = ("are", "objects") if alike else ("is", "object")
    asked = [("describe", "Describe the image.", describe(scene))]
    for i, thing in enumerate(things if pair else things[:1]):
        color = color_words(thing)
        by_place = f"{an_object} {SIDES[relation(thing, things[1 - i])]}" if pair else an_object
        by_shape = plural(thing.shape) if alike else thing.shape
        asked.append(("color", f"What color {are} the {rng.choice((by_shape, by_place))}?", color))
        by_color = f"{color} {an_object}"
        asked.append(("shape", f"What shape {are} the {rng.choice((by_color, by_place))}?", thing.shape))
    if pair:
        for a, b in (things, things[::-1]):
            asked.append(("where", f"Where is the {a.shape}?", f"{PHRASES[relation(a, b)]} the {b.shape}"))
    objects = "objects" if pair else rng.choice((plural(things[0].shape), "objects"))
    asked.append(("count", f"How many {objects} are there?", NUMBERS[len(things)]))
    shown = {(thing.color, thing.shape) for thing in things}
    yes = rng.choice(sorted(shown))
    no = rng.choice([c for c in SEEN if c not in shown and (c[0] == yes[0] or c[1] == yes[1])])
    asked.append(("exists", f"Is there a {' '.join(yes)}?", "yes"))
    asked.append(("exists", f"Is there a {' '.join(no)}?", "no"))
    if has_named_colors(scene):
        return asked
    return [question for question in asked if question[0] in ("shape", "count", "where")]


def reading_turns(scene, rng) -> list:
    """[(question, answer), …] without a picture: a fact, or questions about a scene told in a sentence."""
    if rng.random() < 0.1:
        return [rng.choice(FACTS)]
    asked = questions(scene, rng)
    chosen = rng.sample(asked, min(len(asked), 3))
    turns = [(question, answer) for kind, question, answer in chosen if kind != "describe"]
    told = describe(scene)
    if scene.kind == "pair" and rng.random() >= 0.5:
        told = caption(scene, rng, style="color position")
    question, answer = turns[0]
    return [(f"{told}\n{question}", answer)] + turns[1:]


def looking_turns(scene, rng) -> list:
    """[(question, answer), …] about a picture: three to five, and seldom a fact, which no picture shows."""
    asked = questions(scene, rng)
    count = min(len(asked), rng.choice((3, 4, 5)))
    turns = [(question, answer) for _, question, answer in rng.sample(asked, count)]
    return turns + ([rng.choice(FACTS)] if rng.random() < 0.05 else [])


FACTS = (
    ("How many sides does a triangle have?", "three"), ("How many sides does a square have?", "four"),
    ("How many points does a star have?", "five"), ("Which shape is round?", "circle"),
    ("Which shape has three sides?", "triangle"), ("Which shape has four equal sides?", "square"),
    ("Which shape has five points?", "star"), ("What comes after one?", "two"),
    ("What comes after two?", "three"), ("What comes after three?", "four"),
    ("What is the opposite of left?", "right"), ("What is the opposite of right?", "left"),
    ("What is the opposite of above?", "below"), ("What is the opposite of below?", "above"),
    ("Which color do blue and yellow make?", "green"), ("Which color do red and blue make?", "purple"),
    ("Which color is the sky?", "blue"), ("Which color is grass?", "green"),
    ("Which color is a lemon?", "yellow"), ("Which color is a tomato?", "red"),
    ("Which shapes can you draw?", "circles, squares, triangles, stars and crosses"),
    ("Which colors do you know?", "red, yellow, green, cyan, blue and purple"),
    ("What are you?", "I am a tiny model of a world of shapes."), ("Hello!", "Hello! Ask me about shapes."),
)
