"""The judge accepts every rendered scene and rejects pictures that are wrong in any one respect."""
import hashlib
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from harmonkit.shapes_world import judge, world
from harmonkit.shapes_world.judge import CATEGORIES, correct


@pytest.fixture(scope="module")
def one_thing():
    """The first prompt of "colors": its scene and its picture."""
    scene = next(scene for category, scene, _ in judge.prompts(1, False) if category == "colors")
    return scene, world.render(scene)


def test_the_judge_is_right():
    accepted, rejected, n, m = judge.judge_the_judge(count=60)
    assert (n, m) == (120, 360)
    assert accepted == rejected == 1


def test_wrong_pictures_are_wrong_in_one_respect_each():
    kinds = {category: [] for category in CATEGORIES}
    for category, scene, _ in judge.prompts(1, False):
        for wrong in judge.spoiled(scene, category):
            things = list(zip(scene.things, wrong.things, strict=False))
            if len(wrong.things) < len(scene.things):
                kinds[category].append("missing")
            elif any(a.shape != b.shape for a, b in things):
                kinds[category].append("shape")
            elif any(a.color != b.color for a, b in things):
                kinds[category].append("color")
            else:
                kinds[category].append("place")
                assert world.relation(*wrong.things) != world.relation(*scene.things)
    plain, colored = ["shape", "missing"], ["shape", "missing", "color"]
    assert list(kinds.values()) == [plain, plain, colored, colored, colored + ["place"], colored]


def test_things_are_found_where_they_are():
    for _, scene, _ in judge.prompts(3, False):
        found = judge.find(world.render(scene))
        assert len(found) == len(scene.things)
        for thing in scene.things:
            near = [t for t in found if abs(t.x - thing.x) < 3 and abs(t.y - thing.y) < 3]
            assert [(t.color, t.shape) for t in near] == [(thing.color, thing.shape)]
            assert abs(near[0].size - thing.size) < 4


def test_an_extra_thing_is_wrong(one_thing):
    scene, image = one_thing
    assert correct(image, scene, "colors")
    extra = image.copy()
    x = 4 if scene.things[0].x > 32 else 48
    ImageDraw.Draw(extra).rectangle((x, 4, x + 11, 15), fill=(230, 20, 20))
    assert not correct(extra, scene, "colors")


def test_an_empty_picture_and_a_smudge_are_wrong(one_thing):
    scene, _ = one_thing
    smudge = Image.new("RGB", (64, 64), "white")
    assert not correct(smudge, scene, "colors")
    ImageDraw.Draw(smudge).ellipse((10, 20, 50, 30), fill=scene.things[0].rgb)
    ImageDraw.Draw(smudge).ellipse((10, 24, 22, 50), fill=scene.things[0].rgb)
    assert [thing.shape for thing in judge.find(smudge)] == ["?"]
    assert not correct(smudge, scene, "colors")


def test_specks_and_pale_areas_are_background(one_thing):
    scene, image = one_thing
    speckled = image.copy()
    x = 1 if scene.things[0].x > 32 else 59
    ImageDraw.Draw(speckled).rectangle((x, 1, x + 3, 4), fill=(20, 20, 230))        # 16 pixels, fewer than 20
    ImageDraw.Draw(speckled).rectangle((x, 50, x + 3, 60), fill=(200, 200, 255))    # a chroma of 55
    assert len(judge.find(speckled)) == 1


def test_components_are_connected_by_sides():
    mask = np.zeros((6, 6), dtype=bool)
    mask[0:2, 0:2] = True
    mask[2:4, 2:4] = True                                   # touches the first at a corner
    mask[5, :] = mask[4, 5] = True
    sizes = [int(component.sum()) for component in judge.components(mask)]
    assert sizes == [4, 4, 7]
    assert (sum(component.astype(int) for component in judge.components(mask)) == mask).all()


def test_prompts_are_many_fixed_and_true():
    seen, held_out = judge.prompts(60, False), judge.prompts(40, True)
    assert (len(seen), len(held_out)) == (360, 160)
    digest = hashlib.sha256(str([caption for _, _, caption in seen + held_out]).encode()).hexdigest()
    assert digest[:16] == "54bab9db428270e8"    # published figures belong to these prompts
    assert [category for category, _, _ in seen[::60]] == list(CATEGORIES)
    for _, _, caption in held_out:
        assert any(f"{color} {shape}" in caption for color, shape in world.HELD_OUT)


def test_a_perfect_model_is_always_right_with_a_token_a_step_and_not_in_two_steps():
    perfect, hurried = judge.ceiling(64, 4), judge.ceiling(2, 4)
    assert list(perfect) == list(CATEGORIES)
    assert set(perfect.values()) == {1.0}
    assert sum(hurried.values()) < 4


def test_a_perfect_model_draws_one_of_the_pictures_or_in_one_step_any_tokens():
    rng = np.random.default_rng(0)
    pictures = rng.integers(256, size=(5, 64, 64, 3), dtype=np.uint8)
    drawn = judge.perfect_picture(pictures, 64, np.random.default_rng(1))
    assert sum((drawn == picture).all() for picture in pictures) == 1
    drawn = judge.perfect_picture(pictures, 1, np.random.default_rng(1))
    source = (drawn == pictures).reshape(5, 8, 8, 8, 8, 3).all(axis=(2, 4, 5))      # (5, 8, 8)
    assert (source.sum(0) == 1).all()                       # each token is of one picture
    assert source.sum(axis=(1, 2)).min() > 4                # all pictures are used


def test_allowed_scenes_make_the_caption_true():
    for category, scene, _ in judge.prompts(2, False):
        for other in judge.allowed(scene, category, 10, random.Random(0)):
            assert correct(world.render(other), scene, category)
