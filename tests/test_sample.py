"""The command line as people use it: with the bundled model, with bad input, in several processes."""
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import sample
from harmon import Harmon
from harmonkit.evals.shapes import question_scores, reconstruction_psnr
from harmonkit.shapes_world import world
from harmonkit.shapes_world.judge import find


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def main(capsys):
    """Run sample.py in this process: (exit status, stdout, stderr)."""
    def run(*args):
        status = 0
        try:
            sample.main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


def command(*args, **options):
    line = [sys.executable, str(ROOT / "sample.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, **options)


def images_in(path):
    """{name: grey levels} of a folder's images."""
    return {file.name: np.asarray(Image.open(file)).astype(int) for file in path.iterdir()}


# ---- the bundled model -----------------------------------------------------------------------------------

def test_the_bundled_model_draws(tmp_path):
    run = command("three blue stars", "--steps", 16, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [str(tmp_path / "three-blue-stars.png")]
    names = [f"three-blue-stars-{i}.png" for i in range(4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "three-blue-stars.png"])
    assert Image.open(tmp_path / "three-blue-stars.png").size == (128, 128)
    single = Image.open(tmp_path / names[2])
    assert single.size == (64, 64)
    assert (single.text["prompt"], single.text["seed"]) == ("three blue stars", "2")
    settings = json.loads(single.text["settings"])
    assert (settings["num_iter"], settings["cfg"], settings["model"]) == (16, 3.0, "harmon-tiny")
    shown = [[(thing.color, thing.shape) for thing in find(Image.open(tmp_path / name))] for name in names]
    assert shown.count([("blue", "star")] * 3) >= 3, shown


def test_the_bundled_model_answers(tmp_path, main):
    scene = world.scene("test", 0, kind="single")
    world.render(scene).resize((301, 301)).save(tmp_path / "photo.jpg")
    question = f"How many {world.plural(scene.things[0].shape)} are there?"
    assert main("--image", tmp_path / "photo.jpg", question) == (0, "one\n", "")
    assert main("--ask", "How many sides does a triangle have?") == (0, "three\n", "")


def test_the_bundled_model_sees():
    """Well above chance on questions about 20 scenes, seen and held out, and through the VAE."""
    model = Harmon.from_pretrained()
    scores, asked = question_scores(model, 20)
    assert asked > 80 and scores["count"] >= 0.9 and scores["exists"] >= 0.8 and scores["color"] >= 0.8
    assert scores["held-out"] >= 0.8
    assert reconstruction_psnr(model, 40) >= 28


# ---- images and answers ----------------------------------------------------------------------------------

def test_batches_do_not_depend_on_processes(folder, tmp_path, main, monkeypatch):
    prompts = ["a star", "a red circle", "two crosses above each other", "a"]
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in prompts]))
    flags = ("--model", folder, "--prompts", tmp_path / "prompts.json", "--num-images", 2, "--steps", 3)
    status, out, _ = main(*flags, "--out", tmp_path / "one")
    assert status == 0 and out.split()[1] == str(tmp_path / "one" / "00001-a-red-circle.png")
    printed = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        status, out, _ = main(*flags, "--out", tmp_path / "three", "--batch-size", 3)
        assert status == 0
        printed.append(len(out.split()))
    assert printed == [2, 1, 1], "each prompt is drawn by one process"
    one, three = images_in(tmp_path / "one"), images_in(tmp_path / "three")
    assert one.keys() == three.keys() and len(one) == 4 * 3
    for name in one:
        assert np.abs(one[name] - three[name]).max() <= 1, name
    seeds = [Image.open(tmp_path / "three" / f"00003-a-{s}.png").text["seed"] for s in range(2)]
    assert seeds == ["300000", "300001"]


def test_the_flags_reach_the_model(folder, tmp_path, main, monkeypatch):
    given = {}

    def generate_image(self, prompts, **options):
        given.update(options, prompts=prompts)
        return [Image.new("RGB", (8, 8))] * len(prompts)
    monkeypatch.setattr(Harmon, "generate_image", generate_image)
    base = ("--model", folder, "--out", tmp_path / "out", "a star")
    main(*base)
    # By default four images, and K a quarter of the 16 tokens.
    expected = {
        "prompts": ["a star"] * 4, "seed": [0, 1, 2, 3], "size": None, "num_iter": 4, "cfg": 3.0,
        "cfg_schedule": "constant", "temperature": 1.0, "num_sampling_steps": None, "solver": "ancestral",
        "progress": True}
    assert given == expected
    main(*base, "--size", "16x32", "--num-iter", 9, "--cfg", 2, "--cfg-schedule", "linear",
         "--temperature", 0.5, "--num-sampling-steps", 7, "--seed", 3, "--num-images", 1)
    changes = {
        "prompts": ["a star"], "seed": [3], "size": (16, 32), "num_iter": 9, "cfg": 2.0,
        "cfg_schedule": "linear", "temperature": 0.5, "num_sampling_steps": 7}
    assert given == expected | changes
    main(*base, "--size", "512", "--solver", "ddim")
    assert (given["size"], given["num_iter"], given["solver"]) == ((512, 512), 64, "ddim")


def test_inpainting_from_files(folder, tmp_path, main):
    Image.new("RGB", (45, 60), "orange").save(tmp_path / "x.png")
    mask = Image.new("L", (45, 60))
    mask.paste(255, (0, 0, 20, 60))
    mask.save(tmp_path / "m.png")
    files = ("--image", tmp_path / "x.png", "--mask", tmp_path / "m.png", "--out", tmp_path / "out")
    status, out, err = main("--model", folder, *files, "a star", "--num-images", 1, "--steps", 2)
    assert status == 0, err
    drawn = Image.open(out.strip())
    orange = Image.new("RGB", (1, 1), "orange").getpixel((0, 0))
    assert drawn.getpixel((30, 10)) == orange != drawn.getpixel((3, 10))


def test_chat_remembers(folder, main, monkeypatch):
    asked = []

    def chat(self, question, image=None, *, history=(), size=None, max_new_tokens=None):
        asked.append((question, list(history), size, max_new_tokens))
        return iter(["an", "swer"])
    monkeypatch.setattr(Harmon, "chat", chat)
    monkeypatch.setattr(sys, "stdin", io.StringIO("second\n\nnever\n"))
    flags = ("--model", folder, "--size", "48", "--max-new-tokens", 5)
    assert main(*flags, "--chat", "first") == (0, "answer\nanswer\n", "")
    assert asked == [("first", [], (48, 48), 5), ("second", [("first", "answer")], (48, 48), 5)]


# ---- bad input -------------------------------------------------------------------------------------------

@pytest.fixture
def files(tmp_path, monkeypatch):
    """The working directory holds a text file, a cut image and a whole one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.png").write_text("no image")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    (tmp_path / "empty.json").write_text('[{"prompt": " "}]')
    return tmp_path


@pytest.mark.parametrize("line, message", [
    ("", "the prompt is empty"),
    ("--cfg 3", "the prompt is empty"),
    ("star --cfg -1", "--cfg is -1.0; it must be a number from 0 up"),
    ("star --cfg nan", "--cfg is nan"),
    ("star --steps 0", "--num-iter is 0"),
    ("star --num-images 0", "--num-images is 0; it must be at least 1"),
    ("star --batch-size 0", "--batch-size is 0"),
    ("star --ask --max-new-tokens 0", "--max-new-tokens is 0"),
    ("star --num-sampling-steps 0", "--num-sampling-steps is 0"),
    ("star --cfg-schedule cosine", "--cfg-schedule is 'cosine'"),
    ("star --solver euler", "--solver is 'euler'"),
    ("star --solver ddim --temperature 0.9", "--temperature is 0.9, but solver 'ddim'"),
    ("star --size big", "--size is 'big'"),
    ("star --size 30", "multiples of 8"),
    ("star --size 0x32", "multiples of 8"),
    ("star --image no.png", "no.png: no such file"),
    ("star --image junk.png", "junk.png: not an image"),
    ("star --image cut.png", "cut.png: not an image"),
    ("star --mask whole.png", "--mask marks the part of --image"),
    ("star --mask whole.png --image whole.png --ask", "--mask marks the part of --image"),
    ("star --image whole.png --mask cut.png", "cut.png: not an image"),
    ("star --ask --image whole.png", "--ask is for questions without an image"),
    ("--prompts no.json", "no.json: no such file"),
    ("--prompts junk.png", "junk.png: expected a JSON list"),
    ("--prompts empty.json", "empty.json: there is an empty prompt"),
    ("star --prompts empty.json", "--prompts only draws"),
    ("star --model nothing.pth", "nothing.pth: no such file"),
    ("star --tokenizer no-folder", "no-folder: no such file"),
    ("star --vae no.ckpt", "no.ckpt: no such file"),
    ("star --device nowhere", "--device nowhere"),
    ("star --dtype float16 --mode packed", "weights are packed in float32 and bfloat16"),
])
def test_bad_input_is_one_line_and_status_2(folder, files, main, line, message):
    model = [] if "--model" in line else ["--model", folder]
    status, out, err = main(*model, *line.split())
    assert status == 2 and out == "" and err.startswith("sample.py: ") and err.count("\n") == 1
    assert message in err
    assert not (files / "out").exists()


def test_unknown_flags_end_with_status_2(main):
    status, out, err = main("a star", "--stepps", 3)
    assert status == 2 and "--stepps" in err and "Traceback" not in err


def test_an_interruption_ends_with_status_130(folder, tmp_path, main, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(Harmon, "generate_image", interrupted)
    assert main("--model", folder, "--out", tmp_path, "a star") == (130, "", "\nsample.py: interrupted\n")


def test_a_full_disk_leaves_no_image(folder, tmp_path):
    """A limit on the file size replaces the full disk."""
    out = tmp_path / "out"
    args = ["a star", "--model", str(folder), "--out", str(out), "--num-images", "1", "--steps", "2"]
    code = f"""
import resource, signal, sys
sys.dont_write_bytecode = True
import sample
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sample.main({args})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("sample.py: "), run.stderr
    assert "Traceback" not in run.stderr and list(out.iterdir()) == []
