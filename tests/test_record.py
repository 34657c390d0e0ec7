"""What a resumed command changes: used and said, or refused with what to do."""
import json
import shutil

import pytest
import torch
from conftest import shake
from data_files import write_shard
from training_helpers import (  # noqa: F401
    ALL,
    SHORT,
    SMALL_64,
    equal,
    options,
    run,
    small_world,
)

import train
from harmon import Harmon
from harmonkit.training import changes, record
from harmonkit.training.checkpoint_files import last_checkpoint
from harmonkit.training.recipes import change, settings

pytestmark = pytest.mark.usefixtures("small_world")
TEXT = change(SHORT, ratio={"text": 1}, lr={"llm": 1e-3}, batch=2, steps=4)        # the quickest
RECA = change(SHORT, ratio={"reca": 1}, batch=2, steps=4)


@pytest.fixture
def models(tokenizer, tmp_path):
    """Two folders of models that differ."""
    folders = []
    for number in range(2):
        model = shake(Harmon(SMALL_64))
        with torch.no_grad():
            model.proj_in[0].weight.add_(number)
        model.tokenizer = tokenizer
        folders.append(tmp_path / f"model{number}")
        model.save_pretrained(folders[-1])
    return folders


@pytest.fixture
def mixture(tmp_path):
    """A mixture of 12 pictures."""
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "a.tar", range(12))
    file = tmp_path / "data" / "mixture.json"
    file.write_text(json.dumps([{"path": "a.tar", "task": "reca"}]))
    return file


def test_changed_rates_are_used(tmp_path):
    """The optimizer's state holds the old ones."""
    for name in ("same", "lr", "decay"):
        run(TEXT, tmp_path, name=name, stop_at=2)
    same = run(TEXT, tmp_path, name="same")
    rate = run(TEXT, tmp_path, name="lr", lr={"llm": 1e-1})
    decay = run(TEXT, tmp_path, name="decay", weight_decay=50.0)
    names = ["llm.model.layers.0.mlp.up_proj.weight"]
    for other, largest in ((rate, 0.05), (decay, 1e-4)):
        difference = (same["model"][names[0]] - other["model"][names[0]]).abs().max()
        assert difference > largest
    assert [group["lr"] > 0 for group in rate["optimizer"]["param_groups"]] == [True] * len(
        rate["optimizer"]["param_groups"])


def test_changed_settings_are_said(tmp_path, capsys):
    run(TEXT, tmp_path, stop_at=1)
    run(TEXT, tmp_path, stop_at=2, batch=4, lr={"llm": 2e-3})
    err = capsys.readouterr().err
    assert "batch 2 -> 4" in err and "lr {" in err and "the data come in another order" in err
    content = run(TEXT, tmp_path, stop_at=3, batch=4, lr={"llm": 2e-3}, clip=2.0)
    err = capsys.readouterr().err
    assert "clip 1.0 -> 2.0" in err and "batch" not in err and "another order" not in err
    assert content["optimizer"]["param_groups"][0]["peak"] == 2e-3
    run(TEXT, tmp_path, batch=4, lr={"llm": 2e-3}, kl=3.0)
    assert "kl 0.01 -> 3.0" in capsys.readouterr().err
    starts = json.loads((tmp_path / "test" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 1, 2, 3]
    assert "batch 2 -> 4" in starts[1]["changes"]


@pytest.mark.parametrize("other, message", [
    (dict(lr=ALL), "trained llm so far, not llm, mar-decoder, mar-encoder; .*--init .*another --runs"),
    (dict(muon=True), "--muon true, but the state of this run's optimizer is from --muon false"),
    (dict(scenes=21), "has 21 samples now, and had 20 when the run began .*--scenes was 20"),
    (dict(seed=1), "shapes-text, their order or their words are others .*--seed was 0; to train"),
    (dict(ratio={"text": 1, "text2image": 1}), "trained on shapes-text .text., not on shapes-text .text., "),
])
def test_another_run_in_the_same_folder_is_refused(tmp_path, other, message):
    before = run(TEXT, tmp_path, stop_at=2)
    with pytest.raises(ValueError, match=message):
        run(TEXT, tmp_path, **other)
    assert equal(before["model"], last_checkpoint(tmp_path / "test")[1]["model"])


def test_a_finished_run_is_not_handed_out_for_another(tmp_path, capsys):
    run(TEXT, tmp_path)
    run(TEXT, tmp_path, save_every=1)
    assert "finished, 4 steps; another --runs trains anew" in capsys.readouterr().err
    with pytest.raises(ValueError, match="finished, with --clip 1.0; another --runs trains anew, more"):
        run(TEXT, tmp_path, clip=2.0)
    with pytest.raises(ValueError, match="finished, with --steps 4"):
        run(TEXT, tmp_path, steps=3)
    assert run(TEXT, tmp_path, steps=5)["step"] == 5


def test_another_start_is_refused(tmp_path, models, capsys):
    first, second = models
    run(TEXT, tmp_path, "--init", first, stop_at=1)
    with pytest.raises(ValueError, match=f"--init {second}, but this run started with --init {first}; leave"):
        run(TEXT, tmp_path, "--init", second)
    shutil.move(first, tmp_path / "elsewhere")
    run(TEXT, tmp_path, "--init", tmp_path / "elsewhere", stop_at=2)        # the same files
    run(TEXT, tmp_path, stop_at=3)                                          # needs none
    assert f"goes on with --init {first}, which is left out here" in capsys.readouterr().err
    shutil.copytree(second, first)
    capsys.readouterr()
    run(TEXT, tmp_path, "--init", first)
    assert f"goes on with its own weights; {first} has changed since" in capsys.readouterr().err
    run(TEXT, tmp_path, name="from scratch", stop_at=1)
    with pytest.raises(ValueError, match=f"--init {first}, but this run started with random weights"):
        run(TEXT, tmp_path, "--init", first, name="from scratch")


def test_a_recipe_before_that_was_trained_anew_is_noticed(tmp_path):
    run(TEXT, tmp_path, name="before", steps=1)
    after = change(TEXT, after="before")
    run(after, tmp_path, stop_at=1)
    run(after, tmp_path, stop_at=2)
    shutil.rmtree(tmp_path / "before")
    run(after, tmp_path, stop_at=3)                                         # not needed any more
    run(TEXT, tmp_path, name="before", steps=1, clip=0.1, weight_decay=1.0)
    with pytest.raises(ValueError, match="before has changed since this run started from it; another --runs"):
        run(after, tmp_path)


def test_a_recipe_starts_from_a_finished_run(tmp_path):
    run(TEXT, tmp_path, name="before", stop_at=1)
    with pytest.raises(ValueError, match="1 of 4 steps are done, test needs all; --init "):
        run(TEXT, tmp_path, after="before")
    content = last_checkpoint(tmp_path / "before")[1]
    started = run(TEXT, tmp_path, "--init", tmp_path / "before", steps=1, lr={"vae": 1e-30},
                  ratio={"reconstruct": 1}, batch=2)
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(content["model_ema"][name], started["model"][name])


@pytest.mark.parametrize("flags", [("--init-llm", "x"), ("--init-mar", "x"), ("--config", "harmon-1.5b")])
def test_flags_without_effect_are_refused(tmp_path, models, flags):
    with pytest.raises(ValueError, match=f"{flags[0]} {flags[1]} has no effect beside --init, a whole model"):
        run(TEXT, tmp_path, "--init", models[0], *flags)


def test_other_data_are_refused(tmp_path, mixture, capsys):
    run(RECA, tmp_path, "--mixture", mixture, stop_at=1)
    moved = shutil.move(tmp_path / "data", tmp_path / "moved") / "mixture.json"
    run(RECA, tmp_path, "--mixture", moved, stop_at=2)
    write_shard(tmp_path / "moved" / "a.tar", range(13))
    with pytest.raises(ValueError, match="a.tar has 13 samples now, and had 12 when the run began"):
        run(RECA, tmp_path, "--mixture", moved)
    write_shard(tmp_path / "moved" / "a.tar", reversed(range(12)))
    with pytest.raises(ValueError, match="a.tar, their order or their words are others"):
        run(RECA, tmp_path, "--mixture", moved)
    with pytest.raises(ValueError, match="20 samples now, and had 12"):
        run(RECA, tmp_path)
    write_shard(tmp_path / "moved" / "a.tar", range(12))
    moved.write_text(json.dumps([{"path": "a.tar", "task": "reca", "weight": 3}]))
    capsys.readouterr()
    run(RECA, tmp_path, "--mixture", moved)
    assert "weight 1 -> 3" in capsys.readouterr().err
    moved.unlink()
    run(RECA, tmp_path, "--mixture", moved)
    assert "its data as they were; they cannot be opened now" in capsys.readouterr().err


def test_the_record_says_what_a_run_was(tmp_path, mixture, models):
    run(RECA, tmp_path, "--mixture", mixture, "--init", models[0])
    found = record.read(tmp_path / "test")
    assert found["settings"] == json.loads(json.dumps(settings(RECA)))
    start = found["start"]["init"]
    assert start["path"] == str(models[0]) and len(start["fingerprint"]) == 8
    source, = found["data"]
    assert (source["samples"], source["task"], source["format"]) == (12, "reca", "WebDataset")
    assert len(source["fingerprint"]) == 16
    start, = found["starts"]
    assert start["command"][0] == "train.py" and start["versions"]["torch"] == torch.__version__
    assert start["processes"] == 1 and start["step"] == 0 and start["host"]


def test_a_run_without_its_record_goes_on_and_says_so(tmp_path, capsys):
    whole = run(TEXT, tmp_path / "a")
    run(TEXT, tmp_path / "b", stop_at=2)
    (tmp_path / "b" / "test" / "run.json").unlink()
    assert equal(whole["model"], run(TEXT, tmp_path / "b")["model"])
    assert "no run.json, so its start and its data cannot be compared" in capsys.readouterr().err


# ---- resume RUN --------------------------------------------------------------------------------------------

def main(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags)])
    train.main()


FINETUNE = ("finetune", "--device", "cpu", "--steps", 4, "--batch", 2, "--micro-batch", 1, "--size", 64,
            "--ratio", "reca=1", "--lr", "mar-decoder=1e-3,llm=0.0001", "--checkpointing", "false",
            "--save-every", 2, "--sample-every", 0)


def test_resume_needs_the_folder_alone(tmp_path, mixture, models, monkeypatch):
    monkeypatch.chdir(tmp_path)                                             # relative paths
    start = (*FINETUNE, "--mixture", "data/mixture.json", "--init", models[0].name)
    main(monkeypatch, *start, "--runs", "whole")
    main(monkeypatch, *start, "--runs", "halves", "--export", "exported")
    (tmp_path / "halves" / "finetune" / "step-000004.pt").unlink()
    shutil.rmtree(tmp_path / "exported")
    (tmp_path / "data" / "mixture.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main(monkeypatch, "resume", "../halves/finetune")
    contents = [last_checkpoint(tmp_path / runs / "finetune")[1] for runs in ("whole", "halves")]
    assert contents[1]["step"] == 4 and equal(contents[0]["model"], contents[1]["model"])
    assert (tmp_path / "exported" / "model.safetensors").exists()
    # Renamed, and with another flag.
    shutil.move(tmp_path / "halves" / "finetune", tmp_path / "best")
    main(monkeypatch, "resume", tmp_path / "best", "--steps", 5)
    main(monkeypatch, "resume", tmp_path / "best")
    assert last_checkpoint(tmp_path / "best")[1]["step"] == 5


def test_resume_goes_on_with_the_chain(tmp_path, monkeypatch):
    flags = ("tiny", "--device", "cpu", "--runs", tmp_path / "runs", "--steps", 1, "--batch", 2,
             "--micro-batch", 1, "--scenes", 20, "--compile", "false")
    main(monkeypatch, *flags)
    for name in ("tiny-align", "tiny-joint", "tiny-reca"):
        shutil.rmtree(tmp_path / "runs" / name)
    main(monkeypatch, "resume", tmp_path / "runs" / "tiny-mar")
    assert last_checkpoint(tmp_path / "runs" / "tiny-reca")[1]["step"] == 1


def test_resume_takes_no_other_place(tmp_path, monkeypatch, capsys):
    main(monkeypatch, "tiny-llm", "--device", "cpu", "--runs", tmp_path, "--steps", 1, "--batch", 2,
         "--micro-batch", 1, "--scenes", 20)
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, "resume", tmp_path / "tiny-llm", "--runs", tmp_path / "other")
    assert "`resume` goes on in" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("argv, message", [
    (("resume",), "resume RUN: the folder of a run is expected"),
    (("resume", "nowhere"), "nowhere: no run.json"),
    (("tiny", "--workers", "-1"), "--workers -1"),
    (("tiny", "--export", "train.py"), "--export train.py: a file"),
])
def test_wrong_commands_are_named(monkeypatch, capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        main(monkeypatch, *argv)
    assert message in capsys.readouterr().err


def test_other_software_is_said(tmp_path):
    start = record.describe_start(3, options(tmp_path))
    before = json.loads(json.dumps({"starts": [start]}))
    assert changes.compare_versions(before, start) == []
    before["starts"][0]["versions"]["torch"] = "1.0"
    before["starts"][0]["processes"] = 8
    said = changes.compare_versions(before, start)
    assert said == [f"torch 1.0 -> {start['versions']['torch']}", "processes 8 -> 1"]
