"""A run that goes on: what was changed is used and told, or refused; its folder alone says what it was."""
import json
import os
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT

from faults.helpers import (
    assert_same,
    back_to,
    call,
    checkpoints,
    copy,
    differs,
    draw,
    fine,
    load,
    not_silent,
    refused,
    run,
    told,
    write_mixture,
    write_pictures,
    write_rows,
)
from harmon import Harmon


@pytest.fixture(scope="module")
def joint_run(models, tmp_path_factory):
    """The --runs folder of three steps of tiny-joint with all its parts and tasks, finished."""
    folder = tmp_path_factory.mktemp("joint") / "runs"
    fine(run(models.one, folder, recipe="tiny-joint"))
    return folder


@pytest.fixture(scope="module")
def drawn(models, tmp_path_factory):
    """Three steps of drawing from a mixture of six pictures, finished: data/, mixture.json, runs/."""
    folder = tmp_path_factory.mktemp("drawn")
    write_mixture(folder / "mixture.json", (write_pictures(folder / "data"), "text2image"))
    fine(draw(models.one, folder / "runs", folder / "mixture.json"))
    return folder


@pytest.fixture
def half_drawn(drawn, tmp_path):
    """A copy of its runs as if killed after step 2. The data stay where they are, and must not be changed."""
    folder = copy(drawn / "runs", tmp_path / "runs")
    back_to(folder / "tiny-joint", 2)
    return folder


# ---- changed and used --------------------------------------------------------------------------------------

def moves(before, after):
    """{name: how far the last step moved the weights of the language model}."""
    return {name: after["model"][name] - tensor for name, tensor in before["model"].items()
            if name.startswith("llm.") and name != "llm.lm_head.weight"}


@pytest.mark.parametrize("muon", ["false", "true"])
def test_a_changed_rate_is_used(muon, models, tmp_path):
    """The last step alone is 100 times as long."""
    runs = tmp_path / "a"
    plain = fine(run(models.one, runs, "--muon", muon))
    assert "goes on" not in plain.err
    unchanged = load(runs / "tiny-llm")
    back_to(runs / "tiny-llm", 2)
    before = load(runs / "tiny-llm")
    fine(run(models.one, runs, "--muon", muon, "--lr", "llm=0.1"), "lr", r"0\.001", r"0\.1")
    changed = load(runs / "tiny-llm")
    assert changed["step"] == 3 and changed["recipe"]["lr"] == {"llm": 0.1}
    wanted = moves(before, unchanged)
    for name, move in moves(before, changed).items():
        assert torch.allclose(move, 100 * wanted[name], rtol=0.02, atol=2e-4), name


def test_a_changed_weight_decay_is_used(models, text_run, half):
    before, unchanged = load(half / "tiny-llm"), load(text_run / "tiny-llm")
    fine(run(models.one, half, "--weight-decay", 5), "weight.decay", r"0\.02", "5")
    changed = load(half / "tiny-llm")
    name = "llm.model.layers.0.mlp.up_proj.weight"
    more = changed["model"][name] - unchanged["model"][name]
    rate = 1e-3 * 0.25                                                      # of the last of three steps
    assert torch.allclose(more, -rate * 4.98 * before["model"][name], rtol=0.02, atol=1e-7)
    name = "llm.model.norm.weight"
    assert torch.equal(changed["model"][name], unchanged["model"][name]), "no decay of vectors"


@pytest.mark.parametrize("before, after", [(0.02, 0), (0, 0.02)])
@pytest.mark.parametrize("muon", ["false", "true"])
def test_no_weight_decay_is_a_weight_decay(before, after, muon, models, tmp_path):
    fine(run(models.one, tmp_path, "--muon", muon, "--weight-decay", before))
    unchanged = load(tmp_path / "tiny-llm")
    back_to(tmp_path / "tiny-llm", 2)
    done = not_silent(run(models.one, tmp_path, "--muon", muon, "--weight-decay", after), "weight.decay")
    assert done.status or differs(unchanged, load(tmp_path / "tiny-llm"))


def test_a_changed_average_is_used(models, text_run, half):
    before = load(half / "tiny-llm")
    fine(run(models.one, half, "--ema", 0.1), "ema", r"0\.998", r"0\.1")
    after = load(half / "tiny-llm")
    assert not differs(after, load(text_run / "tiny-llm")), "the weights themselves are the same"
    name = "llm.model.norm.weight"
    wanted = 0.1 * before["model_ema"][name] + 0.9 * after["model"][name]
    assert torch.allclose(after["model_ema"][name], wanted, atol=1e-6)


@pytest.mark.parametrize("flag, value, key", [
    ("--clip", "0.5", "clip"), ("--steps", "5", "steps"),
    ("--batch", "4", "batch"), ("--micro-batch", "1", "micro.batch"), ("--seed", "3", "seed|shapes"),
    ("--scenes", "21", "scenes|shapes"), ("--bf16", "true", "bf16"), ("--max-length", "30", "max.length"),
])
def test_other_settings_are_used_or_refused(flag, value, key, models, text_run, half):
    done = not_silent(run(models.one, half, flag, value), key)
    if done.status == 0:
        after = load(half / "tiny-llm")
        assert str(after["recipe"][flag[2:].replace("-", "_")]).lower() == str(json.loads(value)).lower()
        assert differs(load(text_run / "tiny-llm"), after), "told, but not used"
    else:
        assert [path.name for path in checkpoints(half / "tiny-llm")] == ["step-000002.pt"]


@pytest.mark.parametrize("flag, value", [
    ("--grad-scale", "0.5"), ("--kl", "0.5"), ("--free-nats", "0.5"), ("--local", "0.5"),
    ("--all-hidden", "0.5"), ("--cosine-mask", "false"), ("--checkpointing", "true"),
    ("--sample-every", "100"), ("--warmup", "0.9"), ("--save-every", "2"),
])
def test_settings_that_change_nothing_here_are_told(flag, value, models, text_run, half):
    not_silent(run(models.one, half, flag, value), flag[2:].replace("-", "."))
    if checkpoints(half / "tiny-llm")[-1].name == "step-000003.pt":
        assert not differs(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


def test_nothing_is_told_of_a_run_that_goes_on_unchanged(models, text_run, half):
    done = fine(run(models.one, half))
    assert "warning" not in done.err and "->" not in done.err, done
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


def test_a_reader_more_changes_nothing(models, text_run, half):
    fine(run(models.one, half, "--workers", 1))
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


@pytest.mark.parametrize("spelling", ["relative", "slash", "tilde"])
def test_the_same_start_in_other_words_is_the_same(spelling, models, text_run, half, monkeypatch):
    path = {"relative": os.path.relpath(models.one, ROOT), "slash": f"{models.one}/",
            "tilde": f"~/{models.one.name}"}[spelling]
    monkeypatch.setenv("HOME", str(models.one.parent))
    fine(run(path, half))
    assert_same(load(text_run / "tiny-llm"), load(half / "tiny-llm"))


# ---- changed and refused -----------------------------------------------------------------------------------

def assert_untouched(runs, step=2, recipe="tiny-llm"):
    assert [path.name for path in checkpoints(runs / recipe)] == [f"step-{step:06d}.pt"]


def other_start(flag, models):
    """Another value of a flag that decides how a run begins."""
    return {"--init": models.two, "--tokenizer": models.two, "--config": "harmon-0.5b",
            "--init-llm": models.two, "--init-mar": models.two / "model.safetensors",
            "--vae": models.two / "model.safetensors"}[flag]


@pytest.mark.parametrize("flag", ["--init", "--tokenizer", "--config", "--init-llm", "--init-mar", "--vae"])
def test_another_start_is_refused(flag, models, half):
    refused(run(models.one, half, flag, other_start(flag, models)), flag, "--runs")
    assert_untouched(half)


def test_a_start_left_out_is_told(models, half):
    not_silent(run(None, half), "--init")


def test_a_tokenizer_left_out_is_told(models, tmp_path):
    fine(run(models.one, tmp_path / "runs", "--tokenizer", models.one))
    back_to(tmp_path / "runs" / "tiny-llm", 2)
    done = run(models.one, tmp_path / "runs")
    assert done.status == 0 or refused(done, "--tokenizer")                 # it is the same one


@pytest.mark.parametrize("before, after", [("false", "true"), ("true", "false")])
def test_another_optimizer_is_refused(before, after, models, tmp_path):
    fine(run(models.one, tmp_path, "--muon", before))
    back_to(tmp_path / "tiny-llm", 2)
    refused(run(models.one, tmp_path, "--muon", after), "muon", "--runs")
    assert_untouched(tmp_path)


@pytest.mark.parametrize("flags", [
    ("--only", "llm"), ("--only", "mar-decoder"), ("--lr", "llm=1e-3"),
    ("--lr", "llm=1e-3,mar-encoder=1e-3,mar-decoder=1e-3,vae=1e-3")])
def test_other_parts_are_refused(flags, models, joint_run, tmp_path):
    runs = copy(joint_run, tmp_path / "runs")
    back_to(runs / "tiny-joint", 2)
    refused(run(models.one, runs, *flags, recipe="tiny-joint"), "llm", "--runs")
    assert_untouched(runs, recipe="tiny-joint")


def test_all_parts_after_one_are_refused(models, tmp_path):
    fine(run(models.one, tmp_path, "--only", "mar-decoder", recipe="tiny-joint"))
    back_to(tmp_path / "tiny-joint", 2)
    refused(run(models.one, tmp_path, recipe="tiny-joint"), "mar-decoder", "--only|--runs")


@pytest.mark.parametrize("flags, words", [
    (("--ratio", "text2image=1,image2text=1,text=1"), ("ratio",)), (("--size", "32"), ("size",)),
    (("--from-scratch", "harmon-0.5b"), ("from.scratch",)), (("--after", "tiny-mar"), ("after",))])
def test_other_data_and_sizes_are_told(flags, words, models, joint_run, tmp_path):
    runs = copy(joint_run, tmp_path / "runs")
    back_to(runs / "tiny-joint", 2)
    not_silent(run(models.one, runs, *flags, recipe="tiny-joint"), *words)


# ---- the tokenizer -----------------------------------------------------------------------------------------

def test_a_missing_tokenizer_is_an_error(models, half):
    (half / "tiny-llm" / "tokenizer.json").unlink()
    refused(run(models.one, half), "tokenizer.json")
    assert not (half / "tiny-llm" / "tokenizer.json").exists(), "no other one is made"


def test_a_missing_tokenizer_is_an_error_without_init(models, tmp_path):
    """Where the run's start had none, one was trained on the shapes world: that is not done again either."""
    model = Harmon.from_pretrained(models.one)
    model.tokenizer = None
    model.save_pretrained(tmp_path / "bare")
    fine(run(tmp_path / "bare", tmp_path / "runs"))
    back_to(tmp_path / "runs" / "tiny-llm", 2)
    (tmp_path / "runs" / "tiny-llm" / "tokenizer.json").unlink()
    refused(run(tmp_path / "bare", tmp_path / "runs"), "tokenizer.json")


def test_another_tokenizer_in_the_folder_is_not_silent(models, half):
    shutil.copy(models.two / "tokenizer.json", half / "tiny-llm" / "tokenizer.json")
    not_silent(run(models.one, half), "tokenizer")


@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 20_000])
def test_a_broken_tokenizer_is_one_line(content, models, half):
    (half / "tiny-llm" / "tokenizer.json").write_bytes(content)
    refused(run(models.one, half), "tokenizer.json")


# ---- mixtures ----------------------------------------------------------------------------------------------

def test_another_mixture_is_refused(models, drawn, half_drawn, tmp_path):
    other = write_mixture(tmp_path / "other.json", (write_pictures(tmp_path / "data", 7), "text2image"))
    refused(draw(models.one, half_drawn, other), "mixture|data|source", "--runs|--mixture")
    assert_untouched(half_drawn, recipe="tiny-joint")


def test_the_shapes_world_after_a_mixture_is_refused(models, half_drawn):
    done = run(models.one, half_drawn, "--ratio", "text2image=1", recipe="tiny-joint")
    refused(done, "mixture|data|source")


def test_a_mixture_after_the_shapes_world_is_refused(models, joint_run, drawn, tmp_path):
    runs = copy(joint_run, tmp_path / "runs")
    back_to(runs / "tiny-joint", 2)
    refused(draw(models.one, runs, drawn / "mixture.json"), "mixture|ratio|data")


@pytest.mark.parametrize("change", ["append", "remove", "reorder", "caption", "weight", "task", "source"])
def test_changed_data_under_the_same_name_are_refused(change, models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6)
    mixture = tmp_path / "mixture.json"
    lines = [{"path": str(rows), "task": "text2image"}, {"path": str(rows), "task": "image2text"}]
    write_mixture(mixture, *lines)
    ratio = ("--ratio", "text2image=1,image2text=1")
    fine(draw(models.one, tmp_path / "runs", mixture, *ratio))
    back_to(tmp_path / "runs" / "tiny-joint", 2)
    if change == "append":
        write_pictures(tmp_path / "data", 7)
    elif change == "remove":
        write_rows(tmp_path / "data", range(5))
    elif change == "reorder":
        write_rows(tmp_path / "data", [1, 0, 2, 3, 4, 5])
    elif change == "caption":
        write_rows(tmp_path / "data", range(6), caption="words {}")
    elif change == "weight":
        write_mixture(mixture, {**lines[0], "weight": 3}, lines[1], {**lines[0], "weight": 2})
    elif change == "task":
        write_mixture(mixture, lines[1], lines[0])
    elif change == "source":
        write_mixture(mixture, *lines, lines[1])
    refused(draw(models.one, tmp_path / "runs", mixture, *ratio), "data|source|mixture|pairs")
    assert_untouched(tmp_path / "runs", recipe="tiny-joint")


def test_a_mixture_written_anew_with_the_same_data_goes_on(models, drawn, half_drawn, tmp_path):
    """Data and mixture were moved."""
    shutil.copytree(drawn / "data", tmp_path / "moved")
    mixture = write_mixture(tmp_path / "m.json", (tmp_path / "moved" / "pairs.jsonl", "text2image"))
    fine(draw(models.one, half_drawn, mixture))
    assert_same(load(drawn / "runs" / "tiny-joint"), load(half_drawn / "tiny-joint"))


# ---- finished runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["--init", "--tokenizer", "--init-llm", "--vae"])
def test_a_finished_run_does_not_export_another_model(flag, models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    done = run(models.one, runs, flag, other_start(flag, models), "--export", tmp_path / "out")
    refused(done, flag, "--runs")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_with_other_settings_is_told(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    not_silent(run(models.one, runs, "--lr", "llm=0.1", "--export", tmp_path / "out"), "lr")
    assert load(runs / "tiny-llm")["recipe"]["lr"] == {"llm": 1e-3}, "what is saved was trained so"


def test_a_finished_run_of_another_mixture_is_refused(models, drawn, tmp_path):
    runs = copy(drawn / "runs", tmp_path / "runs")
    other = write_mixture(tmp_path / "other.json", (write_pictures(tmp_path / "data", 7), "text2image"))
    refused(draw(models.one, runs, other, "--export", tmp_path / "out"), "mixture|data|source")
    assert not (tmp_path / "out").exists()


def test_a_finished_run_exports_its_own_model(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    fine(run(models.one, runs, "--export", tmp_path / "out"), "finished")
    exported = Harmon.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in load(runs / "tiny-llm")["model_ema"].items():
        assert torch.equal(exported[name], tensor.half().float()), name


def test_fewer_steps_than_done_are_told(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    told(run(models.one, runs, steps=2), "finished", "3")


# ---- the folder alone --------------------------------------------------------------------------------------

def test_the_folder_says_what_the_run_was(models, drawn):
    record = json.loads((drawn / "runs" / "tiny-joint" / "run.json").read_text())
    start, = record["starts"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    assert start["git"]["commit"] == commit.strip()
    assert start["versions"]["torch"] == torch.__version__ and start["versions"]["python"]
    assert "--ratio" in start["command"] and "tiny-joint" in start["command"]
    assert record["settings"]["steps"] == 3 and record["settings"]["lr"]["llm"] == 7e-4
    source, = record["data"]
    assert source["samples"] == 6 and source["path"].endswith("pairs.jsonl")
    assert len(source["fingerprint"]) == 16
    assert record["start"]["init"]["path"] == str(models.one)


def test_resume_goes_on_from_the_folder_alone(drawn, half_drawn, tmp_path):
    done = call("train.py", "resume", half_drawn / "tiny-joint", cwd=tmp_path)
    fine(done)
    assert_same(load(drawn / "runs" / "tiny-joint"), load(half_drawn / "tiny-joint"))


@pytest.mark.parametrize("slash", ["", "/", "/."])
def test_resume_after_relative_paths_works_from_anywhere(slash, models, text_run, drawn, tmp_path):
    (tmp_path / "work").mkdir()
    shutil.copytree(drawn / "data", tmp_path / "work" / "data")
    write_mixture(tmp_path / "work" / "mixture.json", {"path": "data/pairs.jsonl", "task": "text2image"})
    model = os.path.relpath(models.one, tmp_path / "work")
    fine(draw(model, "runs", "mixture.json", cwd=tmp_path / "work"))
    back_to(tmp_path / "work" / "runs" / "tiny-joint", 2)
    fine(call("train.py", "resume", f"work/runs/tiny-joint{slash}", cwd=tmp_path))
    assert_same(load(drawn / "runs" / "tiny-joint"), load(tmp_path / "work" / "runs" / "tiny-joint"))
    assert sorted(path.name for path in (tmp_path / "work" / "runs").iterdir()) == ["tiny-joint"]


def test_resume_after_the_start_is_gone(models, text_run, tmp_path):
    """A checkpoint holds all that the run needs of --init."""
    shutil.copytree(models.one, tmp_path / "model")
    fine(run(tmp_path / "model", tmp_path / "runs"))
    back_to(tmp_path / "runs" / "tiny-llm", 2)
    shutil.rmtree(tmp_path / "model")
    fine(call("train.py", "resume", tmp_path / "runs" / "tiny-llm"))
    assert_same(load(text_run / "tiny-llm"), load(tmp_path / "runs" / "tiny-llm"))


def test_resume_of_a_moved_run(joint_run, tmp_path):
    runs = copy(joint_run, tmp_path / "elsewhere")
    back_to(runs / "tiny-joint", 2)
    fine(call("train.py", "resume", runs / "tiny-joint"))
    assert_same(load(joint_run / "tiny-joint"), load(runs / "tiny-joint"))


def test_resume_exports_as_the_command_asked(models, text_run, tmp_path):
    fine(run(models.one, tmp_path / "runs", "--export", tmp_path / "out"))
    back_to(tmp_path / "runs" / "tiny-llm", 2)
    shutil.rmtree(tmp_path / "out")
    done = fine(call("train.py", "resume", tmp_path / "runs" / "tiny-llm"))
    assert done.out.strip() == str(tmp_path / "out")
    name = "llm.model.norm.weight"
    exported = Harmon.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(exported[name], load(text_run / "tiny-llm")["model_ema"][name].half().float())


def test_resume_with_more_steps(models, text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    fine(call("train.py", "resume", runs / "tiny-llm", "--steps", 5), "steps 3 -> 5")
    assert load(runs / "tiny-llm")["step"] == 5


def test_resume_goes_on_with_the_chain(models, tmp_path):
    """A chain that was killed in its last recipe but one."""
    pairs = ("--init", models.one, "--runs", tmp_path, "--scenes", 20, "--batch", 2, "--micro-batch", 1)
    command = ("tiny", *pairs, "--steps", 2, "--save-every", 1, "--compile", "false", "--device", "cpu")
    fine(call("train.py", *command))
    last = load(tmp_path / "tiny-reca")
    shutil.rmtree(tmp_path / "tiny-reca")
    back_to(tmp_path / "tiny-joint", 1)
    fine(call("train.py", "resume", tmp_path / "tiny-joint"))
    assert_same(last, load(tmp_path / "tiny-reca"))
    shutil.rmtree(tmp_path / "tiny-reca")
    fine(call("train.py", *command))
    assert_same(last, load(tmp_path / "tiny-reca"))


def test_resume_of_changed_data_is_refused(models, tmp_path):
    rows = write_pictures(tmp_path / "data", 6)
    mixture = write_mixture(tmp_path / "mixture.json", (rows, "text2image"))
    fine(draw(models.one, tmp_path / "runs", mixture))
    back_to(tmp_path / "runs" / "tiny-joint", 2)
    write_pictures(tmp_path / "data", 7)
    refused(call("train.py", "resume", tmp_path / "runs" / "tiny-joint"), "data|source|pairs", "6", "7")


def test_resume_of_a_finished_run_says_so(text_run, tmp_path):
    runs = copy(text_run, tmp_path / "runs")
    fine(call("train.py", "resume", runs / "tiny-llm"), "finished", "3 steps")


@pytest.mark.parametrize("what", ["nothing", "empty", "runs", "model", "file"])
def test_resume_of_no_run_is_one_line(what, models, text_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a text")
    path = {"runs": text_run, "model": models.one}.get(what, tmp_path / what)
    refused(call("train.py", "resume", path), str(path))


def test_resume_without_a_folder_is_one_line():
    refused(call("train.py", "resume"), "resume|folder|run")


@pytest.mark.parametrize("content", [None, b"", b'{"command": ["train', b"[]", b"{}", b"\0" * 500])
def test_a_broken_record_is_one_line(content, half):
    file = half / "tiny-llm" / "run.json"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    refused(call("train.py", "resume", half / "tiny-llm"), "run.json|tiny-llm")
    assert_untouched(half)
