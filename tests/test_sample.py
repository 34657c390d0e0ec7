"""The command line as people use it: with the bundled model, with wrong input, in several processes."""
import io
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import pretrained
import sample
from harmon import Harmon
from pretrained import auto_dtype


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def command(*args, **kwargs):
    return subprocess.run([sys.executable, ROOT / "sample.py", *map(str, args)], capture_output=True, text=True, **kwargs)


def test_bundled_model_draws(tmp_path):
    began = time.time()
    run = command("three blue stars", "--steps", 16, "--out", tmp_path)
    assert run.returncode == 0, run.stderr
    print(f"{time.time() - began:.1f} s")
    assert run.stdout.split() == [str(tmp_path / "three-blue-stars.png")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["three-blue-stars-0.png", "three-blue-stars-1.png", "three-blue-stars-2.png",
                                                         "three-blue-stars-3.png", "three-blue-stars.png"]
    assert Image.open(tmp_path / "three-blue-stars.png").size == (128, 128)
    single = Image.open(tmp_path / "three-blue-stars-2.png")
    assert single.size == (64, 64)
    assert single.text["prompt"] == "three blue stars" and single.text["seed"] == "2" and json.loads(single.text["settings"])["num_iter"] == 16


def test_bundled_model_answers(tmp_path):
    import shapes

    scene = shapes.scene("test", 0, kind="single")
    shapes.render(scene).resize((301, 301)).save(tmp_path / "photo.jpg")
    run = command("--image", tmp_path / "photo.jpg", f"How many {shapes.plural(scene.things[0].shape)} are there?")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "one"
    run = command("--ask", "How many sides does a triangle have?")
    assert run.stdout.strip() == "three"


def test_bundled_model_sees():
    """Well above chance on what it is asked about 20 scenes, seen and held out; evaluate.py has the real figures."""
    import evaluate

    scores, asked = evaluate.question_scores(Harmon.from_pretrained(), 20)
    assert asked > 80 and scores["count"] >= 0.7 and scores["exists"] >= 0.6 and scores["color"] >= 0.4
    assert "held-out" not in evaluate.question_scores(Harmon.from_pretrained(), 1)[0]                  # one scene is a seen one
    assert evaluate.reconstruction_psnr(Harmon.from_pretrained(), 40) >= 28


def main(capsys, *args):
    code = 0
    try:
        sample.main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def files(path):
    return {p.name: p.read_bytes() for p in path.iterdir()}


def test_batches_do_not_depend_on_processes(folder, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"prompt": p} for p in ("a star", "a red circle", "two crosses above each other", "a")]))
    base = ("--model", folder, "--prompts", prompts, "--num-images", 2, "--steps", 3)
    assert main(capsys, *base, "--out", tmp_path / "one")[0] == 0
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert main(capsys, *base, "--out", tmp_path / "three", "--batch-size", 3)[0] == 0
    one, three = files(tmp_path / "one"), files(tmp_path / "three")
    assert sorted(one) == sorted(three) and len(one) == 4 * 3
    for name in one:
        a, b = (np.asarray(Image.open(io.BytesIO(x[name]))).astype(int) for x in (one, three))
        assert np.abs(a - b).max() <= 1, name


def test_chat_remembers(folder, capsys, monkeypatch, small):
    asked = []
    monkeypatch.setattr(Harmon, "chat", lambda self, q, image=None, *, history=(), **k: asked.append((q, list(history))) or iter(["an", "swer"]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("second\n\nnever\n"))
    code, out, _ = main(capsys, "--model", folder, "--chat", "first")
    assert code == 0 and out == "answer\nanswer\n"
    assert asked == [("first", []), ("second", [("first", "answer")])]


def test_inpainting_from_files(folder, tmp_path, capsys):
    Image.new("RGB", (45, 60), "orange").save(tmp_path / "x.png")
    mask = Image.new("L", (45, 60))
    mask.paste(255, (0, 0, 20, 60))
    mask.save(tmp_path / "m.png")
    code, out, err = main(capsys, "--model", folder, "--image", tmp_path / "x.png", "--mask", tmp_path / "m.png", "a star", "--num-images", 1, "--steps", 2,
                          "--out", tmp_path / "out")
    assert code == 0, err
    assert Image.open(out.strip()).getpixel((30, 10)) == Image.new("RGB", (1, 1), "orange").getpixel((0, 0))


@pytest.mark.parametrize("args, message", [
    ((), "prompt is empty"), (("  ",), "prompt is empty"), (("a star", "--cfg", "-1"), "--cfg is -1.0; it must be at least 0"),
    (("a star", "--cfg", "nan"), "--cfg is nan"), (("a star", "--steps", "0"), "--steps is 0"), (("a star", "--num-images", "0"), "--num-images is 0"),
    (("a star", "--size", "big"), "--size is 'big'"), (("a star", "--size", "30"), "multiples of 8"), (("a star", "--size", "0x32"), "multiples of 8"),
    (("a star", "--image", "no.png"), "no.png: no such file"), (("a star", "--image", "junk.png"), "junk.png: not an image"),
    (("a star", "--image", "cut.png"), "cut.png: not an image"), (("a star", "--mask", "cut.png"), "--mask marks"),
    (("--prompts", "no.json"), "no.json: no such file"), (("--prompts", "junk.png"), "junk.png: expected a JSON list"),
    (("a star", "--model", "nothing.pth"), "nothing.pth: no such file"), (("a star", "--device", "nowhere"), "nowhere"),
    (("a star", "--diffusion-steps", "0"), "--diffusion-steps is 0"), (("a star", "--solver", "ddim", "--temperature", "0.9"), "--solver ddim"),
    (("a star", "--mode", "graphs", "--device", "cpu"), "the device is cpu"),
    (("a star", "--ask", "--image", "cut.png"), "--ask is for questions without"), (("a star", "--tokenizer", "no-folder"), "no-folder: no such file"),
])
def test_bad_input_is_one_line_and_status_2(folder, tmp_path, capsys, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk.png").write_text("no image")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    model = () if "--model" in args else ("--model", folder)
    code, out, err = main(capsys, *model, *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seconds, expected", [((2.0, 1.0), torch.bfloat16), ((1.0, 1.0), torch.float32)])
def test_auto_dtype(tmp_path, monkeypatch, seconds, expected):
    """float32 for what is small; on the CPU a large model's is what this processor multiplies faster."""
    assert auto_dtype("harmon-tiny", "cpu") == torch.float32 and auto_dtype("harmon-tiny", "cuda") == torch.bfloat16
    with open(tmp_path / "large.pth", "wb") as file:
        file.truncate(2 * 10 ** 9)                       # sparse
    times = iter([t for duration in seconds for _ in range(4) for t in (0.0, duration)])
    monkeypatch.setattr(pretrained.time, "perf_counter", lambda: next(times))
    assert auto_dtype(tmp_path / "large.pth", "cpu") == expected


def test_wrong_flags_end_with_status_2():
    run = command("a star", "--stepps", 3)
    assert run.returncode == 2 and "--stepps" in run.stderr and "Traceback" not in run.stderr


def test_a_full_disk_leaves_no_image(folder, tmp_path):
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import sample
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sample.main(["a star", "--model", {str(folder)!r}, "--out", {str(tmp_path / "out")!r}, "--num-images", "1", "--steps", "2"])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
    assert run.returncode == 2 and "Traceback" not in run.stderr and run.stderr.startswith("sample.py: "), run.stderr
    assert list((tmp_path / "out").iterdir()) == []
