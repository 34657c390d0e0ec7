"""The command line as people use it: with the bundled model, with bad input, in several processes."""
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import sample
from harmon import Harmon
from harmonkit import outputs
from harmonkit.evals.world_scores import question_scores, reconstruction_psnr
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
        assert np.array_equal(one[name], three[name]), name
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
    assert err == f"redrawing 44% of the picture: its light parts in {tmp_path / 'm.png'}\n"
    drawn = Image.open(out.strip())
    settings = json.loads(drawn.text["settings"])
    assert (settings["image"], settings["mask"], settings["redrawn"]) == ("x.png", "m.png", 0.4444)
    for name in ("image", "mask"):
        content = (tmp_path / settings[name]).read_bytes()
        assert settings[f"{name}_sha256"] == hashlib.sha256(content).hexdigest()
    assert drawn.size == (45, 60)
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
    Image.new("L", (64, 32), 255).save(tmp_path / "wide.png")
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
    ("--prompts junk.png", "junk.png: not a prompt file"),
    ("--prompts empty.json", "empty.json, entry 1 (line 1): the prompt is empty"),
    ("star --prompts empty.json", "--prompts only draws"),
    ("star --model nothing.pth", "nothing.pth: no such file"),
    ("star --tokenizer no-folder", "no-folder: no such file"),
    ("star --vae no.ckpt", "no.ckpt: no such file"),
    ("star --device nowhere", "--device nowhere"),
    ("star --dtype float16 --mode packed", "weights are packed in float32 and bfloat16"),
    ("star --cfg inf", "--cfg is inf"),
    ("star --temperature nan", "--temperature is nan"),
    ("star --size -1", "--size is '-1'"),
    ("star --size 1e3", "--size is '1e3'"),
    ("star --size 64x", "--size is '64x'"),
    ("star --size ６４", "--size is '６４'"),
    ("star --size 99999x64", "--size is 99999x64; a side has at most 8192 pixels"),
    ("star --size " + "9" * 5000, "give pixels as 512"),
    ("star --seed 99999999999999999999", "--seed is 99999999999999999999; it must be"),
    ("star --num-images 100001", "a prompt has seeds for 100000 images"),
    ("star --seed 1e3", "argument --seed: invalid int value: '1e3'"),
    ("star --image whole.png --image cut.png", "--image: given twice, as whole.png and cut.png"),
    ("star --steps 3 --num-iter 4", "given twice, as 3 and 4; one is expected"),
    ("--prompts a.json --prompts b.json", "--prompts: given twice"),
    ("star --out junk.png", "--out junk.png: junk.png is a file; a folder is expected"),
    ("star --out junk.png/deep/er", "junk.png is a file; a folder is expected"),
    ("star --image ~/surely-not-there.png", f"{Path.home()}/surely-not-there.png: no such file"),
    ("star --image whole.png --mask wide.png", "another shape"),
    ("three blue stars", "unrecognized arguments: blue stars; put a prompt of several words in quotes"),
    ("\udcff", "is not valid Unicode text"),
])
def test_bad_input_is_one_line_and_status_2(folder, files, main, line, message):
    model = [] if "--model" in line else ["--model", folder]
    status, out, err = main(*model, *line.split())
    assert status == 2 and out == "" and err.startswith("sample.py: ") and err.count("\n") == 1
    assert "Traceback" not in err and message in err and len(err) < 400
    assert not (files / "out").exists()


@pytest.mark.parametrize("line", [
    "--prompts empty.json", "--prompts no.json", "star --out junk.png", "star --size 1e3", "star --cfg nan",
    "star --image no.png", "star --image whole.png --mask cut.png"])
def test_input_is_checked_before_the_model_is_loaded(files, main, monkeypatch, line):
    monkeypatch.setattr(Harmon, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    status, _, err = main(*line.split())
    assert status == 2 and err.count("\n") == 1


def test_unknown_flags_end_with_status_2(main):
    status, out, err = main("a star", "--stepps", 3)
    assert status == 2 and "--stepps" in err and "Traceback" not in err


def test_an_interruption_ends_with_status_130(folder, tmp_path, main, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(Harmon, "generate_image", interrupted)
    assert main("--model", folder, "--out", tmp_path, "a star") == (130, "", "\nsample.py: interrupted\n")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried …"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_said_in_the_users_terms(folder, main, monkeypatch, error):
    def too_large(*args, **options):
        raise error
    monkeypatch.setattr(Harmon, "generate_image", too_large)
    status, _, err = main("--model", folder, "--size", "32x64", "a star")
    assert (status, err) == (2, "sample.py: not enough memory for 4 images of 32x64 pixels at once; lower "
                                "--batch-size or --size\n")


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


# ---- names, metadata, and what is there already ----------------------------------------------------------

@pytest.fixture
def draw(folder, tmp_path, main):
    """Draw one image a prompt with the small model to tmp_path/out: (status, names of the images, stderr)."""
    def run(*args, steps=2):
        status, out, err = main("--model", folder, "--steps", steps, "--num-images", 1,
                                "--out", tmp_path / "out", *args)
        return status, [Path(line).name for line in out.split("\n") if line], err
    return run


def stamps(path):
    """{name: (inode, time of writing)} of a folder's files."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.iterdir()}


def test_a_png_says_how_it_was_drawn(small, folder, tmp_path, draw):
    assert draw("a star", "--cfg", 2, "--seed", 5)[:2] == (0, ["a-star.png"])
    texts = Image.open(tmp_path / "out" / "a-star.png").text
    assert (texts["prompt"], texts["seed"]) == ("a star", "5")
    settings = json.loads(texts["settings"])
    assert settings == {
        "num_iter": 2, "cfg": 2.0, "cfg_schedule": "constant", "temperature": 1.0,
        "num_sampling_steps": None, "solver": "ancestral", "size": [32, 32], "model": str(folder),
        "weights": outputs.fingerprint(small), "dtype": "float32", "mode": "auto",
        "version": outputs.version(), "torch": torch.__version__}


def test_the_same_command_draws_nothing_and_others_lose_nothing(tmp_path, draw):
    assert draw("a star")[:2] == (0, ["a-star.png"])
    first = stamps(tmp_path / "out")
    status, names, err = draw("a star")
    assert (status, names) == (0, ["a-star.png"])
    assert err == "1 of 1 prompts are drawn already; --overwrite draws them anew\n"
    assert draw("a star", "--size", 32)[1] == ["a-star.png"], "the native size is the same size"
    assert stamps(tmp_path / "out") == first
    assert draw("a star", "--seed", 1)[:2] == (0, ["a-star_2.png"])
    assert draw("a star", "--seed", 1)[:2] == (0, ["a-star_2.png"]), "found again under its name"
    assert draw("A star!", "--dtype", "bfloat16")[:2] == (0, ["a-star_3.png"])
    assert {name: stamp for name, stamp in stamps(tmp_path / "out").items() if name in first} == first
    assert draw("a star", "--seed", 1, "--overwrite")[:2] == (0, ["a-star.png"])
    assert Image.open(tmp_path / "out" / "a-star.png").text["seed"] == "1"


def test_another_models_pictures_and_foreign_files_are_kept(small, folder, tmp_path, draw, main):
    draw("a star")
    (tmp_path / "out" / "a-star_2.png").write_text("a letter")
    first = stamps(tmp_path / "out")
    other = tmp_path / "other"
    small.save_pretrained(other)
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-1] ^= 1                                            # the sign, or the exponent, of one weight
    (other / "model.safetensors").write_bytes(content)
    flags = ("--steps", 2, "--num-images", 1, "--out", tmp_path / "out", "a star")
    status, out, _ = main("--model", other, *flags)
    assert (status, Path(out.strip()).name) == (0, "a-star_3.png")
    assert {name: stamp for name, stamp in stamps(tmp_path / "out").items() if name in first} == first


def test_fingerprints(small, tokenizer):
    same, reloaded = outputs.fingerprint(small), Harmon(small.config).eval()
    reloaded.load_state_dict(small.state_dict())
    reloaded.tokenizer = tokenizer
    assert len(same) == 16 and outputs.fingerprint(reloaded) == same
    weight = reloaded.mar.decoder_embed.weight
    with torch.no_grad():
        for i in range(0, weight.numel(), weight.numel() // 7):
            value = weight.flatten()[i].item()
            weight.view(-1)[i] = value * 1.01
            assert outputs.fingerprint(reloaded) != same, f"element {i}"
            weight.view(-1)[i] = value
        assert outputs.fingerprint(reloaded) == same
        weight.copy_(weight.flip(0))
    assert outputs.fingerprint(reloaded) != same
    assert outputs.fingerprint(small.to(torch.bfloat16)) != same
    small.to(torch.float32)


def test_a_batch_refuses_to_replace_other_pictures(tmp_path, draw):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "x", "prompt": "a star"}\n{"id": "y", "prompt": "a circle"}\n')
    assert draw("--prompts", prompts)[:2] == (0, ["x.png", "y.png"])
    first = stamps(tmp_path / "out")
    for flags, steps in ((("--seed", 1), 2), (("--cfg", 2), 2), ((), 3), (("--solver", "ddim"), 2)):
        status, names, err = draw("--prompts", prompts, *flags, steps=steps)
        assert status == 2 and names == [] and err.count("\n") == 1
        assert f"{tmp_path / 'out' / 'x.png'} and 1 more: there already" in err and "--overwrite" in err
    prompts.write_text('{"id": "x", "prompt": "a star"}\n{"id": "y", "prompt": "a square"}\n')
    status, _, err = draw("--prompts", prompts)
    assert status == 2 and "y.png: there already" in err
    assert stamps(tmp_path / "out") == first
    assert draw("--prompts", prompts, "--overwrite")[:2] == (0, ["x.png", "y.png"])
    assert not set(first.values()) & set(stamps(tmp_path / "out").values())


def test_a_batch_draws_what_is_missing(tmp_path, folder, main, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na circle\na cross\n")
    drawn = []
    generate = Harmon.generate_image

    def counted(self, prompts, **options):
        drawn.extend(zip(prompts, options["seed"]))
        return generate(self, prompts, **options)
    monkeypatch.setattr(Harmon, "generate_image", counted)
    flags = ("--model", folder, "--prompts", prompts, "--steps", 2, "--out", tmp_path / "out",
             "--num-images", 2)
    assert main(*flags)[0] == 0
    assert len(drawn) == 6
    whole, first = images_in(tmp_path / "out"), stamps(tmp_path / "out")
    (tmp_path / "out" / "00001-a-circle-1.png").unlink()
    (tmp_path / "out" / "00001-a-circle.png").unlink()                              # its grid
    (tmp_path / "out" / "00002-a-cross.png").unlink()
    content = (tmp_path / "out" / "00000-a-star-0.png").read_bytes()
    (tmp_path / "out" / "00000-a-star-0.png").write_bytes(content[:-20])            # cut off
    (tmp_path / "out" / ".00000-a-star-0.png.abcd1234.png").write_bytes(b"killed")
    (tmp_path / "out" / ".mine.png").write_bytes(b"a file of the user")
    drawn.clear()
    status, out, err = main(*flags)
    assert status == 0 and err == "" and len(out.split()) == 3
    assert sorted(drawn) == [("a circle", 100_001), ("a star", 0)]
    (tmp_path / "out" / ".mine.png").unlink()
    again = images_in(tmp_path / "out")
    assert again.keys() == whole.keys()
    for name in whole:
        assert np.array_equal(again[name], whole[name]), name
    kept = [name for name, stamp in stamps(tmp_path / "out").items() if first[name] == stamp]
    assert sorted(kept) == ["00000-a-star-1.png", "00001-a-circle-0.png", "00002-a-cross-0.png",
                            "00002-a-cross-1.png"]
    drawn.clear()
    assert main(*flags[:-1], 3)[0] == 0, "more images of the same prompts"
    assert sorted(seed for _, seed in drawn) == [2, 100_002, 200_002]


def test_names_that_two_prompts_would_share(tmp_path, folder, main):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "x", "prompt": "a star"}\n{"id": "x-1", "prompt": "a circle"}\n')
    status, names, err = main("--model", folder, "--prompts", prompts, "--num-images", 2)
    assert (status, names) == (2, "") and "two prompts give the file x-1.png" in err


@pytest.mark.parametrize("prompt, name", [
    ("三" * 200, "三" * 33 + ".png"), ("★★★", "image.png"), ("../../a/b", "a-b.png"), ("con", "_con.png")])
def test_names_of_pictures_fit_the_disk(tmp_path, draw, prompt, name):
    assert draw(prompt)[:2] == (0, [name])
    assert Image.open(tmp_path / "out" / name).text["prompt"] == prompt


def test_a_killed_batch_goes_on_with_other_processes(folder, tmp_path):
    """SIGKILL while the fifth picture is being written; then two processes finish what one had begun."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"star {n}" for n in range(12)))
    out = tmp_path / "out"
    args = ["--model", folder, "--prompts", prompts, "--steps", 2, "--batch-size", 3, "--out", out]
    args = [str(arg) for arg in args]
    code = f"""
import os, signal
from PIL import Image
import sample
save, count = Image.Image.save, [0]
def save_or_die(self, file, **options):
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, file, **options)
Image.Image.save = save_or_die
sample.main({args})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    first = stamps(out)
    assert len(first) == 5 and min(first).startswith(".00004-star-4.png."), "a temporary file is left"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run([sys.executable, *torchrun, str(ROOT / "sample.py"), *args], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    assert "4 of 12 prompts are drawn already" in run.stderr
    assert len(run.stdout.split()) == 12, "each path once"
    last = stamps(out)
    assert sorted(last) == [f"{n:05d}-star-{n}.png" for n in range(12)]
    del first[min(first)]
    assert {name: last[name] for name in first} == first, "what was there is not drawn again"


# ---- the terminal ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", ["argparse", "torch", "harmonkit.outputs"])
def test_ctrl_c_during_the_imports(module):
    code = f"""
import os, runpy, signal, sys
def interrupt(event, args):
    if event == "import" and args[0] == "{module}":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(interrupt)
sys.argv = ["sample.py", "a star", "--out", "never-made"]
runpy.run_path("sample.py", run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "\nsample.py: interrupted\n")


def test_a_closed_pipe_is_quiet(folder):
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, str(ROOT / "sample.py"), "--model", str(folder), "--ask", "what"]
    run = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (141, "")


def test_ctrl_c_ends_the_answer_not_the_conversation(folder, main, monkeypatch):
    asked = []

    def chat(self, question, image=None, *, history=(), **options):
        asked.append((question, list(history)))
        yield "half"
        if question == "first":
            raise KeyboardInterrupt
        yield "-whole"
    monkeypatch.setattr(Harmon, "chat", chat)
    monkeypatch.setattr(sys, "stdin", io.StringIO("second\n"))
    assert main("--model", folder, "--chat", "first") == (0, "half\nhalf-whole\n", "")
    assert asked == [("first", []), ("second", [("first", "half")])]
    assert main("--model", folder, "--ask", "first") == (130, "half", "\nsample.py: interrupted\n")

    def interrupted():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys.stdin, "readline", interrupted)
    assert main("--model", folder, "--chat", "second")[0] == 130, "at the prompt it ends the conversation"


def test_a_chat_reads_bytes_that_are_not_text(folder, main, monkeypatch):
    asked = []
    monkeypatch.setattr(Harmon, "chat", lambda self, question, *_, **options: asked.append(question) or ["."])
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9?\nsecond\n\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main("--model", folder, "--chat") == (0, ".\n.\n", "")
    assert asked == ["caf\ufffd?", "second"]
