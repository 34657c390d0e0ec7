"""sample.py --classes: names and numbers, the balanced set, resuming, what is said of wrong flags."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, shake
from PIL import Image

import sample
from harmonkit import by_class, outputs
from harmonkit.by_class import class_names, plan, read_class
from harmonkit.config import MAR_SIZES
from harmonkit.mar_files import ClassConfig, ClassModel, defaults

NAMES = ("tench", "great white shark", "golden retriever")
CONFIG = ClassConfig(replace(SMALL.mar, class_num=3), SMALL.vae, SMALL.vae_scale, NAMES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mar")
    shake(ClassModel(CONFIG)).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def main(capsys, folder):
    """Run sample.py --classes in this process: (exit status, stdout, stderr)."""
    def run(*args):
        status = 0
        try:
            sample.main(["--model", str(folder), "--num-sampling-steps", "3", *map(str, args)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return run


def bytes_in(path):
    """{name: pixels} of a folder's images."""
    return {file.name: Image.open(file).tobytes() for file in path.iterdir()}


# ---- classes ---------------------------------------------------------------------------------------------

IMAGENET = class_names(ClassConfig(MAR_SIZES["mar_base"]))


@pytest.mark.parametrize("text, label", [
    ("207", 207), ("0", 0), ("golden retriever", 207), ("Golden_Retriever", 207), ("a golden retriever", 207),
    ("tench", 0), ("n02099601", 207), ("none", -1), ("toilet tissue", 999)])
def test_classes_of_imagenet(text, label):
    assert read_class(text, IMAGENET) == label


@pytest.mark.parametrize("text, message", [
    ("1000", "--classes 1000: this MAR has classes 0 to 999, and none"),
    ("-1", "--classes -1: this MAR has classes 0 to 999"), ("9" * 40, "this MAR has classes"),
    ("golden retreiver", "no such class; did you mean golden retriever"), ("", "no such class"),
    ("retriever", "did you mean .*retriever"), ("qqqq", "no such class; the first one is tench"),
])
def test_wrong_classes(text, message):
    with pytest.raises(ValueError, match=message):
        read_class(text, IMAGENET)


def test_names_of_other_models():
    unnamed = ClassConfig(replace(SMALL.mar, class_num=2), SMALL.vae)
    assert class_names(unnamed) == ["class 0", "class 1"] and class_names(CONFIG) == list(NAMES)


def test_defaults_are_those_of_the_authors_table():
    for name, cfg in (("mar_base", 2.9), ("mar_large", 3.0), ("mar_huge", 3.2)):
        given = defaults(ClassConfig(MAR_SIZES[name]))
        assert given == {"num_iter": 256, "cfg_schedule": "linear", "cfg": cfg}
        assert f"{name} {cfg}" in by_class.DEFAULTS


def test_the_balanced_set():
    """Image i is of class i // (count per class), and the seeds are those of the listed classes."""
    sheets, labels = plan(["all"], IMAGENET, 50_000, 4, {}, Path("out"))
    assert len(sheets) == 50_000 and sheets[49_999].path == Path("out/49999.png")
    for i in (0, 49, 50, 12_345, 49_999):
        picture = sheets[i].pictures[0]
        assert sheets[i].path.name == f"{i:05d}.png" and labels[picture.path] == i // 50
        assert (picture.seed, picture.prompt) == (4 + 100_000 * (i // 50) + i % 50, IMAGENET[i // 50])
    one_each, labels = plan(["all"], NAMES, None, 0, {}, Path("out"))
    assert list(labels.values()) == [0, 1, 2]
    for count, near in ((49_999, 49_000), (999, 1000), (1, 1000)):
        with pytest.raises(ValueError, match=f"--num-images is {count}; all 1000 classes .*, so {near} or"):
            plan(["all"], IMAGENET, count, 0, {}, Path("out"))


# ---- drawing ---------------------------------------------------------------------------------------------

def test_listed_classes(main, folder, tmp_path):
    flags = ("--classes", 2, "tench", "golden retriever", "none", "--num-images", 2, "--out", tmp_path)
    status, out, err = main(*flags)
    assert (status, err) == (0, "")
    names = ["2-golden-retriever.png", "0-tench.png", "none.png"]
    assert sorted(Path(line).name for line in out.split()) == sorted(names)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {*names, *(name.replace(".png", f"-{s}.png") for name in names for s in range(2))}
    texts = Image.open(tmp_path / "2-golden-retriever-1.png").text
    assert (texts["prompt"], texts["seed"]) == ("golden retriever", "200001")
    settings = json.loads(texts["settings"])
    assert settings["class"] == 2 and settings["size"] == [32, 32] and settings["num_sampling_steps"] == 3
    assert (settings["num_iter"], settings["cfg"], settings["cfg_schedule"]) == (16, 3.0, "linear")
    assert Image.open(tmp_path / "none-0.png").text["seed"] == "-100000"
    assert Image.open(tmp_path / "0-tench.png").size == (64, 32), "a grid"


def test_the_flags_reach_the_model(main, tmp_path, monkeypatch):
    given = {}

    def generate_image(self, labels, **options):
        given.update(options, labels=labels)
        return [Image.new("RGB", (32, 32))] * len(labels)
    monkeypatch.setattr(ClassModel, "generate_image", generate_image)
    assert main("--classes", 1, "--num-images", 1, "--steps", 5, "--cfg", 2, "--cfg-schedule", "constant",
                "--temperature", 0.9, "--seed", 7, "--out", tmp_path, "--size", 32)[0] == 0
    assert given == {
        "labels": [1], "seed": [100_007], "num_iter": 5, "cfg": 2.0, "cfg_schedule": "constant",
        "temperature": 0.9, "num_sampling_steps": 3, "solver": "ancestral", "progress": True}


def test_pictures_do_not_depend_on_batches_processes_and_the_list(main, tmp_path, monkeypatch):
    flags = ("--classes", "all", "--num-images", 9, "--steps", 4)
    assert main(*flags, "--out", tmp_path / "one")[0] == 0
    whole = bytes_in(tmp_path / "one")
    assert sorted(whole) == [f"{i:05d}.png" for i in range(9)] and len(set(whole.values())) == 9
    assert main(*flags, "--out", tmp_path / "singly", "--batch-size", 1)[0] == 0
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(*flags, "--out", tmp_path / "two", "--batch-size", 4)[0] == 0
    assert whole == bytes_in(tmp_path / "singly") == bytes_in(tmp_path / "two")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert main("--classes", 2, "--steps", 4, "--num-images", 3, "--out", tmp_path / "listed")[0] == 0
    assert bytes_in(tmp_path / "listed")["2-golden-retriever-1.png"] == whole["00007.png"]


def test_a_killed_set_goes_on_with_other_processes(folder, tmp_path):
    """SIGKILL while the seventh picture is being written; then two processes finish the set."""
    args = ["--model", folder, "--classes", "all", "--num-images", 12, "--steps", 2, "--batch-size", 3,
            "--num-sampling-steps", 2]
    args = [str(arg) for arg in args]
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    code = f"""
import os, signal
from PIL import Image
import sample
sample.main({[*args, '--out', whole]})
save, count = Image.Image.save, [0]
def save_or_die(self, file, **options):
    count[0] += 1
    if count[0] == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, file, **options)
Image.Image.save = save_or_die
sample.main({[*args, '--out', broken]})
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(os.listdir(broken)) == 7, "six pictures and a temporary file"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run([sys.executable, *torchrun, str(ROOT / "sample.py"), *args, "--out", broken],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "6 of 12 pictures are drawn already" in run.stderr and len(run.stdout.split()) == 12
    files = {name: (Path(whole) / name).read_bytes() for name in os.listdir(whole)}
    assert files == {name: (Path(broken) / name).read_bytes() for name in os.listdir(broken)}


def test_the_same_command_draws_nothing_and_others_lose_nothing(main, tmp_path):
    flags = ("--classes", "all", "--steps", 2, "--out", tmp_path)
    assert main(*flags)[0] == 0
    first = bytes_in(tmp_path)
    assert main(*flags)[2] == "3 of 3 pictures are drawn already; --overwrite draws them anew\n"
    status, out, err = main(*flags, "--num-images", 6)
    assert (status, out) == (2, "") and "there already, drawn from another prompt" in err
    assert bytes_in(tmp_path) == first


# ---- bad input -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, message", [
    ("--classes 3", "--classes 3: this MAR has classes 0 to 2"),
    ("--classes tenhc", "'tenhc': this MAR has no such class; did you mean tench?"),
    ("--classes all 2", "'all': this MAR has no such class"),
    ("--classes all --num-images 4", "--num-images is 4; all 3 classes get equally many, so 3 or another"),
    ("--classes 1 --size 64", "--size is 64; this MAR draws 32x32 pixels by class"),
    ("star --classes 1", "--classes draws by class alone; leave out the prompt"),
    ("--classes 1 --ask", "leave out --ask"), ("--classes 1 --image x.png", "leave out --image"),
    ("--classes 1 --prompts x.json", "leave out --prompts"), ("--classes 1 --cfg -1", "--cfg is -1.0"),
    ("--classes 1 --cfg-schedule cosine", "--cfg-schedule is 'cosine'"),
    ("--classes 1 --steps 0", "--num-iter is 0"), ("--classes", "expected at least one argument"),
    ("--classes 1 --num-images 0", "--num-images is 0"),
    ("--classes 1 --vae no.ckpt", "no.ckpt: no such file"),
    ("--classes 1 --out a.txt", "a.txt is a file"),
])
def test_bad_input_is_one_line_and_status_2(main, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    status, out, err = main(*line.split())
    assert status == 2 and out == "" and err.startswith("sample.py: ") and err.count("\n") == 1
    assert message in err and not (tmp_path / "out").exists()


def test_a_mar_does_not_draw_prompts(main):
    status, _, err = main("a star")
    assert status == 2 and "a MAR checkpoint, no Harmon model: sample.py --classes draws from it" in err


def test_other_weights_are_other_pictures():
    fingerprints = [outputs.fingerprint(shake(ClassModel(CONFIG), seed)) for seed in (0, 0, 1)]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
