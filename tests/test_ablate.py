"""The ablations: arms start alike, finished ones are kept, the table shows means and ranges."""
import json

import pytest
from training_helpers import SHORT, run, small_world  # noqa: F401

from harmonkit.scripts import ablate
from harmonkit.training.recipes import RECIPES, change

SCORES = {column: 0.5 for column in ablate.COLUMNS}


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run ablate with its files in tmp_path."""
    def run(*flags):
        ablate.main([*flags, "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")])
    return run


@pytest.fixture
def scored(monkeypatch):
    """Arms train nothing and score 0.5; the list of those that are run."""
    runs = []
    monkeypatch.setattr(ablate, "run_arm", lambda arm, seed, args: row(arm, seed))

    def row(arm, seed):
        runs.append((arm, seed))
        settings = {"steps": 3, "batch": 8, "prompts": 2, "scenes asked about": 4}
        return {"arm": arm, "seed": seed} | settings | SCORES
    return runs


@pytest.fixture
def quick_scores(monkeypatch):
    """The real evaluations on fewer scenes, in fewer steps."""
    losses, generation = ablate.masked_losses, ablate.generation_scores

    def generate(model, split, count, seed, batch, **sampling):
        assert sampling == {"num_iter": 16, "cfg": 3.0}
        return generation(model, split, count, seed, batch, num_iter=1, cfg=1.0)
    monkeypatch.setattr(ablate, "masked_losses", lambda model, ratios, count: losses(model, ratios[:2], 2))
    monkeypatch.setattr(ablate, "generation_scores", generate)


@pytest.mark.usefixtures("small_world", "quick_scores")
def test_an_arm_is_trained_scored_and_kept(command, tmp_path, monkeypatch, capsys):
    """Two stages of 4 steps in all: the second goes on from the first, and the arm is run once."""
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(ablate.RECIPES, name, change(SHORT, ratio=recipe.ratio, lr=recipe.lr, scenes=4))
    stages = [("tiny-align", 0.25, {}), ("tiny-joint", 0.75, ablate.ASK)]
    monkeypatch.setattr(ablate, "EXPERIMENTS", {"stages": ("tiny-mar", {"both, alike": stages})})
    start = change(SHORT, ratio={"mar": 1}, lr={"mar-decoder": 1e-3}, steps=1, batch=2, scenes=4)
    run(start, tmp_path / "runs", name="tiny-mar")

    flags = ["stages", "--steps", "4", "--batch", "3", "--seeds", "0", "--prompts", "2", "--questions", "2"]
    command(*flags)
    arm = tmp_path / "runs" / "ablate" / "stages" / "both-alike-0-4x3"
    runs = [arm / "0-tiny-align", arm / "1-tiny-joint"]
    contents = [ablate.last_checkpoint(folder)[1] for folder in runs]
    recipes = [content["recipe"] for content in contents]
    assert [content["step"] for content in contents] == [1, 3]
    assert [recipe["after"] for recipe in recipes] == [
        "tiny-mar", "ablate/stages/both-alike-0-4x3/0-tiny-align"]
    assert [recipe["ratio"] for recipe in recipes] == [{"text2image": 2, "image2text": 1}, {"image2text": 1}]
    assert all((recipe["batch"], recipe["micro_batch"], recipe["seed"]) == (3, 1, 0) for recipe in recipes)

    (scores,) = json.loads((tmp_path / "docs" / "ablate-stages.json").read_text())
    model = ablate.model_from_checkpoint(contents[-1]).eval()               # the last stage's EMA weights
    model.tokenizer = ablate.load_tokenizer(runs[-1])
    (_, first, _), (_, second, _) = ablate.masked_losses(model, (1.0, 0.9), 2)
    assert scores[ablate.LOSS] == round((first + second) / 2, 4)
    assert all(0 <= scores[column] <= 1 for column in ablate.COLUMNS[1:])
    assert (scores["steps"], scores["batch"], scores["prompts"], scores["scenes asked about"]) == (4, 3, 2, 2)

    # Kept scores are used, unless other prompts or questions are asked for; the runs are kept in any case.
    (file,) = arm.glob("scores-*.json")
    file.write_text(json.dumps(scores | {ablate.LOSS: 0.25}))
    command(*flags)
    assert json.loads((tmp_path / "docs" / "ablate-stages.json").read_text())[0][ablate.LOSS] == 0.25
    assert "finished" not in capsys.readouterr().err
    monkeypatch.setattr(ablate, "scores_of", lambda model, seed, args: SCORES)
    command(*flags[:-1], "4")
    (again,) = json.loads((tmp_path / "docs" / "ablate-stages.json").read_text())
    assert again[ablate.LOSS] == 0.5 and again["scenes asked about"] == 4
    assert "1-tiny-joint: finished, 3 steps" in capsys.readouterr().err


def test_the_experiments():
    """The stages of an arm take all steps, or half; the first starts from a run of `train.py tiny`."""
    for start, arms in ablate.EXPERIMENTS.values():
        assert start in RECIPES
        for arm, stages in arms.items():
            fraction = sum(fraction for _, fraction, _ in stages)
            expected = 0.5 if "half" in arm else 1
            assert fraction == pytest.approx(0 if arm == "before" else expected), arm
    stages = ablate.EXPERIMENTS["stages"][1]["I, II, III"]
    recipes = [change(RECIPES[name], **changes) for name, _, changes in stages]
    assert [recipe.ratio for recipe in recipes] == [
        {"text2image": 2, "image2text": 1}, {"text2image": 10, "image2text": 2, "text": 4},
        {"text2image": 16, "image2text": 3, "text": 1}]
    assert [recipe.lr.get("llm") for recipe in recipes] == [None, 7e-4, 1.4e-4]


def test_files_and_the_table_anew(command, scored, tmp_path, capsys):
    command("reca", "--seeds", "0", "3")
    assert scored == [(arm, seed) for seed in (0, 3) for arm in ("before", "plain", "reca")]
    page = tmp_path / "docs" / "ablate-reca.md"
    first = page.read_text()
    heading = "ablate reca --steps 3 --batch 8 --seeds 0 3 --prompts 2 --questions 4`\n"
    assert first.startswith("# `python -m harmonkit.scripts." + heading) and ablate.LEGEND in first
    assert "| plain | 0, 3 | 0.500 (0.500 – 0.500) |" in first and "(ablate-reca.png)" in first
    assert (tmp_path / "docs" / "ablate-reca.png").stat().st_size > 5000
    page.unlink()
    command("reca", "--table")
    assert len(scored) == 6 and page.read_text() == first and "| reca | 0, 3 |" in capsys.readouterr().out


def test_the_table_shows_the_spread():
    def row(seed, value):
        return {"seed": seed} | dict.fromkeys(ablate.COLUMNS, value)
    lines = ablate.table({"a": [row(0, 0.25), row(1, 0.75)], "b": [row(0, 1.0)]}).splitlines()
    assert lines[2].startswith("| a | 0, 1 | 0.500 (0.250 – 0.750) |")
    assert lines[3].startswith("| b | 0 | 1.000 |")
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("flags, message", [(("reca", "--table"), "ablate-reca.json: no such file"),
                                            (("reca", "--seeds", "0"), "run `python train.py tiny` first")])
def test_nothing_to_begin_with(flags, message, command, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(*flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


def test_matplotlib_is_needed_from_the_start(command, scored, monkeypatch, capsys):
    monkeypatch.setattr(ablate, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        command("reca")
    assert "pip install matplotlib" in capsys.readouterr().err and not scored
