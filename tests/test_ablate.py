from dataclasses import replace

import pytest
from test_train import SHORT, log, options, small_world  # noqa: F401

import ablate
import train


def test_arms_start_alike_and_are_scored(small_world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ablate, "RECIPES", {name: replace(SHORT, ratio=recipe.ratio, lr=recipe.lr) for name, recipe in ablate.RECIPES.items()})
    start = replace(SHORT, ratio={"mar": 1}, lr={"mar-decoder": 1e-3}, steps=2)
    train.train("tiny-mar", start, options(tmp_path))
    results = [ablate.run_arm("tasks", arm, 0, 3, 8, tmp_path, prompts=2, questions=2) for arm in ("joint", "generation alone")]
    for r in results:
        assert all(0 <= r[column] <= 1 for column in ablate.COLUMNS[1:]) and 0 < r[ablate.LOSS] < 5 and (r["steps"], r["batch"]) == (3, 8)
    tasks = [set(log(tmp_path / "ablate" / "tasks" / f"{arm}-0-3x8", "0-tiny-joint")[-1]["loss"]) for arm in ("joint", "generation-alone")]
    assert tasks == [{"text2image", "image2text"}, {"text2image"}]
    arms = ablate.EXPERIMENTS["stages"][1].values()
    assert {round(sum(share for _, share, _ in stages), 6) for stages in arms} == {1}                       # as many steps in every arm


def test_the_table_shows_the_spread():
    row = lambda arm, seed, value: {"arm": arm, "seed": seed, "training_seconds": 60, "steps": 3, "batch": 8, "prompts": 2, "scenes asked about": 2} | {c: value for c in ablate.COLUMNS}  # noqa: E731
    text = ablate.table([row("a", 0, 0.25), row("a", 1, 0.75), row("b", 0, 1.0)])
    assert "| a | 0, 1 | 0.500 (0.250 – 0.750) |" in text and "| b | 0 | 1.000 |" in text


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablate.py", "reca", "--table", "--docs", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        ablate.main()
    assert "nothing has been run yet" in capsys.readouterr().err
