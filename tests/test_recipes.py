from dataclasses import asdict

import pytest
from training_helpers import SHORT

import train
from harmonkit.training.optim import PARTS
from harmonkit.training.recipes import (
    CHAINS,
    FIELDS,
    RECIPES,
    TRAINED_BY,
    accumulation,
    change,
    override,
    settings,
)


def overridden(name, *flags):
    return override(name, RECIPES[name], train.arguments([name, *flags]))


def test_table_1_of_the_paper():
    s1, s2, s3 = (RECIPES[f"stage{i}"] for i in (1, 2, 3))
    assert s1.lr == {"mar-decoder": 1e-4, "mar-encoder": 1e-5}
    assert s2.lr == {"mar-decoder": 1e-4, "mar-encoder": 1e-5, "llm": 1e-5}
    assert s3.lr == {"mar-decoder": 2e-5, "mar-encoder": 2e-6, "llm": 2e-6}
    assert [(s.size, s.batch, s.steps) for s in (s1, s2, s3)] == [
        (256, 4096, 50_000), (256, 4096, 50_000), (512, 1024, 50_000)]
    assert s1.ratio == {"image2text": 1, "text2image": 2}
    assert s2.ratio == {"text": 1, "image2text": 3, "text2image": 8}
    assert s3.ratio == {"text": 1, "image2text": 3, "text2image": 16}
    for s in (s1, s2, s3):
        assert (s.warmup, s.weight_decay, s.clip, s.grad_scale) == (0.01, 0.02, 1.0, 0.1)
        assert (s.bf16, s.checkpointing, s.from_scratch) == (True, True, "")
        assert (s.tiny.muon, s.tiny.cosine_mask, s.tiny.all_hidden) == (False, False, 0.0), "as in the paper"


def test_every_recipe_can_be_trained():
    for name, recipe in RECIPES.items():
        assert overridden(name) == recipe, "without flags nothing changes"
        assert recipe.after in (*RECIPES, "")
        assert set(recipe.ratio) <= set(TRAINED_BY) and set(recipe.lr) <= set(PARTS)
        accumulation(recipe, 1)
    after = [RECIPES[name].after for name in CHAINS["tiny"]]
    assert after == ["", *CHAINS["tiny"][:-1]]


def test_every_field_is_a_flag():
    examples = {int: ("3", 3), float: ("0.5", 0.5), bool: ("true", True), str: ("x", "x")}
    examples[dict] = ("text=2", {"text": 2.0})
    for field in FIELDS:
        text, value = examples[field.type]
        if field.name == "lr":
            text, value = "llm=2", {"llm": 2.0}
        flag = f"--{field.name.replace('_', '-')}"
        assert settings(overridden("tiny-joint", flag, text))[field.name] == value, flag
    assert {field.name for field in FIELDS} == set(settings(SHORT)) and "tiny" not in settings(SHORT)


def test_change_reaches_nested_fields():
    changed = change(SHORT, steps=7, muon=True)
    assert (changed.steps, changed.tiny.muon, changed.tiny.scenes) == (7, True, 20)
    assert asdict(change(changed, steps=6, muon=False)) == asdict(SHORT)


def test_only_one_part():
    flags = ("--only", "mar-decoder", "--steps", "7", "--lr", "mar-decoder=3e-4,llm=1e-5")
    recipe = overridden("finetune", *flags)
    assert (recipe.lr, recipe.steps) == ({"mar-decoder": 3e-4}, 7)
    ratio = overridden("stage2", "--only", "mar-decoder").ratio
    assert ratio == {"text2image": 8}, "the decoder has no part in answers"


@pytest.mark.parametrize("flags, message", [
    (("--only", "mar-decoder", "--ratio", "text=1"), "no task of it trains mar-decoder"),
    (("--only", "vae"), "--only vae: stage2 trains mar-decoder, mar-encoder, llm"),
    (("--ratio", "drawing=1"), "--ratio: 'drawing' must be one of text, image2text"),
    (("--lr", "llm=0"), "--lr: 'llm' must be one of .* above 0"),
    (("--save-every", "0"), "save-every must be at least 1"),
    (("--sample-every", "-1"), "sample-every at least 0"),
])
def test_impossible_values(flags, message):
    with pytest.raises(ValueError, match=message):
        overridden("stage2", *flags)


def test_the_batch_must_divide():
    message = "a batch of 10 is no multiple of 2 processes × a micro-batch of 2; --batch 8 is"
    with pytest.raises(ValueError, match=message):
        accumulation(change(SHORT, batch=10), 2)
    assert accumulation(change(SHORT, batch=16), 2) == 4
