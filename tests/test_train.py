import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, shake
from PIL import Image

from harmonkit.training import monitor
from harmonkit.training import optim
from harmonkit.training import recipes
from harmonkit.shapes_world import world as shapes
import train
from harmonkit import checkpoints
from harmon import Harmon
from pretrained import HarmonConfig
from harmonkit.training.recipes import RECIPES, Recipe

ALL = {"mar-decoder": 1e-3, "mar-encoder": 1e-3, "llm": 1e-3}
SHORT = Recipe(ratio={"text2image": 2, "image2text": 1, "text": 1}, lr=ALL, steps=6, batch=8, micro_batch=2, size=64, scenes=20, save_every=3, sample_every=0, warmup=0.3,
               checkpointing=False, ema=0.9)
SMALL_64 = replace(SMALL, mar=replace(SMALL.mar, img_size=64, dropout=0.1, class_num=shapes.LABELS))


@pytest.fixture
def small_world(monkeypatch):
    """harmon-tiny shrunk, at 64 pixels as the shapes world is."""
    monkeypatch.setattr(HarmonConfig, "from_name", classmethod(lambda cls, name: SMALL_64))


def options(folder, *more):
    return train.arguments(["tiny-joint", "--device", "cpu", "--runs", str(folder), *map(str, more)])


def run(recipe, folder, *more, stop_at=None):
    path = train.train("test", replace(recipe, after=""), options(folder, *more), stop_at)
    return torch.load(path, weights_only=True)


def equal(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items())


def log(folder, name="test"):
    return [json.loads(line) for line in open(folder / name / "log.jsonl")]


# ---- resuming --------------------------------------------------------------------------------------------------------

def test_resume_is_exact(small_world, tmp_path):
    whole = run(SHORT, tmp_path / "a")
    run(SHORT, tmp_path / "b", stop_at=3)
    halves = run(SHORT, tmp_path / "b")
    assert whole["step"] == halves["step"] == 6
    assert equal(whole["model"], halves["model"]) and equal(whole["model_ema"], halves["model_ema"])
    assert not equal(whole["model"], run(replace(SHORT, seed=1), tmp_path / "c")["model"])


def test_resume_is_exact_with_muon(small_world, tmp_path):
    recipe = replace(SHORT, muon=True)
    whole = run(recipe, tmp_path / "a")
    run(recipe, tmp_path / "b", stop_at=3)
    assert equal(whole["model"], run(recipe, tmp_path / "b")["model"])
    assert not equal(whole["model"], run(SHORT, tmp_path / "c")["model"])
    optimizer = optim.make_optimizer(optim.parameter_groups(Harmon(SMALL), recipe))
    matrices = {id(p) for g in optimizer.parts[0].param_groups for p in g["params"]}
    assert len(matrices) == (2 + 2) * 4 + 2 * 7                    # of four MAR blocks and two of the LLM's layers
    with pytest.raises(ValueError, match="--zero"):
        optim.make_optimizer(optim.parameter_groups(Harmon(SMALL), recipe), spread=True)


def test_a_broken_checkpoint_falls_back_to_the_one_before(small_world, tmp_path, capsys):
    whole = run(SHORT, tmp_path)
    last = train.checkpoints(tmp_path / "test")[-1]
    last.write_bytes(last.read_bytes()[:5000])
    again = run(SHORT, tmp_path)
    assert "step-000006.pt cannot be read, going back" in capsys.readouterr().err
    assert equal(whole["model"], again["model"])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    model = shake(Harmon(SMALL_64))
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path_factory.mktemp("model"))
    return tmp_path_factory.getbasetemp() / "model0"


def command(model_folder, runs, *more, processes=1):
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, "train.py", "tiny-joint", "--device", "cpu", "--init", model_folder, "--runs", runs, "--scenes", "20", "--batch", "8", "--micro-batch", "2",
            "--bf16", "false", "--muon", "false", *more]


def in_shell(*args, **kwargs):
    done = subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def last_of(runs):
    return train.last_checkpoint(runs / "tiny-joint")[1]


@pytest.fixture(scope="module")
def one_process(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    in_shell(model_folder, folder, "--steps", "4")
    return folder


@pytest.mark.parametrize("zero", ["false", "true"])
def test_two_processes_train_as_one_and_resume_exactly(model_folder, one_process, tmp_path, zero):
    two_processes = ("--steps", "4", "--save-every", "2", "--zero", zero)
    in_shell(model_folder, tmp_path, *two_processes, processes=2)
    one, two = last_of(one_process), last_of(tmp_path)
    for k, x in one["model"].items():
        if not k.endswith(("qkv.bias", "k_proj.bias")):   # a bias of all keys changes no attention: its gradient is rounding, which Adam blows up
            assert torch.allclose(x, two["model"][k], atol=1e-5), k
    for task, loss in log(one_process, "tiny-joint")[-1]["loss"].items():
        assert log(tmp_path, "tiny-joint")[-1]["loss"][task] == pytest.approx(loss, abs=1e-5)
    train.checkpoints(tmp_path / "tiny-joint")[-1].unlink()                      # back to step 2
    in_shell(model_folder, tmp_path, *two_processes, processes=2)
    assert equal(two["model"], last_of(tmp_path)["model"])


def test_killed_at_any_moment(model_folder, tmp_path):
    """kill -9, also while a checkpoint is written: what was finished is whole, and the run ends with the same weights."""
    in_shell(model_folder, tmp_path / "whole", "--steps", "12", "--save-every", "1")
    runs = tmp_path / "killed"
    for saved in (2, 5, 9):
        process = subprocess.Popen(command(model_folder, runs, "--steps", "12", "--save-every", "1"), cwd=ROOT, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None and (not train.checkpoints(runs / "tiny-joint") or int(train.checkpoints(runs / "tiny-joint")[-1].stem[-6:]) < saved):
            time.sleep(0.002)
        process.kill()
        process.wait()
    in_shell(model_folder, runs, "--steps", "12", "--save-every", "1")
    assert equal(last_of(tmp_path / "whole")["model"], last_of(runs)["model"])
    assert equal(last_of(tmp_path / "whole")["model_ema"], last_of(runs)["model_ema"])


def test_a_full_disk_ends_the_run_and_loses_nothing_saved(small_world, tmp_path, monkeypatch):
    whole = run(SHORT, tmp_path / "whole")
    write, written = torch.save, []

    def nearly_full(content, path):
        write(content, path)
        written.append(path)
        if len(written) > 1:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 712960 vs 712848")   # what torch says of a full disk
    monkeypatch.setattr(torch, "save", nearly_full)
    with pytest.raises(OSError, match="the checkpoint of step .* could not be written to .*is the disk full.*The last one is .*step-0000"):
        run(replace(SHORT, save_every=2), tmp_path / "full")
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "full" / "test").glob("*step*")] == ["step-000002.pt"], "nothing half-written is left"
    assert equal(whole["model"], run(replace(SHORT, save_every=2), tmp_path / "full")["model"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves(model_folder, tmp_path, number):
    process = subprocess.Popen(command(model_folder, tmp_path, "--steps", "100000", "--save-every", "100000", "--workers", "1"), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    while not (tmp_path / "tiny-joint" / "log.jsonl").exists() or not (tmp_path / "tiny-joint" / "log.jsonl").stat().st_size:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, number)                          # as a terminal or torchrun does: to all of the group
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "stopped and saved at step" in errors and "Traceback" not in errors
    assert last_of(tmp_path)["step"] >= 25


# ---- what is trained -------------------------------------------------------------------------------------------------

def groups_by_name(model, recipe):
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: (g["peak"], g["weight_decay"]) for g in optim.parameter_groups(model, recipe) for p in g["params"]}


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_has_the_recipes_rate(name):
    recipe, model = RECIPES[name], Harmon(SMALL)
    given = groups_by_name(model, recipe)
    for n, p in model.named_parameters():
        head = n.startswith(("mar.decoder", "mar.mask_token", "mar.diffusion_pos_embed_learned", "mar.diffloss", "proj_out"))
        encoder = n.startswith(("mar.encoder", "mar.z_proj", "mar.fake_latent", "mar.class_emb", "proj_in"))
        part = "mar-decoder" if head else "mar-encoder" if encoder else n.split(".")[0]
        assert p.requires_grad == (n in given) == (part in recipe.lr), n
        if p.requires_grad:
            muon = recipe.muon and p.ndim == 2 and (".layers." in n or "coder_blocks" in n)
            assert given[n] == (recipe.lr[part] * (2 if muon else 1), 0.0 if p.ndim <= 1 or ".diffloss." in n else recipe.weight_decay), n


def test_the_papers_table_1():
    s1, s2, s3 = (RECIPES[f"stage{i}"] for i in (1, 2, 3))
    assert (s1.lr, s2.lr) == ({"mar-decoder": 1e-4, "mar-encoder": 1e-5}, {"mar-decoder": 1e-4, "mar-encoder": 1e-5, "llm": 1e-5})
    assert s3.lr == {"mar-decoder": 2e-5, "mar-encoder": 2e-6, "llm": 2e-6}
    assert [(s.size, s.batch, s.steps) for s in (s1, s2, s3)] == [(256, 4096, 50_000), (256, 4096, 50_000), (512, 1024, 50_000)]
    assert (s1.ratio, s2.ratio, s3.ratio) == ({"image2text": 1, "text2image": 2}, {"text": 1, "image2text": 3, "text2image": 8}, {"text": 1, "image2text": 3, "text2image": 16})


def test_stage_one_leaves_the_llm_bit_identical(small_world, tmp_path, model_folder):
    recipe = replace(SHORT, ratio=RECIPES["stage1"].ratio, lr=RECIPES["stage1"].lr, steps=2, batch=6)
    before, after = Harmon.from_pretrained(model_folder).state_dict(), run(recipe, tmp_path, "--init", model_folder)["model"]
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"mar", "proj_in", "proj_out"}


def test_stage_one_starts_from_three_files(small, tmp_path):
    """A Qwen2.5 folder, MAR's checkpoint with raw and averaged weights, a VAE."""
    (tmp_path / "model").mkdir()
    small.save_pretrained(tmp_path / "model")
    checkpoints.write(tmp_path / "qwen" / "model.safetensors", {k: v for k, v in small.llm.state_dict().items() if k != "lm_head.weight"})
    torch.save({"model_ema": small.mar.state_dict(), "model": {k: 0 * v for k, v in small.mar.state_dict().items()}, "epoch": 799}, tmp_path / "mar.pth")
    torch.save({"model": small.vae.state_dict()}, tmp_path / "kl16.ckpt")
    args = train.arguments(["stage1", "--config", str(tmp_path / "model"), "--init-llm", str(tmp_path / "qwen"), "--init-mar", str(tmp_path / "mar.pth"),
                            "--vae", str(tmp_path / "kl16.ckpt"), "--runs", str(tmp_path)])
    model = train.first_model(RECIPES["stage1"], args).state_dict()
    for k, x in small.state_dict().items():
        if not k.startswith("proj"):
            assert torch.equal(x, model[k]), k
    with pytest.raises(ValueError, match="stage1 starts from trained weights"):
        train.first_model(RECIPES["stage1"], train.arguments(["stage1", "--runs", str(tmp_path)]))


def test_only_one_part(tmp_path):
    recipe = recipes.override(RECIPES["finetune"], train.arguments(["finetune", "--only", "mar-decoder", "--steps", "7", "--lr", "mar-decoder=3e-4,llm=1e-5"]))
    assert (recipe.lr, recipe.steps) == ({"mar-decoder": 3e-4}, 7)
    recipe = recipes.override(RECIPES["stage2"], train.arguments(["stage2", "--only", "mar-decoder"]))
    assert recipe.ratio == {"text2image": 8}, "answers do not go through the decoder: they would have no gradient"
    with pytest.raises(ValueError, match="no task of it trains mar-decoder"):
        recipes.override(RECIPES["stage2"], train.arguments(["stage2", "--only", "mar-decoder", "--ratio", "text=1"]))


def test_rates_warm_up_and_end_near_zero():
    recipe = replace(SHORT, steps=100, warmup=0.1)
    rates = [optim.schedule(recipe, s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(rates[9], abs=0.03) and rates[-1] < 1e-3


def test_locality_asks_like_pixels_for_like_codes():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1                                                          # two tokens black, two white
    codes = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    assert train.locality(pixels, codes).item() == pytest.approx(0, abs=1e-6)    # each color its code
    mixed = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).view(1, 1, 2, 2)
    assert train.locality(pixels, mixed).item() == pytest.approx(2 * 4 / 8, abs=1e-6)     # of 8 pairs of one color, 2 differ by 2


@pytest.mark.parametrize("task", ["reconstruct", "text", "mar", "text2image", "image2text", "reca"])
def test_every_task_learns(small_world, tmp_path, task):
    lr = {"reconstruct": {"vae": 3e-3}, "text": {"llm": 3e-3}, "mar": {"mar-decoder": 3e-3, "mar-encoder": 3e-3}}.get(task, {part: 3e-3 for part in ALL})
    run(replace(SHORT, ratio={task: 1}, lr=lr, steps=50, batch=4, micro_batch=4, save_every=100), tmp_path)
    losses = [line["loss"][task] for line in log(tmp_path)]
    assert losses[-1] < losses[0]


def test_checkpointing_and_bf16_change_nothing_but_memory_and_digits(small_world, tmp_path):
    plain = run(replace(SHORT, bf16=False, steps=2), tmp_path / "a")["model"]
    saving = run(replace(SHORT, bf16=False, steps=2, checkpointing=True), tmp_path / "b")["model"]
    assert all(torch.allclose(x, saving[k], atol=1e-6) for k, x in plain.items())


def test_steps_without_a_finite_gradient_are_skipped_and_ten_end_the_run(small_world, tmp_path, monkeypatch):
    right, calls = train.Losses.forward, []

    def sometimes(self, task, batch):
        calls.append(task)
        return right(self, task, batch) * (float("nan") if bad(len(calls)) else 1)
    monkeypatch.setattr(train.Losses, "forward", sometimes)
    recipe = replace(SHORT, ratio={"text": 1}, batch=2, steps=8)
    bad = lambda n: n in (2, 3)  # noqa: E731
    content = run(recipe, tmp_path / "a")
    assert log(tmp_path / "a")[-1]["skipped"] == 2 and all(x.isfinite().all() for x in content["model"].values() if x.is_floating_point())
    bad = lambda n: True  # noqa: E731
    with pytest.raises(ValueError, match="ten steps in a row"):
        run(replace(recipe, steps=20), tmp_path / "b")


def test_the_batch_must_divide(small_world):
    with pytest.raises(ValueError, match="a batch of 10 is no multiple of 2 processes × a micro-batch of 2; --batch 8 is"):
        recipes.accumulation(replace(SHORT, batch=10), 2)
    assert recipes.accumulation(replace(SHORT, batch=16), 2) == 4


def test_the_stage_before_must_exist(small_world, tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-mar.*must run first"):
        train.train("tiny-align", RECIPES["tiny-align"], options(tmp_path))


def test_latent_scale_is_measured(small_world, tmp_path):
    content = run(replace(SHORT, ratio={"reconstruct": 1}, lr={"vae": 1e-3}, steps=3, batch=4, micro_batch=4), tmp_path)
    model = train.model_of(content)
    assert model.config.vae_scale == content["config"]["vae_scale"] != SMALL.vae_scale
    sources = train.shapes_world(model, replace(SHORT, ratio={"mar": 1}), SimpleNamespace(runs=tmp_path, rank=0, ranks=1))
    latents = torch.stack([sources[0].latents.get(i) for i in range(20)]).float()
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_latents_of_another_vae_are_refused(small_world, tmp_path, model_folder):
    run(replace(SHORT, steps=1, save_every=1), tmp_path)
    for file in train.checkpoints(tmp_path / "test"):
        file.unlink()
    with pytest.raises(ValueError, match="these latents come from another VAE"):
        run(replace(SHORT, steps=1), tmp_path, "--init", model_folder)


def test_a_run_keeps_its_own_tokenizer(small_world, tmp_path, model_folder):
    """A run in the same folder of runs, from a model with other words, is not given those of the run before."""
    run(replace(SHORT, steps=1), tmp_path, "--init", model_folder)
    own = train.load_tokenizer(tmp_path / "test").to_str()
    other = tmp_path / "other"
    Harmon.from_pretrained(model_folder).save_pretrained(other)
    (other / "tokenizer.json").write_text(train.train_tokenizer(400).to_str())
    train.train("second", replace(SHORT, steps=1, after=""), options(tmp_path, "--init", other))
    assert train.load_tokenizer(tmp_path / "second").get_vocab_size() < train.load_tokenizer(tmp_path / "test").get_vocab_size()
    train.train("third", replace(SHORT, steps=1, after="second"), options(tmp_path))
    assert train.load_tokenizer(tmp_path / "third").to_str() == train.load_tokenizer(other).to_str() and train.load_tokenizer(tmp_path / "test").to_str() == own


def test_what_is_changed_on_the_way_is_said(small_world, tmp_path, capsys):
    run(SHORT, tmp_path, stop_at=3)
    run(replace(SHORT, batch=4, lr={**ALL, "llm": 2e-3}), tmp_path, stop_at=4)
    said = capsys.readouterr().err
    assert "batch 8 -> 4" in said and "lr {" in said and "the data come in another order" in said
    run(replace(SHORT, batch=4, lr={**ALL, "llm": 2e-3}, clip=2.0), tmp_path)
    said = capsys.readouterr().err
    assert "clip 1.0 -> 2.0" in said and "batch" not in said and "another order" not in said
    run(SHORT, tmp_path)
    assert "finished, 6 steps; give another --runs" in capsys.readouterr().err
    with pytest.raises(ValueError, match="has trained llm, mar-decoder, mar-encoder so far; another choice needs another --runs"):
        run(replace(SHORT, lr={"llm": 1e-3}, steps=8), tmp_path)


@pytest.mark.parametrize("flags, message", [(("--checkpointing", "yes"), "neither true nor false"), (("--save-every", "0"), "save-every must be at least 1"),
                                            (("--device", "tpu9"), "--device tpu9"), (("--device", "cuda"), "no CUDA device")])
def test_wrong_flags_are_named(flags, message):
    if flags == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([sys.executable, "train.py", "tiny", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_samples_are_drawn_and_change_nothing(small_world, tmp_path):
    plain = run(SHORT, tmp_path / "a")
    watched = run(replace(SHORT, sample_every=2), tmp_path / "b")
    assert equal(plain["model"], watched["model"]) and equal(plain["model_ema"], watched["model_ema"])
    samples = tmp_path / "b" / "test" / "samples"
    assert sorted(p.name for p in samples.glob("*.png")) == ["000002.png", "000004.png", "000006.png"]
    assert Image.open(samples / "000006.png").size == (4 * 64, 2 * 64)
    answers = [json.loads(line) for line in open(samples / "answers.jsonl")]
    assert [a["step"] for a in answers] == [2, 4, 6] and all(isinstance(a[k], str) for a in answers for k in ("raw", "averaged"))


def test_the_log_and_its_plot(tmp_path):
    rows = [{"step": s, "loss": {"text": 2 / s, "text2image": 1 / s}} for s in (25, 50, 75, 50)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 1')     # cut off by a kill
    assert [line["step"] for line in monitor.read_log(tmp_path)] == [25, 50, 75]
    assert Image.open(monitor.plot(tmp_path)).width > 600


def test_a_dry_run_needs_no_data(capsys):
    recipes.dry_run("stage3", RECIPES["stage3"], train.arguments(["stage3", "--config", "harmon-0.5b"]))
    out = capsys.readouterr().out
    assert "batch 1024 = 1 processes × micro-batch 4 × accumulation 256" in out and "learning rate 2e-05" in out and "vae" in out and "frozen" in out
