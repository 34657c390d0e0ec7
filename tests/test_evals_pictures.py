"""The runner of drawing benchmarks: the files it writes, seeds, what it refuses, kills and processes."""
import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from harmon import Harmon
from harmonkit.evals import benchmark, origins, pictures
from harmonkit.evals.__main__ import main
from harmonkit.evals.benchmark import Item, Result
from harmonkit.repeatable import OneThreadVAE

PROMPTS = ("a star", "two red circles above each other", "a", "a blue cross", "three stars")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    small.save_pretrained(path)
    return path


def toy(prompts=PROMPTS, **changes):
    """A drawing benchmark: two pictures a prompt, the score is the number of files that it finds."""
    def prepare(out, number, item):
        (out / item.name).mkdir(parents=True, exist_ok=True)
        (out / item.name / "about.txt").write_text(item.prompt)

    def score(out, items, args):
        found = sum((out / item.name / f"{s}.png").is_file() for item in items for s in range(2))
        return Result({"counted": {"found": found}})
    module = dict(
        PER_PROMPT=2, SEED_STRIDE=100_000, prepare=prepare, score=score, add_arguments=lambda parser: None,
        read=lambda args: [Item(f"{p:05}", text) for p, text in enumerate(prompts)],
        picture=lambda number, item, sample: f"{item.name}/{sample}.png")
    return SimpleNamespace(**module | changes)


@pytest.fixture(scope="module")
def arguments(folder):
    """Parse flags. The model is loaded once, because all that its loading depends on is the same."""
    known = []

    def parse(*flags):
        parser = ArgumentParser()
        benchmark.add_common_arguments(parser)
        benchmark.add_drawing_arguments(parser)
        args = parser.parse_args(["--model", str(folder), "--steps", "2", *map(str, flags)])
        if "--dtype" not in flags:
            known.append(known[0] if known else benchmark.load(args))
            args.loaded = known[0]
        return args
    return parse


def files(out):
    """{path: bytes} of everything but the manifest, which tells times."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != "manifest.json"}


# ---- one process -----------------------------------------------------------------------------------------

def test_pictures_have_their_seeds_and_stand_where_the_benchmark_says(arguments, small, tmp_path):
    result = pictures.run("toy", toy(), arguments("--seed", 7, "--batch-size", 3), tmp_path)
    assert result == Result({"counted": {"found": 10}})
    beside = [f"0000{p}/{name}" for p in range(5) for name in ("0.png", "1.png", "about.txt")]
    assert sorted(files(tmp_path)) == sorted([*beside, "scores.json"])
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == {"counted": {"found": 10}}
    seeds = [Image.open(tmp_path / f"0000{p}/{s}.png").text["seed"] for p in range(5) for s in range(2)]
    assert seeds == [str(7 + 100_000 * p + s) for p in range(5) for s in range(2)]
    [alone] = small.generate_image(PROMPTS[1], seed=100_008, num_iter=2)
    drawn = np.asarray(Image.open(tmp_path / "00001/1.png")).astype(int)
    assert np.abs(drawn - np.asarray(alone).astype(int)).max() <= 1


def test_the_model_draws_the_same_in_any_batch(arguments):
    """What make_repeatable does is tested in test_repeatable.py, with a model that is wide enough."""
    assert type(arguments().loaded.model.vae) is OneThreadVAE


def test_the_manifest_tells_the_run(arguments, folder, tmp_path):
    pictures.run("toy", toy(), arguments("--seed", 7, "--cfg", 2), tmp_path)
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert (told["benchmark"], told["status"], told["limit"]) == ("toy", "complete", None)
    assert told["numbers"] == {"prompts": 5, "of": 5, "pictures": 10, "drawn": 10, "failed": 0}
    assert (told["seed"], told["seed_rule"]) == (7, "seed + 100000·prompt + sample")
    expected = {"num_iter": 2, "cfg": 2.0, "size": [32, 32], "dtype": "float32", "per_prompt": 2}
    assert {name: told["settings"][name] for name in expected} == expected
    assert told["weights"]["files"] == {name: origins.digest(folder / name) for name in
                                        ("config.json", "model.safetensors", "tokenizer.json")}
    [run] = told["runs"]
    assert run["processes"] == 1 and run["wall_seconds"] >= 0 and run["versions"]["torch"]


def test_grids_are_made_of_an_items_pictures(arguments, tmp_path):
    module = toy(PROMPTS[:2], grid=lambda number, item: f"{item.name}.png",
                 picture=lambda number, item, sample: f"parts/{item.name}-{sample}.png", PER_PROMPT=4)
    pictures.run("toy", module, arguments(), tmp_path)
    grid = np.asarray(Image.open(tmp_path / "00001.png"))
    parts = [np.asarray(Image.open(tmp_path / f"parts/00001-{s}.png")) for s in range(4)]
    assert np.array_equal(grid, np.block([[[parts[0]], [parts[1]]], [[parts[2]], [parts[3]]]]))
    (tmp_path / "00001.png").unlink()
    before = files(tmp_path)
    pictures.run("toy", module, arguments(), tmp_path)
    assert {name: data for name, data in files(tmp_path).items() if name != "00001.png"} == before


def test_a_part_says_so_and_is_completed(arguments, tmp_path):
    part = pictures.run("toy", toy(), arguments("--limit", 2), tmp_path)
    assert part.scores == {"counted": {"found": 4}}
    assert part.notes[0].startswith("A part of the benchmark, the first 2 of 5")
    told = json.loads((tmp_path / "manifest.json").read_text())
    assert (told["status"], told["numbers"]["prompts"], told["numbers"]["of"]) == ("part", 2, 5)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    assert len(stamps) == 4
    whole = pictures.run("toy", toy(), arguments(), tmp_path)
    assert whole.scores == {"counted": {"found": 10}} and whole.notes == ()
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "nothing is drawn twice"
    with pytest.raises(ValueError, match="results of all are here, and --limit 2 would make a part"):
        pictures.run("toy", toy(), arguments("--limit", 2), tmp_path)


def test_without_a_scorer_no_old_scores_stay(arguments, tmp_path):
    pictures.run("toy", toy(), arguments("--limit", 1), tmp_path)
    assert pictures.run("toy", toy(score=lambda *_: None), arguments(), tmp_path) is None
    assert not (tmp_path / "scores.json").exists()
    assert json.loads((tmp_path / "manifest.json").read_text())["numbers"]["drawn"] == 10


@pytest.mark.parametrize("flags, message", [
    (["--seed", "1"], "seed is 0 there and 1 here"),
    (["--cfg", "1"], "cfg is 3.0 there and 1.0 here"),
    (["--size", "16"], "size is [32, 32] there and [16, 16] here"),
    (["--dtype", "bfloat16"], "fingerprint"),
    (["--cfg", "1", "--overwrite"], "cfg is 3.0 there and 1.0 here")])
def test_a_folder_of_another_run_is_refused(arguments, tmp_path, flags, message):
    module = toy(PROMPTS[:1])
    pictures.run("toy", module, arguments(), tmp_path)
    before = files(tmp_path) | {"manifest": (tmp_path / "manifest.json").read_bytes()}
    with pytest.raises(ValueError) as raised:
        pictures.run("toy", module, arguments(*flags), tmp_path)
    assert "results of another run are here" in str(raised.value)
    if message != "fingerprint":
        assert message in str(raised.value)
    assert files(tmp_path) | {"manifest": (tmp_path / "manifest.json").read_bytes()} == before


def test_a_folder_of_other_prompts_or_strange_pictures_is_refused(arguments, tmp_path):
    pictures.run("toy", toy(PROMPTS[:1]), arguments(), tmp_path / "a")
    with pytest.raises(ValueError, match="prompts_sha256 is .* there and .* here"):
        pictures.run("toy", toy(PROMPTS[1:2]), arguments(), tmp_path / "a")
    (tmp_path / "b/00000").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "b/00000/0.png")
    with pytest.raises(ValueError, match=r"b/00000/0.png: there already, drawn from another"):
        pictures.run("toy", toy(PROMPTS[:1]), arguments(), tmp_path / "b")


@pytest.mark.parametrize("flags, message", [
    (["--limit", "0"], "--limit is 0; it must be at least 1"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--cfg", "-1"], "--cfg is -1.0; it must be"),
    (["--seed", str(2 ** 63)], "--seed is 9223372036854775808; it must be"),
    (["--size", "12"], "size 12x12 is not possible")])
def test_bad_flags_leave_nothing_behind(arguments, tmp_path, flags, message):
    with pytest.raises(ValueError) as raised:
        pictures.run("toy", toy(), arguments(*flags), tmp_path / "out")
    assert message in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_two_items_of_one_file_are_refused(arguments, tmp_path):
    module = toy(picture=lambda number, item, sample: f"{sample}.png")
    with pytest.raises(ValueError, match="00000 and 00001 both give the file .*0.png"):
        pictures.run("toy", module, arguments(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_batch_that_lacks_a_picture_is_drawn_whole(arguments, tmp_path, monkeypatch):
    """So that rounding, which depends on the batch on GPUs, is that of a run without a kill."""
    drawn = []

    def generate_image(self, prompts, *, seed, **options):
        drawn.append(seed)
        return [Image.new("RGB", (32, 32), (s % 100, 0, 0)) for s in seed]
    monkeypatch.setattr(Harmon, "generate_image", generate_image)
    pictures.run("toy", toy(), arguments("--batch-size", 3), tmp_path)
    whole = sorted(drawn)
    assert whole[:2] == [[0, 1, 100_000], [100_001, 200_000, 200_001]]
    before = files(tmp_path)
    for name in ("00000/1.png", "00003/0.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "00001/.0.png.abcd_123.png").write_bytes(b"half a picture of the first batch")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("[!.]*.png") if path.stat().st_size}
    drawn.clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        pictures.run("toy", toy(), arguments("--batch-size", 3), tmp_path)
    assert sorted(drawn) == [whole[0], [300_000, 300_001, 400_000]]
    assert files(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps, "what is there stays"


# ---- several processes -----------------------------------------------------------------------------------

def test_processes_that_cannot_talk_to_each_other(arguments, tmp_path, monkeypatch, capsys):
    module = toy(grid=lambda number, item: f"{item.name}.png")
    pictures.run("toy", module, arguments("--batch-size", 8), tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    scored = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        scored.append(pictures.run("toy", module, arguments("--batch-size", 3), tmp_path / "two"))
    assert scored == [None, None, Result({"counted": {"found": 10}})]
    assert "4 of 5 prompts are not drawn yet" in capsys.readouterr().err
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_a_killed_run_and_two_processes_give_the_same_files(folder, tmp_path):
    """SIGKILL while the fifth picture of the real benchmark is being written; then two processes go on."""
    data = tmp_path / "prompts.jsonl"
    lines = [{"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": f"a {name}"}
             for name in ("bench", "cow", "traffic light", "sports ball", "cup")]
    data.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    flags = ["geneval", "--data", data, "--model", folder, "--steps", 2, "--batch-size", 3, "--out"]
    main([*map(str, flags), str(tmp_path / "one")])
    flags = [*map(str, flags), str(tmp_path / "two")]
    code = f"""
import os, signal
from PIL import Image
from harmonkit.evals.__main__ import main
save, count = Image.Image.save, [0]
def save_or_die(self, file, **options):
    count[0] += 1
    if count[0] == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, file, **options)
Image.Image.save = save_or_die
main({flags})
"""
    options = dict(cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    run = subprocess.run([sys.executable, "-c", code], **options)
    assert run.returncode == -9, run.stderr
    drawn = [path for path in (tmp_path / "two").rglob("*.png") if not path.name.startswith(".")]
    assert len(drawn) == 4 and len(list((tmp_path / "two").rglob(".*.png"))) == 1
    assert json.loads((tmp_path / "two/manifest.json").read_text())["status"] == "running"
    run = subprocess.run([*TORCHRUN, "-m", "harmonkit.evals", *flags], **options)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("score it by") == 1, "process 0 alone scores"
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert len(one) == 5 * (4 + 1) and one == two
    told = json.loads((tmp_path / "two/manifest.json").read_text())
    assert [run["processes"] for run in told["runs"]] == [1, 2] and told["status"] == "complete"
