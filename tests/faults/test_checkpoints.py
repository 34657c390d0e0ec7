"""Checkpoints and exports on disk: what is saved is what was meant, and what is broken is found and told."""
import json
import os
import shutil
import signal

import pytest
import torch

from faults.helpers import (
    assert_same,
    call,
    checkpoints,
    copy,
    cut,
    fine,
    flip,
    full_disk,
    hole,
    load,
    log,
    not_silent,
    refused,
    rewrite_checkpoint,
    run,
    told,
)
from harmon import Harmon
from harmonkit.training import losses
from harmonkit.training.monitor import read_log
from vae import AutoencoderKL


def full_copy(text_run, tmp_path):
    """A copy of the finished run, with its checkpoints of steps 2 and 3."""
    return copy(text_run, tmp_path / "runs")


# ---- damaged checkpoints -----------------------------------------------------------------------------------

DAMAGES = {
    "hole near the start": lambda path: hole(path, 0.02),
    "hole in the middle": lambda path: hole(path, 0.5),
    "hole near the end": lambda path: hole(path, 0.95),
    "hole of 64 bytes": lambda path: hole(path, 0.3, 64),
    "a bit": lambda path: flip(path, 0.4),
    "a bit of the optimizer's state": lambda path: flip(path, 0.9),
    "cut": cut,
    "cut at 99%": lambda path: cut(path, 0.99),
    "empty": lambda path: cut(path, 0),
    "zeros alone": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a text": lambda path: path.write_text("<html>"),
    "a list": lambda path: torch.save([1, 2], path),
    "a state dict": lambda path: torch.save({"a": torch.ones(2)}, path),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    DAMAGES[damage](runs / "tiny-llm" / "step-000003.pt")
    done = run(models.one, runs)
    if damage in ("a list",
                  "a state dict") and done.status:                           # of another format: refused
        refused(done, "step-000003.pt")
        return
    fine(done, "step-000003.pt")
    assert checkpoints(runs / "tiny-llm")[-1].name == "step-000003.pt"
    assert_same(load(text_run / "tiny-llm"), load(runs / "tiny-llm"))


@pytest.mark.parametrize("damage", ["hole in the middle", "cut", "a bit", "empty"])
def test_all_checkpoints_damaged(damage, models, text_run, tmp_path):
    """Refused, or begun anew with all that is saved kept; never exit 0 with nothing to show."""
    runs = full_copy(text_run, tmp_path)
    for path in checkpoints(runs / "tiny-llm"):
        DAMAGES[damage](path)
    done = not_silent(run(models.one, runs), "step-000003.pt|tiny-llm")
    if done.status == 0:
        assert_same(load(text_run / "tiny-llm"), load(runs / "tiny-llm"))
        told(done, "step-000003.pt", "step-000002.pt")


@pytest.mark.parametrize("save_every", [1, 2])
def test_new_checkpoints_are_kept_beside_broken_ones(save_every, models, text_run, tmp_path):
    """The broken ones have higher numbers."""
    runs = full_copy(text_run, tmp_path)
    for step in (50, 60):
        (runs / "tiny-llm" / f"step-{step:06d}.pt").write_bytes(b"broken")
    done = fine(run(models.one, runs, "--save-every", save_every, steps=6), "step-000060.pt")
    assert "step-000050.pt" in done.err
    whole = [path for path in checkpoints(runs / "tiny-llm") if path.read_bytes() != b"broken"]
    assert whole[-1].name == "step-000006.pt" and len(whole) == 2
    again = fine(run(models.one, runs, steps=6), "finished")
    assert "cannot be read" not in again.err, "a broken file is set aside once"


def test_the_next_recipe_starts_from_a_whole_checkpoint(models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    hole(runs / "tiny-llm" / "step-000003.pt")
    done = told(run(None, runs, "--after", "tiny-llm", recipe="tiny-joint"), "step-000003.pt")
    assert done.status in (0, 2) and "Traceback" not in done.err, done


def test_export_reads_a_whole_checkpoint(models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    hole(runs / "tiny-llm" / "step-000003.pt")
    fine(run(models.one, runs, "--export", tmp_path / "out"), "step-000003.pt")
    exported = Harmon.from_pretrained(tmp_path / "out").state_dict()
    name = "llm.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(exported[name], load(text_run / "tiny-llm")["model_ema"][name].half().float())


# ---- the order of checkpoints ------------------------------------------------------------------------------

@pytest.mark.parametrize("older, newer", [
    (998_000, 1_000_000), (999_999, 1_000_000), (9_000_000, 10_000_000)])
def test_steps_sort_as_numbers(older, newer, models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    folder = runs / "tiny-llm"
    for step in (older, newer):
        rewrite_checkpoint(text_run / "tiny-llm" / "step-000003.pt",
                           lambda content, step=step: content.update(step=step),
                           folder / f"step-{step:06d}.pt")
    back = [path for path in checkpoints(folder) if int(path.stem[5:]) < 10]
    for path in back:
        path.unlink()
    done = run(models.one, runs, steps=newer + 1, limit=30)
    fine(done, "steps")
    assert [int(path.stem[5:]) for path in checkpoints(folder)] == [newer, newer + 1]
    assert log(folder)[-1]["step"] == newer + 1


def test_other_files_beside_checkpoints_do_no_harm(models, text_run, half):
    for name in ("step-final.pt", "step-000002 (copy).pt", "step-.pt", "step-000009.pt.tmp",
                 ".step-000003.pt.x.pt"):
        (half / "tiny-llm" / name).write_bytes(b"something")
    fine(run(models.one, half))
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))
    assert (half / "tiny-llm" / "step-final.pt").exists(), "not ours to delete"


# ---- work at a stage's end ---------------------------------------------------------------------------------

VAE_FLAGS = ("--batch", 1, "--micro-batch", 1)


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory):
    """The vae_scale of two steps of tiny-vae that nothing stopped."""
    runs = tmp_path_factory.mktemp("vae")
    fine(run(models.one, runs, *VAE_FLAGS, recipe="tiny-vae", steps=2))
    return load(runs / "tiny-vae")


def stop_in_the_work_at_the_end(number, after=3):
    """Returns a `plant`: a signal to the process when it encodes for the scale, after its training."""
    def plant():
        encode, forward = AutoencoderKL.encode, losses.Losses.forward
        state = {"in_loss": False, "calls": 0}

        def watched(self, pixels):
            if not state["in_loss"]:
                state["calls"] += 1
                if state["calls"] == after:
                    os.kill(os.getpid(), number)
            return encode(self, pixels)

        def loss(self, task, inputs):
            state["in_loss"] = True
            try:
                return forward(self, task, inputs)
            finally:
                state["in_loss"] = False
        AutoencoderKL.encode, losses.Losses.forward = watched, loss
    return plant


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("how", ["command", "resume"])
def test_the_work_at_a_stages_end_is_done_after_all(number, how, models, measured, tmp_path):
    command = dict(recipe="tiny-vae", steps=2)
    done = run(models.one, tmp_path, *VAE_FLAGS, **command, plant=stop_in_the_work_at_the_end(number))
    if number == signal.SIGKILL:
        assert done.status == -signal.SIGKILL
    else:                                       # it ends the work, or stops and says so
        assert done.status in (0, 130) and "Traceback" not in done.err, done
    if how == "command":
        fine(run(models.one, tmp_path, *VAE_FLAGS, **command))
    else:
        fine(call("train.py", "resume", tmp_path / "tiny-vae"))
    assert load(tmp_path / "tiny-vae")["config"]["vae_scale"] == measured["config"]["vae_scale"]
    assert_same(measured, load(tmp_path / "tiny-vae"))


def test_a_stop_in_the_last_step_leaves_the_work_to_do(models, measured, tmp_path):
    def plant():
        forward, calls = losses.Losses.forward, []

        def loss(self, task, inputs):
            calls.append(task)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return forward(self, task, inputs)
        losses.Losses.forward = loss
    done = run(models.one, tmp_path, *VAE_FLAGS, recipe="tiny-vae", steps=2, plant=plant)
    assert done.status in (0, 130), done
    fine(run(models.one, tmp_path, *VAE_FLAGS, recipe="tiny-vae", steps=2))
    assert load(tmp_path / "tiny-vae")["config"]["vae_scale"] == measured["config"]["vae_scale"]


# ---- exports -----------------------------------------------------------------------------------------------

def assert_exported(runs, folder):
    exported = Harmon.from_pretrained(folder).state_dict()
    for name, tensor in load(runs / "tiny-llm")["model_ema"].items():
        assert torch.equal(exported[name], tensor.half().float()), name


def shard(folder, suffix="safetensors"):
    """Make two shards and an index of a model folder's file."""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    names, stem = sorted(tensors), "model" if suffix == "safetensors" else "pytorch_model"
    parts = [names[::2], names[1::2]]
    files = [f"{stem}-{k:05d}-of-00002.{suffix}" for k in (1, 2)]
    for file, part in zip(files, parts):
        content = {name: tensors[name].clone() for name in part}
        save_file(content, folder / file) if suffix == "safetensors" else torch.save(content, folder / file)
    weight_map = {name: file for file, part in zip(files, parts) for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_export_over_shards_is_what_is_read(suffix, models, text_run, tmp_path):
    runs, target = full_copy(text_run, tmp_path), tmp_path / "target"
    shutil.copytree(models.two, target)
    shard(target, suffix)
    assert torch.equal(Harmon.from_pretrained(target).llm.model.norm.weight,
                       Harmon.from_pretrained(models.two).llm.model.norm.weight)
    done = run(models.one, runs, "--export", target)
    if done.status == 0:
        assert_exported(runs, target)
        files = os.listdir(target)
        assert not [name for name in files if name.endswith("index.json")], "some readers take the index"
    else:
        refused(done, str(target))


def test_an_export_over_a_pickle_is_what_is_read(models, text_run, tmp_path):
    runs, target = full_copy(text_run, tmp_path), tmp_path / "target"
    target.mkdir()
    torch.save(Harmon.from_pretrained(models.two).state_dict(), target / "pytorch_model.bin")
    fine(run(models.one, runs, "--export", target))
    assert_exported(runs, target)


def test_an_export_over_another_tokenizer_is_what_is_read(models, text_run, tmp_path):
    runs, target = full_copy(text_run, tmp_path), tmp_path / "target"
    shutil.copytree(models.two, target)
    fine(run(models.one, runs, "--export", target))
    assert (target / "tokenizer.json").read_text() == (runs / "tiny-llm" / "tokenizer.json").read_text()
    assert_exported(runs, target)


def test_a_model_without_tokenizer_leaves_none_of_another(models, tmp_path):
    shutil.copytree(models.two, tmp_path / "out")
    model = Harmon.from_pretrained(models.one)
    model.tokenizer = None
    model.save_pretrained(tmp_path / "out")
    assert Harmon.from_pretrained(tmp_path / "out").tokenizer is None


def test_an_export_to_a_file_is_one_line(models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    (tmp_path / "file").write_text("")
    refused(run(models.one, runs, "--export", tmp_path / "file"), "file")


def test_an_export_over_the_runs_own_start(models, text_run, tmp_path):
    shutil.copytree(models.one, tmp_path / "model")
    done = run(tmp_path / "model", tmp_path / "runs", "--export", tmp_path / "model")
    if done.status == 0:
        assert_exported(tmp_path / "runs", tmp_path / "model")
        fine(run(tmp_path / "model", tmp_path / "runs"), "finished")
    else:
        refused(done, "model")


# ---- to the disk -------------------------------------------------------------------------------------------

def watch_writes(record):
    """Returns a `plant`: the file `record` gets a line for each fsync, rename and removal, with paths."""
    def plant():
        fsync, replace, rename = os.fsync, os.replace, os.rename
        out = open(record, "w", buffering=1)

        def path_of(fd):
            return os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")

        def synced(fd):
            print("sync", path_of(fd), sep="\t", file=out)
            fsync(fd)

        def moved(source, target, **options):
            print("move", os.path.realpath(source), os.path.realpath(target), sep="\t", file=out)
            replace(source, target, **options)
        os.fsync, os.replace, os.rename = synced, moved, moved
        os.fdatasync = synced
        assert rename is not moved
    return plant


def assert_synced(record, names):
    """Files of these names were synced before they got their names, and their folders afterwards."""
    lines = [line.split("\t") for line in record.read_text().splitlines()]
    for name in names:
        moves = [i for i, line in enumerate(lines) if line[0] == "move" and line[2].endswith(name)]
        assert moves, f"{name} was not moved to its place\n{lines}"
        for i in moves:
            source, target = lines[i][1:]
            assert ["sync", source] in lines[:i], f"{name}: not synced"
            assert ["sync", os.path.dirname(target)] in lines[i:], f"{name}: its folder was not synced"


def test_checkpoints_and_exports_reach_the_disk(models, tmp_path):
    fine(run(models.one, tmp_path / "runs", "--export", tmp_path / "out",
             plant=watch_writes(tmp_path / "log")))
    assert_synced(tmp_path / "log", ["step-000001.pt", "step-000003.pt", "tiny-llm/tokenizer.json",
                                     "out/model.safetensors", "out/config.json"])


def test_old_checkpoints_are_not_kept_mapped(models, text_run, half, tmp_path):
    """A deleted file that is mapped takes its room on the disk for the whole run."""
    def plant():
        save, record = torch.save, open(tmp_path / "maps", "w", buffering=1)

        def saving(*args, **options):
            save(*args, **options)
            print("saved", *[line for line in open("/proc/self/maps") if "step-" in line], file=record)
        torch.save = saving
    fine(run(models.one, half, steps=6, plant=plant))
    text = (tmp_path / "maps").read_text()
    if text:
        assert text.count("saved") == 4 and "step-0" not in text.split("saved", 2)[-1], text


@pytest.mark.parametrize("size, file", [
    (600, "tokenizer|run.json"), (10_000, "tokenizer"), (100_000, "step|checkpoint")])
def test_a_full_disk_is_one_line(size, file, models, tmp_path):
    done = run(models.one, tmp_path / "runs", plant=full_disk(size))
    refused(done, file)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name.startswith(".step")]
    assert not left, "half-written files stay"
    fine(run(models.one, tmp_path / "runs"))                                # there is room again
    assert load(tmp_path / "runs" / "tiny-llm")["step"] == 3


def test_a_full_disk_in_the_export_is_one_line(models, text_run, tmp_path):
    runs = full_copy(text_run, tmp_path)
    shutil.copytree(models.two, tmp_path / "out")
    before = Harmon.from_pretrained(tmp_path / "out").llm.model.norm.weight.clone()
    refused(run(models.one, runs, "--export", tmp_path / "out", plant=full_disk(300_000)),
            "out|model.safetensors")
    assert torch.equal(Harmon.from_pretrained(tmp_path / "out").llm.model.norm.weight,
                       before), "the old one is whole"


def test_a_full_disk_later_loses_nothing(models, text_run, half):
    refused(run(models.one, half, plant=full_disk(100_000)), "step|checkpoint", "disk")
    assert [path.name for path in checkpoints(half / "tiny-llm")] == ["step-000002.pt"]
    fine(run(models.one, half))
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


# ---- the log -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rest", ['{"step": 2, "los', '{"step": 2}', '\0' * 100,
                                  '{"step": 2, "loss": {"text"'])
def test_half_a_line_does_not_swallow_the_next(rest, models, half):
    file = half / "tiny-llm" / "log.jsonl"
    file.write_text(file.read_text() + rest)
    fine(run(models.one, half))
    whole = []
    for line in file.read_text().splitlines():
        try:
            whole.append(json.loads(line)["step"])
        except ValueError:
            pass
    assert whole[-1] == 3, file.read_text()
    assert [line["step"] for line in read_log(half / "tiny-llm")][-1] == 3


def test_a_cut_log_is_plotted(models, half):
    file = half / "tiny-llm" / "log.jsonl"
    whole = file.read_text()
    file.write_text('{"step": 1, "loss": {"te' + whole + whole + '{"step": 3, "lo')
    fine(call("train.py", "tiny-llm", "--runs", half, "--plot"))


def test_steps_are_logged_once_as_numbers(models, tmp_path):
    fine(run(models.one, tmp_path))
    line = log(tmp_path / "tiny-llm")[-1]
    assert line["step"] == 3 and line["loss"]["text"] > 0
    assert line["norm"] > 0 and line["skipped"] == line["unusable"] == line["cut"] == 0
