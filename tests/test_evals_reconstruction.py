"""The judge of reconstructions: pictures that are known to differ are said to differ, in what they do."""
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from harmon import Harmon
from harmonkit.evals import reconstruction
from harmonkit.evals.__main__ import main
from harmonkit.evals.reconstruction import ASPECTS, equal_aspects
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import RGB
from harmonkit.shapes_world.world import Scene, Thing

GREY = ((220, 220, 220), (220, 220, 220))
RED = Thing("red", "circle", 16, 32, 26, RGB["red"])
BLUE = Thing("blue", "square", 48, 32, 26, RGB["blue"])


def painted(*things):
    return world.render(Scene("pair", things, GREY))


def differing(*things, original=(RED, BLUE)):
    """The aspects in which the judge finds two pictures to differ."""
    verdict = equal_aspects(painted(*things), painted(*original))
    assert tuple(verdict) == ASPECTS
    return [aspect for aspect in ASPECTS if not verdict[aspect]]


def test_a_picture_equals_itself_and_small_moves():
    assert differing(RED, BLUE) == differing(BLUE, RED) == []
    assert differing(replace(RED, x=19), replace(BLUE, y=29)) == []
    assert differing(replace(RED, size=24), BLUE) == []


def test_what_differs_is_named():
    green, cross = replace(BLUE, color="green", rgb=RGB["green"]), replace(BLUE, shape="cross")
    assert differing(RED, green) == ["color", "all"]
    assert differing(RED, cross) == ["shape", "all"]
    assert differing(replace(RED, x=22), BLUE) == ["place", "all"]
    assert differing(replace(RED, y=26), BLUE) == ["place", "all"]
    assert differing(RED) == ["color", "number", "shape", "place", "all"]
    assert differing() == ["color", "number", "shape", "place", "all"]
    assert differing(RED, BLUE, replace(RED, x=48, y=6, size=8)) == ["number", "place", "all"]
    assert differing(RED, BLUE, replace(BLUE, x=32, y=56, size=12)) == ["number", "place", "all"]


def test_things_are_compared_one_by_one():
    swapped = replace(RED, x=48), replace(BLUE, x=16)
    assert differing(*swapped) == ["all"]
    mixed = replace(RED, shape="square"), replace(BLUE, shape="circle")
    assert differing(*mixed) == ["all"]
    alike = [replace(BLUE, x=x, y=y) for x, y in ((16, 16), (48, 16), (16, 48), (48, 48))]
    assert differing(*alike[:2], original=alike) == ["number", "place", "all"]
    assert differing(*alike[:2], original=alike[2:]) == ["place", "all"]
    assert differing(*alike[:2], original=alike[1:3]) == ["place", "all"]


@pytest.mark.parametrize("held_out", [False, True])
def test_scenes_equal_themselves_and_no_other(held_out):
    pictures = [world.render(world.scene("aspects", i, held_out=held_out)) for i in range(30)]
    assert all(all(equal_aspects(picture, picture).values()) for picture in pictures)
    others = [equal_aspects(one, other) for one, other in zip(pictures, pictures[1:])]
    assert sum(verdict["all"] for verdict in others) <= 1
    assert {verdict["place"] for verdict in others} == {True, False}


class Painter:
    """Draws every second picture that it looks at right; the others and all words give an empty picture."""
    device = torch.device("cpu")

    def __init__(self):
        self.seeds, self.seen, self.captions = [], [], []

    def generate_image(self, captions=None, *, like=None, seed, **settings):
        count = len(captions if like is None else like)
        self.seeds += [seed + i for i in range(count)]
        self.settings = settings
        if like is None:
            self.captions += captions
            return [painted()] * count
        self.seen += like
        places = range(len(self.seen) - count, len(self.seen))
        return [self.seen[i] if i % 2 == 0 else painted() for i in places]

    def encode(self, pixels):
        return pixels

    def decode(self, latents):
        return latents


def test_the_command_prints_a_row_each(tmp_path, monkeypatch, capsys):
    model = Painter()
    monkeypatch.setattr(Harmon, "from_pretrained", lambda path: model)
    main(f"reconstruction --scenes 6 --batch 4 --seed 10 --steps 3 --cfg 2 --out {tmp_path}/out".split())
    scenes = [world.scene("evaluate/reconstruction", i, held_out=True) for i in range(6)]
    assert [image.tobytes() for image in model.seen] == [world.render(scene).tobytes() for scene in scenes]
    assert model.captions == [world.describe(scene) for scene in scenes]
    assert model.seeds == [*range(10, 16)] * 2
    assert model.settings == {"num_iter": 3, "cfg": 2.0, "temperature": 1.0}
    for scene in scenes:
        combinations = {(thing.color, thing.shape) for thing in scene.things}
        assert combinations & world.HELD_OUT
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 held-out scenes, 3 steps, CFG 2, temperature 1, seed 10"
    assert lines[2] == "| | color | number | shape | place | all | single | pair | count | time |"
    assert [scene.kind for scene in scenes] == ["pair", "single", "single", "pair", "single", "count"]
    assert [line.rsplit(" |", 2)[0] for line in lines[4:]] == [
        "| looking" + " | 0.500" * 5 + " | 0.667 | 0.500 | 0.000",
        "| from words" + " | 0.000" * 8, "| VAE alone" + " | 1.000" * 8]
    results = json.loads((tmp_path / "out/reconstruction.json").read_text())
    assert results["looking"].pop("single") == pytest.approx(2 / 3)
    assert results["looking"] == dict.fromkeys(ASPECTS, 0.5) | {"pair": 0.5, "count": 0}
    assert results["settings"]["seed"] == "10"
    names = ["from-words.png", "looking.png", "reconstruction.json", "vae-alone.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with Image.open(tmp_path / "out/looking.png") as sheet:
        frames = [sheet.getpixel((i % 8 * 140 + 3, i // 8 * 180 + 60)) for i in range(12)]
    assert [i for i, color in enumerate(frames) if color == (255, 0, 0)] == [3, 7, 11]


def test_harmon_tiny_sees_what_it_draws():
    """Above what words alone give: in 12 scenes most things have their color, shape and place."""
    scenes = [world.scene("evaluate/reconstruction", i, held_out=True, kind="pair") for i in range(12)]
    originals = [world.render(scene) for scene in scenes]
    drawn = reconstruction.look(Harmon.from_pretrained(), originals, 12, num_iter=8)
    scores = reconstruction.shares(list(map(equal_aspects, drawn, originals)), scenes)
    assert scores["pair"] == scores["all"] and "single" not in scores
    assert scores["place"] >= 0.75 and scores["color"] >= 0.75 and scores["all"] >= 0.5, scores


@pytest.mark.parametrize("flags, message", [
    ("--scenes 0", "--scenes is 0; it must be at least 1"),
    ("--batch 0", "--batch is 0; it must be at least 1"),
    ("--steps 0", "num_iter is 0; it must be a whole number from 1 up"),
    ("--cfg nan", "cfg is nan; it must be a number from 0 up"),
    ("--model nowhere", "nowhere: no such file or folder")])
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["reconstruction", *flags.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"harmonkit.evals: {message}") and error.count("\n") == 1
