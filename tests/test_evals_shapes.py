"""Scores on the shapes world: models whose right answers are known get the scores that they deserve."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from harmon import Harmon
from harmonkit.checkpoints import find_config
from harmonkit.evals import benchmark, pictures, shapes, world_scores
from harmonkit.evals.__main__ import main
from harmonkit.evals.benchmark import Loaded
from harmonkit.shapes_world import judge, world
from harmonkit.terminal import Parser
from harmonkit.tokenizer import load_tokenizer
from harmonkit.weight_files import find_model

TINY = find_config("harmon-tiny")
ABOUT = {"model": "painter", "weights": "0" * 16, "dtype": "float32", "mode": "auto", "version": "1",
         "torch": "2"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def load(monkeypatch):
    """Let the commands load the given model."""
    def replace(model, num_scenes=20):
        monkeypatch.setattr(shapes, "PSNR_SCENES", num_scenes)
        monkeypatch.setattr(Harmon, "from_pretrained", lambda path, **_: model)
        monkeypatch.setattr(benchmark, "load", lambda args: Loaded(model, ABOUT, {}))
        return model
    return replace


class Painter:
    """Paints the scene of a caption and answers right, except for captions and answers in `wrong`.

    Its VAE is off by 0.1 in every pixel.
    """
    device = torch.device("cpu")
    config = TINY
    tokenizer = load_tokenizer(find_model("harmon-tiny"), TINY.llm.vocab_size)

    def __init__(self, wrong=()):
        self.wrong = wrong
        self.seeds = []
        self.asked = []
        self.scenes = {}
        for held_out in (False, True):
            self.scenes |= {caption: scene for _, scene, caption in judge.prompts(20, held_out)}

    def generate_image(self, captions, seed, **_):
        self.seeds += seed if isinstance(seed, list) else [seed + i for i in range(len(captions))]
        return [self.paint(caption) for caption in captions]

    def paint(self, caption):
        empty = world.Scene("single", (), ((220, 220, 220), (220, 220, 220)))
        return world.render(empty if caption in self.wrong else self.scenes[caption])

    def chat(self, question, image, max_new_tokens):
        for i in range(8):
            scene = world.scene("evaluate/questions", i, held_out=i % 2 == 1)
            if world.render(scene).tobytes() == image.tobytes():
                answers = {q: a for _, q, a in world.questions(scene, random.Random(i))}
        self.asked.append(question)
        yield answers[question][:1]
        yield answers[question][1:-1] if answers[question] in self.wrong else answers[question][1:]

    def encode(self, pixels):
        return pixels

    def decode(self, latents):
        return latents - 0.1 * latents.sign()


def test_generation_scores_count_right_pictures():
    captions = [caption for category, _, caption in judge.prompts(4, False) if category == "counting"]
    model = Painter(wrong=captions[1:2])
    scores = world_scores.generation_scores(model, "seen", 4, 100, 5, num_iter=16)
    assert scores == {category: 0.75 if category == "counting" else 1.0 for category in judge.CATEGORIES}
    assert model.seeds == list(range(100, 124))
    scores = world_scores.generation_scores(model, "held-out", 2, 0, 5, num_iter=16)
    assert scores == dict.fromkeys(("counting", "colors", "position", "attribution"), 1.0)


def test_layouts_that_captions_leave_open():
    """Half of the world's pairs are one above the other. A model may know a single layout."""
    pairs, stacked = world_scores.layouts(Painter(), 20, 8)
    assert pairs == 20
    assert 5 <= stacked <= 15
    above = next(caption for _, _, caption in judge.prompts(20, False) if " above " in caption)
    one_layout = Painter()
    one_layout.scenes = dict.fromkeys(one_layout.scenes, one_layout.scenes[above])
    assert world_scores.layouts(one_layout, 10, 4) == (10, 10)


def test_question_scores_count_exact_answers():
    model = Painter()
    scores, asked = world_scores.question_scores(model, 8)
    assert set(scores.values()) == {1.0}
    assert len(model.asked) == asked
    first = world.questions(world.scene("evaluate/questions", 0), random.Random(0))
    of_type = {kind: question for kind, question, _ in reversed(first)}
    assert set(model.asked[:len(of_type)]) == set(of_type.values())                 # the first of each type
    assert list(scores)[-2:] == ["seen", "held-out"]
    assert {"describe", "color", "shape", "count", "exists"} <= set(scores)
    scores, same = world_scores.question_scores(Painter(wrong=("yes", "no")), 8)
    assert (scores["exists"], scores["color"], same) == (0, 1, asked)
    assert scores["seen"] == pytest.approx(1 - 4 / (asked / 2), abs=0.03)
    assert "held-out" not in world_scores.question_scores(Painter(), 1)[0]      # one scene is a seen one


def test_psnr_of_a_known_error():
    psnr = world_scores.reconstruction_psnr(Painter(), 60)
    assert psnr == pytest.approx(26.02, abs=0.01)                               # 10 log10(4 / 0.1²)


def test_masked_losses_compare_the_same_masks_and_noise(small, monkeypatch):
    calls = []

    def text2image_loss(pixels, input_ids, attention_mask, *, latents, mask):
        calls.append((input_ids, attention_mask, mask, torch.rand(3)))
        return torch.tensor(float(len(calls)))
    monkeypatch.setattr(small, "text2image_loss", text2image_loss)
    assert world_scores.masked_losses(small, (1.0, 0.25), 3) == [(1.0, 1.0, 2.0), (0.25, 3.0, 4.0)]
    for (ids, real, mask, noise), (plain_ids, plain_real, plain_mask, plain_noise) in (calls[:2], calls[2:]):
        assert torch.equal(mask, plain_mask) and torch.equal(noise, plain_noise)
        for i in range(3):
            caption = world.describe(world.scene("evaluate/losses", i))
            assert f"Generate an image: {caption}" in small.tokenizer.decode(ids[i][real[i]].tolist())
            assert "Generate an image.\n" in small.tokenizer.decode(plain_ids[i][plain_real[i]].tolist())
    assert [call[2].sum().item() for call in calls] == [192, 192, 48, 48]           # of 3 · 64 tokens


def test_captions_help_harmon_tiny():
    [(_, with_caption, without)] = world_scores.masked_losses(Harmon.from_pretrained(), (1.0,), 30)
    assert with_caption == pytest.approx(0.108, abs=0.02)
    assert without > with_caption + 0.03


def test_the_command_prints_all_scores(tmp_path, load, capsys):
    model = load(Painter(), 500)
    main("shapes --prompts 3 --questions 2 --steps 4 8".split())
    assert sorted(model.seeds) == sorted(2 * [*range(6 * 3), *range(4 * 2)])        # of each split from 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0] for line in lines[2:6]]
    assert names == ["| 4, seen", "| 4, held-out", "| 8, seen", "| 8, held-out"]
    assert lines[3].startswith("| 4, held-out | – | – | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | ")
    assert lines[7].startswith("questions (") and "held-out 1.000" in lines[7]
    assert lines[8] == "VAE reconstruction (500 scenes): 26.02 dB"


def test_the_folder_holds_pictures_scores_and_sheets(tmp_path, load):
    captions = [caption for category, _, caption in judge.prompts(4, False) if category == "counting"]
    load(Painter(wrong=captions[1:2]))
    main(f"shapes --prompts 4 --questions 2 --seed 100 --out {tmp_path}".split())
    told = json.loads((tmp_path / "scores.json").read_text())
    assert (told["benchmark"], told["counts"]) == ("shapes", {"pictures": 32})
    seen = {category: 0.75 if category == "counting" else 1.0 for category in judge.CATEGORIES}
    assert told["scores"]["seen"] == {"overall": pytest.approx(5.75 / 6)} | seen
    held_out = dict.fromkeys(("overall", "counting", "colors", "position", "attribution"), 1.0)
    assert told["scores"]["held-out"] == held_out
    assert told["scores"]["questions"]["seen"] == 1
    assert told["scores"]["VAE"] == {"PSNR": pytest.approx(26.02, abs=0.01)}
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert (told["status"], told["numbers"]["drawn"], told["settings"]["num_iter"]) == ("complete", 32, 16)
    for split, count in (("seen", 24), ("held-out", 8)):
        names = sorted((tmp_path / split).iterdir())
        assert [name.name for name in names] == [f"{i:05}.png" for i in range(count)]
        assert [Image.open(name).text["seed"] for name in names] == [str(100 + i) for i in range(count)]
    with Image.open(tmp_path / "seen-16.png") as sheet:
        frames = [sheet.getpixel((i % 8 * 140 + 3, i // 8 * 180 + 60)) for i in range(24)]
    assert [i for i, color in enumerate(frames) if color == (255, 0, 0)] == [9]     # the second of counting
    assert (tmp_path / "held-out-16.png").is_file()


def test_a_run_goes_on_where_it_was(tmp_path, load, capsys):
    model = load(Painter())
    flags = f"shapes --prompts 2 --questions 1 --batch 1 --out {tmp_path}".split()
    main(flags)
    first = capsys.readouterr().out.splitlines()
    (tmp_path / "seen/00003.png").unlink()
    (tmp_path / "held-out/00001.png").write_bytes((tmp_path / "held-out/00001.png").read_bytes()[:-20])
    model.seeds.clear()
    main(flags)
    assert model.seeds == [3, 1], "only what is missing or cut off is drawn again"
    again = capsys.readouterr().out.splitlines()
    assert [line.rsplit("|", 2)[0] for line in again] == [line.rsplit("|", 2)[0] for line in first]


def test_harmon_tiny_draws_the_same_pictures_as_without_the_runner(tmp_path):
    parser = Parser("shapes", "")
    shapes.add_arguments(parser)
    args = shapes.runner_arguments(parser.parse_args(["--prompts", "2"]), 4)
    job = pictures.begin("shapes", shapes, args, tmp_path)
    pictures.draw(job, job.sheets[-4:])
    items = world_scores.items_of("held-out", 1)
    plain = world_scores.draw(Harmon.from_pretrained(), [item.prompt for item in items], 8, num_iter=4)
    for i, image in enumerate(plain):
        drawn = Image.open(tmp_path / f"held-out/{i:05}.png")
        assert np.abs(np.asarray(drawn).astype(int) - np.asarray(image)).max() <= 2


def test_several_processes_need_a_folder(load, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    load(Painter())
    with pytest.raises(SystemExit) as stop:
        main(["shapes", "--prompts", "2"])
    assert stop.value.code == 2
    assert "give a folder for them, --out FOLDER" in capsys.readouterr().err


def test_the_command_prints_the_other_tables(load, capsys):
    load(Painter())
    main(["shapes", "--ceiling", "--steps", "64", "--prompts", "2"])
    main(["shapes", "--layouts", "--prompts", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| 64, perfect |" + 7 * " 1.000 |" + "  |"
    assert lines[3].startswith("4 prompts that leave places open: 4 pairs found, ")


@pytest.mark.parametrize("flags, message", [
    ("--prompts 1", "--prompts is 1; it must be at least 2"),
    ("--questions 0", "--questions is 0; it must be at least 1"),
    ("--batch 0", "--batch is 0; it must be at least 1"),
    ("--steps 4 0", "num_iter is 0; it must be a whole number from 1 up"),
    ("--cfg -1", "cfg is -1.0; it must be a number from 0 up"),
    ("--num-sampling-steps 0", "num_sampling_steps is 0; it must be "),
    ("--model nowhere", "nowhere: no such file or folder")])
def test_bad_arguments_are_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["shapes", *flags.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"harmonkit.evals: {message}")
    assert error.count("\n") == 1


def test_an_unknown_benchmark_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["nothing"])
    assert stop.value.code == 2
    assert "'nothing' is no benchmark; There are geneval" in capsys.readouterr().err
