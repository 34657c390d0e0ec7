from dataclasses import asdict

import pytest
from training_helpers import SHORT

import train
from harmonkit.training.optim import PARTS
from harmonkit.training.recipes import (
    CHAINS,
    FIELDS,
    RANGES,
    RECIPES,
    TRAINED_BY,
    accumulation,
    change,
    check,
    flag_of,
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
    others = {"ratio": ("text=2", {"text": 2.0}), "lr": ("llm=2", {"llm": 2.0}), "size": ("24", 24),
              "from_scratch": ("harmon-0.5b", "harmon-0.5b")}
    for field in FIELDS:
        text, value = others.get(field.name) or examples[field.type]
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
    (("--from-scratch", "harmon-tiny", "--size", "60"), "--size is 60; expected a multiple of 8, the VAE's"),
])
def test_impossible_values(flags, message):
    with pytest.raises(ValueError, match=message):
        overridden("stage2", *flags)


# ---- ranges ------------------------------------------------------------------------------------------------

NOT_ABOVE_0 = ("nan", "inf", "-inf", "0", "-1", "1e-400", "1e300")
BELOW_0 = ("nan", "inf", "-inf", "-1e-9", "1e300")
OUTSIDE_0_TO_1 = ("nan", "inf", "-inf", "-0.01", "1.01")
NOT_FROM_1 = ("0", "-1", "-5", "1000000001", "9" * 30)
WRONG = {                         # field -> texts that its flag refuses
    "ratio": (*(f"text={value}" for value in NOT_ABOVE_0), "drawing=1", "text=1,drawing=1"),
    "lr": (*(f"llm={value}" for value in NOT_ABOVE_0), "head=1", "llm=1e-3,llms=1"),
    "steps": NOT_FROM_1, "batch": NOT_FROM_1, "micro_batch": NOT_FROM_1, "save_every": NOT_FROM_1,
    "scenes": NOT_FROM_1, "size": (*NOT_FROM_1, "16384"), "max_length": (*NOT_FROM_1, "32769"),
    "sample_every": ("-1", "1000000001"), "seed": ("9" * 30, "-1"),
    "after": ("../elsewhere", "/runs/tiny-llm", "a/../../b"), "from_scratch": ("harmon-7b", "tiny", "None"),
    "warmup": OUTSIDE_0_TO_1, "all_hidden": OUTSIDE_0_TO_1, "ema": (*OUTSIDE_0_TO_1, "1", "2"),
    "clip": ("nan", "-inf", "0", "-1"),
    "weight_decay": BELOW_0, "grad_scale": BELOW_0, "kl": BELOW_0, "free_nats": BELOW_0, "local": BELOW_0,
}
NO_BOOLEAN = ("yes", "1", "0", "")                                          # argparse refuses them
MALFORMED = ("", "llm", "llm=", "=1", "llm=x", "llm=1=2", "llm=1,", ",", "llm=1e-3,llm=1e-4", "llm=1,llm=1")


def test_every_field_has_a_range():
    names = [field.name for field in FIELDS]
    assert names == list(settings(SHORT)) and set(RANGES) == set(names)
    booleans = {field.name for field in FIELDS if field.type is bool}
    assert set(WRONG) | booleans == set(names) and not set(WRONG) & booleans


@pytest.mark.parametrize("name, text", [(name, text) for name, texts in WRONG.items() for text in texts])
def test_values_outside_their_range_are_refused_by_flag(name, text):
    with pytest.raises(ValueError, match=f"^{flag_of(name)} is .*; expected ") as error:
        overridden("stage2", f"{flag_of(name)}={text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, text", [
    ("clip", "inf"), ("warmup", "0"), ("warmup", "1"), ("ema", "0"), ("ema", "0.99999"), ("max_length", "1"),
    ("max_length", "32768"), ("weight_decay", "0"), ("kl", "0"), ("grad_scale", "0"), ("sample_every", "0"),
    ("all_hidden", "1"), ("seed", "3"), ("steps", "1"), ("after", "ablate/loss/0-joint"), ("after", "")])
def test_the_ends_of_ranges_are_inside(name, text):
    assert str(settings(overridden("stage2", f"{flag_of(name)}={text}"))[name]).removesuffix(".0") == text


@pytest.mark.parametrize("changes", [{"muon": 1}, {"bf16": "false"}, {"steps": 2.0}, {"steps": True},
                                     {"ratio": {}}, {"lr": None}, {"ema": None}, {"after": None},
                                     {"lr": {"llm": "1e-3"}}, {"clip": "1"}])
def test_a_recipe_that_is_read_back_is_checked(changes):
    check(SHORT)
    name, = changes
    with pytest.raises(ValueError, match=f"^{flag_of(name)} is "):
        check(change(SHORT, **changes))


@pytest.mark.parametrize("flag, text", [
    *((flag, text) for flag in ("--lr", "--ratio") for text in MALFORMED),
    *((flag_of(field.name), text) for field in FIELDS if field.type is bool for text in NO_BOOLEAN)])
def test_what_cannot_be_read_is_refused_by_flag(flag, text, capsys):
    with pytest.raises(SystemExit) as end:
        overridden("stage2", f"{flag}={text}")
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and f"argument {flag}: " in last
    assert "is not NAME=NUMBER" in last or "given twice" in last or "neither true nor false" in last


def test_the_batch_must_divide():
    message = "a batch of 10 is no multiple of 2 processes × a micro-batch of 2; --batch 8 is"
    with pytest.raises(ValueError, match=message):
        accumulation(change(SHORT, batch=10), 2)
    assert accumulation(change(SHORT, batch=16), 2) == 4
