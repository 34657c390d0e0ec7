import json
from dataclasses import replace

import pytest
from test_train import SHORT, log, options, small_world  # noqa: F401

from harmonkit.scripts import ablate
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


def test_what_is_published_is_of_these_runs(tmp_path, monkeypatch):
    """Scores in docs are no reason not to run; the runs' own are, when every setting is the same."""
    ran = []

    def run_arm(experiment, arm, seed, steps, batch, runs, prompts, questions):
        ran.append((arm, seed, prompts))
        return {"arm": arm, "seed": seed, "training_seconds": 60, "steps": steps, "batch": batch, "prompts": prompts, "scenes asked about": questions} | {c: 0.5 for c in ablate.COLUMNS}
    monkeypatch.setattr(ablate, "run_arm", run_arm)

    def command(*flags):
        monkeypatch.setattr("sys.argv", ["ablate.py", "reca", "--runs", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs"), *flags])
        ablate.main()
    command("--seeds", "0", "--prompts", "2")
    assert ran == [("before", 0, 2), ("plain", 0, 2), ("reca", 0, 2)]
    command("--seeds", "0", "1", "--prompts", "2")
    assert ran[3:] == [("before", 1, 2), ("plain", 1, 2), ("reca", 1, 2)]
    command("--seeds", "0", "--prompts", "4")
    assert ran[6:] == [("before", 0, 4), ("plain", 0, 4), ("reca", 0, 4)], "of other prompts, other scores"
    assert {r["prompts"] for r in json.loads((tmp_path / "docs" / "ablate-reca.json").read_text())} == {4}
    assert "--seeds 0 --prompts 4" in (tmp_path / "docs" / "ablate-reca.md").read_text()
    (tmp_path / "docs" / "ablate-reca.md").unlink()
    command("--table")
    assert len(ran) == 9 and "--seeds 0 --prompts 4" in (tmp_path / "docs" / "ablate-reca.md").read_text()


def test_nothing_to_show_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ablate.py", "reca", "--table", "--docs", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        ablate.main()
    assert "nothing has been run yet" in capsys.readouterr().err
